"""Small pieces that stem, backbones and heads share: initialisers, synchronised BatchNorm, dropout keyed by
record.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

#: U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of torch's Linear and Conv weights, used by the reference
# (spec §11.2).
uniform_fan_in = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")

#: Every LayerNorm and BatchNorm of the reference uses this epsilon (spec §11.2).
NORM_EPSILON = 1e-5


def uniform_bias(fan_in: int):
    """Initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for a bias that feeds from `fan_in` inputs."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x Phi(x) with the normal distribution function Phi (Hendrycks & Gimpel, arXiv 1606.08415).

    Its derivative Phi(x) + x phi(x) is written out: jax 0.12.0 cannot differentiate `erf` inside a `shard_map` that
    checks which values vary over the devices. Computed in float32 at least; the result has the type of x.
    """
    return (_wide(x) * _normal_cdf(x)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    Phi, phi = _normal_cdf(x), jnp.exp(-0.5 * jnp.square(_wide(x))) * (0.5 / jnp.pi) ** 0.5
    return (_wide(x) * Phi).astype(x.dtype), ((Phi + _wide(x) * phi) * dx).astype(x.dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jax.lax.erf(_wide(x) * 0.5**0.5))


def layer_norm(name: str, *, channel_first: bool = False) -> nn.LayerNorm:
    """LayerNorm over the last axis, or the first, computed in float32 whatever the compute dtype."""
    axis = 0 if channel_first else -1
    return nn.LayerNorm(
        epsilon=NORM_EPSILON, dtype=jnp.float32, reduction_axes=axis, feature_axes=axis, name=name
    )


def standardise(x: jax.Array) -> jax.Array:
    """LayerNorm without scale and bias: zero mean and unit variance over the last axis, in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + NORM_EPSILON)


#: What the backward pass recomputes of a block instead of keeping it -> what is kept all the same.
_REMAT_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMAT = ("none", *_REMAT_POLICIES)


def remat(block: Callable, mode: str) -> Callable:
    """`block` with less kept for the backward pass (rematerialisation, Chen et al., arXiv 1604.06174).

    Args:
        block: function of a module, inside its compact `__call__`, and of an array or tree.
        mode: "none": `block` as it is. "block": only its input is kept. "dots": its input and the results of
            matrix products with parameters.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in REMAT:
        raise ValueError(f"model.remat={mode!r} is unknown; known: {', '.join(REMAT)}")
    return block if mode == "none" else nn.remat(block, policy=_REMAT_POLICIES[mode])


def channel_product(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """y[e, b, l] = sum_d kernel[d, e] x[d, b, l].

    Written as a product of matrices: XLA swaps the operands of a transposed product of matrices, but not of one with
    three axes, whose gradient it then computes token first and transposes.
    """
    return jnp.matmul(kernel.T, x.reshape(len(x), -1)).reshape(-1, *x.shape[1:])


class ChannelDense(nn.Module):
    """A linear map of the first axis, y[e, b, l] = sum_d W[d, e] x[d, b, l] + bias[e]; parameters as `nn.Dense`.

    Attributes:
        features: E.
        dtype: of the product; parameters stay float32.
    """

    features: int
    bias_init: Callable
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [D, B, L] to [E, B, L]."""
        kernel = self.param("kernel", uniform_fan_in, (x.shape[0], self.features)).astype(self.dtype)
        bias = self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        return channel_product(kernel, x.astype(self.dtype)) + bias[:, None, None]


class BatchNorm(nn.Module):
    """Batch normalisation over batch and time of [D, B, L], with the reference's running statistics.

    Differs from `flax.linen.BatchNorm` in one thing: the running variance is the *unbiased* estimate, while
    the biased one normalises (spec §2). Statistics are computed in float32 over all devices of `axis_name`.

    Attributes:
        axis_name: mapped axis over which statistics are averaged; None for a single device.
        momentum: weight of the old running statistics (torch's 0.1 is 0.9 here).
    """

    axis_name: str | None = None
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalises x [D, B, L]: in training by the statistics of the batch, else by the running ones.

        In either mode the running statistics move towards those of the batch when the collection `batch_stats` is
        mutable. In evaluation mode that is how a teacher follows its own activations; statistics that were never
        measured say nothing, and there those of the batch take their place.
        """
        width = x.shape[0]
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,))
        dtype = x.dtype
        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        moves = not self.is_initializing() and self.is_mutable_collection("batch_stats")
        if train or moves:
            batch_mean = self._average(x.mean((1, 2)))
            batch_var = self._average(jnp.square(x - batch_mean[:, None, None]).mean((1, 2)))
        if moves:
            count = x.shape[1] * x.shape[2] * (jax.lax.axis_size(self.axis_name) if self.axis_name else 1)
            unbiased = batch_var * count / (count - 1)
            if not train:
                untouched = (mean == 0).all() & (var == 1).all()
                mean, var = jnp.where(untouched, batch_mean, mean), jnp.where(untouched, unbiased, var)
            running_mean.value = self._update(mean, batch_mean)
            running_var.value = self._update(var, unbiased)
        if train:
            mean, var = batch_mean, batch_var
        scale = scale * jax.lax.rsqrt(var + NORM_EPSILON)
        mean, scale, bias = (v[:, None, None] for v in (mean, scale, bias))
        return ((x - mean) * scale + bias).astype(dtype)

    def _average(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmean(x, self.axis_name) if self.axis_name else x

    def _update(self, old: jax.Array, new: jax.Array) -> jax.Array:
        return self.momentum * old + (1.0 - self.momentum) * new


class Dropout(nn.Module):
    """Dropout whose mask belongs to the record, not to the device that happens to hold it.

    The key of record b is the layer's "dropout" key folded with `record_index[b]`, so a step drops the same
    units for any number of devices and processes, and in any order of the records within the global batch.

    Attributes:
        rate: probability of dropping a unit.
        tied: one mask for all tokens of a record ("DropoutNd", spec §3.1) instead of one per token.
        channel_first: x is [D, B, L] instead of [B, L, D].
    """

    rate: float
    tied: bool = True
    channel_first: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, record_index: jax.Array | None, *, train: bool) -> jax.Array:
        """Drops units of x; `record_index` [B] numbers the records within the global batch (None: 0..B-1)."""
        if not train or self.rate == 0.0:
            return x
        batch_axis, token_axis = (1, 2) if self.channel_first else (0, 1)
        if record_index is None:
            record_index = jnp.arange(x.shape[batch_axis])
        shape = [1 if self.tied and axis == token_axis else size for axis, size in enumerate(x.shape)]
        del shape[batch_axis]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), record_index)
        draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate, shape), out_axes=batch_axis)
        keep = draw(keys)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros((), x.dtype))
