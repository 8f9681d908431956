"""Linear centred kernel alignment (CKA) between all layers at once, debiased and biased, with intervals.

For features X [n, D] of one layer and Y [n, D'] of another on the same n examples, with linear kernels K = X Xᵀ and
L = Y Yᵀ, the unbiased estimator of HSIC (Song et al., JMLR 2012, equation 5) is, with K̃ and L̃ the kernels with a zero
diagonal,

    HSIC₁(K, L) = [tr(K̃L̃) + 1ᵀK̃1 1ᵀL̃1 / ((n-1)(n-2)) - 2/(n-2) 1ᵀK̃L̃1] / (n(n-3)).

It does not change when features are translated. With centred features K1 = 0, so that K̃1 = -k with k_r = |x_r|², and

    HSIC₁(K, L) = [|XᵀY|² - n/(n-2) Σ_r k_r l_r + Σ_r k_r Σ_r l_r / ((n-1)(n-2))] / (n(n-3)),

of which |XᵀY|² = ⟨K, L⟩ alone is costly: from kernels in blocks of rows, n²(ΣD + M²) products for M layers, or from the
features, nΣD². The cheaper one is taken; neither holds an n x n matrix. The biased estimator is |XᵀY|² / (n-1)².

CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)). Over mini-batches HSIC is averaged before the quotient is taken (Nguyen,
Raghu & Kornblith, ICLR 2021): HSIC₁ of a mini-batch has the expectation of that of all examples, whatever its size.

Intervals are of the delete-a-group jackknife: the examples are dealt into groups, each group is left out of all
mini-batches in turn, and arctanh(CKA) is given Student's t. (A bootstrap would draw examples twice, whose kernel entry
|x|² lies off the diagonal then: exactly what HSIC₁ leaves out.)
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: HSIC₁ divides by n - 3.
MIN_EXAMPLES = 4
#: Groups of the jackknife, each left out once.
GROUPS = 20
#: Floats of kernels held at once: 128 MB.
_BLOCK = 2**25
#: A layer whose spread is this small beside its values is the same for all examples up to rounding.
_CONSTANT = 1e-6


@dataclass(frozen=True)
class Cka:
    """CKA between M layers.

    Attributes:
        debiased: [M, M], at most 1 in magnitude and near 0 for independent layers; NaN where a layer is the same for
            all examples.
        biased: [M, M], never below 0; with few examples for the width near 1 even for independent layers.
        low, high: [M, M], ends of the interval of `debiased`.
        effective_dimensions: [M], (tr Σ)² / tr Σ² of the covariance Σ of each layer: over how many directions its
            variance is spread, and so how many CKA looks at.
        largest_share: [M], share of one example in the variance of a layer, of the example with the largest.
        n_examples, n_batches: that were added.
    """

    debiased: np.ndarray
    biased: np.ndarray
    low: np.ndarray
    high: np.ndarray
    effective_dimensions: np.ndarray
    largest_share: np.ndarray
    n_examples: int
    n_batches: int


def _gram_products(stacks: Sequence[jax.Array]) -> jax.Array:
    """⟨K_i, K_j⟩ [M, M] of centred stacks [M_w, n, D_w], from blocks of rows of all kernels."""
    n, m = stacks[0].shape[1], sum(len(x) for x in stacks)
    rows = max(1, min(n, _BLOCK // (m * n)))
    starts = np.arange(-(-n // rows)) * rows
    padded = [jnp.pad(x, ((0, 0), (0, len(starts) * rows - n), (0, 0))) for x in stacks]

    def block(start):
        kernels = [
            jnp.einsum("mrd,mnd->mrn", lax.dynamic_slice_in_dim(some, start, rows, axis=1), every)
            for some, every in zip(padded, stacks, strict=True)
        ]
        flat = jnp.concatenate(kernels).reshape(m, -1)
        return flat @ flat.T

    return lax.map(block, starts).sum(axis=0)


def _feature_products(stacks: Sequence[jax.Array]) -> jax.Array:
    """|X_iᵀX_j|² [M, M] of centred stacks [M_w, n, D_w], one layer against all others at a time."""

    def against_all(x):
        products = [jnp.square(jnp.einsum("nd,mne->mde", x, other)).sum(axis=(1, 2)) for other in stacks]
        return jnp.concatenate(products)

    return jnp.concatenate([lax.map(against_all, x) for x in stacks])


def _centred(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A stack [M, n, D] centred over the examples of weight 1, the others zero, with |x|² = 1 on average; and the
    factor [M] that was divided by, 0 for a layer that is the same for all examples.
    """
    count = weights.sum()
    x = jnp.where(weights[:, None] > 0, x, 0.0)
    level = jnp.square(x).sum(axis=(1, 2)) / count
    x = jnp.where(weights[:, None] > 0, x - x.sum(axis=1, keepdims=True) / count, 0.0)
    spread = jnp.square(x).sum(axis=(1, 2)) / count
    spread = jnp.where(spread > _CONSTANT**2 * level, spread, 0.0)
    factor = jnp.sqrt(spread)
    inverse = jnp.where(spread > 0, 1 / jnp.where(spread > 0, factor, 1.0), 0.0)
    return x * inverse[:, None, None], factor


@functools.partial(jax.jit, static_argnames="form")
def _sums(layers: tuple[jax.Array, ...], weights: jax.Array, form: str) -> dict[str, jax.Array]:
    """The sums that HSIC is made of, for all pairs of M layers and for each of W choices of examples.

    Args:
        layers: [n, D_m] each.
        weights: [W, n], 1 for an example that takes part and 0 for one that does not.
        form: "gram" or "features", how |XᵀY|² is computed, or "auto" for the cheaper one.

    Returns:
        products [W, M, M], diagonals [W, M, M], traces and largest [W, M], factors [W, M]: Σ, of features divided by
        factors, of ⟨K_i, K_j⟩, k_i·k_j, k_i, the largest k_i.
    """
    widths = [x.shape[1] for x in layers]
    order = sorted(range(len(layers)), key=lambda m: widths[m])
    stacks = [
        jnp.stack([layers[m] for m in order if widths[m] == width]).astype(jnp.float32)
        for width in sorted(set(widths))
    ]
    if form == "auto":
        n = len(layers[0])
        form = "gram" if n * (sum(widths) + len(layers) ** 2) < sum(widths) ** 2 else "features"
    products = {"gram": _gram_products, "features": _feature_products}[form]
    place = np.argsort(order)

    def of(chosen):
        centred, factors = zip(*(_centred(x, chosen) for x in stacks), strict=True)
        k = jnp.concatenate([jnp.square(x).sum(axis=2) for x in centred])[place]
        return {
            "products": products(centred)[place][:, place],
            "diagonals": k @ k.T,
            "traces": k.sum(axis=1),
            "largest": k.max(axis=1),
            "factors": jnp.concatenate(factors)[place],
        }

    return lax.map(of, weights)


def _hsic(sums: dict[str, np.ndarray], n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(HSIC₁, biased HSIC), float64 [W, M, M], from sums over n [W] examples, see the head of this file."""
    n = n[:, None, None]
    traces = sums["traces"][:, :, None] * sums["traces"][:, None, :]
    products = (sums["products"] + sums["products"].swapaxes(1, 2)) / 2  # the same but for the order of sums
    unbiased = products - n / (n - 2) * sums["diagonals"] + traces / ((n - 1) * (n - 2))
    scale = np.square(sums["factors"][:, :, None] * sums["factors"][:, None, :])
    return scale * unbiased / (n * (n - 3)), scale * products / (n - 1) ** 2


class HsicSums:
    """Sums over mini-batches of all pairs of layers; memory does not grow with their number.

    Args:
        groups: of examples, each left out once for the intervals; 0 for none.
        form: see `_sums`.
    """

    def __init__(self, groups: int = GROUPS, form: str = "auto"):
        self.groups, self.form = groups, form
        self.n_examples = self.n_batches = 0
        self._unbiased = self._biased = self._traces = self._largest = 0.0

    def add(self, layers: Sequence[jax.Array], group=None, n_padding: int = 0) -> None:
        """Adds a mini-batch.

        Args:
            layers: float [n, D_m] of each of M layers, the same examples in the same order; D_m may differ.
            group: int [n - n_padding], group of each example, 0 to groups - 1; None without groups.
            n_padding: so many of the last rows are no examples: mini-batches of one size compile once.

        Raises:
            ValueError: fewer than 4 examples, or fewer than 4 once a group is left out.
        """
        n = len(layers[0]) - n_padding
        weights = np.zeros((1 + self.groups, n + n_padding), np.float32)
        weights[:, :n] = 1
        if self.groups:
            weights[1:, :n] = np.asarray(group) != np.arange(self.groups)[:, None]
        count = weights.sum(axis=1).astype(np.float64)
        if count.min() < MIN_EXAMPLES:
            raise ValueError(
                f"unbiased HSIC needs at least {MIN_EXAMPLES} examples in a mini-batch, not {int(count.min())}"
            )
        with jax.default_matmul_precision("highest"):
            sums = jax.device_get(_sums(tuple(layers), weights, form=self.form))
        sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
        unbiased, biased = _hsic(sums, count)
        size = np.square(sums["factors"][0])
        self._unbiased = self._unbiased + unbiased
        self._biased = self._biased + biased[0]
        self._traces = self._traces + size * sums["traces"][0] / (n - 1)
        self._largest = np.maximum(self._largest, size * sums["largest"][0] / (n - 1))
        self.n_examples += n
        self.n_batches += 1

    def hsic(self) -> np.ndarray:
        """HSIC₁ averaged over mini-batches, float64 [M, M]."""
        return self._unbiased[0] / self.n_batches

    def result(self, level: float = 0.95) -> Cka:
        """CKA of everything added.

        Args:
            level: of the intervals, which are NaN without groups.
        """
        cka, biased = _normalised(self._unbiased), _normalised(self._biased)
        low, high = _jackknife(cka[0], cka[1:], level)
        own = np.diagonal(self.hsic())
        with np.errstate(divide="ignore", invalid="ignore"):
            dimensions = np.where(own > 0, (self._traces / self.n_batches) ** 2 / own, np.nan)
            share = np.where(self._traces > 0, self._largest / self._traces, np.nan)
        return Cka(cka[0], biased, low, high, dimensions, share, self.n_examples, self.n_batches)


def _normalised(hsic: np.ndarray) -> np.ndarray:
    """HSIC [..., M, M] to CKA; NaN where a layer has no HSIC with itself."""
    own = np.diagonal(hsic, axis1=-2, axis2=-1)
    root = np.sqrt(np.where(own > 0, own, np.nan))
    cka = np.clip(hsic / (root[..., :, None] * root[..., None, :]), -1, 1)
    same = np.eye(cka.shape[-1], dtype=bool) & ~np.isnan(cka)
    return np.where(same, 1.0, cka)


def _jackknife(cka: np.ndarray, left_out: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Interval of CKA [M, M] from its values with each group left out [G, M, M]; of the diagonal 1 to 1."""
    from scipy.special import stdtrit

    if len(left_out) < 2:
        return np.full_like(cka, np.nan), np.full_like(cka, np.nan)
    end = 1 - 1e-12
    z, each = np.arctanh(np.clip(cka, -end, end)), np.arctanh(np.clip(left_out, -end, end))
    groups = len(each)
    error = np.sqrt((groups - 1) / groups * np.square(each - each.mean(axis=0)).sum(axis=0))
    half = stdtrit(groups - 1, (1 + level) / 2) * error
    low, high = np.tanh(z - half), np.tanh(z + half)
    same = np.eye(len(cka), dtype=bool) & ~np.isnan(cka)
    return np.where(same, 1.0, low), np.where(same, 1.0, high)


def batches_of(n: int, size: int) -> list[np.ndarray]:
    """0 to n - 1 in n // size consecutive pieces whose sizes differ by one at most, none smaller than `size`.

    Raises:
        ValueError: fewer than `size`.
    """
    if n < size:
        raise ValueError(f"{n} examples make no mini-batch of {size}")
    return np.array_split(np.arange(n), n // size)


def groups_of(n: int) -> np.ndarray:
    """int [n], group of each example for the intervals: dealt in turn, so that every mini-batch has some of each."""
    return np.arange(n) % min(GROUPS, n)


def linear_cka(
    layers: Sequence[np.ndarray], batch: int | None = None, level: float = 0.95, form: str = "auto"
) -> Cka:
    """CKA between all pairs of layers whose features are at hand.

    Args:
        layers: float [n, D_m] of each of M layers on the same examples, in an order that means nothing, n at least 5.
        batch: examples in a mini-batch, at least 5; None for all of them at once.
        level: of the intervals.
        form: "gram" (kernels) or "features", which give the same, or "auto".

    Raises:
        ValueError: too few examples, or layers of different numbers of examples.
    """
    n = len(layers[0])
    if {len(x) for x in layers} != {n}:
        raise ValueError("the layers have different numbers of examples")
    batch = n if batch is None else batch
    if batch <= MIN_EXAMPLES:
        raise ValueError(
            f"CKA with an interval needs {MIN_EXAMPLES + 1} examples in a mini-batch, not {batch}"
        )
    groups = groups_of(n)
    sums, pieces = HsicSums(int(groups.max()) + 1, form), batches_of(n, batch)
    largest = len(pieces[0])
    for piece in pieces:
        missing = largest - len(piece)
        padded = [np.concatenate([x[piece], np.zeros((missing, x.shape[1]), x.dtype)]) for x in layers]
        sums.add(padded, groups[piece], missing)
    return sums.result(level)
