"""The runs of a study with their probes, as `scaling`, `efficiency` and `report` find them on the disk."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ecg_jax.errors import UserError
from ecg_jax.studies.study_files import (
    PREDICTIONS,
    RESULTS,
    SWEEP,
    Place,
    StudyProbe,
    StudyRun,
    is_run,
    probed_run,
    probes_of,
    read_json,
    read_probe,
    read_run,
    subfolders,
    without_workdir,
)

__all__ = ["StudyProbe", "StudyRun", "find_runs"]

_DEPTH = 4  # folders below a given one: of sweeps or runs, a run's probes, their stores, their tasks


def find_runs(folders: Sequence[str | Path]) -> list[StudyRun]:
    """Every run in these folders, with the probes in them.

    Args:
        folders: each is a sweep's, a pretraining run's, a probe's, or a folder of such.

    Returns:
        Runs in the order of the folders, then by name; those that are not finished too.

    Raises:
        UserError: nothing is found, or a file is damaged; names it.
    """
    if not folders:
        raise UserError("no folder is given; name the folder of a sweep, or of runs")
    places: dict[Path, tuple[Place, Path]] = {}
    probes: list[tuple[Path, Path]] = []
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
        probes += [(path, given) for path in found_probes]
    runs = {
        resolved: (read_run(place), given, probes_of(place)) for resolved, (place, given) in places.items()
    }
    taken = {probe.folder.resolve() for _, _, own in runs.values() for probe in own}
    for path, given in probes:
        if path.resolve() in taken:
            continue
        taken.add(path.resolve())
        probe = read_probe(path, path.name)
        probed = probed_run(probe)
        key = probed.resolve() if probed else path.resolve()
        if key not in runs:
            if probed and is_run(probed):
                run = read_run(Place(_relative(probed, given), probed, None, None))
            else:
                run = without_workdir(probe, _relative(path, given))
            runs[key] = (run, given, [])
        runs[key][2].append(probe)
    return _named(list(runs.values()))


def _look(given: Path) -> tuple[list[Place], list[Path]]:
    """Runs and probes in a folder."""
    places: list[Place] = []
    probes: list[Path] = []

    def look(folder: Path, depth: int) -> None:
        if (folder / SWEEP).is_file():
            places.extend(_of_sweep(folder, given))
        elif is_run(folder):
            places.append(Place(_relative(folder, given), folder, None, None))
        elif is_run(folder / "run"):
            places.append(Place(_relative(folder, given), folder / "run", folder, None))
        elif (folder / RESULTS).is_file() and (folder / PREDICTIONS).is_file():
            probes.append(folder)
        elif depth < _DEPTH:
            for inside in subfolders(folder):
                look(inside, depth + 1)

    look(given, 0)
    return places, probes


def _of_sweep(folder: Path, given: Path) -> Iterator[Place]:
    path = folder / SWEEP
    declared = read_json(path)
    try:
        runs = {name: (run["group"], run["config"]["seed"]) and run for name, run in declared["runs"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; run the sweep again, which writes it") from error
    prefix = "" if folder == given else f"{_relative(folder, given)}/"
    for name, run in runs.items():
        yield Place(f"{prefix}{name}", folder / name / "run", folder / name, run)


def _relative(folder: Path, given: Path) -> str:
    if folder == given or given not in folder.parents:
        return folder.resolve().name
    return folder.relative_to(given).as_posix()


def _named(found: list[tuple[StudyRun, Path, list[StudyProbe]]]) -> list[StudyRun]:
    """Runs with their probes, and with names of their own: that of the folder given is added where two share one."""
    names = [run.name for run, _, _ in found]
    named: list[StudyRun] = []
    for run, given, probes in found:
        name = run.name if names.count(run.name) == 1 else f"{given.resolve().name}/{run.name}"
        if any(other.name == name for other in named):
            name = str(run.folder or name)
        ordered = sorted(probes, key=lambda probe: (probe.name != "probe", probe.name, probe.task))
        named.append(replace(run, name=name, probes=ordered))
    return named
