"""Tasks: the 26 of the study, and which store can serve them."""

from collections import Counter

import pytest

from ecg_jax.data.corpora import CORPORA
from ecg_jax.data.corpora.challenge import dataset_of
from ecg_jax.errors import UserError
from ecg_jax.evaluation import tasks


def test_unknown_task_names_a_similar_one():
    with pytest.raises(UserError, match=r"'ptbxl_supper'; did you mean 'ptbxl_super'"):
        tasks.get_task("ptbxl_supper")
    assert all(tasks.get_task(name).name == name for name in tasks.TASKS)


def test_the_benchmark_has_the_26_tasks_on_10_datasets_of_the_study():
    benchmark = [tasks.get_task(name) for name in tasks.BENCHMARK]
    groups = Counter(task.group for task in benchmark)
    assert groups == {
        tasks.ADULT: 13,
        tasks.PAEDIATRIC: 1,
        tasks.STRUCTURE: 1,
        tasks.CARDIAC: 1,
        tasks.NON_CARDIAC: 1,
        tasks.ACUTE: 3,
        tasks.PATIENT: 6,
    }
    assert len({(task.corpus, task.dataset) for task in benchmark}) == 10
    assert Counter(task.metric for task in benchmark) == {"macro_auroc": 21, "mae": 5}


def test_every_task_has_a_corpus_that_prepare_reads():
    assert {task.corpus for task in tasks.TASKS.values()} - set(CORPORA) == {"synthetic"}


def test_store_must_fit_the_task():
    task = tasks.get_task("ptbxl_form")
    tasks.check_store(task, "ptbxl", ["form", "all"], [], "a.zarr")
    with pytest.raises(UserError, match=r"corpus 'ptbxl', but a.zarr was prepared from 'wfdb'"):
        tasks.check_store(task, "wfdb", ["form"], [], "a.zarr")
    with pytest.raises(UserError, match=r"label set 'form', but a.zarr has only all"):
        tasks.check_store(task, "ptbxl", ["all"], ["form"], "a.zarr")
    with pytest.raises(UserError, match="only none"):
        tasks.check_store(task, "ptbxl", [], [], "a.zarr")
    with pytest.raises(UserError, match=r"value set 'age', but a.zarr has only sex"):
        tasks.check_store(tasks.get_task("mimic_age"), "mimic", ["age"], ["sex"], "a.zarr")
    with pytest.raises(tasks.TaskUnavailable, match=r"value set 'protocol', but a.zarr has only age"):
        tasks.check_store(tasks.get_task("mimic_age"), "mimic", [], ["age"], "a.zarr")


def test_tasks_that_a_store_can_serve():
    assert [task.name for task in tasks.fitting("chapman", ["all"], [])] == ["chapman"]
    names = [task.name for task in tasks.fitting("chapman", ["rhythm", "all"], [])]
    assert names == ["chapman", "chapman_rhythm"]
    names = [task.name for task in tasks.fitting("mimic", [], ["age", "sex", "protocol"])]
    assert names == ["mimic_sex", "mimic_age"]
    assert tasks.fitting("mimic", [], ["age", "sex"]) == [], "who is evaluated is not known"
    assert tasks.fitting("wfdb", ["dx"], []) == []


@pytest.mark.parametrize(
    ("record_id", "dataset"),
    [
        ("A0004", "cpsc2018"),
        ("Q0003", "cpsc_extra"),
        ("I0001", "st_petersburg"),
        ("S0001", "ptb"),
        ("HR00001", "ptbxl"),
        ("E07511", "georgia"),
        ("JS10646", "chapman"),
        ("JS10647", "ningbo"),
        ("JS45551", "ningbo"),
        ("ETEST", None),
        ("00001_hr", None),
    ],
)
def test_the_name_of_a_challenge_record_tells_its_dataset(record_id, dataset):
    assert dataset_of(record_id) == dataset
