"""Training from scratch: what a labelled task gives without any pretraining (spec §4.3, §7)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.evaluation.examples import Examples, Fitted
from ecg_jax.evaluation.finetune import Recipe, fit_network
from ecg_jax.models.encoder import build_encoder, constants, tokens_of
from ecg_jax.models.probe_heads import MeanLinear
from ecg_jax.models.supervised import RATE_HZ, SupervisedS4, resampled_length
from ecg_jax.training.parallel import AXIS


def fit_supervised(
    config_model: dict[str, Any] | None,
    preprocessing: Preprocessing,
    examples: Examples,
    *,
    architecture: str = "same",
    epochs: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-3,
    seed: int = 0,
    folder: Path | str | None = None,
    mesh: Mesh | None = None,
    label: str | None = None,
) -> Fitted:
    """Trains a network with a linear head from random initialisation, as `finetune.fit_finetune` does, at one rate.

    Args:
        config_model: `config.model` of a pretraining run, for `architecture="same"`.
        preprocessing: the contract of the crops: window, normalisation and kept leads.
        examples: what to train, validate and test on.
        architecture: "same" as the pretrained encoder, or "s4_100hz", the reference's supervised S4, which sees the
            same crops resampled to 100 Hz.
        learning_rate: of everything.
        epochs, batch_size, weight_decay, folder, mesh, label: as in `fit_finetune`.
        seed: of the initial parameters too.

    Raises:
        UserError: as `fit_finetune`.
        ValueError: unknown architecture, or "same" without a config.
    """
    if architecture == "same":
        if config_model is None:
            raise ValueError('architecture="same" needs config_model')
        encoder = build_encoder(**config_model, axis_name=AXIS)
        tokens, l_max = tokens_of(preprocessing.window_samples), encoder.l_max
    elif architecture == "s4_100hz":
        tokens = resampled_length(preprocessing.window_samples, preprocessing.rate_hz, RATE_HZ)
        l_max = tokens
        encoder = SupervisedS4(rate_hz=preprocessing.rate_hz, l_max=l_max)
    else:
        raise ValueError(f'architecture={architecture!r} is unknown; known: "same", "s4_100hz"')
    x = jnp.zeros((1, preprocessing.window_samples, len(preprocessing.leads)))
    init = jax.jit(lambda key: encoder.init(key, x, train=False))
    variables = jax.device_get(init(jax.random.key(seed)))
    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        factors={"head": 1.0, "backbone": 1.0, "stem": 1.0},
        layer_decay=1.0,
        weight_decay=weight_decay,
        seed=seed,
    )
    identity = {"architecture": architecture, "preprocessing": preprocessing.to_dict()}
    identity["model"] = config_model if architecture == "same" else None
    fitted = fit_network(
        "supervised",
        encoder,
        MeanLinear(len(examples.classes)),
        {**variables, **constants(variables, length=tokens, l_max=l_max)},
        preprocessing,
        examples,
        recipe,
        identity=identity,
        folder=folder,
        mesh=mesh,
        label=label,
    )
    return Fitted(fitted.val, fitted.test, {"architecture": architecture, "head": "linear", **fitted.report})
