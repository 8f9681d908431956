"""The same run by one, two and four real processes, and continued by another number of them."""

import itertools
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from ecg_jax import workdir as workdir_module
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.errors import UserError
from ecg_jax.training.metric_writers import read_log
from process_runs import COMMAND, RECORD, Processes, trail
from test_pretrain import arguments

BATCH, STEPS, RESUMED = 8, 9, 6
# A large epsilon keeps Adam from turning rounding noise into full-size steps.
CHANGES = {
    "optimiser__eps": 1.0, "steps": STEPS, "batch_size": BATCH, "checkpoint_every": 3, "keep_latest": 3,
    "tensorboard": False, "monitor__probe_every": 0, "model__layers": 1,
}  # fmt: skip
# Sums are taken in another order by another number of devices, and by gloo than within a process.
TOLERANCE = 1e-4  # relative
SHAPES = [(1, 1), (2, 1), (2, 2), (4, 1)]  # processes, devices of each


def run(folder, store, processes, devices):
    workdir = folder / "run"
    with Processes(
        folder / "outputs",
        processes,
        code=RECORD + COMMAND,
        args=arguments(workdir, store, **CHANGES),
        devices=devices,
    ) as running:
        codes, out, err = running.finish()
    assert set(codes.values()) == {0}, err
    return workdir, out


@pytest.fixture(scope="module")
def runs(tmp_path_factory, synthetic_store):
    """Workdir of the run, by (processes, devices of each); beside it the processes' trails."""
    with pytest.MonkeyPatch.context() as patch:
        workdirs = {}
        for shape in SHAPES:
            folder = tmp_path_factory.mktemp("{}x{}".format(*shape))
            patch.setenv("TRAIL", str(folder / "trail"))
            workdirs[shape], _ = run(folder, synthetic_store, *shape)
        return workdirs


def taken(workdir, processes):
    """The global batches [STEPS, B] of (record_index, row, checksum of the crop), in the order of record_index."""
    steps = []
    by_process = [trail(workdir.parent / "trail", i, "taken") for i in range(processes)]
    for step in range(STEPS):
        local = BATCH // processes
        batch = list(itertools.chain(*(rows[step * local : (step + 1) * local] for rows in by_process)))
        steps.append(sorted(batch))
    return steps


def assert_same_losses(log, reference):
    assert [entry["step"] for entry in log] == [entry["step"] for entry in reference]
    for name in ("loss", "accuracy", "grad_norm", "rankme", "feature_std"):
        values, expected = ([entry[name] for entry in entries] for entries in (log, reference))
        np.testing.assert_allclose(values, expected, rtol=TOLERANCE, err_msg=name)
    values, expected = (
        [entry["val_loss"] for entry in entries if "val_loss" in entry] for entries in (log, reference)
    )
    assert len(expected)
    np.testing.assert_allclose(values, expected, rtol=TOLERANCE)


def test_one_two_and_four_processes_agree(runs):
    reference = read_log(runs[1, 1])
    assert len({entry["loss"] for entry in reference}) == STEPS
    order = taken(runs[1, 1], 1)
    assert [[i for i, _, _ in batch] for batch in order] == [list(range(BATCH))] * STEPS
    for (processes, devices), workdir in runs.items():
        assert taken(workdir, processes) == order, (processes, devices)
        assert_same_losses(read_log(workdir), reference)


def test_every_process_reads_its_slice_only(runs):
    for (processes, _), workdir in runs.items():
        reads = [trail(workdir.parent / "trail", i, "read") for i in range(processes)]
        for starts in reads:
            assert {len(batch) for batch in starts} == {BATCH // processes}
        # Batches read ahead when the run ends differ from process to process; the first STEPS are all there.
        records = [
            {tuple(row) for row in trail(workdir.parent / "trail", i, "taken")} for i in range(processes)
        ]
        for one, other in itertools.combinations(records, 2):
            assert not {i for i, _, _ in one} & {i for i, _, _ in other}


def test_only_process_0_writes(runs):
    for (processes, _), workdir in runs.items():
        for i in range(processes):
            written = [path for path in trail(workdir.parent / "trail", i, "written") if str(workdir) in path]
            names = {(*Path(path).relative_to(workdir).parts, "")[0] for path in written}
            assert {"log.jsonl", "checkpoints", ""} <= names if i == 0 else names == set()


@pytest.mark.parametrize("processes", [1, 4])
def test_a_checkpoint_of_two_processes_resumes_on_one_and_four(
    tmp_path, monkeypatch, runs, synthetic_store, processes
):
    """On one and on four, the next losses are those of the two processes that were not interrupted."""
    shutil.copytree(runs[2, 1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    monkeypatch.setenv("TRAIL", str(tmp_path / "trail"))
    workdir, out = run(tmp_path, synthetic_store, processes, 1)
    assert f"continuing at step {RESUMED} of {STEPS}" in out[0]
    assert_same_losses(read_log(workdir), read_log(runs[2, 1]))
    rows = [tuple(row) for i in range(processes) for row in trail(tmp_path / "trail", i, "taken")]
    assert sorted(rows) == sorted(tuple(row) for batch in taken(runs[2, 1], 2)[RESUMED:] for row in batch)


def run_refused(tmp_path, *, store, **fields):
    """What two processes say that are refused, each in a folder of its own; `fields` are of process 1 alone."""
    run = tmp_path / "run"
    code = (
        f"import os, sys; os.chdir(f'{tmp_path}/{{PROCESS}}')\n"
        f"sys.argv += {[f'--config.{name}={value}' for name, value in fields.items()]} * PROCESS\n"
    )
    args = arguments(run, store, **CHANGES)
    with Processes(tmp_path / "outputs", 2, code=code + COMMAND, args=args) as running:
        codes, _, err = running.finish()
    assert set(codes.values()) == {2}, err
    assert not run.exists()
    return err


def test_a_workdir_that_is_another_folder_for_a_process_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(workdir_module, "SEEN_WITHIN_S", 0.0)
    monkeypatch.setattr(workdir_module, "answers", lambda topic, mine: [[True, "node0", "/shared/run"], mine])
    refusal = rf"process 1 on \S+ does not see in {folder} what process 0 on node0 wrote into /shared/run"
    with pytest.raises(UserError, match=refusal):
        workdir_module._check_all_see(folder, "process 7 on node0\n")
    folder.mkdir()
    (folder / ".lock").write_text("process 6 on node0\n")  # of another run
    with pytest.raises(UserError, match=refusal):
        workdir_module._check_all_see(folder, "process 7 on node0\n")


def test_a_workdir_may_be_seen_late(tmp_path):
    late = threading.Timer(0.3, lambda: (tmp_path / ".lock").write_text("process 7 on node0\n"))
    late.start()
    workdir_module._check_all_see(tmp_path, "process 7 on node0\n")
    late.join()


@pytest.mark.parametrize("other", ["another", "none"])
def test_a_process_that_reads_another_store_is_refused_on_all(tmp_path, other):
    """One path that is another folder, of equally many records, or none, on another host."""
    for process, seed in ((0, 0), (1, 9)):
        (tmp_path / str(process)).mkdir()
        if process == 0 or other == "another":
            write_synthetic_store(tmp_path / str(process) / "store", n_records=60, seconds=2.0, seed=seed)
    err = run_refused(tmp_path, store="store")
    for text in err.values():
        if other == "another":
            assert "process 1 on " in text
            assert f"has another store ({tmp_path}/1/store) than process 0" in text
        else:
            assert "There is no store at store" in text
            assert "process 1 on " in text


def test_a_process_of_another_command_is_refused_on_all(tmp_path, synthetic_store):
    for process in (0, 1):
        (tmp_path / str(process)).mkdir()
    err = run_refused(tmp_path, store=synthetic_store, seed=3)
    for text in err.values():
        assert "has another config.seed (3) than process 0" in text
