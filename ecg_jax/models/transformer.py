"""Pre-norm Transformer with rotary positions (spec §4.1; Vaswani et al., arXiv 1706.03762; Xiong et al.,
arXiv 2002.04745; Su et al., arXiv 2104.09864).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.models.layers import Dropout, gelu, layer_norm, remat

ROPE_BASE = 10_000.0


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of queries or keys, in float32 (arXiv 2104.09864).

    Component i of the first half of a head and component i of the second half make a pair, which turns by the
    angle l * base^(-2i / head_dim) at token l. The product of a query and a key then depends on the distance of
    their tokens only.

    Args:
        x: [B, L, heads, head_dim], head_dim even.

    Returns:
        [B, L, heads, head_dim], in the dtype of x.
    """
    L, head_dim = x.shape[1], x.shape[-1]
    frequency = np.float32(ROPE_BASE ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))
    angle = np.arange(L)[:, None] * frequency.astype(np.float64)
    cos, sin = (f(angle).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention_implementation(device: Any, dtype: Any, head_dim: int) -> str:
    """Which form of `jax.nn.dot_product_attention` a device runs: "cudnn" or "xla".

    cuDNN's fused attention never writes the [L, L] weights to memory. It needs an NVIDIA GPU of compute capability
    8.0 or later, float16 or bfloat16, and heads of a multiple of 8 and at most 128 components. Everything else
    gets XLA's own form.

    Args:
        device: a `jax.Device`; the first of all processes when a model is traced, so that all trace the same.
        dtype: of queries, keys and values.
        head_dim: components of a head.
    """
    fused = (
        device.device_kind.startswith("NVIDIA")
        and float(device.compute_capability) >= 8.0
        and dtype in (jnp.float16, jnp.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 128
    )
    return "cudnn" if fused else "xla"


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
    """The linear layer of spec §4.1: Xavier-uniform weights, zero biases."""
    return nn.Dense(features, kernel_init=nn.initializers.xavier_uniform(), dtype=dtype, name=name)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions; logits are scaled by head_dim^(-1/2) (spec §4.1).

    The softmax is computed in float32. With `dropout` in training, the attention weights are computed explicitly,
    because `jax.nn.dot_product_attention` has no dropout; each record's own mask [heads, L, L] then drops weights.
    That form keeps [B, heads, L, L] for the backward pass and never runs fused.

    Attributes:
        heads: number of heads, each of D / heads components.
        bidirectional: False hides later tokens.
        dropout: of the attention weights.
        dtype: compute dtype of projections and products.
    """

    heads: int
    bidirectional: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, record_index: jax.Array | None, *, train: bool) -> jax.Array:
        """Maps tokens x [B, L, D] to [B, L, D]."""
        B, L, D = x.shape
        head_dim = D // self.heads
        query, key, value = (
            _dense(D, self.dtype, name)(x).reshape(B, L, self.heads, head_dim)
            for name in ("query", "key", "value")
        )
        query, key = rotate(query), rotate(key)
        if train and self.dropout > 0.0:
            y = self._with_dropout(query, key, value, record_index)
        else:
            y = jax.nn.dot_product_attention(
                query,
                key,
                value,
                is_causal=not self.bidirectional,
                implementation=attention_implementation(jax.devices()[0], query.dtype, head_dim),
            )
        return _dense(D, self.dtype, "output")(y.reshape(B, L, D))

    def _with_dropout(self, query, key, value, record_index):
        """softmax(q k^T / sqrt(head_dim)) with dropped weights, times v [B, L, heads, head_dim]."""
        L, head_dim = query.shape[1], query.shape[-1]
        logits = jnp.einsum("blhd,bmhd->bhlm", query, key, preferred_element_type=jnp.float32)
        logits *= head_dim**-0.5
        if not self.bidirectional:
            logits = jnp.where(np.tri(L, dtype=bool), logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        weights = Dropout(self.dropout, tied=False)(weights, record_index, train=True)
        return jnp.einsum("bhlm,bmhd->blhd", weights, value)


class TransformerLayer(nn.Module):
    """x <- x + Drop(Attention(LN(x))); x <- x + Drop(W2 Drop(GELU(W1 LN(x)))) (spec §4.1).

    Attributes: as `Transformer`.
    """

    heads: int
    ff_width: int
    bidirectional: bool
    dropout: float
    attention_dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, record_index: jax.Array | None, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Maps the residual stream x [B, L, D] to the stream after the layer and what the feed-forward sub-layer
        adds to it, before its dropout; both float32 [B, L, D].
        """

        def drop(z):
            return Dropout(self.dropout, tied=False)(z, record_index, train=train)

        z = Attention(
            heads=self.heads,
            bidirectional=self.bidirectional,
            dropout=self.attention_dropout,
            dtype=self.dtype,
            name="attention",
        )(layer_norm("norm1")(x), record_index, train=train)
        x = x + drop(z.astype(jnp.float32))
        z = drop(gelu(_dense(self.ff_width, self.dtype, "hidden")(layer_norm("norm2")(x))))
        z = _dense(x.shape[-1], self.dtype, "output")(z).astype(jnp.float32)
        return x + drop(z), z


class Transformer(nn.Module):
    """A stack of pre-norm Transformer layers and a final LayerNorm (spec §4.1).

    18 915 328 parameters at the defaults, 12 610 560 with 4 layers, 37 829 632 with 12. The residual stream stays
    float32 in every compute dtype, so that the sums of many layers are not rounded. An input of another width than
    D passes a linear layer `input` first.

    Attributes:
        width: D.
        layers: number of layers.
        heads: attention heads; D / heads must be even.
        ff_width: hidden width of the feed-forward sub-layers.
        bidirectional: False makes it causal: token l sees no later token.
        dropout: of what each sub-layer adds, and after the GELU; a mask for each token.
        attention_dropout: of the attention weights. The reference uses 0.1; above 0 attention runs unfused in
            training, see `Attention`.
        remat: what the backward pass recomputes of each layer, see `layers.remat`.
        dtype: compute dtype of projections and attention; parameters, norms and softmax are float32.
    """

    width: int = 512
    layers: int = 6
    heads: int = 8
    ff_width: int = 2048
    bidirectional: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, record_index: jax.Array | None = None, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps tokens x [B, L, D or another width] to tokens [B, L, D] and a dict of intermediates.

        The intermediates are float32: `layer{i}`, what the feed-forward sub-layer of layer i adds, before dropout
        (the usual target of data2vec), and `block{i}`, the residual stream after layer i.

        Raises:
            ValueError: the heads do not divide D into even parts, or `remat` is unknown.
        """
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                f"model.heads={self.heads} must divide model.width={self.width} into heads of an even number of "
                "components, which rotary positions turn in pairs"
            )
        out = {}
        if x.shape[-1] != self.width:
            x = _dense(self.width, self.dtype, "input")(x)
        x = x.astype(jnp.float32)
        for i in range(self.layers):
            layer = TransformerLayer(
                heads=self.heads,
                ff_width=self.ff_width,
                bidirectional=self.bidirectional,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
                dtype=self.dtype,
                name=f"layer{i}",
            )
            run = remat(lambda layer, x: layer(x, record_index, train=train), self.remat)
            x, out[f"layer{i}"] = run(layer, x)
            out[f"block{i}"] = x
        return layer_norm("norm")(x).astype(self.dtype), out
