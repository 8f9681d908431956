"""What the report of a study is made of: its runs with their probes, what its sweeps say, its commands' figures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.files import read_object
from ecg_jax.studies.figure_folder import INDEX, FigureFolder, read_csv, read_figures
from ecg_jax.studies.report import load, rows
from ecg_jax.studies.report.kinds import SWEEP, is_run, is_study, subfolders
from ecg_jax.studies.report.load import SAME_PREDICTIONS, Collection, Curves, Result
from ecg_jax.studies.report.read import RESULTS, check_fields, read_result
from ecg_jax.studies.study_runs import StudyRun, find_runs
from ecg_jax.sweep_folder import FURTHER, PROBE, is_made, read_status, spent


@dataclass(frozen=True)
class Member:
    """A finished probe of a run."""

    run: StudyRun
    probe: str
    """Its name in the run."""
    result: Result
    """`model` is the run's name, with the probe's where a table has several of a run."""
    group: str
    """Of the runs that differ from its run in the seed alone."""
    variant: str = ""
    """The probe's name where the table has several of its run in one mode; "" elsewhere."""

    @property
    def row(self) -> str:
        """Name of the row that it shares with other seeds."""
        return f"{self.group} [{self.variant}]" if self.variant else self.group


@dataclass(frozen=True)
class SweepFolder:
    """What a sweep wrote about all its runs."""

    folder: Path
    file: str
    """The sweep file, as it was given."""
    note: str
    """What it says about its results; "" for nothing."""
    lines: list[list[str]]
    """Of results.csv, its head first; [] where it is not there."""
    runs: dict[str, dict[str, Any]]
    """Its runs as they are declared, by the names of their folders."""

    def missing(self, finished: Sequence[StudyRun]) -> list[str]:
        """Names of finished runs of its own that `lines` lacks, as when they were finished after it was written."""
        sweeps = [(run.folder.parent, sweep_of(run)) for run in finished if run.folder]
        own = [folder.name for folder, of in sweeps if of and of.resolve() == self.folder.resolve()]
        there = {cell for line in self.lines for cell in line}
        probed = [name for name in own if name in self.runs and self.runs[name]["probe"] is not None]
        return [name for name in probed if self.lines and name not in there]


@dataclass(frozen=True)
class RunState:
    """What the sweep knows of a run beside its workdir."""

    state: str
    """"finished", or how far it is."""
    error: str
    probe_seconds: float | None


@dataclass(frozen=True)
class Study:
    """All that a report of a study is made of."""

    folders: list[Path]
    runs: list[StudyRun]
    states: dict[str, RunState]
    """By the names of the runs."""
    members: list[Member]
    collection: Collection
    """Results of the members, robustness and label efficiency."""
    sweeps: list[SweepFolder]
    figures: list[FigureFolder]

    @property
    def finished(self) -> list[StudyRun]:
        """Runs that are done with everything that was asked of them."""
        return [run for run in self.runs if self.states[run.name].state == "finished"]

    @property
    def synthetic(self) -> list[StudyRun]:
        """Runs with made-up recordings among those they were pretrained on."""
        return [run for run in self.runs if run.synthetic]


def gather(folders: Sequence[str | Path]) -> Study:
    """Everything that the report of a study is made of.

    Args:
        folders: of sweeps, pretraining runs, probes, figures, or of such; each once.

    Raises:
        UserError: a folder holds nothing, or a file in it is damaged; names it. Probes without any run beside them
            lack a baseline, or do not belong together.
    """
    folders = list(map(Path, folders))
    for i, folder in enumerate(folders):
        if not folder.is_dir():
            raise UserError(
                f"There is no folder {folder}; give that of a finished `ecg-jax probe`, or {load.OTHERS}."
            )
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise UserError(f"{folder} is given twice; name every folder once.")
    figure_folders = [path for folder in folders for path in _figure_folders(folder)]
    others = [folder for folder in folders if not (folder / INDEX).is_file() and _holds_runs(folder)]
    figures = [read_figures(path) for path in dict.fromkeys(figure_folders)]
    plain = [folder for folder in others if not is_study(folder)]
    if others and plain == others:
        # Probes alone: what a report of them refuses, it refuses beside figures too.
        rows.check_baselines(load.load(plain))
    inside = [path for folder in others if is_run(folder) for path in subfolders(folder)]
    runs = find_runs([*others, *(path for path in inside if (path / RESULTS).is_file())]) if others else []
    members = _members(runs)
    results = [member.result for member in members]
    load.check_intervals(results)
    robustness: list[Curves] = []
    efficiency: list[Curves] = []
    places = [result.folder for result in results]
    places += [path / "robustness" for path in places]
    for folder in others:
        places += [folder, *subfolders(folder)]
    for path in dict.fromkeys(path.resolve() for path in places):
        load.read_curves(path, robustness, efficiency)
    collection = Collection(results, load.labelled(robustness, results), load.distinct(efficiency))
    sweeps = [
        _sweep(path)
        for folder in others
        for path in (folder, *subfolders(folder))
        if (path / SWEEP).is_file()
    ]
    # A run may be of a sweep that was not given itself.
    of_runs = dict.fromkeys(sweep.resolve() for run in runs if (sweep := sweep_of(run)) is not None)
    declared = {sweep: _declared(sweep)["runs"] for sweep in of_runs}
    states = {run.name: _state(run, declared) for run in runs}
    return Study(folders, runs, states, members, collection, sweeps, figures)


def _figure_folders(folder: Path) -> list[Path]:
    """Folders of figures that a folder is or holds, with those in the `studies` of sweeps."""
    if (folder / INDEX).is_file():
        return [folder]
    inside = subfolders(folder)
    places = [*inside, *(path for each in (folder, *inside) for path in (each / "studies",) if path.is_dir())]
    found = [path for path in places if (path / INDEX).is_file()]
    for path in places:
        if path.name == "studies":
            found += [each for each in subfolders(path) if (each / INDEX).is_file()]
    return list(dict.fromkeys(found))


def _holds_runs(folder: Path) -> bool:
    """Whether anything but figures is in a folder; what holds nothing is for `find_runs` to refuse."""
    inside = subfolders(folder)
    return not inside or not all((path / INDEX).is_file() for path in inside)


def _members(runs: Sequence[StudyRun]) -> list[Member]:
    """The probes of all runs, each in the table of those it can be compared with."""
    found = []
    for run in runs:
        for probe in run.probes:
            contents, predictions = read_result(probe.folder)
            result = Result(probe.folder, probe.folder, run.name, contents, predictions)
            member = Member(run, probe.name, result, run.group)
            # The main probe is the first of its run.
            if not any(other.run is run and _is_again(other.result, result) for other in found):
                found.append(member)
    of_task: dict[str, list[list[Member]]] = {}
    for member in found:
        tables = of_task.setdefault(member.result.task, [])
        own = next((table for table in tables if not load.differing(table[0].result, member.result)), None)
        if own is None:
            tables.append(own := [])
        own.append(member)
    sweeps = {run.name: sweep_of(run) for run in runs}
    shared_names = _names_of_several(runs, sweeps)
    named = []
    for task, tables in of_task.items():
        names = _table_names(task, tables)
        for name, table in zip(names, tables, strict=True):
            named += _named(name, table, sweeps, shared_names)
    # In the order of the runs again.
    order = {run.name: i for i, run in enumerate(runs)}
    return sorted(named, key=lambda member: order[member.run.name])


def _is_again(first: Result, other: Result) -> bool:
    """Whether two probes of a run are the same one made twice, as where one of them is of all tasks."""

    def what(result: Result) -> list[Any]:
        results = result.results
        config = {name: value for name, value in results["config"].items() if name not in ("task", "name")}
        return [result.task, result.mode, config, results["checkpoint"], results["seed"]]

    ours, theirs = (result.predictions["probabilities"] for result in (first, other))
    return (
        what(first) == what(other)
        and not load.differing(first, other)
        and ours.shape == theirs.shape
        and np.allclose(ours, theirs, rtol=0, atol=SAME_PREDICTIONS)
    )


def _names_of_several(runs: Sequence[StudyRun], sweeps: dict[str, Path | None]) -> set[str]:
    """Groups that runs of more than one sweep call themselves."""
    owners: dict[str, set[Path | None]] = {}
    for run in runs:
        owners.setdefault(run.group, set()).add(sweeps[run.name])
    return {group for group, of in owners.items() if len(of) > 1}


def _table_names(task: str, tables: Sequence[Sequence[Member]]) -> list[str]:
    """A name for each table of a task: the task's, with the store's where there are several."""
    if len(tables) == 1:
        return [task]
    names = []
    for table in tables:
        results = table[0].result.results
        store = results["store"] if results["test_store"] is None else results["test_store"]
        name = f"{task}_{re.sub('[^A-Za-z0-9-]+', '-', Path(store['path']).name)}"
        n = sum(other == name or other.startswith(f"{name}_") for other in names)
        names.append(f"{name}_{n + 1}" if n else name)
    return names


def _named(
    name: str, table: Sequence[Member], sweeps: dict[str, Path | None], shared: set[str]
) -> list[Member]:
    """Members of one table: rows of runs and of groups have names of their own."""
    keys = [(member.run.name, member.result.mode) for member in table]
    several = {mode for (_, mode), key in zip(keys, keys, strict=True) if keys.count(key) > 1}
    named = []
    for member in table:
        run, result = member.run, member.result
        variant = member.probe if result.mode in several else ""
        extra = f" [{variant}]" if variant else ""
        sweep = sweeps[run.name]
        group = f"{sweep.name}/{run.group}" if run.group in shared and sweep is not None else run.group
        if run.folder is None:
            group = result.results["model"] if result.mode == "supervised" else run.name
        results = result.results | {"task": name}
        named.append(
            replace(
                member,
                result=replace(result, model=f"{run.name}{extra}", results=results),
                group=group,
                variant=variant,
            )
        )
    return named


def sweep_of(run: StudyRun) -> Path | None:
    """The folder of the sweep that a run is of; None of other runs."""
    if run.folder is None:
        return None
    sweep = run.folder.parent.parent
    return sweep if (sweep / SWEEP).is_file() else None


def _state(run: StudyRun, declared: dict[Path, dict[str, dict[str, Any]]]) -> RunState:
    """How far a run is, probes included; a sweep says why one failed.

    Args:
        run: to look at.
        declared: resolved folder of each sweep -> its runs.
    """
    sweep = sweep_of(run)
    if sweep is None:
        known = run.folder is None  # its pretraining cannot be looked at any more, which is no failure of it
        return RunState("finished" if run.finished or known else run.state, "", None)
    folder, state = run.folder.parent, run.state
    status, probing = read_status(folder), spent(folder)["probe"]
    own = declared[sweep.resolve()]
    if run.finished and folder.name in own and (left := _lacking(folder, own[folder.name])):
        state = f"lacks the probe{'s' if len(left) > 1 else ''} {', '.join(left)}"
    if status is None or status["state"] == "finished":
        # Finished, unless results were removed, or probes asked for, since.
        return RunState(state, "", probing)
    if status["state"] == "running":
        return RunState(f"running, or its process died ({state})", "", probing)
    return RunState(f"{status['state']} ({state})", status["error"] or "", probing)


def _lacking(folder: Path, declared: dict[str, Any]) -> list[str]:
    """Probes that a sweep declares of a run in `folder` and has not made."""
    main = [PROBE] if declared["probe"] is not None and not (folder / PROBE / RESULTS).is_file() else []
    further = ({"probes": {}} | declared)["probes"]  # older files have none
    return main + [name for name in further if not is_made(folder / FURTHER / name)]


def _sweep(folder: Path) -> SweepFolder:
    declared, note, lines = _declared(folder), "", []
    if (path := folder / RESULTS).is_file():
        results = read_object(path)
        check_fields(path, results, {"note": str})
        note = results["note"]
    if (path := folder / "results.csv").is_file():
        head, rows = read_csv(path)
        lines = [head, *rows]
    return SweepFolder(folder, declared["sweep"], note, lines, declared["runs"])


def _declared(folder: Path) -> dict[str, Any]:
    """The sweep.json of a sweep's folder.

    Raises:
        UserError: it cannot be read, or lacks a field.
    """
    path = folder / SWEEP
    content = read_object(path)
    check_fields(path, content, {"sweep": str, "runs": dict})
    for name, run in content["runs"].items():
        check_fields(path, run, {"probe": (dict, type(None))}, f"runs.{name}")
        if "probes" in run:  # older files have none
            check_fields(path, run, {"probes": dict}, f"runs.{name}")
    return content
