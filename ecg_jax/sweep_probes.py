"""The further probes of a run: which of them are to be made, where they go, and making them."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ecg_jax.data.store import Store
from ecg_jax.errors import Stopped, UserError
from ecg_jax.evaluation.tasks import ALL
from ecg_jax.files import write_atomic
from ecg_jax.probe import probe as probe_one
from ecg_jax.probe import probe_all
from ecg_jax.probe_provenance import store_identity
from ecg_jax.sweep_file import FurtherProbe, Run, plain
from ecg_jax.sweep_folder import FURTHER, MADE, PROBE, RUN, is_finished, is_made, read_made
from ecg_jax.sweep_stores import StoreChoice, fits


class ProbesFailed(Exception):
    """Further probes of a run failed; the others are there."""


def is_done(run: Run, choice: StoreChoice, output: Path) -> bool:
    """Whether a run is finished, with further probes on all stores that it is offered now."""
    return is_finished(output, run) and not any(
        _stores_left(run, probe, choice, output) for probe in run.further
    )


def _stores_left(run: Run, probe: FurtherProbe, choice: StoreChoice, output: Path) -> list[str]:
    """Of the stores that a further probe is offered, those that it has not been made on."""
    made = read_made(output / run.name / FURTHER / probe.name)
    return [store for store in choice.further(run, probe, output) if Path(store).name not in made]


def make_probes(
    run: Run,
    choice: StoreChoice,
    output: Path,
    timed: Callable[[str], AbstractContextManager[None]],
) -> None:
    """Makes the further probes of a pretrained run, as far as they are not there.

    One that fails stops no other, and on one store no other store.

    Args:
        run: the run, which this process holds.
        choice: of stores.
        output: folder of the sweep.
        timed: measures what is done in it, and takes its name.

    Raises:
        UserError, ProbesFailed: names those that failed, and why; the latter for what is no mistake of the user's.
    """
    failed: dict[str, Exception] = {}
    for probe in run.further:
        left = _stores_left(run, probe, choice, output)
        if left or not is_made(output / run.name / FURTHER / probe.name):
            with timed(f"probes/{probe.name}"):
                failed |= _make_probe(run, probe, left, choice, output)
    if failed:
        text = "; ".join(f"the probe {which} failed: {_reason(error)}" for which, error in failed.items())
        mistakes = all(isinstance(error, UserError) for error in failed.values())
        # A traceback is kept of the first that is no mistake.
        first = next(
            (e for e in failed.values() if not isinstance(e, UserError)), next(iter(failed.values()))
        )
        raise (UserError if mistakes else ProbesFailed)(text) from first


def _reason(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def _make_probe(
    run: Run, probe: FurtherProbe, left: list[str], choice: StoreChoice, output: Path
) -> dict[str, Exception]:
    """Makes one further probe on the stores that are left, and says in its folder after each which it has.

    Returns:
        Which probe -> why it failed, of the stores on which it has.
    """
    folder = output / run.name / FURTHER / probe.name
    offered = choice.further(run, probe, output)
    # A store that was the only one at first keeps its place when others come; one that is offered no more is forgotten
    # where nothing was made on it.
    stores = {**read_made(folder), **{Path(store).name: None for store in left}}
    failed: dict[str, Exception] = {}

    def note() -> None:
        if any(stores.values()):
            write_atomic(folder / MADE, (json.dumps({"stores": stores}, indent=1) + "\n").encode())

    note()
    for store in left:
        name = Path(store).name
        place = "." if len(stores) == 1 else name
        try:
            stores[name] = _probe_store(run, probe, store, folder, place, output)
        except Stopped:
            raise
        except Exception as error:
            which = probe.name if len(offered) == 1 else f"{probe.name} on {name}"
            failed[which] = error
            print(f"{run.name}: the probe {which} failed: {_reason(error)}", flush=True)
        note()
    if not failed and not any(stores.values()):
        error = UserError(f"none of the stores {', '.join(offered)} can serve task={probe.config.task}")
        failed[probe.name] = error
        print(f"{run.name}: the probe {probe.name} failed: {error}", flush=True)
    return failed


def _probe_store(
    run: Run, probe: FurtherProbe, store: str, folder: Path, place: str, output: Path
) -> list[str]:
    """Folders, from that of the probe, of the tasks that a store was probed on; none where it serves none."""
    if not fits(probe.config.task, Store(store)):
        print(f"{run.name}: {probe.name}: {store} cannot serve task={probe.config.task}", flush=True)
        return []
    arguments = probe.config, folder / place, str(output / run.name / RUN), store
    if probe.config.task == ALL:
        _take_over(run, probe, store, folder / place, output)
        results: dict[str, dict[str, Any]] = probe_all(*arguments)
        return [str(Path(place) / task) for task in results]
    results = probe_one(*arguments)
    value, low, high = (results[key] for key in (results["metric"], "ci_low", "ci_high"))
    shown = "undefined" if value is None else f"{value:.3f}"
    between = "" if low is None else f" ({low:.3f} to {high:.3f})"
    print(f"{run.name}: {probe.name}: {results['task']}, {results['mode']}: {shown}{between}", flush=True)
    return [place]


def _take_over(run: Run, probe: FurtherProbe, store: str, folder: Path, output: Path) -> None:
    """Copies the results of the run's main probe, where the same probe of all tasks would make them once more."""
    main, compared = output / run.name / PROBE, run.probe_config
    if compared is None or plain(probe.config) | {"task": compared.task} != plain(compared):
        return
    there = folder / compared.task
    results = json.loads((main / "results.json").read_text())
    same = results["store"] == store_identity(Store(store)) and results["checkpoint"]["run"] == str(
        (output / run.name / RUN).resolve()
    )
    if not same or (there / "results.json").exists():
        return
    shutil.copytree(main, there, dirs_exist_ok=True, ignore=shutil.ignore_patterns("results.json"))
    write_atomic(there / "results.json", (main / "results.json").read_bytes())
