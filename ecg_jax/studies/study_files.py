"""One run of a study and its probes, as their files tell them.

Nothing here needs a device, a store, or a checkpoint that is still there: a run is what its config, selection, log
and probes say of it.
"""

import functools
import hashlib
import json
import math
import zipfile
import zlib
from dataclasses import dataclass, field
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
SWEEP, RESULTS, PREDICTIONS = "sweep.json", "results.json", "predictions.npz"
_CONFIG, _CONTRACT = "config.json", "preprocessing.json"


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
        path = self.folder / PREDICTIONS
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


class Place(NamedTuple):
    """Where a run may lie: its workdir, the folder that a sweep gave it, and what the sweep declared."""

    name: str
    folder: Path
    of_sweep: Path | None
    declared: dict[str, Any] | None


def is_run(folder: Path) -> bool:
    return (folder / _CONFIG).is_file() and (folder / _CONTRACT).is_file()


def subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def read_run(place: Place) -> StudyRun:
    """A run without its probes.

    Raises:
        UserError: a file of it is damaged.
    """
    folder, begun = place.folder, is_run(place.folder)
    config = read_json(folder / _CONFIG) if begun else place.declared["config"]
    source = folder / _CONFIG if begun else place.of_sweep.parent / SWEEP
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


def _attempts(place: Place) -> dict[str, Any]:
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


def probes_of(place: Place) -> list[StudyProbe]:
    """Finished probes that a sweep made of a run."""
    if place.of_sweep is None:
        return []
    top = place.of_sweep
    found = [(path, "probe") for path in _finished_probes(top / "probe")]
    for inside in subfolders(top / "probes") if (top / "probes").is_dir() else []:
        found += [(path, path.relative_to(top / "probes").as_posix()) for path in _finished_probes(inside)]
    return [read_probe(path, name) for path, name in found]


def _finished_probes(folder: Path, depth: int = 0) -> list[Path]:
    """A probe's workdir, or those in it: of stores, of tasks."""
    if not folder.is_dir():
        return []
    if (folder / RESULTS).is_file():
        return [folder]
    return (
        [path for inside in subfolders(folder) for path in _finished_probes(inside, depth + 1)]
        if depth < 3
        else []
    )


def read_probe(folder: Path, name: str) -> StudyProbe:
    path = folder / RESULTS
    results = read_json(path)
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


def probed_run(probe: StudyProbe) -> Path | None:
    """Where the run that was probed lies, or lay."""
    checkpoint = probe.results["checkpoint"]
    return None if checkpoint is None else Path(checkpoint["run"])


def without_workdir(probe: StudyProbe, name: str) -> StudyRun:
    """What a probe tells of a run that is not there (any more)."""
    config = probe.results["pretraining_config"] or {}
    gone = probed_run(probe)
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
