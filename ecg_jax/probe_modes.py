"""What each mode of `ecg-jax probe` fits, from the fields of its config."""

from pathlib import Path

import jax
import numpy as np

from ecg_jax.evaluation.examples import Examples, Fitted
from ecg_jax.evaluation.feature_cache import FeatureCache
from ecg_jax.evaluation.finetune import fit_finetune
from ecg_jax.evaluation.frozen import fit_frozen
from ecg_jax.evaluation.linear import FittedLinear, LayerFeatures, cached_features, fit_linear
from ecg_jax.evaluation.supervised import fit_supervised
from ecg_jax.training.pretrained import RestoredEncoder, random_twin

#: How the randomly initialised encoders beside a probe are probed: what is trained end to end has its like in
#: mode=supervised, so theirs stay frozen under a linear head.
RANDOM_INIT_MODE = {"linear": "linear", "frozen": "frozen", "finetune": "linear", "supervised": "linear"}


def fit(config, encoder: RestoredEncoder, examples: Examples, workdir: Path, folder: Path) -> Fitted:
    """The probe that config.mode asks for."""
    if config.mode == "linear":
        return _fit_linear(config, encoder, examples, folder, "pretrained")
    if config.mode == "frozen":
        return _fit_frozen(config, encoder, examples, workdir / "fit", "frozen")
    if config.mode == "finetune":
        settings = config.finetune
        return fit_finetune(
            encoder,
            examples,
            epochs=settings.epochs,
            batch_size=_batch_size(settings.batch_size, examples),
            learning_rate=settings.learning_rate,
            factors={"head": 1.0, "backbone": settings.backbone_factor, "stem": settings.stem_factor},
            layer_decay=settings.layer_decay,
            weight_decay=settings.weight_decay,
            head=settings.head,
            attention_heads=settings.attention_heads,
            seed=config.seed,
            folder=workdir / "fit",
            label="finetune",
        )
    settings = config.supervised
    return fit_supervised(
        encoder.config["model"],
        encoder.preprocessing,
        examples,
        architecture=settings.architecture,
        epochs=settings.epochs,
        batch_size=_batch_size(settings.batch_size, examples),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        seed=config.seed,
        folder=workdir / "fit",
        label="supervised",
    )


def _batch_size(wanted: int, examples: Examples) -> int:
    """As the config says, or the largest batch that a task with fewer training records fills; results say which."""
    devices = jax.device_count()
    return min(wanted, len(examples.train.rows) // devices * devices)


def random_init(
    config, encoder: RestoredEncoder, examples: Examples, workdir: Path, folder: Path, number: int
) -> np.ndarray:
    """What a randomly initialised encoder predicts for the test records."""
    twin, label = random_twin(encoder, config.seed + number), f"random {number + 1}"
    if RANDOM_INIT_MODE[config.mode] == "frozen":
        return _fit_frozen(config, twin, examples, workdir / f"fit_random{number + 1}", label).test
    return _fit_linear(config, twin, examples, folder, label).test


def _fit_frozen(config, encoder: RestoredEncoder, examples: Examples, folder: Path, label: str) -> Fitted:
    settings = config.frozen
    return fit_frozen(
        encoder,
        examples,
        epochs=settings.epochs,
        batch_size=_batch_size(settings.batch_size, examples),
        learning_rates=tuple(settings.learning_rates),
        seeds=tuple(config.seed + i for i in range(settings.seeds)),
        weight_decay=settings.weight_decay,
        token_cache_bytes=int(settings.token_cache_gb * 1e9),
        token_dtype=settings.token_dtype,
        attention_heads=settings.attention_heads,
        folder=folder,
        label=label,
    )


def _fit_linear(
    config, encoder: RestoredEncoder, examples: Examples, folder: Path, label: str
) -> FittedLinear:
    layers = config.linear.layers
    features = cached_features(FeatureCache(folder), encoder, examples, layers, config.batch_size, label)
    return solve(config, features, examples, layers)


def solve(config, features: LayerFeatures, examples: Examples, layers: str) -> FittedLinear:
    """The linear head on some features, as `config.linear` says."""
    return fit_linear(
        features,
        examples,
        l2_grid=tuple(config.linear.l2_grid),
        layers=layers,
        tolerance=config.linear.tolerance,
        max_steps=config.linear.max_steps,
        solver=config.linear.solver,
    )
