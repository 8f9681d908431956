"""Which runs of a scaling study belong to one curve.

Those that differ in nothing but the seed and the recordings. A field of the config that differs between runs of the
same size, or whose values come back at other sizes, parts curves (an ablation); one that moves on with the size stays
in the curve and is named, since its effect cannot be told from that of the size.
"""

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ecg_jax.config_flags import load_config, with_argument
from ecg_jax.errors import UserError
from ecg_jax.models.encoder import BACKBONES
from ecg_jax.run_setup import CONFIGS, flatten
from ecg_jax.studies.power_law import rungs_of
from ecg_jax.studies.study_runs import StudyRun

# What makes no other run, or leads to what is compared itself: the recordings.
_IGNORED = {
    "seed", "store", "selection_fingerprint", "targets_fingerprint", "data.rung", "data.max_records",
    "data.selection", "log_every", "checkpoint_every", "keep_latest", "keep_best", "tensorboard", "stall_timeout_s",
    "data.read_threads", "data.prefetch", "model.conv", "model.remat", "stop_on_collapse",
}  # fmt: skip
# What an input is: losses and test records of runs that differ in it are not of one curve.
_INPUT = ("data.window_s", "data.rate_hz", "data.normalisation", "data.leads")


@dataclass(frozen=True)
class Family:
    """Runs that differ in their seed and their recordings.

    Attributes:
        label: objective, backbone, and the settings in which it differs from other families of the two.
        settings: those.
        runs: by size, then seed.
        moving: fields that change with the size.
    """

    label: str
    objective: str
    backbone: str
    settings: dict[str, Any]
    runs: tuple[StudyRun, ...]
    moving: tuple[str, ...]


def usable(runs: Sequence[StudyRun]) -> tuple[list[StudyRun], dict[str, str]]:
    """Finished runs of which the size is known; and name -> why not, of the others."""
    chosen, left_out = [], {}
    for run in runs:
        if not run.finished:
            left_out[run.name] = run.state
        elif run.recordings is None:
            left_out[run.name] = "it has no selection.json, so its number of recordings is not known"
        else:
            chosen.append(run)
    return chosen, left_out


def families(runs: Sequence[StudyRun]) -> list[Family]:
    """Groups runs, in the order of their first ones.

    Args:
        runs: from `usable`.

    Raises:
        UserError: the input of runs moves with their size, or two runs are the same; names them.
    """
    kinds: dict[tuple[str, str], list[StudyRun]] = {}
    for run in runs:
        kinds.setdefault((run.objective, run.backbone), []).append(run)
    return [
        family for (objective, backbone), own in kinds.items() for family in _parted(objective, backbone, own)
    ]


def _fields(run: StudyRun) -> dict[str, Any]:
    """What makes it another run than others: fields from after its time at their defaults, as it had them."""
    shipped = run.objective in CONFIGS and run.backbone in BACKBONES
    declared = _declared(run.objective, run.backbone) if shipped else {}
    fields = {
        name: _hashable(value)
        for name, value in (declared | flatten(run.config)).items()
        if name not in _IGNORED and not name.startswith(("monitor.", "origin"))
    }
    # These two are folders: what is in them counts, and that is known by fingerprints.
    if fields.get("init.checkpoint") and "origin" in run.config:
        fields["init.checkpoint"] = _origin(run.config["origin"])
    if fields.get("data.targets") and "targets_fingerprint" in run.config:
        fields["data.targets"] = run.config["targets_fingerprint"]
    return fields


@functools.cache
def _declared(objective: str, backbone: str) -> dict[str, Any]:
    """The shipped config of an objective, as config.json would hold it."""
    config = load_config(with_argument(CONFIGS[objective], backbone=backbone))
    return flatten(json.loads(json.dumps(config.to_dict())))


def _origin(begun_with: dict[str, Any] | None) -> tuple | None:
    """What a run began with, see `run_origin.describe_run`, whatever its seed and wherever it lies."""
    if begun_with is None:
        return None
    names = ("store_fingerprint", "selection_fingerprint", "step", "window_samples")
    return (*(begun_with[name] for name in names), _origin(begun_with["origin"]))


def _parted(objective: str, backbone: str, runs: list[StudyRun]) -> list[Family]:
    """Runs of one objective and backbone, parted by what differs at one size or comes back at others."""
    fields = [_fields(run) for run in runs]
    rungs = rungs_of([run.recordings for run in runs]).tolist()
    names = list(dict.fromkeys(name for each in fields for name in each))
    values = {name: [each.get(name) for each in fields] for name in names}
    differing = [name for name in names if len(set(values[name])) > 1]
    parting: list[str] = []
    partitions: list[list[int]] = []
    for name in differing:
        if _moves_on(rungs, values[name]):
            continue
        order = list(dict.fromkeys(values[name]))
        partition = [order.index(value) for value in values[name]]
        if partition not in partitions:  # fields that go together part once
            parting.append(name)
            partitions.append(partition)
    found: dict[tuple, list[int]] = {}
    for i in range(len(runs)):
        found.setdefault(tuple(values[name][i] for name in parting), []).append(i)
    made = []
    for members in found.values():
        own = sorted((runs[i] for i in members), key=lambda run: (run.recordings, run.seed))
        settings = {name: fields[members[0]].get(name) for name in parting}
        moving = [name for name in differing if len({values[name][i] for i in members}) > 1]
        _check(own, moving)
        shown = [f"{name.split('.')[-1]}={_shown(name, value, own[0])}" for name, value in settings.items()]
        label = ", ".join([f"{objective} {backbone}", *shown])
        if any(other.label == label for other in made):  # two stores of one name
            label += f" ({own[0].name})"
        made.append(Family(label, objective, backbone, settings, tuple(own), tuple(moving)))
    return made


def _moves_on(rungs: Sequence[int], values: Sequence[Any]) -> bool:
    """Whether a field has one value at each size, none of which comes back once it has changed.

    One value for each size is not enough: of an ablation whose sizes do not coincide (16 at 100 and 300 recordings, 32
    at 170 and 500) each size has one too.
    """
    pairs = set(zip(rungs, values, strict=True))
    if len(pairs) > len(set(rungs)):
        return False
    in_order = [value for _, value in sorted(pairs, key=lambda pair: pair[0])]
    return sum(a != b for a, b in itertools.pairwise(in_order)) == len(set(values)) - 1


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _shown(name: str, value: Any, run: StudyRun) -> Any:
    """A value as labels have it."""
    if name == "store_fingerprint":
        return _stores(run.config["store"])
    if name == "init.checkpoint":
        if not value:
            return "none"
        begun_with = run.config.get("origin")
        if begun_with is None or begun_with["store"] is None:
            return run.config["init"]["checkpoint"]
        return f"{_stores(begun_with['store'])} at step {begun_with['step']}"
    return run.config["data"]["targets"] or "none" if name == "data.targets" else value


def _stores(paths: str) -> str:
    return "+".join(path.rstrip("/").split("/")[-1] for path in paths.split(","))


def _check(runs: list[StudyRun], moving: Sequence[str]) -> None:
    for name in _INPUT:
        if name in moving:
            values = [_fields(run)[name] for run in runs]
            first, other = next((runs[0], i) for i, value in enumerate(values) if value != values[0])
            raise UserError(
                f"the runs {first.name} and {runs[other].name} would be points of one curve, but differ in {name} "
                f"({values[0]} and {values[other]}), so that losses and test records are not the same; give --runs of "
                "one input only"
            )
    seen: dict[tuple[int, int | None], StudyRun] = {}
    for rung, run in zip(rungs_of([run.recordings for run in runs]), runs, strict=True):
        twin = seen.setdefault((int(rung), run.seed), run)
        if twin is not run:
            raise UserError(
                f"the runs {twin.name} and {run.name} have the same settings, size and seed, so that one of them would "
                "count twice; give --runs with one of them"
            )
