"""The supervised baseline of the reference: an S4 on ECG at 100 Hz, trained from scratch (spec §4.3)."""

from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.models.layers import uniform_bias, uniform_fan_in
from ecg_jax.models.s4 import S4Backbone

RATE_HZ = 100.0

# The filter passes up to 90 % of the lower of the two Nyquist frequencies and stops at that frequency by 80 dB; its
# length and shape follow from Kaiser's formulas (Oppenheim & Schafer, Discrete-Time Signal Processing, §7.5.3).
_PASS, _STOP_DB = 0.9, 80.0


def resampled_length(samples: int, rate_hz: float, target_hz: float) -> int:
    """floor(samples * target_hz / rate_hz)."""
    return int(samples * Fraction(target_hz) / Fraction(rate_hz))


def resampling_matrix(samples: int, rate_hz: float, target_hz: float) -> np.ndarray:
    """Band-limited resampling of a window as one matrix: sample m lies at m / target_hz seconds.

    A windowed sinc of about half a second (240 to 100 Hz) to each side; beyond the window the signal goes on by odd
    reflection, which keeps value and slope. A constant stays what it is.

    Args:
        samples: T, of the window.
        rate_hz: its samples per second.
        target_hz: wanted samples per second.

    Returns:
        float64 [T', T] with T' = floor(T * target_hz / rate_hz).

    Raises:
        ValueError: the window is too short for the filter.
    """
    nyquist = 0.5 * min(1.0, target_hz / rate_hz)  # cycles per input sample
    half = int(np.ceil((_STOP_DB - 8) / (2.285 * 2 * np.pi * (1 - _PASS) * nyquist) / 2))
    if samples <= half:
        raise ValueError(
            f"a window of {samples} samples is too short to be resampled from {rate_hz:g} to {target_hz:g} Hz, "
            f"which takes {half + 1}"
        )
    length = resampled_length(samples, rate_hz, target_hz)
    centre = np.arange(length) * (rate_hz / target_hz)
    index = np.floor(centre).astype(int)[:, None] + np.arange(-half + 1, half + 1)
    lag = (index - centre[:, None]) / half
    window = np.i0(0.1102 * (_STOP_DB - 8.7) * np.sqrt(np.clip(1 - lag**2, 0, None)))
    weight = window * np.sinc((1 + _PASS) * nyquist * half * lag)
    weight /= weight.sum(axis=1, keepdims=True)

    matrix, row = np.zeros((length, samples)), np.arange(length)[:, None]
    first, last = index < 0, index >= samples
    inside = np.where(first, -index, np.where(last, 2 * (samples - 1) - index, index))
    np.add.at(matrix, (row, inside), np.where(first | last, -weight, weight))
    matrix[:, 0] += 2 * (weight * first).sum(axis=1)
    matrix[:, -1] += 2 * (weight * last).sum(axis=1)
    return matrix


class SupervisedS4(nn.Module):
    """Resampling to 100 Hz, a linear map of the leads, four bidirectional S4 blocks (spec §4.3).

    2 146 816 trainable parameters at the defaults; with the mean over tokens and a linear head of 71 classes
    2 183 239. Differs from the reference in one thing: a crop is resampled by itself, the reference resamples a whole
    recording and crops it then.

    Attributes:
        rate_hz: samples per second of the input.
        l_max: tokens for which C is length-corrected: samples of a window at 100 Hz.
        width, state, layers, dropout, conv: of the S4 backbone.
    """

    rate_hz: float
    l_max: int = 250
    width: int = 512
    state: int = 8
    layers: int = 4
    dropout: float = 0.2
    conv: str = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, record_index: jax.Array | None = None, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps model input x [B, T, C] to tokens [B, T', D] and a dict of intermediates, as `Encoder` does."""
        matrix = resampling_matrix(x.shape[1], self.rate_hz, RATE_HZ)
        x = jnp.einsum("lt,btc->blc", jnp.asarray(matrix, jnp.float32), x)
        leads = x.shape[-1]
        linear = nn.Dense(self.width, kernel_init=uniform_fan_in, bias_init=uniform_bias(leads), name="stem")
        backbone = S4Backbone(
            width=self.width,
            state=self.state,
            layers=self.layers,
            l_max=self.l_max,
            bidirectional=True,
            dropout=self.dropout,
            conv=self.conv,
            name="backbone",
        )
        return backbone(linear(x), record_index, train=train)
