"""The convolutional stem shared by every backbone (spec §2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models.layers import BatchNorm, uniform_fan_in


class Stem(nn.Module):
    """Four bias-free convolutions, each with BatchNorm and ReLU: one token for every second sample.

    The first convolution has kernel 3 and stride 2, the others kernel 1 (spec §2). 808 960 trainable
    parameters at width 512.

    Attributes:
        width: D, channels of every convolution.
        axis_name: mapped axis over which BatchNorm averages.
        dtype: compute dtype of the convolutions; parameters stay float32.
    """

    width: int = 512
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps x [B, T, C] to tokens [B, ceil(T/2), D]."""
        for i, (kernel, stride) in enumerate([(3, 2), (1, 1), (1, 1), (1, 1)]):
            x = nn.Conv(
                self.width,
                (kernel,),
                strides=(stride,),
                padding=[((kernel - 1) // 2,) * 2],
                use_bias=False,
                kernel_init=uniform_fan_in,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            x = nn.relu(BatchNorm(axis_name=self.axis_name, name=f"norm{i}")(x, train=train))
        return x
