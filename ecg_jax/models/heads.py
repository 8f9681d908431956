"""Prediction heads of the pretraining objectives (spec §5.0)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models.layers import Dropout, layer_norm, uniform_bias, uniform_fan_in
from ecg_jax.models.s4 import S4Layer


class S4Head(nn.Module):
    """One bidirectional S4 layer, residual, LayerNorm, linear: tokens [B, L, D] to predictions [B, L, out].

    Unlike in the backbone, dropout draws each token by itself. 855 040 parameters at D = out = 512.

    Attributes:
        width: D.
        out: width of the predictions.
        l_max: tokens for which C is length-corrected.
        state: N, states of each channel.
        dropout: after the GELU and before the residual.
        conv: algorithm of the convolution, see `convolution.choose`.
        dtype: compute dtype of the linear maps; the predictions are float32.
    """

    width: int
    out: int
    l_max: int
    state: int = 64
    dropout: float = 0.2
    conv: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, record_index: jax.Array | None = None, *, train: bool) -> jax.Array:
        """Maps tokens [B, L, D] to float32 [B, L, out]."""
        x = jnp.transpose(tokens, (2, 0, 1))  # [D, B, L]
        z = S4Layer(
            width=self.width,
            state=self.state,
            l_max=self.l_max,
            bidirectional=True,
            dropout=self.dropout,
            tie_dropout=False,
            conv=self.conv,
            dtype=self.dtype,
            name="layer",
        )(x, record_index, train=train)
        z = Dropout(self.dropout, tied=False, channel_first=True)(z, record_index, train=train)
        norm = layer_norm("norm", channel_first=True)
        z = norm(x.astype(jnp.float32) + z.astype(jnp.float32)).astype(self.dtype)
        z = jnp.transpose(z, (1, 2, 0))
        return _linear(self.width, self.out, self.dtype, "decoder")(z).astype(jnp.float32)


class MLPHead(nn.Module):
    """Linear, ReLU, linear, token by token: [B, L, D] to float32 [B, L, out]. 459 648 parameters at D = 512,
    out = 384.

    Attributes:
        width: D, of the hidden layer too.
        out: width of the predictions.
        dtype: compute dtype.
    """

    width: int
    out: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [B, L, D] to float32 [B, L, out]."""
        hidden = nn.relu(_linear(self.width, self.width, self.dtype, "hidden")(tokens))
        return _linear(self.width, self.out, self.dtype, "output")(hidden).astype(jnp.float32)


def _linear(fan_in: int, out: int, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(out, kernel_init=uniform_fan_in, bias_init=uniform_bias(fan_in), dtype=dtype, name=name)
