"""`ecg-jax tasks`: the catalogue, and what of each task a store holds."""

import pytest

from ecg_jax import cli
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import tasks as known
from ecg_jax.tasks import catalogue, in_store, main
from store_files import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_synthetic_store(
        tmp_path_factory.mktemp("tasks") / "store", n_records=120, seconds=3.0, distinct=24
    )


def test_the_catalogue_names_every_task_and_how_it_is_split():
    header, *lines = catalogue()
    assert header.split()[:2] == ["task", "group"]
    split = {line.split()[0]: line[header.index("split") :] for line in lines}
    assert list(split) == list(known.TASKS)
    assert split["georgia"] == "stratified by labels; by recording, patients unknown"
    assert split["challenge_dx"] == "the corpus' folds; by recording, patients unknown"
    assert split["zzu_pecg"] == "stratified by labels, age and sex; whole patients"
    assert split["chapman_rhythm"] == "stratified by labels of set all; whole patients"
    assert split["echonext"] == "the corpus' folds, 8 and 9 held out"
    assert split["ptbxl_super"] == "the corpus' folds"


def test_what_a_store_holds(store, capsys):
    assert cli.main(["tasks", str(store), "--min-count=29"]) == 0
    title, header, row = capsys.readouterr().out.splitlines()
    assert title == f"{store}: 120 records of synthetic"
    assert header.split() == ["task", "train", "validation", "test", "classes", "dropped"]
    name, *numbers = row.split()
    assert name == "synthetic_rhythm"
    folds = Store(store).column("fold")
    sizes = [(folds < 9).sum(), (folds == 9).sum(), (folds == 10).sum()]
    counts = [found["count"] for found in Store(store).class_info["rhythm"].values()]
    kept = sum(count >= 29 for count in counts)
    assert 0 < kept < 4
    assert numbers == [str(n) for n in (*sizes, kept, 4 - kept)]


def test_a_task_that_cannot_be_served_is_listed_with_its_reason(store):
    lines = in_store(Store(store), window_s=2.5, min_count=1000)
    assert lines[1] == "not possible with it:"
    assert lines[2].startswith("  synthetic_rhythm: None of the 4 classes")
    lines = in_store(Store(store), window_s=4.0, min_count=0)
    assert "left out: 120 shorter than window" in lines[2]


def test_a_store_of_no_task(tmp_path):
    made = write_store(tmp_path / "store", [("r", None, 1, [[0.1] * 12] * 700)])
    assert in_store(made, 2.5, 0)[1:] == ["  no task is known for this corpus and its labels"]


def test_damage_is_an_error_and_no_missing_task(store, monkeypatch):
    def damaged(*_):
        raise UserError("damaged")

    monkeypatch.setattr("ecg_jax.tasks.choose_examples", damaged)
    with pytest.raises(UserError, match="damaged"):
        in_store(Store(store), 2.5, 0)


@pytest.mark.parametrize("option", ["--window=nan", "--window=inf", "--window=0", "--min-count=-1"])
def test_numbers_that_make_no_sense_are_refused(option):
    with pytest.raises(UserError, match="--window must be a number above 0"):
        main([option])
