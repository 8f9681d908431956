"""What a masked objective hides from the backbone, and what it asks back (spec §5.4, §5.6).

`Masking` draws; the functions below it turn what was drawn into masks and draw nothing. Every record draws from a
key of its own, so its masks depend on its number within the global batch and not on the device that holds it. Only
the two block sizes of JEPA are drawn once for the whole batch.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.models.encoder import tokens_of

#: Name of a strategy -> the fields of `Masking` that it reads.
STRATEGIES = {
    "span": ("probability", "span", "last_token"),
    "block": (
        "blocks", "target_min", "target_max", "context_min", "context_max", "min_keep", "last_token",
    ),
    "ratio": ("ratio", "patch"),
    "time": ("ratio", "patch"),
    "independent": ("ratio", "patch"),
    "lead": ("ratio",),
}  # fmt: skip

# The key of a record is fold_in(key, its number); no record has this number.
_WHOLE_BATCH = np.uint32(2**32 - 1)


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
    """How masks are drawn: the fields of `config.objective.mask`. A strategy reads those that `STRATEGIES` names.

    Tokens are masked by
        "span" (wav2vec 2.0, arXiv 2006.11477; spec §5.4): every token is the mid-point of a span with `probability`,
            and spans may overlap. p = 0.065 with 10 tokens hides about half of a window, the released 0.0065 a
            sixteenth of it, and nothing in every seventh window.
        "block" (I-JEPA, arXiv 2301.08243; spec §5.6): the backbone sees a long block without `blocks` shorter ones,
            which it predicts.
        "ratio": the share `ratio` of all tokens, in pieces of `patch` tokens.
    The signal is set to zero before the stem by
        "time": the share `ratio` of the window, in pieces of `patch` tokens, in all leads at once.
        "independent": the same, drawn for each lead by itself. Predicted are the tokens at which at least as many leads
            are hidden as "lead" would hide, about half of them whatever the ratio.
        "lead": the share `ratio` of the leads, throughout; at least one, and all but one at most. Every token is
            predicted.
    "independent" and "lead" draw among `kept_leads`, when a run sees some leads only.
    Pieces lie on a grid from the first token on. The last one of a window that `patch` does not divide is shorter,
    and of the last piece chosen only the beginning or the end is hidden, so that every window hides exactly
    round(ratio L) tokens.

    No strategy hides a whole window: where spans happen to cover all of it, one token drawn at random stays.

    Attributes:
        strategy: one of `STRATEGIES`.
        probability: that a token is a mid-point.
        span: tokens of a span.
        last_token: treat the last token like every other. False: as in the released samplers, which all but never
            mask it.
        ratio: share that is hidden.
        patch: tokens of a piece; 1 hides tokens one by one.
        blocks: target blocks of each record.
        target_min, target_max: size of a target block, as a share of the window; drawn uniformly between them.
        context_min, context_max: size of the context block likewise.
        min_keep: tokens; the least size of a target block, and of the context: if fewer remain of it, that many
            tokens drawn at random from the whole window take its place, inside targets or not.
        kept_leads: numbers of the leads that a run sees (`config.data.leads`), ascending; () for all.
    """

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
    kept_leads: tuple[int, ...] = ()

    def draw(self, key: jax.Array, record_index: jax.Array, *, samples: int, leads: int) -> Mask:
        """Masks of a batch.

        Args:
            key: of the step. What a record draws depends on it and on the record's number only.
            record_index: int [B] number of each record within the global batch.
            samples, leads: T and C of a window.

        Raises:
            ValueError: unknown strategy; see `check` for everything else that can be wrong.
        """
        tokens, there = tokens_of(samples), len(self.kept_leads) or leads
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(record_index)
        if self.strategy == "block":
            return self._blocks(jax.random.fold_in(key, _WHOLE_BATCH), keys, tokens)
        if self.strategy in ("span", "ratio"):
            one_record = self._spans if self.strategy == "span" else self._pieces
            hidden = jax.vmap(lambda key: one_record(key, tokens))(keys)
            return Mask(hidden=hidden, targets=hidden.astype(jnp.float32), signal=None)
        if self.strategy == "time":
            targets = jax.vmap(lambda key: self._pieces(key, tokens))(keys)
            signal = jnp.broadcast_to(_samples(targets, samples)[..., None], (len(targets), samples, leads))
        elif self.strategy == "independent":
            keys = jax.vmap(lambda key: jax.random.split(key, there))(keys)
            of_lead = jax.vmap(jax.vmap(lambda key: self._pieces(key, tokens)))(keys)  # [B, C, L]
            targets = of_lead.sum(axis=1) >= max(1, round(self.ratio * there))
            signal = self._of_all_leads(jnp.swapaxes(_samples(of_lead, samples), 1, 2), leads)
        elif self.strategy == "lead":
            count = min(max(1, round(self.ratio * there)), there - 1)
            chosen = jax.vmap(lambda key: jax.random.permutation(key, there) < count)(keys)
            chosen = self._of_all_leads(chosen, leads)
            targets = jnp.ones((len(chosen), tokens), bool)
            signal = jnp.broadcast_to(chosen[:, None, :], (len(chosen), samples, leads))
        else:
            raise ValueError(_unknown(self.strategy))
        return Mask(hidden=jnp.zeros_like(targets), targets=targets.astype(jnp.float32), signal=signal)

    def _of_all_leads(self, of_kept: jax.Array, leads: int) -> jax.Array:
        """What was drawn for the kept leads, bool [..., kept], as bool [..., C]; nothing is hidden of the others."""
        if not self.kept_leads:
            return of_kept
        none = jnp.zeros((*of_kept.shape[:-1], leads), bool)
        return none.at[..., np.array(self.kept_leads)].set(of_kept)

    def _spans(self, key: jax.Array, tokens: int) -> jax.Array:
        draw, spare = jax.random.split(key)
        midpoints = jax.random.bernoulli(draw, self.probability, (tokens,))
        hidden = spans_around(midpoints, span=self.span, last_token=self.last_token)
        kept = jnp.arange(tokens) == jax.random.randint(spare, (), 0, tokens)
        return hidden & ~(kept & hidden.all())

    def _pieces(self, key: jax.Array, tokens: int) -> jax.Array:
        order_key, end_key = jax.random.split(key)
        return first_pieces(
            jax.random.permutation(order_key, math.ceil(tokens / self.patch)),
            jax.random.bernoulli(end_key),
            tokens=tokens,
            patch=self.patch,
            count=round(self.ratio * tokens),
        )

    def _blocks(self, key: jax.Array, keys: jax.Array, tokens: int) -> Mask:
        uniforms = jax.random.uniform(key, (2,))
        target = block_size(uniforms[0], tokens=tokens, low=self.target_min, high=self.target_max)
        target = jnp.clip(target, self.min_keep, tokens - 1)
        context = block_size(uniforms[1], tokens=tokens, low=self.context_min, high=self.context_max)

        def one_record(key):
            target_key, context_key, keep_key = jax.random.split(key, 3)

            def starts(key, shape, size):
                return jax.random.randint(key, shape, 0, jnp.maximum(tokens - size + self.last_token, 1))

            seen, targets = place_blocks(
                starts(target_key, (self.blocks,), target),
                target,
                starts(context_key, (), context),
                context,
                tokens=tokens,
            )
            kept = jax.random.permutation(keep_key, tokens) < self.min_keep
            return ~jnp.where(seen.sum() < self.min_keep, kept, seen), targets.astype(jnp.float32)

        hidden, targets = jax.vmap(one_record)(keys)
        return Mask(hidden=hidden, targets=targets, signal=None)

    def check(self, samples: int, leads: int) -> None:
        """Refuses settings that a window of `samples` x `leads` cannot be masked with. Fields that the strategy does
        not read may hold anything.

        Raises:
            ValueError: names the field, as "mask.<field>", and what it may be.
        """
        if self.strategy not in STRATEGIES:
            raise ValueError(_unknown(self.strategy))
        tokens, leads = tokens_of(samples), len(self.kept_leads) or leads
        if self.strategy == "span":
            self._check_span(tokens)
        elif self.strategy == "block":
            self._check_block(tokens)
        else:
            self._check_share("ratio")
            if self.strategy == "lead":
                if leads < 2:
                    raise ValueError(
                        f"mask.strategy='lead' needs at least two leads to hide one, not {leads}"
                    )
                return
            self._check_whole("patch", tokens - 1, f"one less than the {tokens} tokens of a window")
            count = round(self.ratio * tokens)
            if not 1 <= count < tokens:
                raise ValueError(
                    f"mask.ratio={self.ratio} hides {count} of the {tokens} tokens of a window; choose it between "
                    f"{1 / tokens:.2g} and {1 - 1 / tokens:.3g}"
                )

    def _check_share(self, name: str) -> None:
        if not 0 < getattr(self, name) < 1:
            raise ValueError(f"mask.{name}={getattr(self, name)} must lie between 0 and 1, both excluded")

    def _check_whole(self, name: str, largest: int, meaning: str) -> None:
        if not 1 <= getattr(self, name) <= largest:
            raise ValueError(f"mask.{name}={getattr(self, name)} must lie between 1 and {largest}, {meaning}")

    def _check_span(self, tokens: int) -> None:
        self._check_share("probability")
        self._check_whole("span", tokens, "the tokens of a window")
        t = np.arange(tokens)
        reach = np.minimum(t + (self.span - 1) // 2, tokens - 1) - np.maximum(t - self.span // 2, 0) + 1
        left = ((1 - self.probability) ** reach).sum()
        if left < 1:
            raise ValueError(
                f"mask.probability={self.probability} with mask.span={self.span} leaves {left:.2g} of the {tokens} "
                "tokens of a window to see, on average; lower one of them"
            )
        if tokens - left < 1:
            raise ValueError(
                f"mask.probability={self.probability} with mask.span={self.span} hides {tokens - left:.2g} tokens of a "
                "window on average, so that hardly anything is left to predict; raise one of them"
            )

    def _check_block(self, tokens: int) -> None:
        self._check_whole("blocks", tokens, "the tokens of a window")
        for kind in ("target", "context"):
            low, high = getattr(self, f"{kind}_min"), getattr(self, f"{kind}_max")
            for end, value in (("min", low), ("max", high)):
                if not 0 < value <= 1:
                    raise ValueError(f"mask.{kind}_{end}={value} must be above 0 and at most 1")
            if low > high:
                raise ValueError(f"mask.{kind}_min={low} must not exceed mask.{kind}_max={high}")
            if int(tokens * low) < 1:
                raise ValueError(
                    f"mask.{kind}_min={low} makes a block of no token in a window of {tokens}; raise it to "
                    f"{math.ceil(1e4 / tokens) / 1e4:g} at least"
                )
        self._check_whole("min_keep", tokens - 1, f"one less than the {tokens} tokens of a window")
        target = max(int(tokens * self.target_min), self.min_keep)
        context = min(int(tokens * self.context_max), tokens - target)
        if context < self.min_keep:
            raise ValueError(
                f"mask.target_min={self.target_min} and mask.min_keep={self.min_keep} make target blocks of at least "
                f"{target} of the {tokens} tokens of a window, which leaves {max(context, 0)} of the context at most, "
                f"below mask.min_keep; lower one of them, or raise mask.context_max={self.context_max}"
            )


def _unknown(strategy: str) -> str:
    return f"mask.strategy={strategy!r} is unknown; known: {', '.join(STRATEGIES)}"


def spans_around(midpoints: jax.Array, *, span: int, last_token: bool) -> jax.Array:
    """The tokens that spans cover (spec §5.4).

    Args:
        midpoints: bool [..., L]; mid-point x covers [x - (span-1)//2 .. x + span//2], as far as the window goes.
        span: tokens.
        last_token: False: the last token is covered only when it is itself a mid-point, as in the released code.

    Returns:
        bool [..., L].
    """
    L = midpoints.shape[-1]
    t = np.arange(L)
    earlier = jnp.cumsum(midpoints, axis=-1, dtype=jnp.int32)
    earlier = jnp.concatenate(
        [jnp.zeros_like(earlier[..., :1]), earlier], axis=-1
    )  # mid-points before each token
    first, end = np.maximum(t - span // 2, 0), np.minimum(t + (span - 1) // 2 + 1, L)
    covered = earlier[..., end] > earlier[..., first]
    return covered if last_token else jnp.where(t == L - 1, midpoints, covered)


def block_size(uniform: jax.Array, *, tokens: int, low: float, high: float) -> jax.Array:
    """floor(L (low + u (high - low))): the size of a block, int32 [...], from u uniform in [0, 1) [...] (spec §5.6)."""
    whole = math.floor(tokens * low)  # apart, so that float32 carries the fraction only
    return whole + jnp.floor(tokens * low - whole + uniform * (tokens * (high - low))).astype(jnp.int32)


def place_blocks(
    target_starts: jax.Array,
    target_size: jax.Array,
    context_start: jax.Array,
    context_size: jax.Array,
    *,
    tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Context and targets of one record (spec §5.6).

    Args:
        target_starts: int [n], first token of each target block.
        target_size: int [], their size.
        context_start, context_size: int [], of the context block.
        tokens: L.

    Returns:
        The context, bool [L]: its block without the target blocks. The targets, int32 [L]: target blocks that each
        token lies in.
    """
    t = jnp.arange(tokens)

    def block(start, size):
        return (t >= start) & (t < start + size)

    targets = block(target_starts[:, None], target_size).sum(axis=0)
    return block(context_start, context_size) & (targets == 0), targets


def first_pieces(order: jax.Array, backwards: jax.Array, *, tokens: int, patch: int, count: int) -> jax.Array:
    """The first `count` tokens of a window whose pieces were put into a new order.

    Args:
        order: int [ceil(L / patch)], the place of each piece of `patch` tokens.
        backwards: bool [], whether the tokens inside a piece are counted from its end.
        tokens: L.
        patch: tokens of a piece.
        count: tokens wanted, at least 1.

    Returns:
        bool [L], `count` of them True.
    """
    piece, inside = np.divmod(np.arange(tokens), patch)
    place = order[piece] * patch + jnp.where(backwards, patch - 1 - inside, inside)
    return place <= jnp.sort(place)[count - 1]


def _samples(of_tokens: jax.Array, samples: int) -> jax.Array:
    """[..., L] -> [..., T]: a token begins at every second sample (`models.stem`)."""
    return jnp.repeat(of_tokens, 2, axis=-1)[..., :samples]
