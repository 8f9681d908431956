"""What a masked objective hides from the backbone, and what it asks back (spec §5.4, §5.6).

Every strategy draws for each record from a key of its own, so that the masks of a record depend on its number within
the global batch and not on the device that holds it.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.models.encoder import tokens_of

STRATEGIES = ("span", "block", "ratio", "time", "independent", "lead")

# Keys of records are fold_in(key, record number); no record has this number.
_SHARED = np.uint32(2**32 - 1)


class Mask(flax.struct.PyTreeNode):
    """The masks of a batch.

    Attributes:
        hidden: bool [B, L]; tokens that the backbone sees as the learned mask token.
        targets: float32 [B, L]; how often each token is to be predicted. 0: it is not; a token in overlapping
            JEPA blocks counts once for each.
        signal: bool [B, T, C]; samples that are zero before the stem. None when tokens alone are masked.
    """

    hidden: jax.Array
    targets: jax.Array
    signal: jax.Array | None

    def hide(self, x: jax.Array) -> jax.Array:
        """x [B, T, C] with the hidden samples zero."""
        return x if self.signal is None else jnp.where(self.signal, jnp.zeros((), x.dtype), x)

    @property
    def visible(self) -> jax.Array:
        """bool [B, L]; tokens that are neither hidden nor to be predicted."""
        return ~self.hidden & (self.targets == 0)


@dataclasses.dataclass(frozen=True)
class Masking:
    """How masks are drawn: the fields of `config.objective.mask`."""

    strategy: str = "span"
    probability: float = 0.065
    span: int = 10
    last_token: bool = True
    ratio: float = 0.5
    patch: int = 10
    blocks: int = 4
    target_min: float = 0.15
    target_max: float = 0.20
    context_min: float = 0.85
    context_max: float = 1.0
    min_keep: int = 1

    def draw(self, key: jax.Array, record_index: jax.Array, *, samples: int, leads: int) -> Mask:
        """Masks of the records numbered record_index [B] in windows of `samples` x `leads`."""
        tokens = tokens_of(samples)
        midpoints = jax.vmap(
            lambda n: jax.random.bernoulli(jax.random.fold_in(key, n), self.probability, (tokens,))
        )(record_index)
        hidden = span_mask(midpoints, span=self.span, last_token=self.last_token)
        return Mask(hidden=hidden, targets=hidden.astype(jnp.float32), signal=None)


def span_mask(midpoints: jax.Array, *, span: int, last_token: bool) -> jax.Array:
    """Tokens covered by spans: mid-point x covers [x - (span-1)//2 .. x + span//2] inside the window."""
    L = midpoints.shape[-1]
    t = np.arange(L)
    before = jnp.cumsum(midpoints, axis=-1, dtype=jnp.int32)
    before = jnp.pad(before, [(0, 0)] * (midpoints.ndim - 1) + [(1, 0)])  # mid-points before token t
    first, end = np.clip(t - span // 2, 0, L), np.clip(t + (span - 1) // 2 + 1, 0, L)
    hidden = before[..., end] > before[..., first]
    if last_token:
        return hidden
    return jnp.where(t == L - 1, midpoints, hidden)
