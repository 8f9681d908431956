"""`ecg-jax audit`: what it finds in and between stores, its file, its words and its exit codes."""

import dataclasses
import json
import types

import numpy as np
import pytest

from ecg_jax import audit
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import synthetic_recording
from ecg_jax.errors import UserError
from ecg_jax.evaluation import audited, examples, near_duplicates, tasks
from store_files import write_store
from test_near_duplicates import sample  # noqa: F401  (a fixture)


def signal(index):
    return synthetic_recording(6, index, 8.0, 240.0, noise_mv=0.02)[0].signal


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """Folds 1-4: the test fold holds a copy, a louder one, and a patient of others."""
    records = [(f"r{i}", f"p{i}", 1 + i % 2, signal(i)) for i in range(6)]
    records += [
        ("valid", "p10", 3, signal(10)),
        ("valid copy", "p11", 3, signal(5)),
        ("test copy", "p12", 4, signal(0)),
        ("test louder", "p13", 4, 0.8 * signal(10)),
        ("test patient", "p3", 4, signal(14)),
        ("test clean", "p15", 4, signal(15)),
        ("train copy", "p1", 1, signal(1)),
    ]
    return write_store(tmp_path_factory.mktemp("stores") / "leaky", records).path


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    records = [(f"c{i}", f"p{i}", i, signal(30 + i)) for i in range(1, 4)]
    return write_store(tmp_path_factory.mktemp("stores") / "clean", records, corpus="other").path


def test_finds_what_was_put_there(leaky):
    found = audit.audit([leaky])
    assert {frozenset(pair["records"]) for pair in found["identical"]} == {
        frozenset(pair) for pair in (("r5", "valid copy"), ("r0", "test copy"), ("r1", "train copy"))
    }
    (near,) = found["near_identical"]
    assert near["records"] == ["valid", "test louder"]
    assert near["folds"] == [3, 4]
    assert near["same_patient"] is False
    assert near["shift_s"] == 0.0
    assert near["residual_correlation"] > 0.99
    assert found["patients_across_folds"] == [
        {"corpus": "made", "patient": "p1", "folds": {"leaky": [1, 2]}},
        {"corpus": "made", "patient": "p3", "folds": {"leaky": [2, 4]}},
    ]
    assert found["copies_across_folds"] == {"identical": 3, "near_identical": 1}
    assert found["train_test_overlap"] == {
        "leaky val": {"leaky train": {"identical": 1, "near_identical": 0, "patients": 0}},
        "leaky test": {
            "leaky train": {"identical": 1, "near_identical": 0, "patients": 1},
            "leaky val": {"identical": 0, "near_identical": 1, "patients": 0},
        },
    }
    assert not found["clean"]
    assert found["examined"] == {"identical": True, "near_identical": True}
    assert found["verdict"] == (
        "Leak: leaky val in leaky train: 1 identical; leaky test in leaky train: 1 identical, 1 patients; leaky "
        "test in leaky val: 1 near-identical. Across folds of any part: 4 pairs of copies and 2 patients."
    )
    (store,) = found["stores"]
    assert (store["records"], store["patients"], store["records_without_patient"]) == (13, 11, 0)
    assert store["parts"] == {"train": 7, "val": 2, "test": 4}
    assert store["compared_by_checksum_only"] == 0


def test_between_stores(leaky, tmp_path):
    other = write_store(
        tmp_path / "pretraining",
        [("x", "p15", 1, signal(15)[240:]), ("y", None, 1, signal(50))],
        corpus="big",
    ).path
    found = audit.audit([leaky, other])
    cell = found["train_test_overlap"]["leaky test"]["pretraining train"]
    assert cell == {"identical": 0, "near_identical": 1, "patients": None}
    (pair,) = [p for p in found["near_identical"] if p["stores"] == ["leaky", "pretraining"]]
    assert (pair["records"], pair["shift_s"], pair["same_patient"]) == (["test clean", "x"], 1.0, None)
    assert "leaky test in pretraining train: 1 near-identical" in found["verdict"]


def test_a_clean_store(clean, capsys, tmp_path):
    assert audit.main([str(clean), "--fail-on-leak", f"--output={tmp_path / 'a'}"]) == 0
    out = capsys.readouterr().out
    assert "clean: 3 records of other (train 1, val 1, test 1)" in out
    assert "Clean: no test or validation recording is in another part" in out
    written = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert written == audit.audit([clean])
    assert written["clean"] is True
    assert written["identical"] == written["near_identical"] == written["patients_across_folds"] == []


def test_exit_codes_and_words(leaky, clean, capsys):
    assert audit.main([str(leaky)]) == 0
    out = capsys.readouterr().out
    assert "leaky r0 (fold 1) = leaky test copy (fold 4), other patient" in out
    assert "leaky valid (fold 3) = leaky test louder (fold 4), other patient, shift 0 s, r 1.000" in out
    assert out.rstrip().endswith("4 pairs of copies and 2 patients.")
    assert audit.main([str(leaky), str(clean), "--fail-on-leak"]) == 1


def test_identical_only_says_what_it_left_out(leaky, capsys):
    found = audit.audit([leaky], near=False)
    assert found["near_identical"] is None
    assert found["train_test_overlap"]["leaky test"]["leaky val"]["near_identical"] is None
    assert found["stores"][0]["compared_by_checksum_only"] == 13
    audit.main([str(leaky), "--identical-only"])
    assert "Near-identical recordings: not looked for" in capsys.readouterr().out


def test_the_real_copies_of_the_sample(sample):  # noqa: F811
    """PTB-XL 145 and 463 are one recording under two patients in folds 3 and 1; both are training folds."""
    found = audit.audit([sample.path], near=False)
    pairs = {tuple(pair["records"]): (pair["folds"], pair["same_patient"]) for pair in found["identical"]}
    across = audit.audit([sample.path])
    pairs |= {tuple(p["records"]): (p["folds"], p["same_patient"]) for p in across["near_identical"]}
    assert pairs == {
        ("137", "138"): ([8, 8], True),
        ("143", "144"): ([9, 9], True),
        ("145", "463"): ([3, 1], False),
    }
    assert across["clean"]
    assert "Across folds of any part: 1 pairs of copies and 0 patients." in across["verdict"]


@pytest.mark.parametrize(
    ("folds", "expected"),
    [
        ([1, 1], {"train": [0, 1]}),
        ([2, 1], {"train": [1], "test": [0]}),
        ([5, 3, 9, 1], {"train": [1, 3], "val": [0], "test": [2]}),
        # A negative fold is none: nothing is validated or tested on it.
        ([5, -1], {"train": [0, 1]}),
        ([5, -1, 6], {"train": [1], "val": [0], "test": [2]}),
        ([-1, -1], {"train": [0, 1]}),
    ],
)
def test_parts(tmp_path, folds, expected):
    records = [(str(i), None, fold, np.full((300, 12), i, np.int16)) for i, fold in enumerate(folds)]
    store = write_store(tmp_path / "s", records)
    assert {part: rows.tolist() for part, rows in audited.fold_parts(store).items()} == expected


def stratified(monkeypatch, task):
    """The task with stratified folds, as it is in the catalogue from now on."""
    monkeypatch.setitem(tasks.TASKS, task.name, dataclasses.replace(task, split="stratified"))
    return tasks.TASKS[task.name]


def test_the_split_of_a_stratified_task(synthetic_store, monkeypatch, capsys):
    """A probe of the task tests on other recordings than the store's highest fold; those are what is audited."""
    task = stratified(monkeypatch, tasks.TASKS["synthetic_rhythm"])
    path = Store(synthetic_store).path
    chosen = examples.choose_examples(task, Store(path), None, 600)
    used = {"train": chosen.train.rows, "val": chosen.val.rows, "test": chosen.test.rows}
    by_folds = audited.fold_parts(Store(path))
    assert set(used["test"]) != set(by_folds["test"])

    found = audit.audit([path], near=False, task=task.name)
    (store,) = found["stores"]
    assert store["parts"] == {part: len(rows) for part, rows in used.items()}
    assert store["records"] == sum(map(len, used.values()))
    assert store["split"].startswith("task synthetic_rhythm: ")
    assert store["split_otherwise_by"] == []
    assert "own folds" not in found["verdict"]

    found = audit.audit([path], near=False)
    (store,) = found["stores"]
    assert store["split"] == "folds of the store"
    assert store["split_otherwise_by"] == [task.name]
    assert (
        "are its own folds; tasks that split it otherwise were not examined (--task=synthetic_rhythm)."
        in (found["verdict"])
    )
    assert audit.main([str(path), "--task=synthetic_rhythm", "--identical-only"]) == 0
    assert "  parts: task synthetic_rhythm: " in capsys.readouterr().out


def test_a_leak_of_a_task_that_the_folds_do_not_show(leaky, clean, monkeypatch, capsys):
    task = tasks.Task("made_task", "made", "x", "other", split="stratified")
    monkeypatch.setitem(tasks.TASKS, "made_task", task)
    part = dict(zip(["train", "val", "test"], map(np.array, ([0, 3, 6], [4], [9, 10, 11])), strict=True))

    def chosen(of, store, test_store, window):
        assert (of, test_store, window) == (task, None, 960)
        parts = {name: types.SimpleNamespace(rows=rows) for name, rows in part.items()}
        return types.SimpleNamespace(**parts, split={"rule": "by hand"})

    monkeypatch.setattr(audited, "choose_examples", chosen)
    found = audit.audit([leaky, clean], task="made_task", window_s=4.0)
    # Rows 0 and 8, 5 and 7, 1 and 12 are copies, but no task uses both; 9 is 6 played softer, 10 of the patient of 3.
    assert found["identical"] == []
    (near,) = found["near_identical"]
    assert (near["records"], near["folds"]) == (["valid", "test louder"], ["train", "test"])
    assert found["patients_across_folds"] == [
        {"corpus": "made", "patient": "p3", "folds": {"leaky": ["test", "train"]}}
    ]
    assert found["train_test_overlap"]["leaky test"]["leaky train"] == {
        "identical": 0, "near_identical": 1, "patients": 1,
    }  # fmt: skip
    assert "leaky test in leaky train: 1 near-identical, 1 patients" in found["verdict"]
    assert [store["split"] for store in found["stores"]] == ["task made_task: by hand", "folds of the store"]
    audit.main([str(leaky), "--task=made_task", "--window=4"])
    out = capsys.readouterr().out
    assert "leaky: 7 of 13 records of made (train 3, val 1, test 3)" in out
    assert "leaky valid (train) = leaky test louder (test), other patient" in out


def test_each_store_is_described_once(leaky, clean, tmp_path, monkeypatch):
    other = write_store(tmp_path / "third", [("a", None, 1, signal(70))], corpus="third").path
    described, describe = [], audit.signatures
    monkeypatch.setattr(
        audit, "signatures", lambda store, *rest: described.append(store.path) or describe(store, *rest)
    )
    audit.audit([leaky, clean, other])
    assert described == [leaky, clean, other]


def test_of_too_large_a_store_only_identical_recordings(leaky, clean, monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_RECORDINGS", 5)
    found = audit.audit([leaky, clean])
    assert found["examined"] == {"identical": True, "near_identical": False}
    assert found["near_identical"] == []
    assert found["train_test_overlap"]["leaky test"]["leaky val"]["near_identical"] is None
    assert found["train_test_overlap"]["leaky test"]["clean val"]["near_identical"] is None
    assert found["train_test_overlap"]["clean test"]["clean val"]["near_identical"] == 0
    assert [store["compared_by_checksum_only"] for store in found["stores"]] == [13, 0]
    assert found["verdict"].endswith(
        "Near-identical recordings of leaky were not looked for: 13 recordings are more than 5."
    )


def test_bad_input(leaky, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="There is no store to audit"):
        audit.main([])
    with pytest.raises(UserError, match="given twice"):
        audit.main([str(leaky), str(leaky.parent / "." / leaky.name)])
    with pytest.raises(UserError, match="There is no store at"):
        audit.main([str(tmp_path / "nothing")])
    slow = write_store(tmp_path / "slow", [("a", None, 1, np.zeros((900, 12), np.int16))], rate=100.0).path
    with pytest.raises(UserError, match="have 240 and 100 samples per second"):
        audit.main([str(leaky), str(slow)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output="):
        audit.main([str(leaky), f"--output={tmp_path / 'file'}"])
    assert not (tmp_path / "file" / "audit.json").exists()
    with pytest.raises(UserError, match="There is no task 'nothing'"):
        audit.main([str(leaky), "--task=nothing"])
    with pytest.raises(UserError, match=r"--task=sph needs a store of corpus 'sph', but leaky was .* 'made'"):
        audit.main([str(leaky), "--task=sph"])
    for window in ("nan", "inf", "0"):
        with pytest.raises(UserError, match="--window="):
            audit.main([str(leaky), f"--window={window}"])


def test_stores_of_one_name_are_told_apart(leaky, tmp_path):
    twin = write_store(tmp_path / "leaky", [("a", None, 1, signal(60))]).path
    names = list(audited.open_stores([leaky, twin]))
    assert names == [str(leaky), str(twin)]
    assert len(Store(twin)) == 1
