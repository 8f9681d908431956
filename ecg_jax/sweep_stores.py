"""The stores of a sweep: which of them each run takes, those that the sweep makes itself, and whether they fit."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import tasks
from ecg_jax.evaluation.targets import known_value_sets
from ecg_jax.prepare import prepare
from ecg_jax.quickstart import SAMPLE
from ecg_jax.run_setup import open_store
from ecg_jax.sweep_damage import Damaged, damage
from ecg_jax.sweep_entry import (
    GIVEN,
    GIVEN_PROBE,
    SAMPLE_STORE,
    STORE,
    STORES,
    split_stores,
    synthetic_arguments,
)
from ecg_jax.sweep_file import FurtherProbe, Run
from ecg_jax.sweep_folder import FURTHER, PROBE, RUN, is_compared, read_made
from ecg_jax.sweep_locks import held_long, held_shortly
from ecg_jax.synthesize import synthesize


class StoreChoice(NamedTuple):
    """What the command line says of stores; None where it says nothing.

    Attributes:
        store: that runs are pretrained on which name none themselves, one folder or several separated by commas.
        probe_store: the same of probes.
    """

    store: str | None
    probe_store: str | None

    def pretraining(self, run: Run, output: Path) -> str:
        """The store, or stores separated by commas, that a run is pretrained on.

        Raises:
            UserError: none is named.
        """
        return ",".join(folder_of(store, output) for store in self._pretraining(run))

    def _pretraining(self, run: Run) -> list[str]:
        if run.store == GIVEN and self.store is None:
            raise UserError(f"the run {run.name} needs a store; give it as --store=STORE")
        named = run.store if run.store != GIVEN else None
        return split_stores(named or self.store or SAMPLE_STORE)

    def probing(self, run: Run, output: Path) -> str | None:
        """The store of the probe that the tables compare, None for a run without one.

        Raises:
            UserError: none is named.
        """
        return None if run.probe_config is None else folder_of(self._probing(run)[0], output)

    def _probing(self, run: Run, named: str | None = None) -> list[str]:
        """Of a run's probes; `named` is what one of them names itself."""
        named = named or run.probe_store
        if named == GIVEN_PROBE and self.probe_store is None:
            raise UserError(f"the run {run.name} needs a store to probe on; give it as --probe-store=STORE")
        if named is not None and named != GIVEN_PROBE:
            return split_stores(named)
        if self.probe_store is not None:
            return split_stores(self.probe_store)
        stores = self._pretraining(run)
        if len(stores) > 1:
            raise UserError(
                f"the run {run.name} is pretrained on several stores; name the labelled one to probe on as "
                "--probe-store=STORE"
            )
        return stores

    def further(self, run: Run, probe: FurtherProbe, output: Path) -> list[str]:
        """The stores that a further probe is offered.

        Raises:
            UserError: none is named, or two of them have folders of one name.
        """
        folders = [folder_of(store, output) for store in self._probing(run, probe.store)]
        names = [Path(folder).name for folder in folders]
        if len(set(names)) < len(names):
            raise UserError(
                f"the run {run.name}: the stores {', '.join(folders)} of its probe {probe.name} have folders of one "
                "name, by which results are told apart; give each another"
            )
        return folders

    def texts(self, run: Run) -> list[str]:
        """Every store of a run, as it is named."""
        probed = self._probing(run)[:1] if run.probe_config is not None else []
        return [
            *self._pretraining(run),
            *probed,
            *(store for probe in run.further for store in self._probing(run, probe.store)),
        ]


def folder_of(store: str, output: Path) -> str:
    """The folder of one store; of those that the sweep makes it lies in `output`."""
    if store == SAMPLE_STORE:
        return str(output / STORE)
    made = synthetic_arguments(store)
    if made is None:
        return store
    shuffled = "-shuffled" * made["shuffle_labels"]
    return str(output / STORES / f"synthetic-{made['records']}-{made['seed']}{shuffled}")


def check_choice(choice: StoreChoice, runs: Sequence[Run]) -> None:
    """Refuses a store of the command line that is empty, or that no run of the sweep would take.

    Args:
        choice: of the command line.
        runs: all runs of the sweep.

    Raises:
        UserError: names a run that names its own.
    """
    for option, given in ((GIVEN, choice.store), (GIVEN_PROBE, choice.probe_store)):
        if given == "":
            raise UserError(f"{option}= names no store; give a folder, or leave it out")
    if choice.store is not None and all(run.store not in (None, GIVEN) for run in runs):
        raise UserError(f"the run {runs[0].name} names its own store, {runs[0].store}; leave out --store")
    probed = [(run, run.probe_store) for run in runs if run.probe_config is not None]
    probed += [(run, probe.store or run.probe_store) for run in runs for probe in run.further]
    if choice.probe_store is not None and probed and all(s not in (None, GIVEN_PROBE) for _, s in probed):
        run, store = probed[0]
        raise UserError(
            f"the run {run.name} names its own store to probe on, {store}; leave out --probe-store"
        )


def check_folders(choice: StoreChoice) -> None:
    """Refuses a store of the command line that is not there.

    Raises:
        UserError: names it.
    """
    for option, given in ((GIVEN, choice.store), (GIVEN_PROBE, choice.probe_store)):
        for store in split_stores(given) if given else ():
            if store != SAMPLE_STORE and synthetic_arguments(store) is None and not Path(store).is_dir():
                raise UserError(f"{option}={given}: there is no folder {store}")


def check_stores(choice: StoreChoice, runs: Sequence[Run], output: Path) -> None:
    """Refuses stores that runs lack, that cannot serve the probes, or whose content is not what finished runs had.

    Writes nothing. Stores that the sweep makes need not be there yet. Of a finished run whose files are damaged nothing
    is known; the tables name it.

    Raises:
        UserError: names the run and the store.
    """
    check = _StoreChecks(output)
    for run in runs:
        store, probed = choice.pretraining(run, output), choice.probing(run, output)
        if run.targets is not None and "," in store:
            raise UserError(
                f"the run {run.name} reads offline targets, which lie beside one store; give it one instead of {store}"
            )
        done, folder = is_compared(output, run), output / run.name
        if check.is_there(store):
            fingerprint = check.fingerprint(run, store)
            if done:
                _check_unchanged(
                    run,
                    folder / RUN / "config.json",
                    lambda config: (config["store"], config["store_fingerprint"]),
                    store,
                    fingerprint,
                )
        if probed is not None and check.is_there(probed):
            digest = check.table_digest(probed)
            if done:
                check_probed(run, folder / PROBE / "results.json", probed, digest)
            check.serves(run.probe_config.task, probed)
        for probe in run.further:
            offered = [each for each in choice.further(run, probe, output) if check.is_there(each)]
            made = read_made(folder / FURTHER / probe.name)
            for each in offered:
                for task in made.get(Path(each).name, []):
                    path = folder / FURTHER / probe.name / task / "results.json"
                    check_probed(run, path, each, check.table_digest(each))
            if len(offered) == len(choice.further(run, probe, output)) and not any(
                check.fits(probe.config.task, each) for each in offered
            ):
                if len(offered) == 1 and probe.config.task != tasks.ALL:
                    check.serves(probe.config.task, offered[0])  # which says what it lacks
                raise UserError(
                    f"the probe {probe.name} of the run {run.name} has task={probe.config.task}, and none of the "
                    f"stores {', '.join(offered)} can serve it; name one as --probe-store, or as the store of the probe"
                )


class _StoreChecks:
    """Of each store what was read of it, once."""

    def __init__(self, output: Path):
        self._made_by_sweep = output / STORE, output / STORES
        self._opened: dict[str, Store] = {}
        self._fingerprints: dict[str, str] = {}
        self._served: set[tuple[str, str]] = set()
        self._fits: dict[tuple[str, str], bool] = {}

    def is_there(self, stores: str) -> bool:
        """False for one that the sweep makes and has not finished: another process may be at it."""
        folders = [Path(store) for store in stores.split(",")]
        own = [f for f in folders if f == self._made_by_sweep[0] or f.parent == self._made_by_sweep[1]]
        return all((folder / "zarr.json").exists() for folder in own)

    def _open(self, folder: str) -> Store:
        if folder not in self._opened:
            self._opened[folder] = Store(folder)
        return self._opened[folder]

    def fingerprint(self, run: Run, stores: str) -> str:
        if stores not in self._fingerprints:
            config = run.config.copy_and_resolve_references()
            config.store = stores
            self._fingerprints[stores] = open_store(config)[0].fingerprint
        return self._fingerprints[stores]

    def table_digest(self, folder: str) -> str:
        """Of labels and folds too, unlike the fingerprint."""
        return self._open(folder).table_digest()

    def serves(self, task: str, folder: str) -> None:
        if (task, folder) not in self._served:
            store = self._open(folder)
            sets = list(store.classes), known_value_sets(store)
            tasks.check_store(tasks.get_task(task), store.corpus, *sets, f"the store {folder}")
            self._served.add((task, folder))

    def fits(self, task: str, folder: str) -> bool:
        if (task, folder) not in self._fits:
            self._fits[task, folder] = fits(task, self._open(folder))
        return self._fits[task, folder]


def fits(task: str, store: Store) -> bool:
    """Whether a store can serve a task, or for all tasks any of them."""
    sets = list(store.classes), known_value_sets(store)
    if task == tasks.ALL:
        return bool(tasks.fitting(store.corpus, *sets))
    return tasks.fits(tasks.get_task(task), store.corpus, *sets)


def check_probed(run: Run, file: Path, store: str, digest: str) -> None:
    """Compares the store of a probe with the one that its results were made on."""
    used = lambda results: (results["store"]["path"], results["store"]["table"])  # noqa: E731
    _check_unchanged(run, file, used, store, digest)


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


def make_stores(choice: StoreChoice, runs: Sequence[Run], output: Path) -> bool:
    """Prepares the sample, and draws the synthetic stores, that runs use; whether any of them use such.

    Each is made by one process, for which the others wait; one that was killed at it is taken up where it was.
    """
    made = list(_made_by_sweep(choice, runs))
    for store in made:
        folder = Path(folder_of(store, output))
        show = not (folder / "zarr.json").exists()  # only what takes a while is told
        if store == SAMPLE_STORE:
            with held_shortly(output):
                print(prepare("ptbxl", SAMPLE, folder, progress=show))
            continue
        try:
            folder.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into {folder.parent}: {error.strerror}") from error
        with held_long(folder.with_name(f".{folder.name}.lock")):
            drawn = synthesize(folder, **synthetic_arguments(store), progress=show)
        print(f"{folder}: {len(drawn)} synthetic recordings")
    return bool(made)


def _made_by_sweep(choice: StoreChoice, runs: Sequence[Run]) -> Iterator[str]:
    """The stores that runs use and the sweep makes, each once."""
    texts = dict.fromkeys(store for run in runs for store in choice.texts(run))
    yield from (store for store in texts if store == SAMPLE_STORE or synthetic_arguments(store) is not None)
