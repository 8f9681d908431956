"""A pretrained encoder as a function: checkpoint -> embeddings. What every probe and `ecg-jax embed` build
on.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu.parameter_overview import count_parameters

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.models.encoder import build_encoder, constants, tokens_of
from ecg_jax.models.inputs import to_model_input
from ecg_jax.training.checkpoint import resolve_checkpoint
from ecg_jax.training.encoder_restore import read_encoder

#: Name of the encoder's output beside those of its intermediates.
FINAL = "tokens"


@dataclasses.dataclass(frozen=True)
class RestoredEncoder:
    """An encoder with its weights and the contract it was pretrained under.

    Attributes:
        run, step: the checkpoint; step is None for a random twin.
        config: of the pretraining run, nested plain dict.
        preprocessing: the contract, with `window_s`, `normalisation` and `kept_leads`.
        variables: `params`, `batch_stats`, and `ssm` and `basis` unless the state matrices were trained.
        n_parameters: trainable parameters of the encoder.
        store_fingerprint: of the store it was pretrained on; None of an imported one.
    """

    run: Path
    step: int | None
    config: dict[str, Any]
    preprocessing: Preprocessing
    variables: dict[str, Any]
    n_parameters: int
    store_fingerprint: str | None = None


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
        store_fingerprint=stored.store_fingerprint,
    )


def random_twin(encoder: RestoredEncoder, seed: int) -> RestoredEncoder:
    """The same architecture and contract, freshly initialised: the baseline of every probe."""
    init = _init_encoder(encoder.config, encoder.preprocessing, seed)
    variables = jax.device_get(jax.jit(init)())
    return dataclasses.replace(
        encoder, step=None, variables=_with_basis(variables, encoder.config, encoder.preprocessing)
    )


@functools.lru_cache(maxsize=8)
def _pooled_program(
    model: str, normalisation: str, kept_leads: tuple[str, ...], layers: tuple[str, ...]
) -> Callable:
    """Jitted (variables, int16 [B, T, C]) -> {layer: float32 [B, D]}, one for all weights of an architecture.

    `model` is the JSON of `config.model`. Kept, so that random twins do not compile the same program again.
    """
    outputs = _outputs(json.loads(model), normalisation, kept_leads)

    @jax.jit
    def pooled(variables, signal):
        every = outputs(variables, signal)
        return {name: every[name].astype(jnp.float32).mean(axis=1) for name in layers}

    return pooled


def _outputs(model: dict[str, Any], normalisation: str, kept_leads: tuple[str, ...]) -> Callable:
    module = build_encoder(**model)

    def outputs(variables, signal):
        x = to_model_input(signal, normalisation, kept_leads)
        tokens, intermediates = module.apply(variables, x, train=False)
        return {**intermediates, FINAL: tokens}

    return outputs


def layer_outputs(encoder: RestoredEncoder) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    """Every layer of the encoder in evaluation mode, as a function that JAX can trace.

    Returns:
        (variables, int16 [B, T, C] microvolts) -> {name: [B, L, D] of that layer}; "tokens" is the final output,
        the others are named as `models.encoder.Encoder` names its intermediates.
    """
    contract = encoder.preprocessing
    return _outputs(encoder.config["model"], contract.normalisation, contract.kept_leads)


def layer_shapes(encoder: RestoredEncoder) -> dict[str, tuple[int, int]]:
    """(tokens L, width D) of every layer for one window of the contract, by name; from the stem on, "tokens" last."""
    crop = (1, encoder.preprocessing.window_samples, len(encoder.preprocessing.leads))
    signal = jax.ShapeDtypeStruct(crop, jnp.int16)
    shapes = jax.eval_shape(layer_outputs(encoder), encoder.variables, signal)
    known = {name: shape.shape[1:] for name, shape in shapes.items() if len(shape.shape) == 3}

    def depth(name: str) -> tuple:
        number = "".join(filter(str.isdigit, name))
        return (name == FINAL, name != "stem", int(number) if number else -1, name)

    return {name: known[name] for name in sorted(known, key=depth)}


def layer_names(encoder: RestoredEncoder) -> tuple[str, ...]:
    """The layers worth probing, from the input on: "stem", "block0", "block1", ..., and "tokens", the final output.

    Other intermediates (`layer{i}`, a branch before its residual sum) are known to `layer_shapes` only.
    """
    return tuple(name for name in layer_shapes(encoder) if not name.startswith("layer"))


def pooled_fn(
    encoder: RestoredEncoder, layers: Sequence[str] = (FINAL,)
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The encoder as a function of stored samples, averaged over tokens, for several layers at once.

    Args:
        encoder: from `restore_encoder` or `random_twin`.
        layers: names out of `layer_shapes`; widths may differ between layers.

    Returns:
        int16 [B, T, C] in microvolts -> {layer: float32 [B, D]}, the mean over tokens of each layer in evaluation
        mode. T is the window of the contract. Compiled once for each B. Anything else raises a ValueError.

    Raises:
        ValueError: the encoder has no such layer.
    """
    known = layer_shapes(encoder)
    if unknown := [name for name in layers if name not in known]:
        raise ValueError(f"the encoder has no layer {', '.join(unknown)}; it has {', '.join(known)}")
    contract = encoder.preprocessing
    crop = (contract.window_samples, len(contract.leads))
    model = json.dumps(encoder.config["model"], sort_keys=True)
    program = _pooled_program(model, contract.normalisation, contract.kept_leads, tuple(layers))
    variables = jax.device_put(encoder.variables)

    def pooled(signal: np.ndarray) -> dict[str, np.ndarray]:
        if signal.dtype != np.int16 or signal.ndim != 3 or signal.shape[1:] != crop:
            raise ValueError(
                f"int16 microvolts of shape [B, {crop[0]}, {crop[1]}] expected, got {signal.dtype} of shape "
                f"{signal.shape}; from millivolts: np.rint(1000 * x).astype(np.int16)"
            )
        with jax.default_matmul_precision("highest"):
            return jax.device_get(program(variables, signal))

    return pooled


def encode_fn(encoder: RestoredEncoder) -> Callable[[np.ndarray], np.ndarray]:
    """`pooled_fn` of the final output alone: int16 [B, T, C] in microvolts -> float32 [B, D]."""
    pooled = pooled_fn(encoder)
    return lambda signal: pooled(signal)[FINAL]
