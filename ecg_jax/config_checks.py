"""What a config of a pretraining run may not be."""

import math
from typing import Any

import jax
from ml_collections import ConfigDict

from ecg_jax.config_flags import closest, load_config
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.errors import UserError
from ecg_jax.models.encoder import tokens_of
from ecg_jax.models.inputs import NORMALISATIONS
from ecg_jax.objectives.masking import Masking
from ecg_jax.run_setup import CONFIGS, DTYPES, OBJECTIVES, build_objective, build_teacher, flatten

MOST_SAMPLES = 10**6  # in a window: more than an hour

_POSITIVE = (
    "batch_size", "epochs", "log_every", "checkpoint_every", "keep_latest", "optimiser.learning_rate",
    "optimiser.eps",
    "data.window_s", "data.rate_hz", "data.max_records", "data.max_val_crops", "data.prefetch",
    "model.width", "model.layers", "model.l_max", "monitor.probe_records",
)  # fmt: skip
_NOT_NEGATIVE = (
    "steps", "keep_best", "seed", "data.val_folds", "data.read_threads", "optimiser.warmup_steps",
    "optimiser.clip_norm", "optimiser.weight_decay", "optimiser.factors.head", "optimiser.factors.backbone",
    "optimiser.factors.stem", "optimiser.factors.ssm", "monitor.min_rankme", "monitor.min_feature_std",
    "monitor.min_perplexity", "monitor.max_dead_share", "monitor.probe_every",
)  # fmt: skip


def check_config(config: ConfigDict) -> None:
    """Refuses values that would fail, or mislead, later.

    Raises:
        UserError: names the field and what it may be.
    """
    _check_fields(config)
    choices = {
        "model.backbone": ("s4",),
        "precision": DTYPES,
        "data.normalisation": NORMALISATIONS,
        "optimiser.schedule": ("constant", "cosine"),
    }
    fields = flatten(config.to_dict())
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{name}={value} must be a finite number")
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            raise UserError(f"config.{name}={fields[name]!r} is unknown; known: {', '.join(allowed)}")
    for name in _POSITIVE:
        if not fields[name] > 0:
            raise UserError(f"config.{name}={fields[name]!r} must be positive")
    for name in _NOT_NEGATIVE:
        if fields[name] < 0:
            raise UserError(f"config.{name}={fields[name]!r} must not be negative")
    for name in ("optimiser.b1", "optimiser.b2"):
        if not 0 <= fields[name] < 1:
            raise UserError(f"config.{name}={fields[name]} must be at least 0 and below 1")
    samples = round(config.data.window_s * config.data.rate_hz)
    if not 4 <= samples <= MOST_SAMPLES:
        raise UserError(
            f"config.data.window_s={config.data.window_s} at config.data.rate_hz={config.data.rate_hz} makes a window "
            f"of {samples} samples; it must have between 4 and {MOST_SAMPLES}"
        )
    if config.seed >= 2**63:
        raise UserError(f"config.seed={config.seed} must be below 2^63")
    if config.model.state < 2 or config.model.state % 2:
        raise UserError(f"config.model.state={config.model.state} must be even and at least 2")
    if not 0.0 <= config.model.dropout < 1.0:
        raise UserError(f"config.model.dropout={config.model.dropout} must be at least 0 and below 1")
    _check_objective(config)
    devices = jax.device_count()
    if config.batch_size % devices:
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide over {devices} devices; use a multiple of {devices}"
        )


def _check_fields(config: ConfigDict) -> None:
    """Refuses a config whose fields are not those, or not of the types, of the shipped config of its objective."""
    fields = flatten(config.to_dict())
    name = fields.get("objective.name")
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise UserError(f"config.objective.name={name!r} is unknown; known: {', '.join(OBJECTIVES)}")
    declared = flatten(load_config(CONFIGS[name]).to_dict())
    for field in declared:
        if field not in fields:
            raise UserError(
                f"config.{field} is missing; {CONFIGS[name]} declares it, for the objective {name}"
            )
    for field, value in fields.items():
        if field not in declared:
            raise UserError(
                f"config.{field} is no field of the objective {name}, whose fields {CONFIGS[name]} declares"
                f"{closest(field, declared)}"
            )
        if value is None and field != "store":
            raise UserError(f"config.{field} is not set; every field but the store needs a value")
        if not _is_like(value, declared[field]):
            raise UserError(f"config.{field}={value!r} must be {_kind(declared[field])}")
        if _kind(value) == "a whole number" and abs(value) >= 2**31 and field != "seed":
            raise UserError(f"config.{field}={value} must be below 2^31")


def _is_like(value: Any, declared: Any) -> bool:
    if declared is None:
        return value is None or isinstance(value, str)
    if isinstance(declared, tuple):
        return isinstance(value, tuple | list) and all(_is_like(item, declared[0]) for item in value)
    if isinstance(declared, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(declared)


def _kind(declared: Any) -> str:
    if isinstance(declared, tuple):
        return "a tuple, each item " + _kind(declared[0])
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    return names.get(type(declared), "text")


def _check_objective(config: ConfigDict) -> None:
    """Refuses an objective that its config, its window or its batch cannot feed, before anything is compiled."""
    objective, samples = config.objective, round(config.data.window_s * config.data.rate_hz)
    tokens = tokens_of(samples)
    try:
        build_objective(config, axis_name=None)
        build_teacher(config, steps=1)
        if "mask" in objective:
            Masking(**objective.mask.to_dict()).check(samples, len(CANONICAL_LEADS))
    except ValueError as error:
        raise UserError(f"config.objective.{error}") from error
    if objective.name == "cpc":
        for name in ("negatives", "temperature"):
            if not objective[name] > 0:
                raise UserError(f"config.objective.{name}={objective[name]!r} must be positive")
        if not 0 < objective.steps_ahead < tokens:
            raise UserError(
                f"config.objective.steps_ahead={objective.steps_ahead} must lie between 1 and {tokens - 1}, "
                f"one less than the tokens in a window of {config.data.window_s} s"
            )
        if config.model.bidirectional:
            raise UserError(
                "config.model.bidirectional=True lets CPC see the token it predicts; set it to False"
            )
    if "top_k" in objective and not 1 <= objective.top_k <= config.model.layers:
        raise UserError(
            f"config.objective.top_k={objective.top_k} must lie between 1 and "
            f"config.model.layers={config.model.layers}: the targets come from the last top_k layers of the teacher"
        )
    if objective.name in ("dinosr", "hubertpp"):
        codes = objective.codes if isinstance(objective.codes, int) else max(objective.codes)
        if codes > config.batch_size * tokens:
            raise UserError(
                f"config.objective.codes={objective.codes} asks for more codes than the {config.batch_size * tokens} "
                f"tokens of a batch ({config.batch_size} windows of {tokens}); lower it or raise config.batch_size"
            )
    if "head_state" in objective:
        if objective.head_state < 2 or objective.head_state % 2:
            raise UserError(f"config.objective.head_state={objective.head_state} must be even and at least 2")
        if not 0.0 <= objective.head_dropout < 1.0:
            raise UserError(
                f"config.objective.head_dropout={objective.head_dropout} must be at least 0 and below 1"
            )
    if "beta" in objective and objective.beta < 0:
        raise UserError(f"config.objective.beta={objective.beta} must not be negative")
    if "target_norms" in objective and objective.target_norms not in (0, 1, 2):
        raise UserError(f"config.objective.target_norms={objective.target_norms} must be 0, 1 or 2")
