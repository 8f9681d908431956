"""The runs of a study as they lie on the disk, with their probes, as `scaling`, `efficiency` and `report` read them.

Nothing here needs a device, a store, or a checkpoint that is still there: a run is what its config, selection, log
and probes say of it.
"""

import functools
import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ecg_jax.data.selection import SELECTION_NAME, Selection, read_selection
from ecg_jax.data.store import SYNTHETIC
from ecg_jax.errors import UserError
from ecg_jax.run_setup import IMPORT_NAME
from ecg_jax.run_starts import read_starts
from ecg_jax.studies.flops import training_flops
from ecg_jax.sweep_folder import read_status, spent
from ecg_jax.training.checkpoint import finished_steps
from ecg_jax.training.metric_writers import read_log, read_warnings

FINISHED = "finished"
_SWEEP, _CONFIG, _CONTRACT = "sweep.json", "config.json", "preprocessing.json"
_RESULTS, _PREDICTIONS = "results.json", "predictions.npz"
_DEPTH = 4  # folders below a given one: of sweeps or runs, a run's probes, their stores, their tasks


@dataclass(frozen=True)
class StudyProbe:
    """A finished probe of one task.

    Attributes:
        folder: its workdir.
        name: "probe", or the path under `probes/`, or its folder's name; without the task's own folder.
        task, mode, metric: as in its results; the metric is "macro_auroc" or "mae".
        error: 1 - macro AUROC, or the mean absolute error in standard deviations; NaN where it is undefined.
        step: of the checkpoint that was probed.
        results: what results.json holds.
    """

    folder: Path
    name: str
    task: str
    mode: str
    metric: str
    error: float
    step: int | None
    results: dict[str, Any]

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        path = self.folder / _PREDICTIONS
        try:
            with np.load(path) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is missing or damaged ({error}); run the probe again") from error

    def predictions(self) -> dict[str, np.ndarray]:
        """The arrays of predictions.npz, read when they are first asked for.

        Raises:
            UserError: the file is missing or damaged.
        """
        return self._arrays

    @property
    def tested_on(self) -> str:
        """Fingerprint of the store whose recordings were tested on."""
        results = self.results
        return (results["test_store"] or results["store"])["fingerprint"]


@dataclass(frozen=True)
class StudyRun:
    """A pretraining run, finished or not, with its finished probes.

    Attributes:
        name: unique among those found: the path relative to the folder given.
        folder: the workdir of pretraining; None where only probes are there.
        group: of the sweep; else objective, backbone and a digest of the config without its seed.
        config: config.json, nested; of a sweep's run that has not begun as it was declared.
        objective, backbone: their names; "" where only a supervised probe is there.
        seed: of pretraining.
        recordings: that it was trained on; None where its selection is not known.
        rung: of the ladder, or the number that was asked for.
        step, steps: the last one logged or saved, and how many the run has; None where they are not known.
        windows: crops that it was trained on so far, step * batch size.
        train_flops: operations of `windows` by formula (spec §8), forward and backward, without validation.
        seconds: of pretraining, all attempts whose length is known; None: no measurement.
        unmeasured: attempts that were killed, whose seconds are in no figure.
        devices, device_kind: of the last attempt.
        log: the logged steps.
        val_loss, best_val_loss: the last and the lowest logged one.
        warnings: (step, sentence) of what looked like a collapse.
        fingerprints: "store", "selection", and "validation" (of the held-out recordings); None where unknown.
        versions: of packages, by name.
        revision, dirty: git revision of the package's checkout at the last attempt, and whether files differed from it;
            None where it is not known.
        parameters: trainable ones of the whole objective.
        synthetic: whether any of its recordings were synthetic; None where its stores are not known.
        state: "finished", or how far it is.
        probes: in the order of their names and tasks.
    """

    name: str
    folder: Path | None
    group: str
    config: dict[str, Any]
    objective: str
    backbone: str
    seed: int | None
    recordings: int | None
    rung: str
    step: int | None
    steps: int | None
    windows: int | None
    train_flops: float | None
    seconds: float | None
    unmeasured: int
    devices: int | None
    device_kind: str | None
    log: list[dict[str, Any]] = field(repr=False)
    val_loss: float | None
    best_val_loss: float | None
    warnings: list[tuple[int, str]] = field(repr=False)
    fingerprints: dict[str, str | None]
    versions: dict[str, str]
    revision: str | None
    dirty: bool | None
    parameters: int | None
    synthetic: bool | None
    state: str
    probes: list[StudyProbe] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether pretraining is."""
        return self.state == FINISHED

    @property
    def device_hours(self) -> float | None:
        """Seconds of pretraining times devices, in hours; None where either is not known."""
        if self.seconds is None or self.devices is None:
            return None
        return self.seconds * self.devices / 3600


class _Place(NamedTuple):
    """Where a run may lie: its workdir, the folder that a sweep gave it, and what the sweep declared."""

    name: str
    folder: Path
    of_sweep: Path | None
    declared: dict[str, Any] | None


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
    places: dict[Path, tuple[_Place, Path]] = {}
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
        resolved: (_read_run(place), given, _probes_of(place)) for resolved, (place, given) in places.items()
    }
    taken = {probe.folder.resolve() for _, _, own in runs.values() for probe in own}
    for path, given in probes:
        if path.resolve() in taken:
            continue
        taken.add(path.resolve())
        probe = _read_probe(path, path.name)
        probed = _probed_run(probe)
        key = probed.resolve() if probed else path.resolve()
        if key not in runs:
            if probed and _is_run(probed):
                run = _read_run(_Place(_relative(probed, given), probed, None, None))
            else:
                run = _without_workdir(probe, _relative(path, given))
            runs[key] = (run, given, [])
        runs[key][2].append(probe)
    return _named(list(runs.values()))


def _look(given: Path) -> tuple[list[_Place], list[Path]]:
    """Runs and probes in a folder."""
    places: list[_Place] = []
    probes: list[Path] = []

    def look(folder: Path, depth: int) -> None:
        if (folder / _SWEEP).is_file():
            places.extend(_of_sweep(folder, given))
        elif _is_run(folder):
            places.append(_Place(_relative(folder, given), folder, None, None))
        elif _is_run(folder / "run"):
            places.append(_Place(_relative(folder, given), folder / "run", folder, None))
        elif (folder / _RESULTS).is_file() and (folder / _PREDICTIONS).is_file():
            probes.append(folder)
        elif depth < _DEPTH:
            for inside in _subfolders(folder):
                look(inside, depth + 1)

    look(given, 0)
    return places, probes


def _of_sweep(folder: Path, given: Path) -> Iterator[_Place]:
    path = folder / _SWEEP
    declared = _read_json(path)
    try:
        runs = {name: (run["group"], run["config"]["seed"]) and run for name, run in declared["runs"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; run the sweep again, which writes it") from error
    prefix = "" if folder == given else f"{_relative(folder, given)}/"
    for name, run in runs.items():
        yield _Place(f"{prefix}{name}", folder / name / "run", folder / name, run)


def _relative(folder: Path, given: Path) -> str:
    if folder == given or given not in folder.parents:
        return folder.resolve().name
    return folder.relative_to(given).as_posix()


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error


def _is_run(folder: Path) -> bool:
    return (folder / _CONFIG).is_file() and (folder / _CONTRACT).is_file()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def _read_run(place: _Place) -> StudyRun:
    """A run without its probes.

    Raises:
        UserError: a file of it is damaged.
    """
    folder, begun = place.folder, _is_run(place.folder)
    config = _read_json(folder / _CONFIG) if begun else place.declared["config"]
    source = folder / _CONFIG if begun else place.of_sweep.parent / _SWEEP
    selection = read_selection(folder / SELECTION_NAME) if (folder / SELECTION_NAME).exists() else None
    log = read_log(folder)
    try:
        objective, backbone = config["objective"]["name"], config["model"]["backbone"]
        seed, batch, data = config["seed"], config["batch_size"], config["data"]
        epochs, steps = config["epochs"], config["steps"] or None
        rung = _rung(data, selection)
    except (KeyError, TypeError) as error:
        raise UserError(f"{source} is damaged: it lacks the field {error}; is it a run's config?") from error
    recordings = None if selection is None else len(selection.train)
    if steps is None and recordings is not None:
        steps = math.ceil(epochs * recordings / batch)
    step = max([*finished_steps(folder)[-1:], *(entry["step"] for entry in log[-1:])], default=None)
    losses = [entry["val_loss"] for entry in log if entry.get("val_loss") is not None]
    windows = None if step is None else step * batch
    cost = _flops(config)
    declared = place.declared
    return StudyRun(
        name=place.name,
        folder=folder,
        group=declared["group"] if declared else _group(config),
        config=config,
        objective=objective,
        backbone=backbone,
        seed=seed,
        recordings=recordings,
        rung=rung,
        step=step,
        steps=steps,
        windows=windows,
        train_flops=None if cost is None or windows is None else float(cost) * windows,
        log=log,
        val_loss=losses[-1] if losses else None,
        best_val_loss=min(losses, default=None),
        warnings=read_warnings(folder),
        fingerprints={
            "store": config.get("store_fingerprint"),
            "selection": None if selection is None else selection.fingerprint,
            "validation": None if selection is None else _validation(selection),
        },
        synthetic=None if selection is None else any(s.corpus == SYNTHETIC for s in selection.sources),
        state=_state(folder, step, steps, begun, log),
        **_attempts(place),
    )


def _state(folder: Path, step: int | None, steps: int | None, begun: bool, log: list[dict]) -> str:
    if (folder / IMPORT_NAME).exists():
        return "imported, so that nothing is known of its pretraining"
    if not begun or step is None:
        return "not begun" if not begun else "before its first logged step"
    if steps is None:
        return f"at step {step}; how many it has is not known, as it has no {SELECTION_NAME}"
    saved = finished_steps(folder)
    # Checkpoints may have been removed to save space; the last step is logged either way.
    reached = [entry["step"] for entry in log[-1:]] + saved[-1:]
    return FINISHED if reached and min(reached) >= steps else f"at step {step} of {steps}"


def _rung(data: dict[str, Any], selection: Selection | None) -> str:
    if selection is not None:
        rule = selection.rule
        return rule.rung or str(rule.max_records)
    # Declared configs, and those of runs begun before there were selections, which had numbers only.
    return str(data["max_records"] or data["rung"])


def _validation(selection: Selection) -> str:
    digest = hashlib.sha256()
    for number, source in enumerate(selection.sources):
        rows = selection.rows_of(number)[1]
        if len(rows):
            digest.update(f"{source.fingerprint} {len(rows)}\n".encode() + rows.astype("<i8").tobytes())
    return digest.hexdigest()


def _group(config: dict[str, Any]) -> str:
    free = ("seed", "store", "store_fingerprint", "selection_fingerprint", "targets_fingerprint", "origin")
    text = json.dumps({name: value for name, value in config.items() if name not in free}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{config['objective']['name']}-{config['model']['backbone']}-{digest}"


def _flops(config: dict[str, Any]) -> int | None:
    """Of one window; None for a config from before a field that the formula needs, or an objective without formula."""
    try:
        return training_flops(ConfigDict(config))
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _attempts(place: _Place) -> dict[str, Any]:
    """What is known of the processes that worked on a run."""
    starts = read_starts(place.folder)
    found: dict[str, Any] = {
        "seconds": None, "unmeasured": 0, "devices": None, "device_kind": None,
        "versions": {}, "revision": None, "dirty": None, "parameters": None,
    }  # fmt: skip
    if starts:
        last = starts[-1]
        measured = [start["seconds"] for start in starts if start["seconds"] is not None]
        git = last["git"] or {"revision": None, "dirty": None}
        found = {
            "seconds": sum(measured) if measured else None,
            "unmeasured": len(starts) - len(measured),
            **git,
            **{name: last[name] for name in ("devices", "device_kind", "versions", "parameters")},
        }
    if place.of_sweep is not None:
        seconds = spent(place.of_sweep)["pretrain"]
        if seconds is not None:
            found["seconds"] = seconds
        status = read_status(place.of_sweep)
        if status is not None and not starts:
            found |= {"parameters": status["parameters"], "versions": status["versions"]}
            if status["device"]:
                count, _, kind = status["device"].partition(" x ")
                found |= {"devices": int(count), "device_kind": kind}
    return found


def _probes_of(place: _Place) -> list[StudyProbe]:
    """Finished probes that a sweep made of a run."""
    if place.of_sweep is None:
        return []
    top = place.of_sweep
    found = [(path, "probe") for path in _finished_probes(top / "probe")]
    for inside in _subfolders(top / "probes") if (top / "probes").is_dir() else []:
        found += [(path, path.relative_to(top / "probes").as_posix()) for path in _finished_probes(inside)]
    return [_read_probe(path, name) for path, name in found]


def _finished_probes(folder: Path, depth: int = 0) -> list[Path]:
    """A probe's workdir, or those in it: of stores, of tasks."""
    if not folder.is_dir():
        return []
    if (folder / _RESULTS).is_file():
        return [folder]
    return (
        [path for inside in _subfolders(folder) for path in _finished_probes(inside, depth + 1)]
        if depth < 3
        else []
    )


def _read_probe(folder: Path, name: str) -> StudyProbe:
    path = folder / _RESULTS
    results = _read_json(path)
    try:
        task, metric = results["task"], results["metric"]
        value = results[metric]
        probed = results["checkpoint"]
        (results["test_store"] or results["store"])["fingerprint"], results["bootstrap"]["undefined"]
        error = math.nan if value is None else 1 - value if metric == "macro_auroc" else value
        step = None if probed is None else probed["step"]
        mode = results["mode"]
        if folder.name == task and name != "probe":
            name = name.removesuffix(task).rstrip("/") or folder.parent.name
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} lacks the field {error}; run its probe again with this version of ecg_jax"
        ) from error
    return StudyProbe(folder, name, task, mode, metric, float(error), step, results)


def _probed_run(probe: StudyProbe) -> Path | None:
    """Where the run that was probed lies, or lay."""
    checkpoint = probe.results["checkpoint"]
    return None if checkpoint is None else Path(checkpoint["run"])


def _without_workdir(probe: StudyProbe, name: str) -> StudyRun:
    """What a probe tells of a run that is not there (any more)."""
    config = probe.results["pretraining_config"] or {}
    gone = _probed_run(probe)
    return StudyRun(
        name=gone.name if gone else name,
        folder=None,
        group=_group(config) if config else name,
        config=config,
        objective=config["objective"]["name"] if config else "",
        backbone=config["model"]["backbone"] if config else "",
        seed=config["seed"] if config else None,
        recordings=None,
        rung=_rung(config["data"], None) if config else "",
        step=probe.step,
        steps=None,
        windows=None,
        train_flops=None,
        seconds=None,
        unmeasured=0,
        devices=None,
        device_kind=None,
        log=[],
        val_loss=None,
        best_val_loss=None,
        warnings=[],
        fingerprints={
            "store": config.get("store_fingerprint"),
            "selection": config.get("selection_fingerprint"),
            "validation": None,
        },
        versions=probe.results["versions"],
        revision=None,
        dirty=None,
        parameters=None,
        synthetic=None,
        state=f"known by its probe only: its folder {gone} is gone" if gone else "known by its probe only",
    )


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
