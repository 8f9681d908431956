"""Online clustering of the teacher's tokens: the codebooks of DinoSR and the prototypes of HuBERT++ (spec §5.7, §5.8).

Everything here is float32 and pure. Sums over tokens are sums over the global batch: functions that need them take
the mapped axis (None outside a map), so that any number of devices makes the same targets and the same clusters.
Distances are matrix products; nothing of [B, L, K, D] exists.
"""

import jax
import jax.numpy as jnp

#: Below this moving count a codeword is divided by it instead, and shrinks towards zero (spec §5.7).
SMALLEST_COUNT = 1e-8
#: Added to the sums that Sinkhorn's rounds divide by (spec §5.8).
SINKHORN_EPSILON = 1e-8

_HIGHEST = jax.lax.Precision.HIGHEST


def _psum(tree, axis_name: str | None):
    return jax.lax.psum(tree, axis_name) if axis_name else tree


def unit_rows(x: jax.Array) -> jax.Array:
    """x [..., D] with rows of length 1, as float32; a row of zeros stays."""
    x = x.astype(jnp.float32)
    # The square is bounded, not the root: the gradient of the root at zero is not finite.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def nearest_code(features: jax.Array, codebook: jax.Array) -> jax.Array:
    """int32 [..., L], the codeword of codebook [..., K, D] that is nearest to each of features [..., L, D]."""
    # |f - c|^2 without |f|^2, which is the same for all codewords.
    products = jnp.einsum("...ld,...kd->...lk", features, codebook, precision=_HIGHEST)
    distances = jnp.square(codebook).sum(axis=-1)[..., None, :] - 2.0 * products
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def code_usage(labels: jax.Array, codes: int, axis_name: str | None) -> jax.Array:
    """Tokens of the global batch with each label: labels int [B, L, ...] to float32 [..., K]. Labels outside 0..K-1 do
    not count.
    """
    counts = jax.nn.one_hot(labels, codes, dtype=jnp.float32).sum(axis=(0, 1))
    return _psum(counts, axis_name)


def perplexity(usage: jax.Array) -> jax.Array:
    """exp(entropy) of the shares of usage [..., K]: the number of codes in even use; 1 when a single code is used."""
    shares = usage / jnp.maximum(usage.sum(axis=-1, keepdims=True), 1.0)
    return jnp.exp(-jax.scipy.special.xlogy(shares, shares).sum(axis=-1))


def update_codebook(
    code_sum: jax.Array,
    code_count: jax.Array,
    features: jax.Array,
    labels: jax.Array,
    *,
    momentum: float,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Moving average of the tokens assigned to each codeword (spec §5.7; Liu et al., arXiv 2305.10005).

    A codeword that no token is assigned to keeps its place, since sum and count decay alike, until its count falls
    below `SMALLEST_COUNT`; from then on it shrinks towards zero and may become attractive again.

    Args:
        code_sum, code_count: [K, D] and [K].
        features, labels: [B, L, D] and int [B, L], assigned with the codebook before this update.
        momentum: weight of the old sums and counts.

    Returns:
        codebook [K, D], code_sum, code_count.
    """
    assigned = jax.nn.one_hot(labels, code_count.shape[0], dtype=jnp.float32)
    sums = jnp.einsum("blk,bld->kd", assigned, features, precision=_HIGHEST)
    sums, counts = _psum((sums, assigned.sum(axis=(0, 1))), axis_name)
    code_sum = momentum * code_sum + (1.0 - momentum) * sums
    code_count = momentum * code_count + (1.0 - momentum) * counts
    return code_sum / jnp.maximum(code_count, SMALLEST_COUNT)[:, None], code_sum, code_count


def temperature_at(step: jax.Array, *, start: float, end: float, steps: int) -> jax.Array:
    """Temperature after `step` updates: from `start` to `end` along half a cosine of `steps` updates (spec §5.8)."""
    progress = jnp.minimum(step / steps, 1.0) if steps else 1.0
    return start + (end - start) * 0.5 * (1.0 - jnp.cos(jnp.pi * progress))


def cosines(features: jax.Array, prototypes: jax.Array) -> jax.Array:
    """float32 [B, L, K], the cosine of every token with every prototype, both given as unit rows."""
    return jnp.einsum("bld,kd->blk", features, prototypes, precision=_HIGHEST)


def sinkhorn_targets(
    similarity: jax.Array, *, temperature: jax.Array, rounds: int, axis_name: str | None
) -> jax.Array:
    """Soft assignments that use all prototypes about equally (spec §5.8; Cuturi, arXiv 1306.0895; Caron et al., arXiv
    2006.09882).

    Each round divides by the column sums, over the tokens of the global batch, and then by the row sums.

    Args:
        similarity: [B, L, K], see `cosines`.
        temperature: similarities are divided by it.
        rounds: at least 1.

    Returns:
        float32 [B, L, K] whose rows sum to 1.
    """
    scores = similarity / temperature
    targets = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    for _ in range(rounds):
        targets = targets / (_psum(targets.sum(axis=(0, 1)), axis_name) + SINKHORN_EPSILON)
        targets = targets / (targets.sum(axis=-1, keepdims=True) + SINKHORN_EPSILON)
    return targets


def update_prototypes(
    prototypes: jax.Array, targets: jax.Array, features: jax.Array, *, momentum: float, axis_name: str | None
) -> jax.Array:
    """Prototypes [K, D] moved towards the mean direction of their tokens (spec §5.8).

    Args:
        prototypes: [K, D], unit rows.
        targets: [B, L, K], the weights of the tokens.
        features: [B, L, D], unit rows.
        momentum: weight of the old prototypes.

    Returns:
        [K, D], unit rows.
    """
    mean = jnp.einsum("blk,bld->kd", targets, features, precision=_HIGHEST)
    mean = unit_rows(_psum(mean, axis_name))
    return unit_rows(momentum * prototypes + (1.0 - momentum) * mean)


def squared_distance(features: jax.Array, centre: jax.Array) -> jax.Array:
    """[...], squared distance of features [..., D] to one centre [D]; exactly 0 for the centre itself."""
    return jnp.square(features - centre).sum(axis=-1)


def draw_probability(nearest: jax.Array, axis_name: str | None) -> jax.Array:
    """Probability of each token to be the next centre of k-means++: its share of the squared distances `nearest` [B,
    L] to the nearest centre so far, over the global batch. 0 for all when every token is a centre.
    """
    total = _psum(nearest.sum(), axis_name)
    return nearest / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)


def kmeans_plus_plus(
    key: jax.Array,
    features: jax.Array,
    record_index: jax.Array,
    *,
    codes: int,
    axis_name: str | None,
    instead_of: jax.Array | None = None,
    when: jax.Array | bool = True,
) -> jax.Array:
    """Centres among the tokens of the global batch (Arthur & Vassilvitskii, SODA 2007; spec §5.8): the first uniform,
    each of the others with probability proportional to the squared distance to the nearest one so far.

    A token is drawn where log probability plus Gumbel noise is greatest. The noise belongs to draw, record and token,
    so the tokens stay where they are, and any number of devices draws the same ones. A batch with fewer distinct
    tokens than codes repeats a centre.

    Args:
        key: of the draw.
        features: [B, L, D].
        record_index: int32 [B], number of each record within the global batch.
        codes: K.
        instead_of, when: [K, D] to return, at no cost, unless `when`.

    Returns:
        [K, D], rows of `features`.
    """
    B, L, D = features.shape
    # Of each token within the global batch.
    number = record_index[:, None] * L + jnp.arange(L, dtype=jnp.int32)

    def centre(draw, log_probability):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, draw), record_index)
        # "high": plain float32 noise has so few values at its upper end that tokens of a large batch would tie.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (L,), mode="high"))(keys)
        score = log_probability + noise
        best, drawn = score.max(), jnp.iinfo(jnp.int32).max
        best = jax.lax.pmax(best, axis_name) if axis_name else best
        drawn = jnp.where(score == best, number, drawn).min()  # ties: the first
        drawn = jax.lax.pmin(drawn, axis_name) if axis_name else drawn
        here = (number == drawn).reshape(-1)
        row = features.reshape(B * L, D)[jnp.argmax(here)]
        return _psum(jnp.where(here.any(), row, 0.0), axis_name)

    def draw(i, carry):
        nearest, centres = carry
        new = centre(i, jnp.where(i == 0, 0.0, jnp.log(draw_probability(nearest, axis_name))))
        nearest = jnp.minimum(nearest, squared_distance(features, new))
        return nearest, centres.at[i].set(new)

    far = jnp.zeros_like(features[..., 0]) + 1e30
    centres = jnp.zeros((codes, D), features.dtype) if instead_of is None else instead_of
    # No round instead of a `cond`: on several CPU devices XLA (jaxlib 0.10) crashes on sums inside a conditional.
    return jax.lax.fori_loop(0, jnp.where(when, codes, 0), draw, (far, centres))[1]
