"""Faults around checkpoints in runs of several real processes: a process killed in the middle of a save, a full disk, a
half-deleted checkpoint, another store. Each process is started on its own, so that the end of each is seen.
"""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.errors import UserError
from ecg_jax.training.checkpoint import finished_steps
from ecg_jax.training.metric_writers import JsonlWriter, MultiWriter
from process_runs import COMMAND, Processes
from test_pretrain import arguments, checksums, trajectory

SETTINGS = {"steps": 12, "checkpoint_every": 5, "model__layers": 1, "tensorboard": False}

# Runs in a process before the command: calls `at_commit(step)` when a checkpoint is written and about to get its name,
# and `after_commit(step)` when it has it.
HOOKS = """
import os, pathlib, resource, time
def at_commit(step): pass
def after_commit(step): pass
rename = os.rename
def renaming(source, target, *args, **kwargs):
    path = pathlib.Path(target)
    step = int(path.name) if path.parent.name == "checkpoints" and path.name.isdigit() else None
    if step is not None: at_commit(step)
    rename(source, target, *args, **kwargs)
    if step is not None: after_commit(step)
os.rename = renaming
"""


def finish_all(folder, args, processes=2, before=""):
    """Exit codes, stdouts and stderrs of the command as processes of one device each."""
    with Processes(folder, processes, code=f"{before}\n{COMMAND}", args=args) as running:
        return running.finish()


def assert_finished(codes, out, err, resumed_at):
    assert set(codes.values()) == {0}, err
    assert f"continuing at step {resumed_at} of 12" in out[0]


def assert_same_run(workdir, whole):
    """Losses of every step and the last parameters, bit for bit."""
    assert trajectory(workdir) == trajectory(whole)
    assert checksums(workdir, 12) == checksums(whole, 12)


def half_written(workdir):
    """Folders of checkpoints that did not get their names."""
    return [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]


# Holds the name of the last checkpoint back until process 1 waits for it, or has gone on without it; process 1 writes
# down what there is once it has gone on.
HOLD_LAST = """
from ecg_jax import pretrain
from ecg_jax.training import checkpoint
folder = pathlib.Path(os.environ["MARKS"])
waits, gone = folder / "waits", folder / "gone"
def at_commit(step):
    while step == 12 and not (waits.exists() or gone.exists()): time.sleep(0.05)
    if step == 12: time.sleep(1)
if PROCESS == 1:
    real_finish, real_pretrain = checkpoint.Checkpoints.finish, pretrain.pretrain
    def finish(self):
        waits.touch()
        real_finish(self)
    def whole(config, workdir):
        real_pretrain(config, workdir)
        gone.write_text(str(checkpoint.finished_steps(pathlib.Path(workdir))))
    checkpoint.Checkpoints.finish, pretrain.pretrain = finish, whole
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, synthetic_store):
    """A run of two processes whose last write takes its time."""
    folder = tmp_path_factory.mktemp("runs")
    workdir = folder / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARKS", str(folder))
        codes, _, err = finish_all(
            folder, arguments(workdir, synthetic_store, **SETTINGS), before=HOOKS + HOLD_LAST
        )
    assert codes == {0: 0, 1: 0}, err
    assert finished_steps(workdir)[-1] == 12
    return workdir


def test_no_process_leaves_before_the_last_write_has_ended(whole):
    """One that left would wait in JAX's shutdown, which ends all after five minutes."""
    assert (whole.parent / "gone").read_text() == str(finished_steps(whole))


def test_sigkill_of_one_process_during_a_save(tmp_path, whole, synthetic_store):
    """The checkpoint of step 10 is written but not yet named when a process is killed, first one, then the other."""
    workdir = tmp_path / "run"
    args = arguments(workdir, synthetic_store, **SETTINGS)
    for killed in (1, 0):
        marker = tmp_path / f"saving_{killed}"
        hold = f"def at_commit(step):\n    if step == 10: pathlib.Path({str(marker)!r}).touch(); time.sleep(3600)\n"
        with Processes(tmp_path / str(killed), 2, code=HOOKS + hold + COMMAND, args=args) as running:
            running.wait(marker.exists)
            running.kill(killed, signal.SIGKILL)
            codes, _, err = running.finish()
        assert codes == {killed: -signal.SIGKILL, 1 - killed: 75}, err
        assert re.search(rf"process {killed} on \S+ is lost", err[1 - killed])
        assert finished_steps(workdir) == [5]
        assert len(half_written(workdir)) == 1, (
            "of both kills together: the second run removed what the first left"
        )

    assert_finished(*finish_all(tmp_path / "again", args), resumed_at=5)
    assert half_written(workdir) == []
    assert_same_run(workdir, whole)


def test_a_full_disk_during_a_save(tmp_path, whole, synthetic_store):
    """After the checkpoint of step 5 no file may grow beyond 16 kB: logs fit, a checkpoint does not."""
    workdir = tmp_path / "run"
    args = arguments(workdir, synthetic_store, **SETTINGS)
    full = "def after_commit(step): resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))\n"
    codes, _, err = finish_all(tmp_path / "full", args, before=HOOKS + full)
    assert codes == {0: 2, 1: 2}, err
    for text in err.values():
        assert "Traceback" not in text
        sentences = [line for line in text.splitlines() if "a checkpoint could not be written to" in line]
        assert sentences, text
        assert all("the last complete one is step 5. Free some space" in sentence for sentence in sentences)
        assert sum("ecg-jax pretrain: error" in sentence for sentence in sentences) <= 1
    assert finished_steps(workdir) == [5]

    assert_finished(*finish_all(tmp_path / "again", args), resumed_at=5)
    assert half_written(workdir) == []
    assert_same_run(workdir, whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_at_a_line_of_the_log(tmp_path):
    """The first thing that a full disk refuses."""
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    writer = MultiWriter(JsonlWriter(tmp_path))
    with pytest.raises(
        UserError, match=r"cannot write .*/log.jsonl: No space left on device; free some space"
    ):
        writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    with pytest.raises(UserError, match=r"cannot write .*/nothing/log.jsonl: No such file"):
        JsonlWriter(tmp_path / "nothing")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_half_deleted_checkpoint(tmp_path, whole, synthetic_store, processes):
    """As when someone's clean-up was stopped in the middle: some files of the newest checkpoint are gone."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    newest = workdir / "checkpoints" / "12"
    shutil.rmtree(next((newest / "state").glob("ocdbt.process_*")))
    (newest / "meta" / "metadata").unlink()
    codes, out, err = finish_all(tmp_path, arguments(workdir, synthetic_store, **SETTINGS), processes)
    assert_finished(codes, out, err, resumed_at=10)
    said = [err[process].count("checkpoint 12 is damaged") for process in sorted(err)]
    assert said == [1] + [0] * (processes - 1)
    assert (workdir / "damaged_checkpoints" / "12" / "state").is_dir()
    if processes == 2:
        assert_same_run(workdir, whole)
    # What two processes write is what one does, and as much of it.
    one_or_two, two = (list((run / "checkpoints" / "12").rglob("*")) for run in (workdir, whole))
    assert {path.name for path in two if "process" in path.name} == {"ocdbt.process_0"}
    sizes = [sum(path.stat().st_size for path in paths) for paths in (one_or_two, two)]
    assert 2 / 3 < sizes[0] / sizes[1] < 3 / 2, "by timing, the format keeps more or less of its own tables"
    metas = [
        json.loads((run / "checkpoints" / "12" / "meta" / "metadata").read_text()) for run in (workdir, whole)
    ]
    for meta in metas:
        del meta["checksums"]  # of one process they differ by rounding
    assert metas[0] == metas[1]


def test_a_store_that_changed(tmp_path, whole, synthetic_store):
    """Another store of as many recordings, under the path that the run began with."""
    workdir, store = tmp_path / "run", tmp_path / "store"
    shutil.copytree(whole, workdir)
    write_synthetic_store(store, n_records=96, seconds=6.0, seed=1)
    args = arguments(workdir, store, **SETTINGS)
    codes, _, err = finish_all(tmp_path, args)
    assert codes == {0: 2, 1: 2}, err
    for text in err.values():
        assert "Traceback" not in text
        assert "differs in store_fingerprint" in text
    assert finished_steps(workdir)[-1] == 12, "nothing was set aside"
