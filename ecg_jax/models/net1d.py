"""Net1D, the RegNet-like convolutional backbone of ECGFounder at a constant token rate (spec §4.2; Li et al.,
arXiv 2410.04133; Radosavovic et al., arXiv 2003.13678; squeeze-excite: Hu et al., arXiv 1709.01507).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models.layers import remat, uniform_bias, uniform_fan_in


def _padding(kernel: int, bidirectional: bool) -> tuple[int, int]:
    """Tokens of zeros before and after the window: "same", the odd one after; or causal, all before."""
    left = (kernel - 1) // 2 if bidirectional else kernel - 1
    return left, kernel - 1 - left


def grouped_convolution(x: jax.Array, kernel: jax.Array, *, left: int) -> jax.Array:
    """Grouped convolution over time with stride 1, as one matrix product for each group.

    y[l, g, o] = sum_{j, i} x[l + j - left, g, i] kernel[j, i, g, o], zeros outside the window. Time is cut into
    frames of k tokens; a frame of outputs is a Toeplitz matrix, [2k inputs, k outputs] of kernel taps, times its
    frame of inputs and the next. That doubles the multiplications and is exact. XLA's own form,
    `feature_group_count`, is several times slower in its weight gradient on a CPU, and a plain `jit` with
    shardings gathers its whole batch on every device.

    Args:
        x: [B, L, D].
        kernel: [k, D/G, D], the layout of `jax.lax.conv_general_dilated` for G groups.
        left: tokens of padding before the window, at most k - 1; k - 1 - left come after it.

    Returns:
        [B, L, D].
    """
    B, L, D = x.shape
    k, per_group = kernel.shape[:2]
    groups, frames = D // per_group, -(-L // k)

    x = jnp.pad(x, ((0, 0), (left, (frames + 1) * k - left - L), (0, 0)))
    x = x.reshape(B, frames + 1, k, groups, per_group).transpose(3, 0, 1, 2, 4)
    inputs = jnp.concatenate([x[:, :, :-1], x[:, :, 1:]], axis=3).reshape(
        groups, B * frames, 2 * k * per_group
    )

    # Rows of length 2k + 1, read as rows of length 2k, move one tap to the right from each output to the next.
    taps = kernel.reshape(k, per_group, groups, per_group).transpose(2, 0, 1, 3)
    taps = jnp.pad(taps, ((0, 0), (0, k + 1), (0, 0), (0, 0)))
    taps = jnp.broadcast_to(taps[:, None], (groups, k, *taps.shape[1:]))
    taps = taps.reshape(groups, k * (2 * k + 1), per_group, per_group)[:, : 2 * k * k]
    taps = taps.reshape(groups, k, 2 * k, per_group, per_group).transpose(0, 2, 3, 1, 4)
    toeplitz = taps.reshape(groups, 2 * k * per_group, k * per_group)

    y = jnp.matmul(inputs, toeplitz).reshape(groups, B, frames, k, per_group)
    return y.transpose(1, 2, 3, 0, 4).reshape(B, frames * k, D)[:, :L]


class GroupedConv(nn.Module):
    """`grouped_convolution` with torch's default initialisation.

    Attributes:
        kernel: taps k.
        group_width: channels of a group.
        bidirectional: False pads before the window only.
        dtype: compute dtype.
    """

    kernel: int
    group_width: int
    bidirectional: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, L, D] to [B, L, D]."""
        D = x.shape[-1]
        kernel = self.param("kernel", uniform_fan_in, (self.kernel, self.group_width, D))
        bias = self.param("bias", uniform_bias(self.kernel * self.group_width), (D,))
        left, _ = _padding(self.kernel, self.bidirectional)
        return grouped_convolution(x.astype(self.dtype), kernel.astype(self.dtype), left=left) + bias.astype(
            self.dtype
        )


class Net1DBlock(nn.Module):
    """Bottleneck block: pointwise, grouped and pointwise convolution, each after a swish; squeeze-excite; identity
    (spec §4.2).

    Attributes: as `Net1D`, and
        features: channels after the block; more than before is made up with zeros on both sides of the identity.
        first: the very first block, whose input has been activated already.
    """

    features: int
    first: bool
    kernel: int
    group_width: int
    bidirectional: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps the residual stream x [B, L, C] to the stream after the block and what the block adds to it, both
        float32 [B, L, features].
        """

        def linear(features, name, z):
            return nn.Dense(
                features,
                kernel_init=uniform_fan_in,
                bias_init=uniform_bias(z.shape[-1]),
                dtype=self.dtype,
                name=name,
            )(z)

        z = linear(self.features, "conv1", x if self.first else nn.swish(x))
        z = GroupedConv(
            kernel=self.kernel,
            group_width=self.group_width,
            bidirectional=self.bidirectional,
            dtype=self.dtype,
            name="conv2",
        )(nn.swish(z))
        z = linear(self.features, "conv3", nn.swish(z)).astype(jnp.float32)
        if self.bidirectional:
            gate = nn.swish(linear(self.features // 2, "gate1", z.mean(axis=1)))
            z = z * nn.sigmoid(linear(self.features, "gate2", gate).astype(jnp.float32))[:, None]
        before = (self.features - x.shape[-1]) // 2
        after = self.features - x.shape[-1] - before
        return jnp.pad(x, ((0, 0), (0, 0), (before, after))) + z, z


class Net1D(nn.Module):
    """A convolution and stages of bottleneck blocks, all with stride 1 and without normalisation (spec §4.2).

    `bidirectional=True` is the released form: "same" padding and a squeeze-excite gate that averages over the
    whole window; 9 678 464 parameters at the defaults. The reference uses it for CPC as well, where every token
    sees the tokens it is asked to predict: the published CPC with Net1D reads its own target.

    `bidirectional=False` is causal in truth, for CPC: all padding comes before the window, and there is no
    squeeze-excite, because an average over the window is not causal; its parameters do not exist. 7 104 960
    parameters at the defaults.

    The BatchNorms that the reference creates and never uses do not exist here. There is no dropout. The residual
    stream stays float32 in every compute dtype.

    Attributes:
        width: D; the last of `filters` must equal it.
        filters: channels of each stage, never falling, multiples of `group_width`; the first is also that of the
            first convolution.
        blocks: blocks of each stage.
        kernel: taps of the first convolution and of the grouped ones.
        group_width: channels of a group.
        bidirectional: see above.
        remat: what the backward pass recomputes of each block, see `layers.remat`.
        dtype: compute dtype of convolutions and gates; parameters are float32.
    """

    width: int = 512
    filters: tuple[int, ...] = (64, 128, 128, 256, 256, 512, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 3, 3, 4, 4)
    kernel: int = 16
    group_width: int = 16
    bidirectional: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, record_index: jax.Array | None = None, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps tokens x [B, L, any width] to tokens [B, L, D] and a dict of intermediates.

        `record_index` and `train` change nothing. The intermediates are float32 and numbered through the blocks
        of all stages: `layer{i}`, what block i adds to its identity, and `block{i}`, after the addition.

        Raises:
            ValueError: `filters`, `blocks` or `remat` do not fit the rest.
        """
        self._check()
        x = nn.Conv(
            self.filters[0],
            (self.kernel,),
            padding=[_padding(self.kernel, self.bidirectional)],
            kernel_init=uniform_fan_in,
            bias_init=uniform_bias(self.kernel * x.shape[-1]),
            dtype=self.dtype,
            name="input",
        )(x)
        x = nn.swish(x.astype(jnp.float32))
        out = {}
        features = [f for f, n in zip(self.filters, self.blocks, strict=True) for _ in range(n)]
        for i, f in enumerate(features):
            block = Net1DBlock(
                features=f,
                first=i == 0,
                kernel=self.kernel,
                group_width=self.group_width,
                bidirectional=self.bidirectional,
                dtype=self.dtype,
                name=f"block{i}",
            )
            x, out[f"layer{i}"] = remat(lambda block, x: block(x), self.remat)(block, x)
            out[f"block{i}"] = x
        return x.astype(self.dtype), out

    def _check(self) -> None:
        filters = self.filters
        if not filters or filters[-1] != self.width:
            raise ValueError(f"model.filters={filters} must end with model.width={self.width}")
        if list(filters) != sorted(filters):
            raise ValueError(f"model.filters={filters} must not fall from one stage to the next")
        if self.bidirectional and filters[0] < 2:
            raise ValueError(f"model.filters={filters} must be at least 2: squeeze-excite halves them")
        if any(f % self.group_width for f in filters):
            raise ValueError(
                f"model.filters={filters} must be multiples of model.group_width={self.group_width}"
            )
        if len(self.blocks) != len(filters):
            raise ValueError(
                f"model.blocks={self.blocks} must have one number for each of model.filters={filters}"
            )
