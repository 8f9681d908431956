"""One run of a study, as its files tell it.

Nothing here needs a device, a store, or a checkpoint that is still there: a run is what its config, selection, log
and probes say of it.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ecg_jax.data.selection import SELECTION_NAME, Selection, read_selection
from ecg_jax.data.store import SYNTHETIC
from ecg_jax.errors import UserError
from ecg_jax.files import read_object
from ecg_jax.json_fields import (
    ANY_TEXT,
    FLAG,
    OBJECT,
    TEXT,
    Kind,
    list_of,
    number,
    object_of,
    or_null,
    whole,
    wrong_field,
)
from ecg_jax.run_setup import IMPORT_NAME
from ecg_jax.run_starts import Damaged, cost_of, read_starts
from ecg_jax.studies.flops import training_flops
from ecg_jax.studies.report.kinds import SWEEP, is_run
from ecg_jax.studies.report.read import RESULTS
from ecg_jax.studies.study_probes import StudyProbe, probed_run
from ecg_jax.sweep_folder import STATUS, read_status, spent
from ecg_jax.training.checkpoint import finished_steps
from ecg_jax.training.metric_writers import LOG_NAME, read_log, read_warnings

FINISHED = "finished"
_CONFIG = "config.json"

_ADVICE = "is it a run's config?"
_SIZE = whole(1)
# What studies read of a config.
_FIELDS: dict[str, Kind] = {
    "objective.name": TEXT, "model.backbone": TEXT, "seed": whole(0), "batch_size": _SIZE,
    "epochs": number(0, above=True), "steps": or_null(whole(0)), "data": OBJECT,
}  # fmt: skip
# Fields that one objective or backbone has, or that came with a later version.
_FURTHER: dict[str, Kind] = {
    "store": or_null(ANY_TEXT), "init.checkpoint": ANY_TEXT, "data.targets": ANY_TEXT,
    **dict.fromkeys(("store_fingerprint", "selection_fingerprint", "targets_fingerprint"), or_null(TEXT)),
    "data.max_records": whole(0), "data.rung": TEXT,
    "data.window_s": number(0, 1e6, above=True), "data.rate_hz": number(0, 1e6, above=True),
    **{f"model.{name}": _SIZE for name in ("width", "layers", "ff_width", "heads", "kernel", "group_width", "l_max")},
    "model.filters": list_of(_SIZE), "model.blocks": list_of(_SIZE), "model.bidirectional": FLAG,
    "objective.steps_ahead": _SIZE, "objective.top_k": _SIZE, "objective.idle_logits": whole(0),
    "origin": or_null(OBJECT),
}  # fmt: skip
# Of the run that a run begins with, see `run_origin.describe_run`.
_ORIGIN: dict[str, Kind] = {
    "store": or_null(TEXT), "store_fingerprint": or_null(TEXT), "selection_fingerprint": or_null(TEXT),
    "step": whole(0), "window_samples": _SIZE, "origin": or_null(OBJECT),
}  # fmt: skip
# What status.json says of a run from before starts were noted, as `sweep_run` writes it.
_DEVICE = Kind("a number x a kind", lambda value: bool(re.fullmatch(r"[1-9]\d{0,8} x .+", str(value))))
_STATUS: dict[str, Kind] = {"versions": object_of(TEXT), "device": or_null(_DEVICE)}


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
        device_hours: seconds times devices over all attempts, in hours; None unless every attempt was measured.
        devices, device_kind: of the last attempt.
        log: the logged steps.
        val_loss: at the last step; of a run that is not finished the last one logged. None where it is not known.
        best_val_loss: the lowest one logged.
        warnings: (step, sentence) of what looked like a collapse.
        fingerprints: "store", "selection", and "validation" (of the held-out recordings); None where unknown.
        versions: of packages, by name.
        revision, dirty: git revision of the package's checkout at the last attempt, and whether files differed from it;
            None where it is not known.
        parameters: trainable ones of the whole objective.
        synthetic: whether any of its recordings were synthetic; None where its stores are not known.
        state: "finished", or how far it is.
        remarks: sentences on what of it is not known, or was left out, and why.
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
    device_hours: float | None
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
    remarks: tuple[str, ...] = ()
    probes: list[StudyProbe] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether pretraining is."""
        return self.state == FINISHED

    @property
    def windows_per_s(self) -> float | None:
        """All windows over all seconds; None where `device_hours` is."""
        return self.windows / self.seconds if self.device_hours and self.windows else None


class Place(NamedTuple):
    """Where a run may lie: its workdir, the folder that a sweep gave it, and what the sweep declared."""

    name: str
    folder: Path
    of_sweep: Path | None
    declared: dict[str, Any] | None


def read_run(place: Place) -> StudyRun:
    """A run without its probes.

    Raises:
        UserError: a file of it is damaged.
    """
    folder, begun = place.folder, is_run(place.folder)
    config = read_object(folder / _CONFIG) if begun else place.declared["config"]
    source = folder / _CONFIG if begun else place.of_sweep.parent / SWEEP
    selection = read_selection(folder / SELECTION_NAME) if (folder / SELECTION_NAME).exists() else None
    log = read_log(folder)
    _check(source, config, "" if begun else f"runs.{place.of_sweep.name}.config.")
    objective, backbone = config["objective"]["name"], config["model"]["backbone"]
    batch, epochs, steps = config["batch_size"], config["epochs"], config["steps"] or None
    try:
        rung = _rung(config["data"], selection)
    except KeyError as error:
        raise UserError(f"{source} is damaged: it lacks the field data.{error.args[0]}; {_ADVICE}") from error
    recordings = None if selection is None else len(selection.train)
    if steps is None and recordings is not None:
        steps = math.ceil(epochs * recordings / batch)
    # The last checkpoint may have been removed to save space, and a log may be gone: either says how far it came.
    step = max([*finished_steps(folder)[-1:], *(entry["step"] for entry in log[-1:])], default=None)
    state = _state(folder, step, steps, begun)
    val_loss, best_val_loss, no_loss = _losses(log, step if state == FINISHED else None)
    windows = None if step is None else step * batch
    cost, no_cost = _flops(config)
    attempts, unknown_attempts = _attempts(place)
    declared = place.declared
    return StudyRun(
        name=place.name,
        folder=folder,
        group=declared["group"] if declared else _group(config),
        config=config,
        objective=objective,
        backbone=backbone,
        seed=config["seed"],
        recordings=recordings,
        rung=rung,
        step=step,
        steps=steps,
        windows=windows,
        train_flops=None if cost is None or windows is None else float(cost) * windows,
        log=log,
        val_loss=val_loss,
        best_val_loss=best_val_loss,
        warnings=read_warnings(folder),
        fingerprints={
            "store": config.get("store_fingerprint"),
            "selection": None if selection is None else selection.fingerprint,
            "validation": None if selection is None else _validation(selection),
        },
        synthetic=None if selection is None else any(s.corpus == SYNTHETIC for s in selection.sources),
        state=state,
        remarks=tuple(filter(None, (no_loss, no_cost, unknown_attempts))),
        **attempts,
    )


def _check(source: Path, config: Any, where: str = "") -> None:
    """Refuses what is no config of a run, or has a field that it cannot have."""
    wrong = wrong_field(config, _FIELDS, where)
    if not wrong:
        # One codebook has a number, several have a list.
        codes = {"objective.codes": list_of(_SIZE) if config["objective"]["name"] == "hubertpp" else _SIZE}
        wrong = wrong_field(config, _FURTHER | codes, where, optional=True)
    begun_with, inner = {} if wrong else config, where
    while not wrong and (begun_with := begun_with.get("origin")) is not None:
        inner += "origin."
        wrong = wrong_field(begun_with, _ORIGIN, inner)
    if wrong:
        raise UserError(f"{source} is damaged: {wrong}; {_ADVICE}")


def _losses(log: list[dict[str, Any]], end: int | None) -> tuple[float | None, float | None, str]:
    """The validation loss at step `end`, or the last one logged if that is None; the lowest one; what is not known."""
    logged = [(entry["step"], entry["val_loss"]) for entry in log if entry.get("val_loss") is not None]
    best = min((loss for _, loss in logged if not math.isnan(loss)), default=None)
    last = [loss for step, loss in logged if end is None or step == end]
    if last or end is None:
        return (last[-1] if last else None), best, ""
    remark = f"its validation loss is not known: {LOG_NAME} has none at step {end}, where the run ends"
    return None, best, remark


def _state(folder: Path, step: int | None, steps: int | None, begun: bool) -> str:
    if (folder / IMPORT_NAME).exists():
        return "imported, so that nothing is known of its pretraining"
    if not begun or step is None:
        return "not begun" if not begun else "before its first logged step"
    if steps is None:
        return f"at step {step}; how many it has is not known, as it has no {SELECTION_NAME}"
    return FINISHED if step >= steps else f"at step {step} of {steps}"


def _rung(data: dict[str, Any], selection: Selection | None) -> str:
    if selection is not None:
        rule = selection.rule
        return rule.rung or str(rule.max_records)
    # Declared configs, and those of runs begun before there were selections, which had numbers only.
    return str(data["max_records"] or data["rung"])


def _validation(selection: Selection) -> str:
    digest = hashlib.sha256()
    for i, source in enumerate(selection.sources):
        rows = selection.rows_of(i)[1]
        if len(rows):
            digest.update(f"{source.fingerprint} {len(rows)}\n".encode() + rows.astype("<i8").tobytes())
    return digest.hexdigest()


def _group(config: dict[str, Any]) -> str:
    free = ("seed", "store", "store_fingerprint", "selection_fingerprint", "targets_fingerprint", "origin")
    text = json.dumps({name: value for name, value in config.items() if name not in free}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{config['objective']['name']}-{config['model']['backbone']}-{digest}"


def _flops(config: dict[str, Any]) -> tuple[int | None, str]:
    """Of one window; None and why, for an objective without formula or a config from before a field of the formula."""
    try:
        return training_flops(ConfigDict(config)), ""
    except ValueError as error:
        return None, f"its operations are not known: {error}"
    except AttributeError as error:
        if not isinstance(error.obj, ConfigDict):
            raise
        return None, f"its operations are not known: its config lacks the field {error.name}"


def _attempts(place: Place) -> tuple[dict[str, Any], str]:
    """What is known of the processes that worked on a run, and what is not."""
    found: dict[str, Any] = {
        "seconds": None, "unmeasured": 0, "device_hours": None, "devices": None, "device_kind": None,
        "versions": {}, "revision": None, "dirty": None, "parameters": None,
    }  # fmt: skip
    remark = ""
    try:
        starts = read_starts(place.folder)
    except Damaged as error:
        starts, remark = [], f"what it cost is not known: {error}"
    if starts:
        last = starts[-1]
        *cost, remark = cost_of(starts)
        found |= {
            **dict(zip(("seconds", "unmeasured", "device_hours"), cost, strict=True)),
            **(last["git"] or {}),
            **{name: last[name] for name in ("devices", "device_kind", "versions", "parameters")},
        }
    elif place.of_sweep is not None:  # a run from before starts were noted
        status = read_status(place.of_sweep)
        if status is not None and (wrong := wrong_field(status, _STATUS)):
            raise UserError(f"{place.of_sweep / STATUS} is damaged: {wrong}; remove it")
        found["seconds"] = None if remark else spent(place.of_sweep)["pretrain"]
        if status is not None:
            found |= {"parameters": status["parameters"], "versions": status["versions"]}
        if status is not None and status["device"]:
            count, _, kind = status["device"].partition(" x ")
            found |= {"devices": int(count), "device_kind": kind}
            if found["seconds"]:
                found["device_hours"] = found["seconds"] * int(count) / 3600
    return found, remark


def without_workdir(probe: StudyProbe, name: str) -> StudyRun:
    """What a probe tells of a run that is not there (any more)."""
    config = probe.results["pretraining_config"] or {}
    if config:
        _check(probe.folder / RESULTS, config, "pretraining_config.")
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
        device_hours=None,
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
