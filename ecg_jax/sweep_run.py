"""One run of a sweep: its stores, its offline targets, pretraining and the probe."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from clu.parameter_overview import count_parameters

from ecg_jax.cluster import cluster
from ecg_jax.data.folds import highest_folds
from ecg_jax.data.store import Store
from ecg_jax.data.targets import FOLDER, Targets, names
from ecg_jax.errors import UserError
from ecg_jax.pretrain import pretrain
from ecg_jax.probe import probe
from ecg_jax.run_setup import open_store
from ecg_jax.sweep_file import Run, targets_name
from ecg_jax.sweep_folder import PROBE, RUN, TIMES, RunStatus, claimed, is_compared, is_pretrained
from ecg_jax.sweep_locks import held_long
from ecg_jax.sweep_probes import is_done, make_probes
from ecg_jax.sweep_stores import StoreChoice
from ecg_jax.training.checkpoint import finished_steps


def pretrain_and_probe(run: Run, choice: StoreChoice, output: Path) -> bool:
    """One run, which this process holds meanwhile; what is there already is continued.

    Returns:
        False when the run is finished already: by another process, meanwhile.

    Raises:
        Busy: another process works on it.
        Exception: whatever ends the run; its status says it too.
    """
    folder = output / run.name
    with claimed(output, run, lambda: is_done(run, choice, output)) as status:
        if status is None:
            return False
        devices = jax.devices()
        status.note(device=f"{len(devices)} x {devices[0].device_kind}")
        if not is_compared(output, run):
            _pretrain_and_compare(run, choice, output, status)
        make_probes(run, choice, output, lambda what: _timed(folder, what))
    return True


def _pretrain_and_compare(run: Run, choice: StoreChoice, output: Path, status: RunStatus) -> None:
    """Pretraining, and the probe that the tables of the sweep compare."""
    folder = output / run.name
    if run.init is not None and not is_pretrained(output, run.init):
        raise UserError(f"it begins with the run {run.init.name}, which is not pretrained yet")
    config = run.config.copy_and_resolve_references()
    config.store = choice.pretraining(run, output)
    if run.init is not None:
        config.init.checkpoint = _begun_with(folder) or str(output / run.init.name / RUN)
    status.note(recordings=len(open_store(config)[0]))
    if run.targets is not None:
        _make_targets(run, Store(config.store))
    with _timed(folder, "pretrain"):
        state = pretrain(config, folder / RUN)
    status.note(parameters=int(count_parameters(state.params)))
    if run.probe_config is None:
        return
    with _timed(folder, "probe"):
        results = probe(run.probe_config, folder / PROBE, str(folder / RUN), choice.probing(run, output))
    print(
        f"{run.name}: macro AUROC {results['macro_auroc']:.3f} ({results['ci_low']:.3f} to "
        f"{results['ci_high']:.3f}), random initialisation "
        f"{results['baselines']['random_init']['macro_auroc']:.3f}",
        flush=True,
    )


def _begun_with(folder: Path) -> str | None:
    """The checkpoint that a run says it began with, whatever the sweep's folder was called then; None before it has."""
    if not finished_steps(folder / RUN):
        return None
    try:
        return json.loads((folder / RUN / "config.json").read_text())["init"]["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):  # `pretrain` says what is damaged
        return None


@contextlib.contextmanager
def _timed(folder: Path, what: str) -> Iterator[None]:
    """Appends the seconds of an attempt to times.jsonl, however it ends."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        with (folder / TIMES).open("a") as file:
            file.write(json.dumps({what: time.perf_counter() - begin}) + "\n")


def _make_targets(run: Run, store: Store) -> None:
    """Clusters the store once for all runs, of whatever sweep, that read the same targets.

    Raises:
        UserError: targets of that name are there but were made otherwise; or the store cannot be written.
    """
    name = targets_name(run.targets)
    val_folds = run.config.data.val_folds
    if name not in names(store):
        folder = store.path / FOLDER
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}") from error
        with held_long(folder / f".{name}.lock"):
            if name not in names(store):
                cluster(store.path, name, **run.targets, val_folds=val_folds)
                return
    meta = Targets(store, name).meta
    wanted = {**run.targets, "held_out_folds": highest_folds(store.column("fold"), val_folds).tolist()}
    differ = [key for key, value in wanted.items() if meta[key] != value]
    if differ:
        raise UserError(
            f"the store {store.path} has targets {name} that were made with other {', '.join(differ)}; remove them"
        )
