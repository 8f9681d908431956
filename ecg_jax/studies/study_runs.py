"""The runs of a study with their probes, as `scaling`, `efficiency` and `report` find them on the disk."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecg_jax.errors import UserError
from ecg_jax.files import read_object
from ecg_jax.json_fields import OBJECT, TEXT, object_of, wrong_field
from ecg_jax.studies.report.kinds import SWEEP, is_run, subfolders
from ecg_jax.studies.report.read import PREDICTIONS, RESULTS
from ecg_jax.studies.study_files import Place, StudyRun, read_run, without_workdir
from ecg_jax.studies.study_probes import StudyProbe, probed_run, probes_of_sweep, read_probe
from ecg_jax.sweep_folder import PROBE, RUN

__all__ = ["StudyProbe", "StudyRun", "find_runs"]

# In a run's workdir, where no probes are.
_NOT_PROBES = ("checkpoints", "tensorboard")
_DEPTH = 4  # folders below a given one: of sweeps or runs, a run's probes, their stores, their tasks


def find_runs(folders: Sequence[str | Path]) -> list[StudyRun]:
    """Every run in these folders, with the probes in them.

    Args:
        folders: each is a sweep's, a pretraining run's, a probe's, or a folder of such.

    Returns:
        Runs in the order of the folders, then by name; those that are not finished too.

    Raises:
        UserError: nothing is found, or a file or folder is damaged or cannot be read; names it.
    """
    try:
        return _find_runs(folders)
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; a study reads all runs and probes in the folders given"
        ) from error


def _find_runs(folders: Sequence[str | Path]) -> list[StudyRun]:
    if not folders:
        raise UserError("no folder is given; name the folder of a sweep, or of runs")
    places: dict[Path, tuple[Place, Path]] = {}
    probes: list[tuple[Path, Path | None, Path]] = []
    for given in map(Path, folders):
        if not given.is_dir():
            raise UserError(f"there is no folder {given}; name the folder of a sweep, of a run or of a probe")
        found_places, found_probes = _look(given)
        if not found_places and not found_probes:
            raise UserError(
                f"{given} holds no sweep, no pretraining run and no finished probe; name a folder that does"
            )
        for place in found_places:
            places.setdefault(place.folder.resolve(), (place, given))
        probes += [(path, inside, given) for path, inside in found_probes]
    runs = {resolved: (*_with_probes(place), given) for resolved, (place, given) in places.items()}
    taken = {probe.folder.resolve() for _, own, _ in runs.values() for probe in own}
    for path, inside, given in probes:
        if path.resolve() in taken:
            continue
        taken.add(path.resolve())
        probe = read_probe(path, path.name)
        probed = probed_run(probe)
        if inside is not None and not (probed and is_run(probed)):
            probed = inside  # which was moved after it was probed
        key = probed.resolve() if probed else path.resolve()
        if key not in runs:
            if probed and is_run(probed):
                run = read_run(_place(probed, given))
            else:
                run = without_workdir(probe, _relative(path, given))
            runs[key] = (run, [], given)
        runs[key][1].append(probe)
    return _named(list(runs.values()))


def _with_probes(place: Place) -> tuple[StudyRun, list[StudyProbe]]:
    run = read_run(place)
    if place.of_sweep is None:
        return run, []
    probes, remarks = probes_of_sweep(place.of_sweep)
    return replace(run, remarks=(*run.remarks, *remarks)), probes


def _look(given: Path) -> tuple[list[Place], list[tuple[Path, Path | None]]]:
    """Runs in a folder; and probes, each with the run in whose workdir it lies."""
    places: list[Place] = []
    probes: list[tuple[Path, Path | None]] = []

    def look(folder: Path, depth: int, run: Path | None = None) -> None:
        if (folder / SWEEP).is_file():
            found = list(_of_sweep(folder, given))
        elif is_run(folder) or is_run(folder / RUN):
            found = [_place(folder if is_run(folder) else folder / RUN, given, folder)]
        else:
            if (folder / RESULTS).is_file() and (folder / PREDICTIONS).is_file():
                probes.append((folder, run))
            for inside in subfolders(folder) if depth < _DEPTH else []:
                look(inside, depth + 1, run)
            return
        places.extend(found)
        for place in found:
            for inside in subfolders(place.folder) if place.folder.is_dir() else []:
                if inside.name not in _NOT_PROBES:
                    look(inside, depth + 1, place.folder)

    look(given, 0)
    return places, probes


def _place(run: Path, given: Path, top: Path | None = None) -> Place:
    """Of the workdir of a run, which a sweep may have given it; found in `top`."""
    own = run.absolute().parent
    if run.absolute().name == RUN and (own.parent / SWEEP).is_file():
        declared = _declared(own.parent)
        if own.name in declared:
            return Place(_relative(own, given), run, own, declared[own.name])
    if top is not None and top != run:
        return Place(_relative(top, given), run, top, None)
    return Place(_relative(run, given), run, None, None)


def _of_sweep(folder: Path, given: Path) -> Iterator[Place]:
    prefix = "" if folder == given else f"{_relative(folder, given)}/"
    for name, run in _declared(folder).items():
        yield Place(f"{prefix}{name}", folder / name / RUN, folder / name, run)


def _declared(sweep: Path) -> dict[str, Any]:
    """The runs of a sweep as it was begun."""
    path = sweep / SWEEP
    declared = read_object(path)
    wrong = wrong_field(declared, {"runs": object_of(OBJECT)})
    for name, run in {} if wrong else declared["runs"].items():
        wrong = wrong or wrong_field(run, {"group": TEXT, "config": OBJECT}, f"runs.{name}.")
    if wrong:
        raise UserError(f"{path} is damaged: {wrong}; run the sweep again, which writes it")
    return declared["runs"]


def _relative(folder: Path, given: Path) -> str:
    if folder == given or given not in folder.parents:
        return folder.resolve().name
    return folder.relative_to(given).as_posix()


def _named(found: list[tuple[StudyRun, list[StudyProbe], Path]]) -> list[StudyRun]:
    """Runs with their probes, and with names of their own: that of the folder given is added where two share one."""
    names = [run.name for run, _, _ in found]
    named: list[StudyRun] = []
    for run, probes, given in found:
        name, above = run.name, given.resolve()
        if names.count(name) > 1:
            while above.name in (RUN, run.name):
                above = above.parent
            name = f"{above.name}/{run.name}"
        if any(other.name == name for other in named):
            name = str(run.folder or name)
        ordered = sorted(probes, key=lambda probe: (probe.name != PROBE, probe.name, probe.task))
        named.append(replace(run, name=name, probes=ordered))
    return named
