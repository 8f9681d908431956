"""Contrastive predictive coding of one future token (spec §5.3; van den Oord et al., arXiv 1807.03748).

The backbone reads the stem's tokens up to i and predicts token i + steps_ahead among negatives drawn from the
same record.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models.encoder import Encoder
from ecg_jax.models.layers import uniform_fan_in
from ecg_jax.objectives.contract import Inputs, Terms


def draw_negatives(
    key: jax.Array, record_index: jax.Array, *, tokens: int, steps_ahead: int, negatives: int
) -> jax.Array:
    """Time indices of the negatives, uniform over all tokens of the record but the positive, with
    replacement. Past and future tokens alike may be drawn, those the backbone has read and the positive's
    neighbours included.

    Args:
        key: key of the step; the draw of a record depends on it and on the record's number only.
        record_index: [B] number of each record within the global batch.
        tokens: L.
        steps_ahead: k, distance of the predicted token.
        negatives: M, negatives for each position.

    Returns:
        int32 [B, L - k, M].
    """
    positions = tokens - steps_ahead
    positive = steps_ahead + jnp.arange(positions)[:, None]

    def one_record(index):
        # A third of the time of `randint`; no token is likelier than another by more than tokens / 2^23.
        uniform = jax.random.uniform(jax.random.fold_in(key, index), (positions, negatives))
        drawn = jnp.minimum((uniform * (tokens - 1)).astype(jnp.int32), tokens - 2)
        return drawn + (drawn >= positive)  # from tokens - 1 values to all but the positive

    return jax.vmap(one_record)(record_index)


def cpc_loss(
    encoded: jax.Array,
    predicted: jax.Array,
    negative_idx: jax.Array,
    *,
    steps_ahead: int,
    temperature: float,
    normalise: bool,
    negative_records: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """InfoNCE over one positive and M negatives for every position (spec §5.3).

    Every token is scored against every prediction of its record once, G [B, L-k, L]. With n_ij the number of times
    that token j was drawn as a negative of position i, the denominator is sum_j (n_ij + [j = i + k]) exp G_ij: neither
    a vector nor a score is copied for a negative, and the backward pass is a softmax instead of a scatter of floats,
    whose order, and so its rounding, a GPU does not promise.

    Args:
        encoded: stem tokens s [B, L, D]; gradients flow into them.
        predicted: predictions p [B, L, D]; the last k are not used.
        negative_idx: [B, L-k, M] token indices of the negatives.
        steps_ahead: k.
        temperature: scores are divided by it.
        normalise: scores are cosines instead of dot products.
        negative_records: [B, L-k, M] batch index of the record that each negative comes from; None: its own
            record, as the paper draws them and `CPC` does.

    Returns:
        loss float32 [B], summed over the L-k positions of each record, and accuracy float32 [B], the share of
        positions whose positive scores at least as high as every negative. The objective is the mean of
        `loss` over the batch.
    """
    _, L, D = encoded.shape
    if normalise:
        encoded, predicted = (v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (encoded, predicted))
    predicted = predicted[:, : L - steps_ahead]

    def score(p, s):
        product = jnp.einsum("...id,...jd->...ij", p, s, preferred_element_type=jnp.float32)
        return product / temperature

    if negative_records is None:
        scores = score(predicted, encoded)
        drawn = _count(negative_idx, L)
        is_positive = jnp.arange(L) == steps_ahead + jnp.arange(L - steps_ahead)[:, None]
        positive = jnp.diagonal(scores, offset=steps_ahead, axis1=1, axis2=2)
        total = jax.nn.logsumexp(scores, axis=-1, b=drawn + is_positive)
        hardest = jnp.where(drawn > 0, scores, -jnp.inf).max(axis=-1)
    else:
        positive = jnp.einsum(
            "bid,bid->bi", predicted, encoded[:, steps_ahead:], preferred_element_type=jnp.float32
        )
        positive = positive / temperature
        flat = encoded.reshape(-1, D)

        # One record at a time and recomputed in the backward pass: the score matrix is [L-k, B L], never [B,
        # L-k, B L].
        @jax.checkpoint
        def one_record(args):
            p, idx = args
            return jnp.take_along_axis(score(p, flat), idx, axis=1)

        negative = jax.lax.map(one_record, (predicted, negative_records * L + negative_idx))
        logits = jnp.concatenate([positive[..., None], negative], axis=-1)
        total, hardest = jax.nn.logsumexp(logits, axis=-1), negative.max(axis=-1)
    loss = (total - positive).sum(axis=-1)
    accuracy = (positive >= hardest).mean(axis=-1, dtype=jnp.float32)
    return loss, accuracy


def _count(idx: jax.Array, L: int) -> jax.Array:
    """How often each of L tokens occurs in the last axis of idx [B, P, M], float32 [B, P, L]."""
    b, p, _ = jnp.ix_(*(jnp.arange(size) for size in idx.shape))
    return jnp.zeros((*idx.shape[:2], L), jnp.float32).at[b, p, idx].add(1.0)


class CPC(nn.Module):
    """Encoder and linear prediction head of CPC.

    Attributes:
        encoder: must be causal.
        width: D.
        steps_ahead: k, tokens between the last one read and the one predicted (14 tokens are 117 ms).
        negatives: M.
        temperature, normalise: as in `cpc_loss`.
    """

    encoder: Encoder
    width: int
    steps_ahead: int = 14
    negatives: int = 128
    temperature: float = 1.0
    normalise: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Inputs, *, train: bool) -> tuple[Terms, Terms]:
        """`contrastive_loss` and the metric `accuracy`, see `objectives.contract`."""
        record_index = inputs.record_index
        tokens, out = self.encoder(inputs.x, record_index, train=train)
        encoded = out["stem"]
        predicted = nn.Dense(
            self.width, use_bias=False, kernel_init=uniform_fan_in, dtype=self.dtype, name="head"
        )(tokens)
        negative_idx = draw_negatives(
            self.make_rng("objective"),
            record_index,
            tokens=encoded.shape[1],
            steps_ahead=self.steps_ahead,
            negatives=self.negatives,
        )
        loss, accuracy = cpc_loss(
            encoded,
            predicted,
            negative_idx,
            steps_ahead=self.steps_ahead,
            temperature=self.temperature,
            normalise=self.normalise,
        )
        weights = jnp.ones_like(loss)
        return {"contrastive_loss": (loss, weights)}, {"accuracy": (accuracy, weights)}
