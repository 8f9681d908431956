"""JEPA: predict the teacher's final features in target blocks from a context block (spec §5.6; Assran et al.,
arXiv 2301.08243).
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
    mean_over_tokens,
    predict_with_s4,
    smooth_l1,
)
from ecg_jax.objectives.masking import Masking


def jepa_targets(tokens: jax.Array, norms: int) -> jax.Array:
    """Teacher tokens [B, L, D], standardised over D `norms` times, as float32.

    Twice, as the released code does it, differs from once only by the epsilon (spec §5.6).
    """
    targets = tokens.astype(jnp.float32)
    for _ in range(norms):
        targets = standardise(targets)
    return targets


def jepa_loss(predicted: jax.Array, targets: jax.Array, *, beta: float) -> jax.Array:
    """Smooth L1 distance of each token, averaged over D: [B, L, D] to [B, L]."""
    return smooth_l1(predicted, targets, beta).mean(axis=-1)


class JEPA(nn.Module):
    """Prediction of the teacher's output in blocks, in place: hidden tokens are replaced, none is dropped.

    A token in several target blocks counts once for each.

    Attributes:
        encoder: bidirectional.
        width: D.
        mask: what the student does not see, and what it is to predict.
        target_norms: see `jepa_targets`.
        beta: of the smooth L1 loss.
        head_state, head_dropout: of the S4 head.
    """

    encoder: Encoder
    width: int
    mask: Masking
    target_norms: int = 1
    beta: float = 1.0
    head_state: int = 64
    head_dropout: float = 0.2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Inputs, *, train: bool) -> tuple[Terms, Terms]:
        """`prediction_loss` over target blocks and the metric `masked_share`, see `objectives.contract`."""
        tokens, mask = encode_masked(self, inputs, train=train)
        predicted = predict_with_s4(self, tokens, inputs, out=self.width, train=train)
        loss = jepa_loss(predicted, jepa_targets(inputs.teacher["tokens"], self.target_norms), beta=self.beta)
        return {"prediction_loss": mean_over_tokens(loss, mask.targets)}, {
            "masked_share": mean_over_tokens(mask.targets > 0, jnp.ones_like(loss))
        }
