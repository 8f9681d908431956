"""What describes a token of a stored recording, for clustering: its spectrum, or a layer of a pretrained encoder."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.data.targets import TOKEN_SAMPLES, Grid
from ecg_jax.errors import UserError
from ecg_jax.models.encoder import tokens_of
from ecg_jax.training.pretrained import FINAL as FINAL  # where callers of this module find it
from ecg_jax.training.pretrained import layer_outputs, layer_shapes, restore_encoder

SPECTRUM = "spectrum"

_SPECTRUM_MAX_HZ = 45.0  # below the power line; an ECG has little above
_SPECTRUM_FLOOR_MV = 0.01  # amplitude of the noise of a good recording


@dataclass(frozen=True)
class Features:
    """What describes a token: a function of windows of the stored signal.

    Attributes:
        grid: how records are cut into windows of T samples, and which M tokens of a window get a vector.
        encode: (variables, int16 [B, T, C] microvolts) -> float32 [B, M, F]; traceable by jax.
        variables: its first argument.
        source: JSON-able description.
    """

    grid: Grid
    encode: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    source: dict


def spectrum(rate_hz: float) -> Features:
    """Log power of short windows of each lead: features without any model.

    Around each token about 0.27 s (64 samples at 240 Hz, as long as a QRS complex with its surroundings) are freed
    of their mean and weighted by a Hann window; features are log(amplitude^2 + floor^2) of the 12 frequencies from 3.75
    to 45 Hz in each of the leads. Power and not the waveform, so that a token's cluster depends on which wave is
    near and not on its exact position within the window; logarithms, so that P waves count beside QRS
    complexes; the floor of 0.01 mV keeps noise between the beats from making clusters of its own. At the ends
    of a record, where the window would leave it, the nearest whole window describes the token.

    Args:
        rate_hz: samples per second of the store.
    """
    frame = 4 * round(rate_hz / 15)
    hops = np.arange(round((rate_hz - frame) / TOKEN_SAMPLES) + 1) * TOKEN_SAMPLES
    time = np.arange(frame)
    taper = np.sin(np.pi * (time + 0.5) / frame) ** 2
    bins = np.arange(1, int(_SPECTRUM_MAX_HZ / rate_hz * frame) + 1)
    # A sine of amplitude a at a bin's frequency gives power a^2.
    waves = 2 / taper.sum() * taper[:, None] * np.exp(-2j * np.pi * np.outer(time, bins) / frame)
    waves -= waves.mean(axis=0)  # the same as subtracting the mean from every frame
    waves = np.stack([waves.real, waves.imag]).astype(np.float32)

    def encode(variables, signal):
        x = signal.astype(jnp.float32) * 1e-3
        frames = x[:, hops[:, None] + time]  # [B, M, frame, C]
        parts = jnp.einsum("bmtc,ztk->zbmck", frames, waves)
        power = jnp.square(parts).sum(axis=0)
        return jnp.log(power + _SPECTRUM_FLOOR_MV**2).reshape(*power.shape[:2], -1)

    return Features(
        grid=Grid(
            window=int(hops[-1]) + frame,
            stride=TOKEN_SAMPLES * len(hops),
            skipped=frame // 2 // TOKEN_SAMPLES,
            tokens=len(hops),
        ),
        encode=encode,
        variables=None,
        source={
            "features": SPECTRUM,
            "frame_samples": frame,
            "frequencies_hz": (bins * rate_hz / frame).tolist(),
            "floor_mv": _SPECTRUM_FLOOR_MV,
        },
    )


def of_checkpoint(checkpoint: str | Path, layer: str, store: Store) -> Features:
    """Outputs of one layer of a pretrained encoder in evaluation mode, under the checkpoint's own normalisation.

    Args:
        checkpoint: RUN or RUN/STEP.
        layer: "tokens" for the final output, or an intermediate of the encoder.
        store: whose recordings will be encoded.

    Raises:
        UserError: no such checkpoint or layer, or the store has other leads or another rate than the checkpoint.
    """
    encoder = restore_encoder(checkpoint)
    contract = encoder.preprocessing
    if store.leads != contract.leads:
        raise UserError(
            f"The store {store.path} has the leads {', '.join(store.leads)}, the checkpoint {checkpoint} takes "
            f"{', '.join(contract.leads)}; prepare the recordings for it."
        )
    if store.rate_hz != contract.rate_hz:
        raise UserError(
            f"The store {store.path} has {store.rate_hz:g} samples per second, the checkpoint {checkpoint} takes "
            f"{contract.rate_hz:g}; prepare the recordings for it."
        )
    outputs, window = layer_outputs(encoder), contract.window_samples
    known = [name for name, (length, _) in layer_shapes(encoder).items() if length == tokens_of(window)]
    if layer not in known:
        raise UserError(
            f"--layer={layer} is unknown; the encoder of {checkpoint} has {', '.join(sorted(known))}."
        )
    config = json.dumps(encoder.config, sort_keys=True).encode()
    return Features(
        grid=Grid(window=window, stride=window, skipped=0, tokens=tokens_of(window)),
        encode=lambda variables, signal: outputs(variables, signal)[layer].astype(jnp.float32),
        variables=jax.device_put(encoder.variables),
        source={
            "features": "checkpoint",
            "run": str(encoder.run.resolve()),
            "step": encoder.step,
            "layer": layer,
            "config_sha256": hashlib.sha256(config).hexdigest(),
        },
    )
