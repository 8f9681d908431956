"""Heads that a probe puts on the tokens of an encoder (spec §7.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models.layers import uniform_bias, uniform_fan_in


class MeanLinear(nn.Module):
    """Mean over tokens, then a linear map with bias: tokens [B, L, D] to float32 [B, out].

    Attributes:
        out: K, number of outputs.
    """

    out: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [B, L, D] to [B, K]."""
        pooled = tokens.astype(jnp.float32).mean(axis=1)
        bias_init = uniform_bias(tokens.shape[-1])
        return nn.Dense(self.out, kernel_init=uniform_fan_in, bias_init=bias_init, name="linear")(pooled)


class AttentionPool(nn.Module):
    """One learned query attends to all tokens; its heads, side by side, are projected on the classes.

    Q = q W_q, K = x W_k, V = x W_v, weights softmax(Q K^T / sqrt(D / heads)), logits = concat(weights V) W_c, all
    without bias (the attentive probe of V-JEPA, Bardes et al., arXiv 2404.08471, without its norms and MLP; spec
    §7.1). 512 + 3 * 512^2 + 512 K parameters at D = 512.

    With one query nothing need be projected token by token: the scores are x (W_k Q^T), and the values are those of
    the weighted mean of the tokens. That takes 4 L D heads operations for a record instead of 4 L D^2, and shares the
    product with the tokens between heads that are trained together under `jax.vmap`.

    Attributes:
        out: K, number of outputs.
        heads: attention heads, a divisor of D.
    """

    out: int
    heads: int = 16

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [B, L, D] to float32 [B, K].

        Raises:
            ValueError: `heads` does not divide D.
        """
        D = tokens.shape[-1]
        if D % self.heads:
            raise ValueError(f"{self.heads} attention heads do not divide tokens of width {D}")
        x = tokens.astype(jnp.float32)
        query = self.param("query", nn.initializers.normal(D**-0.5), (D,))
        W_q, W_k, W_v = (self.param(f"{name}_proj", uniform_fan_in, (D, D)) for name in "qkv")
        W_k, W_v = (W.reshape(D, self.heads, -1) for W in (W_k, W_v))
        Q = (query @ W_q).reshape(self.heads, -1)
        keys = jnp.einsum("dhe,he->hd", W_k, Q) * (D // self.heads) ** -0.5
        weights = nn.softmax(jnp.einsum("bld,hd->bhl", x, keys), axis=-1)
        pooled = jnp.einsum("bhl,bld->bhd", weights, x)
        values = jnp.einsum("bhd,dhe->bhe", pooled, W_v).reshape(-1, D)
        return values @ self.param("c_proj", uniform_fan_in, (D, self.out))


class HeadedEncoder(nn.Module):
    """An encoder and a head under the names `encoder` and `head`, trained together.

    Attributes:
        encoder: maps x [B, T, C] to (tokens [B, L, D], intermediates).
        head: maps tokens [B, L, D] to [B, K].
    """

    encoder: nn.Module
    head: nn.Module

    def __call__(self, x: jax.Array, record_index: jax.Array | None = None, *, train: bool) -> jax.Array:
        """Maps model input x [B, T, C] to logits or values, float32 [B, K]; other arguments as `Encoder`."""
        tokens, _ = self.encoder(x, record_index, train=train)
        return self.head(tokens)


def build_head(head: str, *, out: int, attention_heads: int) -> nn.Module:
    """The head of this name, "linear" or "attention", with `out` outputs; `attention_heads` is for the latter.

    Raises:
        ValueError: another name.
    """
    if head == "linear":
        return MeanLinear(out)
    if head == "attention":
        return AttentionPool(out, attention_heads)
    raise ValueError(f'head={head!r} is unknown; known: "linear", "attention"')
