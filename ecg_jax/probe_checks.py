"""What `ecg-jax probe` and `ecg-jax label-efficiency` refuse before they do anything."""

from collections.abc import Iterator
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
    "seeds",
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
    "seeds": 1000,
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
    """Refuses values that no probe can run with: of the fields that a config declares, those that are known here.

    Raises:
        UserError: names the field.
    """

    def declared(names) -> Iterator[tuple[str, Any]]:
        for name in names:
            node = config
            for part in name.split("."):
                if part not in node:
                    break
                node = node[part]
            else:
                yield name, node

    def refuse(name: str, value: Any, must: str) -> None:
        raise UserError(f"--config.{name}={value} must be {must}.")

    for name, value in declared(_CHOICES):
        if value not in _CHOICES[name]:
            refuse(name, value, " or ".join(f'"{word}"' for word in _CHOICES[name]))
    for name, value in declared(_AT_LEAST_ONE):
        if value < 1:
            refuse(name, value, "at least 1")
    for name, value in declared(_AT_MOST):
        if value > _AT_MOST[name]:
            refuse(name, value, f"at most {_AT_MOST[name]}")
    for name, value in declared(["bootstrap.resamples"]):
        if value < MIN_RESAMPLES:
            refuse(name, value, f"at least {MIN_RESAMPLES}")
    for name, value in declared(_NOT_NEGATIVE):
        if not 0 <= value < float("inf"):
            refuse(name, value, "at least 0")
    for name, value in declared(_POSITIVE):
        if not 0 < value < float("inf"):
            refuse(name, value, "above 0")
    for name, value in declared(_POSITIVE_LISTS):
        if not value or not all(isinstance(n, int | float) and 0 < n < float("inf") for n in value):
            refuse(name, value, "a list of numbers above 0")
    for name, value in declared(["bootstrap.level"]):
        if not 0 < value < 1:
            refuse(name, value, "between 0 and 1")


def check_workdir(workdir: Path) -> None:
    """Refuses a folder that belongs to something else.

    Raises:
        UserError: it is a pretraining run or a store.
    """
    for name, what in (("checkpoints", "a pretraining run"), ("zarr.json", "a store")):
        if (workdir / name).exists():
            raise UserError(f"--workdir={workdir} is {what}; choose another folder.")
