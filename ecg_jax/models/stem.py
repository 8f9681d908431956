"""The convolutional stem shared by every backbone (spec §2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models.layers import BatchNorm, channel_product, uniform_fan_in


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
        L = (x.shape[1] + 1) // 2
        # The first convolution as a product: token l reads samples 2 l - 1, 2 l and 2 l + 1.
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 2 * L + 1 - x.shape[1]), (0, 0)))
        x = jnp.concatenate([x[:, offset : offset + 2 * L : 2] for offset in range(3)], axis=-1)
        x = jnp.transpose(x, (2, 0, 1))  # channel first, [3 C, B, L]
        for i, kernel_size in enumerate((3, 1, 1, 1)):
            x = _Convolution(self.width, kernel_size, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.relu(BatchNorm(axis_name=self.axis_name, name=f"norm{i}")(x, train=train))
        return jnp.transpose(x, (1, 2, 0))


class _Convolution(nn.Module):
    """A bias-free convolution whose input holds the channels of all its samples: [k C, B, L] to [D, B, L]."""

    width: int
    kernel_size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k = self.kernel_size
        kernel = self.param("kernel", uniform_fan_in, (k, x.shape[0] // k, self.width))
        kernel = kernel.reshape(x.shape[0], self.width).astype(self.dtype)
        return channel_product(kernel, x)
