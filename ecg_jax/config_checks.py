"""What a config of a pretraining run may not be."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ecg_jax.config_flags import load_config, with_argument
from ecg_jax.data import ladder
from ecg_jax.data.mixture import parse_weights, store_paths
from ecg_jax.data.preprocessing import parse_leads
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.errors import UserError, closest
from ecg_jax.models import convolution
from ecg_jax.models.encoder import BACKBONES, build_encoder, tokens_of
from ecg_jax.models.inputs import NORMALISATIONS
from ecg_jax.models.layers import REMAT
from ecg_jax.run_setup import (
    CONFIGS,
    DTYPES,
    OBJECTIVES,
    build_masking,
    build_objective,
    build_teacher,
    flatten,
)

INIT_PARTS = ("all", "encoder")
MOST_SAMPLES = 10**6  # in a window: more than an hour
MOST_LAYERS = 10**4  # and blocks and channels of a stage
_MOST = {"width": 10**5, "ff_width": 10**5, "state": 10**4, "layers": MOST_LAYERS, "kernel": 10**4}

_POSITIVE = (
    "batch_size", "accumulate", "epochs", "log_every", "checkpoint_every", "keep_latest", "optimiser.learning_rate",
    "optimiser.eps",
    "data.window_s", "data.rate_hz", "data.max_val_crops", "data.prefetch",
    "model.width", "model.layers", "model.l_max", "model.heads", "model.ff_width", "model.kernel", "model.group_width",
    "monitor.probe_records",
)  # fmt: skip
_NOT_NEGATIVE = (
    "steps", "keep_best", "seed", "stall_timeout_s", "data.max_records", "data.val_folds", "data.read_threads",
    "optimiser.warmup_steps",
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
        "model.remat": REMAT,
        "precision": DTYPES,
        "data.normalisation": NORMALISATIONS,
        "optimiser.schedule": ("constant", "cosine"),
        "data.ladder": ladder.LADDERS,
        "data.rung": ladder.SIZES,
        "init.part": INIT_PARTS,
    }
    fields = flatten(config.to_dict())
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{name}={value} must be a finite number")
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            raise UserError(f"config.{name}={fields[name]!r} is unknown; known: {', '.join(allowed)}")
    for name in _POSITIVE:
        if name in fields and not fields[name] > 0:  # some belong to one backbone
            raise UserError(f"config.{name}={fields[name]!r} must be positive")
    for name in _NOT_NEGATIVE:
        if fields[name] < 0:
            raise UserError(f"config.{name}={fields[name]!r} must not be negative")
    for name in ("optimiser.b1", "optimiser.b2"):
        if not 0 <= fields[name] < 1:
            raise UserError(f"config.{name}={fields[name]} must be at least 0 and below 1")
    parse_leads(config.data.leads)
    samples = config.data.window_s * config.data.rate_hz
    samples = round(samples) if samples < 1e9 else samples
    if not 4 <= samples <= MOST_SAMPLES:
        raise UserError(
            f"config.data.window_s={config.data.window_s} at config.data.rate_hz={config.data.rate_hz} makes a window "
            f"of {samples:g} samples; it must have between 4 and {MOST_SAMPLES}"
        )
    if config.seed >= 2**63:
        raise UserError(f"config.seed={config.seed} must be below 2^63")
    devices = jax.device_count()
    parts = devices * config.accumulate
    if config.batch_size % parts:
        cut = f" in {config.accumulate} parts each (config.accumulate)" if config.accumulate > 1 else ""
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide over {devices} devices{cut}; "
            f"use a multiple of {parts}"
        )
    _check_sources(config)
    depth = _check_model(config)
    _check_objective(config, depth)


def _check_sources(config: ConfigDict) -> None:
    """Refuses stores, weights and a selection that do not fit each other."""
    stores = [] if config.store is None else store_paths(config.store)
    if not all(stores) or len(set(stores)) < len(stores):
        raise UserError(
            f"config.store={config.store!r} must name one store, or several different ones separated by commas (a "
            "path cannot have one)"
        )
    if config.data.selection and config.data.max_records:
        raise UserError(
            f"config.data.max_records={config.data.max_records} would cut config.data.selection="
            f"{config.data.selection!r}, which is used as it is; set one of them"
        )
    if not config.data.weights:
        return
    shares = parse_weights(config.data.weights)
    if stores and len(shares) != len(stores):
        raise UserError(
            f"config.data.weights={config.data.weights!r} has {len(shares)} numbers, but config.store names "
            f"{len(stores)} stores; give one for each"
        )


def _check_model(config: ConfigDict) -> int:
    """Refuses an encoder that cannot be built; the number of its blocks that are as wide as its tokens."""
    model = config.model
    if "state" in model and (model.state < 2 or model.state % 2):
        raise UserError(f"config.model.state={model.state} must be even and at least 2")
    for name in ("dropout", "attention_dropout"):
        if name in model and not 0.0 <= model[name] < 1.0:
            raise UserError(f"config.model.{name}={model[name]} must be at least 0 and below 1")
    for name in ("filters", "blocks"):
        if name in model and not all(1 <= number <= MOST_LAYERS for number in model[name]):
            raise UserError(
                f"config.model.{name}={model[name]} must be numbers between 1 and {MOST_LAYERS}, one for each stage"
            )
    for name, limit in _MOST.items():
        if name in model and model[name] > limit:
            raise UserError(f"config.model.{name}={model[name]} must be at most {limit}")
    try:
        conv, _ = convolution.parse(model.conv)
        encoder = build_encoder(**model.to_dict())
        x = jnp.zeros((1, 16, len(CANONICAL_LEADS)))
        (_, out), _ = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), x, train=False))
    except ValueError as error:
        if not str(error).startswith("model."):
            raise
        raise UserError(f"config.{error}") from error
    if conv == "chunked" and "state" in model and model.state > convolution.MOST_CHUNKED_STATES:
        raise UserError(
            f"config.model.conv={model.conv!r} is for at most {convolution.MOST_CHUNKED_STATES} states, not "
            f"config.model.state={model.state}; take auto, fft or toeplitz"
        )
    if conv == "chunked" and "trainable_ssm" in model and model.trainable_ssm:
        raise UserError(
            f"config.model.conv={model.conv!r} needs fixed state matrices, but config.model.trainable_ssm is set; "
            "take auto, fft or toeplitz"
        )
    return sum(name.startswith("layer") and v.shape[-1] == model.width for name, v in out.items())


def _check_fields(config: ConfigDict) -> None:
    """Refuses a config whose fields are not those, or not of the types, of the shipped config of its objective."""
    fields = flatten(config.to_dict())
    name, backbone = fields.get("objective.name"), fields.get("model.backbone")
    for field, value, known in (
        ("objective.name", name, OBJECTIVES),
        ("model.backbone", backbone, BACKBONES),
    ):
        if not isinstance(value, str) or value not in known:
            raise UserError(f"config.{field}={value!r} is unknown; known: {', '.join(known)}")
    shipped = with_argument(CONFIGS[name], backbone=backbone)
    declared = flatten(load_config(shipped).to_dict())
    for field in declared:
        if field not in fields:
            raise UserError(f"config.{field} is missing; {shipped} declares it, for the objective {name}")
    for field, value in fields.items():
        if field not in declared:
            raise UserError(
                f"config.{field} is no field of the objective {name} on {backbone}, whose fields {shipped} declares"
                f"{closest(field, declared)}"
            )
        if value is None and field != "store":
            raise UserError(f"config.{field} is not set; every field but the store needs a value")
        if not _is_like(value, declared[field]):
            raise UserError(f"config.{field}={value!r} must be {_kind(declared[field])}")
        if type(value) is int and abs(value) >= 2**31 and field != "seed":
            raise UserError(f"config.{field}={value} must be below 2^31")


def _is_like(value: Any, declared: Any) -> bool:
    if declared is None:
        return value is None or isinstance(value, str)
    if isinstance(declared, tuple):
        items = value if isinstance(value, tuple | list) else ()
        return len(items) > 0 and all(_is_like(item, declared[0]) for item in items)
    if isinstance(declared, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(declared)


def _kind(declared: Any) -> str:
    if isinstance(declared, tuple):
        return "a tuple of one item or more, each " + _kind(declared[0])
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    return names.get(type(declared), "text")


def _check_objective(config: ConfigDict, depth: int) -> None:
    """Refuses an objective that its config, its window, its batch or an encoder with `depth` layers as wide as its
    tokens cannot feed, before anything is compiled.
    """
    objective, samples = config.objective, round(config.data.window_s * config.data.rate_hz)
    tokens = tokens_of(samples)
    try:
        build_objective(config, axis_name=None)
        build_teacher(config, steps=1)
        if "mask" in objective:
            build_masking(config).check(samples, len(CANONICAL_LEADS))
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
        if config.model.bidirectional and objective.require_causal:
            raise UserError(
                "config.model.bidirectional=True lets CPC see the token it predicts; set it to False, or take "
                "recipe=released, which reproduces that (config.objective.require_causal=False)"
            )
    if "top_k" in objective and not 1 <= objective.top_k <= depth:
        raise UserError(
            f"config.objective.top_k={objective.top_k} must lie between 1 and {depth}: the targets come from the last "
            "top_k layers of the teacher, and so many of them are as wide as its tokens"
        )
    if objective.name in ("dinosr", "hubertpp"):
        codes = objective.codes if isinstance(objective.codes, int) else max(objective.codes)
        windows = config.batch_size // config.accumulate
        if codes > windows * tokens:
            raise UserError(
                f"config.objective.codes={objective.codes} asks for more codes than the {windows * tokens} tokens that "
                f"pass through the model at once ({windows} windows of {tokens}); lower it or raise config.batch_size"
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
