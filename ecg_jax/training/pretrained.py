"""A pretrained encoder as a function: checkpoint -> embeddings. What every probe and `ecg-jax embed` build
on.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu.parameter_overview import count_parameters

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.models.encoder import build_encoder, constants, tokens_of
from ecg_jax.models.inputs import to_model_input
from ecg_jax.training.checkpoint import read_encoder, resolve_checkpoint


@dataclasses.dataclass(frozen=True)
class RestoredEncoder:
    """An encoder with its weights and the contract it was pretrained under.

    Attributes:
        run, step: the checkpoint; step is None for a random twin.
        config: of the pretraining run, nested plain dict.
        preprocessing: the contract, with `window_s` and `normalisation`.
        variables: `params`, `batch_stats`, and `ssm` and `basis` unless the state matrices were trained.
        n_parameters: trainable parameters of the encoder.
    """

    run: Path
    step: int | None
    config: dict[str, Any]
    preprocessing: Preprocessing
    variables: dict[str, Any]
    n_parameters: int


def _init_encoder(
    config: dict[str, Any], preprocessing: Preprocessing, seed: int
) -> Callable[[], dict[str, Any]]:
    """Function without arguments that initialises the encoder of a config; run it, jit it, or ask for its
    shapes.
    """
    encoder = build_encoder(**config["model"])
    # No parameter's shape depends on the window, so a short one will do.
    x = jnp.zeros((2, 16, len(preprocessing.leads)))
    return lambda: encoder.init(jax.random.key(seed), x, train=False)


def _with_basis(
    variables: dict[str, Any], config: dict[str, Any], preprocessing: Preprocessing
) -> dict[str, Any]:
    length = tokens_of(preprocessing.window_samples)
    return {**variables, **constants(variables, length=length, l_max=config["model"]["l_max"])}


def restore_encoder(run: str | Path, step: int | None = None) -> RestoredEncoder:
    """Restores the encoder of a pretraining run and refuses any missing, extra or misshaped parameter.

    Args:
        run: folder of the run, or RUN/STEP.
        step: None for the latest checkpoint.

    Raises:
        UserError: there is no such checkpoint, or it is damaged or does not hold the encoder that its config describes.
    """
    run, step = resolve_checkpoint(run, step)
    stored = read_encoder(
        run, step, lambda config, contract: jax.eval_shape(_init_encoder(config, contract, seed=0))
    )
    return RestoredEncoder(
        run=stored.run,
        step=stored.step,
        config=stored.config,
        preprocessing=stored.preprocessing,
        variables=_with_basis(stored.variables, stored.config, stored.preprocessing),
        n_parameters=count_parameters(stored.variables["params"]),
    )


def random_twin(encoder: RestoredEncoder, seed: int) -> RestoredEncoder:
    """The same architecture and contract, freshly initialised: the baseline of every probe."""
    init = _init_encoder(encoder.config, encoder.preprocessing, seed)
    variables = jax.device_get(jax.jit(init)())
    return dataclasses.replace(
        encoder, step=None, variables=_with_basis(variables, encoder.config, encoder.preprocessing)
    )


def encode_fn(encoder: RestoredEncoder) -> Callable[[np.ndarray], np.ndarray]:
    """The encoder as a function of stored samples.

    Returns:
        int16 [B, T, C] in microvolts -> float32 [B, D], the mean over tokens of the backbone's output in
        evaluation mode. T is the window of the contract. Compiled once for each B. Anything else raises a
        ValueError.
    """
    crop = (encoder.preprocessing.window_samples, len(encoder.preprocessing.leads))
    module = build_encoder(**encoder.config["model"])
    normalisation = encoder.preprocessing.normalisation
    variables = jax.device_put(encoder.variables)

    @jax.jit
    def embed(variables, signal):
        tokens, _ = module.apply(variables, to_model_input(signal, normalisation), train=False)
        return tokens.astype(jnp.float32).mean(axis=1)

    def encode(signal: np.ndarray) -> np.ndarray:
        if signal.dtype != np.int16 or signal.ndim != 3 or signal.shape[1:] != crop:
            raise ValueError(
                f"int16 microvolts of shape [B, {crop[0]}, {crop[1]}] expected, got {signal.dtype} of shape "
                f"{signal.shape}; from millivolts: np.rint(1000 * x).astype(np.int16)"
            )
        with jax.default_matmul_precision("highest"):
            return np.asarray(embed(variables, signal))

    return encode
