"""One run of a sweep: its stores, its offline targets, pretraining and the probe."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from clu.parameter_overview import count_parameters

from ecg_jax.cluster import cluster
from ecg_jax.data.folds import highest_folds
from ecg_jax.data.store import Store
from ecg_jax.data.targets import FOLDER, Targets, names
from ecg_jax.errors import UserError
from ecg_jax.evaluation import tasks
from ecg_jax.evaluation.targets import known_value_sets
from ecg_jax.prepare import prepare
from ecg_jax.pretrain import pretrain
from ecg_jax.probe import probe
from ecg_jax.quickstart import SAMPLE
from ecg_jax.run_setup import open_store
from ecg_jax.sweep_entry import GIVEN, STORE
from ecg_jax.sweep_file import Run, targets_name
from ecg_jax.sweep_folder import TIMES, Damaged, claimed, damage, held_long, held_shortly, is_finished


class StoreChoice(NamedTuple):
    """What the command line says of stores; None where it says nothing.

    Attributes:
        store: that every run is pretrained on, one folder or several separated by commas.
        probe_store: that every run is probed on.
    """

    store: str | None
    probe_store: str | None

    def pretraining(self, run: Run, output: Path) -> str:
        """The store that a run is pretrained on.

        Raises:
            UserError: none, or two, are named.
        """
        named = run.store if run.store != GIVEN else None
        if named is not None and self.store is not None:
            raise UserError(f"the run {run.name} names its own store, {named}; leave out --store")
        if run.store == GIVEN and self.store is None:
            raise UserError(f"the run {run.name} needs a store; give it as --store=STORE")
        return named or self.store or str(output / STORE)

    def probing(self, run: Run, output: Path) -> str | None:
        """The store that a run is probed on, None for a run without probe.

        Raises:
            UserError: the run is pretrained on several stores, and none is named to probe on.
        """
        if run.probe_config is None:
            return None
        if self.probe_store is not None:
            return self.probe_store
        store = self.pretraining(run, output)
        if "," in store:
            raise UserError(
                f"the run {run.name} is pretrained on several stores; name the labelled one to probe on as "
                "--probe-store=STORE"
            )
        return store


def check_stores(choice: StoreChoice, runs: Sequence[Run], output: Path) -> None:
    """Refuses stores that runs lack, that cannot serve the probe, or whose content is not what finished runs had.

    Writes nothing. The sample that ships with the package need not be prepared yet. Of a finished run whose files are
    damaged nothing is known; the tables name it.

    Raises:
        UserError: names the run and the store.
    """
    own = str(output / STORE)
    prepared = (Path(own) / "zarr.json").exists()  # else another process may be at it
    checked: set[tuple[str, str]] = set()
    fingerprints: dict[str, str] = {}
    tables: dict[str, str] = {}
    for run in runs:
        store, probed = choice.pretraining(run, output), choice.probing(run, output)
        done, folder = is_finished(output, run), output / run.name
        if store != own or prepared:
            if store not in fingerprints:
                config = run.config.copy_and_resolve_references()
                config.store = store
                fingerprints[store] = open_store(config)[0].fingerprint
            if done:
                _check_unchanged(
                    run,
                    folder / "run" / "config.json",
                    lambda config: (config["store"], config["store_fingerprint"]),
                    store,
                    fingerprints[store],
                )
        if probed is None or (probed == own and not prepared):
            continue
        if (probed, run.probe_config.task) not in checked:
            opened = Store(probed)
            tables[probed] = opened.table_digest()  # of labels and folds too, unlike the fingerprint
        if done:
            _check_unchanged(
                run,
                folder / "probe" / "results.json",
                lambda results: (results["store"]["path"], results["store"]["table"]),
                probed,
                tables[probed],
            )
        if (probed, run.probe_config.task) not in checked:
            task, sets = (
                tasks.get_task(run.probe_config.task),
                (list(opened.classes), known_value_sets(opened)),
            )
            tasks.check_store(task, opened.corpus, *sets, f"the store {probed}")
            checked.add((probed, task.name))


def _check_unchanged(
    run: Run,
    file: Path,
    used_store: Callable[[dict[str, Any]], tuple[str, str]],
    store: str,
    digest: str,
) -> None:
    """Compares a store with the one, path and digest, that a file of a finished run says it used."""
    try:
        with damage(file.parent):
            used, content = used_store(json.loads(file.read_text()))
    except Damaged:
        return
    if content != digest:
        raise UserError(
            f"the folder belongs to another sweep: its run {run.name} used {used}, whose content is not that of "
            f"{store}; choose another --output"
        )


def prepare_sample(choice: StoreChoice, runs: Sequence[Run], output: Path) -> bool:
    """Prepares the sample that ships with the package if runs use it; whether they do."""
    chosen = {each for run in runs for each in (choice.pretraining(run, output), choice.probing(run, output))}
    if str(output / STORE) not in chosen:
        return False
    with held_shortly(output):
        # Only what takes a while is told.
        print(prepare("ptbxl", SAMPLE, output / STORE, progress=not (output / STORE / "zarr.json").exists()))
    return True


def pretrain_and_probe(run: Run, choice: StoreChoice, output: Path) -> bool:
    """One run, which this process holds meanwhile; what is there already is continued.

    Returns:
        False when the run is finished already: by another process, meanwhile.

    Raises:
        Busy: another process works on it.
        Exception: whatever ends the run; its status says it too.
    """
    folder = output / run.name
    with claimed(output, run) as status:
        if status is None:
            return False
        devices = jax.devices()
        status.note(device=f"{len(devices)} x {devices[0].device_kind}")
        config = run.config.copy_and_resolve_references()
        config.store = choice.pretraining(run, output)
        status.note(recordings=len(open_store(config)[0]))
        if run.targets is not None:
            _make_targets(run, Store(config.store))
        with _timed(folder, "pretrain"):
            state = pretrain(config, folder / "run")
        status.note(parameters=int(count_parameters(state.params)))
        if run.probe_config is None:
            return True
        with _timed(folder, "probe"):
            results = probe(
                run.probe_config, folder / "probe", str(folder / "run"), choice.probing(run, output)
            )
        print(
            f"{run.name}: macro AUROC {results['macro_auroc']:.3f} ({results['ci_low']:.3f} to "
            f"{results['ci_high']:.3f}), random initialisation "
            f"{results['baselines']['random_init']['macro_auroc']:.3f}",
            flush=True,
        )
    return True


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
