"""data2vec: regress the teacher's last layers at the masked tokens (spec §5.5; Baevski et al., arXiv
2202.03555).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models.encoder import Encoder
from ecg_jax.models.layers import standardise
from ecg_jax.objectives.contract import (
    Inputs,
    Terms,
    encode_masked,
    last_layers,
    mean_over_tokens,
    predict_with_s4,
    smooth_l1,
)
from ecg_jax.objectives.masking import Masking


def data2vec_targets(layers: list[jax.Array]) -> jax.Array:
    """Mean over the layers [B, L, D] of their features, each standardised token by token; float32 [B, L, D]."""
    return jnp.mean(jnp.stack([standardise(layer) for layer in layers]), axis=0)


def data2vec_loss(
    predicted: jax.Array, targets: jax.Array, *, beta: float, scale: float | None = None
) -> jax.Array:
    """Smooth L1 distance of each token, summed over D and times `scale` (None: 1 / sqrt(D)): [B, L, D] to [B,
    L].
    """
    scale = predicted.shape[-1] ** -0.5 if scale is None else scale
    return scale * smooth_l1(predicted, targets, beta).sum(axis=-1)


class Data2Vec(nn.Module):
    """Masked regression of the mean of the teacher's last `top_k` layers, before their residual and norm.

    Attributes:
        encoder: bidirectional.
        width: D.
        mask: what the student does not see.
        top_k: layers averaged into the targets.
        beta: of the smooth L1 loss.
        head_state, head_dropout: of the S4 head.
    """

    encoder: Encoder
    width: int
    mask: Masking
    top_k: int = 2
    beta: float = 1.0
    head_state: int = 64
    head_dropout: float = 0.2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Inputs, *, train: bool) -> tuple[Terms, Terms]:
        """`regression_loss` over masked tokens and the metric `masked_share`, see `objectives.contract`."""
        tokens, mask = encode_masked(self, inputs, train=train)
        predicted = predict_with_s4(self, tokens, inputs, out=self.width, train=train)
        targets = data2vec_targets(last_layers(inputs.teacher, "layer", self.top_k))
        loss = data2vec_loss(predicted, targets, beta=self.beta)
        masked = mask.targets > 0
        return {"regression_loss": mean_over_tokens(loss, masked)}, {
            "masked_share": mean_over_tokens(masked, jnp.ones_like(loss))
        }
