"""`ecg-jax sweep`: many runs, one after another, each pretrained and probed, and one table of them all."""

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecg_jax.cluster import cluster
from ecg_jax.data.folds import highest_folds
from ecg_jax.data.store import Store
from ecg_jax.data.targets import Targets, names
from ecg_jax.errors import Stopped, UserError
from ecg_jax.evaluation import plots
from ecg_jax.files import lock, read_jsonl, write_atomic
from ecg_jax.prepare import prepare
from ecg_jax.pretrain import pretrain
from ecg_jax.probe import probe
from ecg_jax.quickstart import SAMPLE
from ecg_jax.studies import comparison
from ecg_jax.studies.comparison import FinishedRun
from ecg_jax.sweep_file import STORE, Run, Sweep, differences, load_sweep, plain, select, targets_name
from ecg_jax.training.checkpoint import finished_steps
from ecg_jax.training.metric_writers import read_log, read_warnings

DESCRIPTION = """\
Pretrains and probes every run of a sweep file, one after another, and writes one table: macro AUROC of each
group of seeds with an interval over test patients and seeds, beside random initialisation and the majority guess.
Run the same command again after an interruption: finished runs are skipped, the interrupted one goes on. A run
that fails is reported, and the others go on.

  ecg-jax sweep configs/sweeps/objectives_quick.py --output=runs/objectives_quick

Writes into DIR: NAME/run and NAME/probe of each run; results.json, results.csv, results.md and results.png,
anew after every run.
"""

_DECLARATION = "sweep.json"
LOCK = ".lock"


@contextlib.contextmanager
def _claimed(sweep: Sweep, output: Path) -> Iterator[None]:
    """Makes the folder this sweep's and this process's, or refuses it.

    A sweep may gain runs later; runs that are there already must not have changed.

    Raises:
        UserError: the folder holds something else, or another process runs a sweep in it; runs that differ, or are
            missing now, are named.
    """
    path = output / _DECLARATION
    runs = {
        run.name: {
            "group": run.group,
            "config": plain(run.config),
            "probe": plain(run.probe_config),
            "targets": run.targets,
        }
        for run in sweep.runs
    }
    if path.exists():
        try:
            before = json.loads(path.read_text())["runs"]
            gone = [name for name in before if name not in runs]
            changed = {name: differences(before[name], runs[name]) for name in before if name in runs}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged; choose another --output") from error
        if gone:
            raise UserError(
                f"{output} belongs to another sweep: it has the runs {', '.join(gone[:5])}, which {sweep.path} has "
                "not; choose another --output"
            )
        for name, differ in changed.items():
            if differ:
                raise UserError(
                    f"{output} belongs to another sweep: its run {name} differs in {', '.join(sorted(differ)[:5])}; "
                    "choose another --output, or give the run another name"
                )
    elif output.is_dir() and any(entry.name not in (STORE, LOCK) for entry in output.iterdir()):
        raise UserError(f"{output} holds something else than a sweep; choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into --output={output}: {error.strerror}") from error
    with (output / LOCK).open("w") as held:
        lock(held, f"another `ecg-jax sweep` is running in {output}; wait for it, or choose another --output")
        write_atomic(path, (json.dumps({"sweep": sweep.path, "runs": runs}, indent=1) + "\n").encode())
        yield


def _is_finished(output: Path, run: Run) -> bool:
    """results.json is the last thing a probe writes."""
    return (output / run.name / "probe" / "results.json").exists()


def _state(output: Path | None, run: Run) -> str:
    if output is None:
        return ""
    if _is_finished(output, run):
        return "finished"
    steps = finished_steps(output / run.name / "run")
    return f"at step {max(steps)}" if steps else "not begun"


def run_sweep(
    sweep: Sweep, output: str | Path, store: str | Path | None = None, only: str | None = None
) -> dict[str, Any]:
    """Runs what is not finished yet, and writes the table after each run.

    Args:
        sweep: from `load_sweep`.
        output: folder of the sweep, made if needed.
        store: a labelled store; None prepares the PTB-XL sample that ships with the package.
        only: names of runs or groups, separated by commas; None for all.

    Returns:
        What results.json holds: see `studies.comparison.compare`; and "failed", run -> reason.

    Raises:
        UserError: the folder or the store does not fit. A run that fails does not raise.
        Stopped, KeyboardInterrupt: asked to stop; the same call goes on from there.
    """
    output = Path(output)
    chosen = select(sweep, only)
    if store is not None:
        Store(store)  # before anything is written
    with _claimed(sweep, output):
        return _run(sweep, output, store, chosen)


def _run(sweep: Sweep, output: Path, store: str | Path | None, chosen: Sequence[Run]) -> dict[str, Any]:
    """The sweep itself, in a folder that is this process's."""
    if store is None:
        print(prepare("ptbxl", SAMPLE, output / STORE))
        store = output / STORE
    opened = Store(store)
    _check_store(sweep, output, opened)
    waiting = [run for run in chosen if not _is_finished(output, run)]
    if len(waiting) < len(chosen):
        print(f"{len(chosen) - len(waiting)} of {len(chosen)} runs are finished already")
    failed: dict[str, str] = {}
    results = _write_results(sweep, output, opened)
    for number, run in enumerate(waiting, start=1):
        print(f"\n[{number}/{len(waiting)}] {run.name}: {run.declared}", flush=True)
        try:
            _pretrain_and_probe(run, output / run.name, opened)
        except Stopped:
            raise
        except Exception as error:  # whatever it is, the other runs go on
            failed[run.name] = _report(error, output / run.name)
            print(f"{run.name} failed: {failed[run.name]}", file=sys.stderr, flush=True)
        jax.clear_caches()  # programs of a run that is over
        results = _write_results(sweep, output, opened)
    return results | {"failed": failed}


def _check_store(sweep: Sweep, output: Path, store: Store) -> None:
    """Refuses a store with another content than the finished runs had."""
    for run in sweep.runs:
        if _is_finished(output, run):
            with _damage(output / run.name / "probe"):
                used = json.loads((output / run.name / "probe" / "results.json").read_text())["store"]
                path, fingerprint = used["path"], used["fingerprint"]
            if fingerprint != store.fingerprint:
                raise UserError(
                    f"{output} belongs to another sweep: its run {run.name} used {path}, whose content is not that of "
                    f"{store.path}; choose another --output"
                )


@contextlib.contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Whatever goes wrong while the files of a probe are read becomes one sentence."""
    try:
        yield
    except Exception as error:  # of json, zipfile, numpy, a missing key, ...
        text = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"{folder} is damaged ({type(error).__name__}: {text}); remove it, and it is made anew"
        ) from error


def _pretrain_and_probe(run: Run, folder: Path, store: Store) -> None:
    """One run; what is there already is continued, and the probe done anew."""
    config = run.config.copy_and_resolve_references()
    config.store = str(store.path)
    folder.mkdir(exist_ok=True)
    (folder / "error.txt").unlink(missing_ok=True)
    if run.targets is not None:
        _make_targets(run, store)
    begin = time.perf_counter()
    try:
        pretrain(config, folder / "run")
    finally:
        with (folder / "times.jsonl").open("a") as file:
            file.write(json.dumps({"pretrain": time.perf_counter() - begin}) + "\n")
    results = probe(run.probe_config, folder / "probe", folder / "run", store.path)
    print(
        f"{run.name}: macro AUROC {results['macro_auroc']:.3f} ({results['ci_low']:.3f} to {results['ci_high']:.3f}), "
        f"random initialisation {results['baselines']['random_init']['macro_auroc']:.3f}",
        flush=True,
    )


def _make_targets(run: Run, store: Store) -> None:
    """Clusters the store once for all runs that read the same targets.

    Raises:
        UserError: targets of that name are there but were made otherwise.
    """
    name = targets_name(run.targets)
    val_folds = run.config.data.val_folds
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


def _report(error: BaseException, folder: Path) -> str:
    """The reason of a failure in one line; what is no mistake of the user's leaves its traceback in a file."""
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).strip().splitlines()
    first = f"{type(error).__name__}: {lines[0] if lines else ''}"
    path = folder / "error.txt"
    try:
        path.write_text("".join(traceback.format_exception(error)))
    except OSError:  # the folder itself may be what failed
        return first
    return f"{first} (all of it in {path})"


def read_finished(sweep: Sweep, output: Path) -> list[FinishedRun]:
    """The finished runs of a sweep, in its order.

    Raises:
        UserError: a file of one of them is damaged.
    """
    finished = []
    for run in sweep.runs:
        if not _is_finished(output, run):
            continue
        folder = output / run.name
        with _damage(folder / "probe"):
            results = json.loads((folder / "probe" / "results.json").read_text())
            with np.load(folder / "probe" / "predictions.npz") as file:
                predictions = dict(file)
            n = len(predictions["targets"])
            twins = predictions["probabilities_random_init_seeds"]
            lengths = {name: len(predictions[name]) for name in ("record_id", "patient_id", "probabilities")}
            for name, length in (lengths | {"probabilities_random_init_seeds": twins.shape[1]}).items():
                if length != n:
                    raise ValueError(f"predictions.npz has {length} of {name}, not {n}")
            for name in ("macro_auroc", "bootstrap", "baselines", "pretraining_config", "n_patients"):
                results[name]
        times = folder / "times.jsonl"
        seconds = sum(entry["pretrain"] for entry in read_jsonl(times)) if times.exists() else None
        finished.append(
            FinishedRun(
                name=run.name,
                group=run.group,
                results=results,
                predictions=predictions,
                log=read_log(folder / "run"),
                warnings=read_warnings(folder / "run"),
                seconds=seconds,
            )
        )
    return finished


def _write_results(sweep: Sweep, output: Path, store: Store) -> dict[str, Any]:
    """results.json, .csv, .md and .png of the finished runs, {} while there is none."""
    finished = read_finished(sweep, output)
    if not finished:
        return {}
    done = {run.name for run in finished}
    results = {
        "sweep": sweep.path,
        "note": sweep.note.replace("{recordings}", str(len(store))),
        "recordings": len(store),
        "missing": [run.name for run in sweep.runs if run.name not in done],
        **comparison.compare(finished),
    }
    write_atomic(output / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(output / "results.csv", comparison.to_csv(results).encode())
    write_atomic(output / "results.md", comparison.to_markdown(results).encode())
    try:
        _draw(results, output / "results.png")
    except OSError as error:
        raise UserError(f"cannot write {output / 'results.png'}: {error.strerror}") from error
    return results


def _draw(results: dict[str, Any], path: Path) -> None:
    def interval(entry):
        return tuple(
            float("nan") if entry[name] is None else entry[name]
            for name in ("macro_auroc", "ci_low", "ci_high")
        )

    random = {
        group: interval(entry)
        for entry in results["baselines"]
        if entry["baseline"] == comparison.RANDOM_INIT
        for group in entry["groups"]
    }
    patients = f", {results['n_patients']} patients" if results["n_patients"] else ""
    plots.seeds_forest(
        [entry["group"] for entry in results["groups"]],
        [interval(entry) for entry in results["groups"]],
        [entry["each_seed"] for entry in results["groups"]],
        [random[entry["group"]] for entry in results["groups"]],
        next(e["macro_auroc"] for e in results["baselines"] if e["baseline"] == comparison.MAJORITY),
        path,
        title=f"{results['task']}: {results['n_records']} test records{patients}",
        note=results["note"],
        level=results["bootstrap"]["level"],
    )


def describe(runs: Sequence[Run], output: Path | None) -> str:
    """One line for each run: name, group, state, config."""
    rows = [(run.name, run.group, _state(output, run), run.declared) for run in runs]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True) if w] + [row[3]])
        for row in rows
    )


def main(argv: list[str]) -> int:
    """`ecg-jax sweep`."""
    parser = argparse.ArgumentParser(
        prog="ecg-jax sweep",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "sweep", metavar="SWEEP.py", help="sweep file, e.g. configs/sweeps/objectives_quick.py"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of all runs and of the table")
    parser.add_argument(
        "--store", help="labelled store (default: the PTB-XL sample that ships with the package)"
    )
    parser.add_argument("--only", metavar="NAME,...", help="only these runs or groups")
    parser.add_argument(
        "--list", action="store_true", help="shows the runs and how far they are, and runs nothing"
    )
    options = parser.parse_args(argv)
    sweep = load_sweep(options.sweep)
    if options.list:
        print(describe(select(sweep, options.only), options.output))
        return 0
    if options.output is None:
        raise UserError("give the folder of the sweep: --output=DIR")
    results = run_sweep(sweep, options.output, options.store, options.only)
    failed = results.pop("failed")
    if results:
        print("\n" + "\n".join(comparison.group_table(results)))
        if results["note"]:
            print(f"\n{results['note']}")
        print(f"\nwritten to {options.output}: results.md, results.csv, results.json, results.png")
    if failed:
        many = f"{len(failed)} runs" if len(failed) > 1 else "1 run"
        raise UserError(f"{many} failed, see above: {', '.join(failed)}")
    return 0
