"""What `ecg-jax probe` refuses before it does anything."""

from pathlib import Path
from typing import Any

from ecg_jax.errors import UserError

_CHOICES = {
    "mode": ("linear", "frozen", "finetune", "supervised"),
    "finetune.head": ("linear", "attention"),
    "supervised.architecture": ("same", "s4_100hz"),
    "linear.solver": ("auto", "lbfgs", "vmap"),
    "frozen.token_dtype": ("float16", "float32"),
    "bootstrap.unit": ("patient", "record"),
    "bootstrap.undefined": ("exclude", "half"),
    "bootstrap.interval": ("percentile", "bca"),
}
_AT_LEAST_ONE = (
    "batch_size",
    "baseline_seeds",
    "linear.max_steps",
    "frozen.epochs",
    "frozen.batch_size",
    "frozen.seeds",
    "frozen.attention_heads",
    "finetune.attention_heads",
    "finetune.epochs",
    "finetune.batch_size",
    "supervised.epochs",
    "supervised.batch_size",
)
#: Beyond these a number is a slip of the keyboard: it would end in a MemoryError, or never.
_AT_MOST = {
    "seed": 2**31 - 1,
    "batch_size": 2**16,
    "baseline_seeds": 100,
    "linear.max_steps": 10**6,
    "frozen.epochs": 10**5,
    "frozen.batch_size": 2**16,
    "frozen.seeds": 100,
    "frozen.token_cache_gb": 10**6,
    "finetune.epochs": 10**5,
    "finetune.batch_size": 2**16,
    "supervised.epochs": 10**5,
    "supervised.batch_size": 2**16,
    "bootstrap.resamples": 10**5,
}
#: Fewer resamples have no quantiles to speak of.
MIN_RESAMPLES = 10
_NOT_NEGATIVE = (
    "seed",
    "min_count",
    "frozen.weight_decay",
    "frozen.token_cache_gb",
    "finetune.weight_decay",
    "finetune.backbone_factor",
    "finetune.stem_factor",
    "supervised.weight_decay",
)
_POSITIVE = (
    "linear.tolerance",
    "finetune.learning_rate",
    "finetune.layer_decay",
    "supervised.learning_rate",
)
_POSITIVE_LISTS = ("linear.l2_grid", "frozen.learning_rates")


def check_config(config) -> None:
    """Refuses values that no probe can run with.

    Raises:
        UserError: names the field.
    """

    def value(name: str) -> Any:
        node = config
        for part in name.split("."):
            node = node[part]
        return node

    def refuse(name: str, must: str) -> None:
        raise UserError(f"--config.{name}={value(name)} must be {must}.")

    for name, allowed in _CHOICES.items():
        if value(name) not in allowed:
            refuse(name, " or ".join(f'"{word}"' for word in allowed))
    for name in _AT_LEAST_ONE:
        if value(name) < 1:
            refuse(name, "at least 1")
    for name, most in _AT_MOST.items():
        if value(name) > most:
            refuse(name, f"at most {most}")
    if config.bootstrap.resamples < MIN_RESAMPLES:
        refuse("bootstrap.resamples", f"at least {MIN_RESAMPLES}")
    for name in _NOT_NEGATIVE:
        if not 0 <= value(name) < float("inf"):
            refuse(name, "at least 0")
    for name in _POSITIVE:
        if not 0 < value(name) < float("inf"):
            refuse(name, "above 0")
    for name in _POSITIVE_LISTS:
        numbers = value(name)
        if not numbers or not all(isinstance(n, int | float) and 0 < n < float("inf") for n in numbers):
            refuse(name, "a list of numbers above 0")
    if not 0 < config.bootstrap.level < 1:
        refuse("bootstrap.level", "between 0 and 1")


def check_workdir(workdir: Path) -> None:
    """Refuses a folder that belongs to something else.

    Raises:
        UserError: it is a pretraining run or a store.
    """
    for name, what in (("checkpoints", "a pretraining run"), ("zarr.json", "a store")):
        if (workdir / name).exists():
            raise UserError(f"--workdir={workdir} is {what}; choose another folder.")
