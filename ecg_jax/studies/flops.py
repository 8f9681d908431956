"""Floating point operations of pretraining, by formula (spec §3, §8).

The convention is the one that published figures of these models follow: a multiply-add is 2 operations; only
convolutions and matrix products count. FFTs, the generation of S4 kernels, norms, activations, dropout, masks,
Sinkhorn's divisions and the optimiser are left out. So the stem and four S4 layers of width 512 make
1 741 209 600 operations for a window of 2.5 s, although the convolution of an S4 layer is its FFT: a
time measured against these figures contains work that they do not.

What else the published figures turn out to contain: the 12.43 G of six Transformer layers are the four projections,
the two linears of the feed-forward part, and both products of attention over all pairs of tokens (rotary positions
and softmax are not products; a causal mask is not credited for the half it hides). The 4.26 G of the released Net1D
are its convolutions, a grouped one with the inputs of its own group only (`models.net1d` computes it as a matrix
product of twice that size), and the two linears of squeeze-excite, which act once on a window (0.005 G).

Letters: T samples, C leads, L = ceil(T / 2) tokens, D width, K codes. All figures are for one window.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

LEADS = 12


class Cost(NamedTuple):
    """Operations of one window: of the forward pass, and of the backward pass (0 where nothing is differentiated)."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Both passes."""
        return self.forward + self.backward


def tokens_of_window(window_s: float, rate_hz: float) -> int:
    """L: the stem's first convolution has stride 2."""
    return (round(window_s * rate_hz) + 1) // 2


def product(rows: int, inner: int, columns: int) -> int:
    """[rows, inner] times [inner, columns]: 2 rows inner columns."""
    return 2 * rows * inner * columns


def first_convolution(L: int, C: int, D: int) -> int:
    """Kernel 3, C leads to D channels at L tokens: 2 L 3C D."""
    return product(L, 3 * C, D)


def stem(L: int, C: int, D: int) -> int:
    """The first convolution and three of kernel 1: 2 L 3C D + 3 (2 L D D)."""
    return first_convolution(L, C, D) + 3 * product(L, D, D)


def s4_layer(L: int, D: int) -> int:
    """The output linear, D to value and gate of the GLU: 2 L D 2D. One kernel or two, any number of states."""
    return product(L, D, 2 * D)


def s4_backbone(L: int, D: int, layers: int) -> int:
    """`layers` S4 layers."""
    return layers * s4_layer(L, D)


def attention(L: int, D: int) -> int:
    """Scores of all pairs of tokens and the mix of values, over all heads: 2 (2 L D L)."""
    return product(L, D, L) + product(L, L, D)


def transformer_layer(L: int, D: int, ff_width: int) -> int:
    """Query, key, value and output, attention, feed-forward: 4 (2 L D D) + 4 L D L + 2 (2 L D F)."""
    return 4 * product(L, D, D) + attention(L, D) + 2 * product(L, D, ff_width)


def transformer(L: int, D: int, layers: int, ff_width: int) -> int:
    """`layers` layers; any number of heads."""
    return layers * transformer_layer(L, D, ff_width)


def net1d(
    L: int,
    D: int,
    *,
    filters: Sequence[int],
    blocks: Sequence[int],
    kernel: int,
    group_width: int,
    squeeze_excite: bool,
) -> int:
    """First convolution and blocks of Net1D, every stage at stride 1 (spec §4.2).

    A block from c to f channels is a 1x1 convolution, a grouped one with `group_width` inputs for each of its f
    outputs, a second 1x1 convolution, and two linears over the mean of the window:
    2 L (c f + f group_width kernel + f f) + 2 (2 f f/2).

    Args:
        L, D: tokens and width of the stem.
        filters, blocks: channels and number of blocks of each stage.
        kernel: taps of the first and the grouped convolutions.
        group_width: channels in a group.
        squeeze_excite: whether blocks have it; the causal variant has none.
    """
    widths = [filters[0]] + [f for f, n in zip(filters, blocks, strict=True) for _ in range(n)]
    total = product(L, kernel * D, filters[0])
    for c, f in itertools.pairwise(widths):
        total += product(L, c, f) + product(L, kernel * group_width, f) + product(L, f, f)
        if squeeze_excite:
            total += 2 * product(1, f, f // 2)
    return total


def backbone(L: int, model: ConfigDict) -> int:
    """The backbone that `config.model` describes.

    Raises:
        ValueError: unknown backbone.
    """
    if model.backbone == "s4":
        return s4_backbone(L, model.width, model.layers)
    if model.backbone == "transformer":
        return transformer(L, model.width, model.layers, model.ff_width)
    if model.backbone == "net1d":
        return net1d(
            L,
            model.width,
            filters=model.filters,
            blocks=model.blocks,
            kernel=model.kernel,
            group_width=model.group_width,
            squeeze_excite=model.bidirectional,
        )
    raise ValueError(f"unknown backbone {model.backbone!r}; known: s4, transformer, net1d")


def encoder(L: int, C: int, model: ConfigDict) -> int:
    """Stem and backbone; the forward pass of a teacher too."""
    return stem(L, C, model.width) + backbone(L, model)


def encoder_cost(config: ConfigDict) -> Cost:
    """Operations of the encoder for one window of a run, the first convolution's data without gradient."""
    L = tokens_of_window(config.data.window_s, config.data.rate_hz)
    forward = encoder(L, LEADS, config.model)
    return Cost(forward, 2 * forward - first_convolution(L, LEADS, config.model.width))


def s4_head(L: int, D: int, out: int) -> int:
    """An S4 layer and a linear: 2 L D 2D + 2 L D out."""
    return s4_layer(L, D) + product(L, D, out)


def mlp_head(L: int, D: int, out: int) -> int:
    """Two linears: 2 L D D + 2 L D out."""
    return product(L, D, D) + product(L, D, out)


def linear_head(L: int, D: int) -> int:
    """One linear: 2 L D D."""
    return product(L, D, D)


def cpc_scores(L: int, D: int, steps_ahead: int) -> int:
    """Each of the L - k predictions against each of the L tokens of its record: 2 (L - k) D L."""
    return product(L - steps_ahead, D, L)


def code_scores(L: int, D: int, K: int) -> int:
    """Distances or cosines of L tokens to K codes, a matrix product: 2 L D K."""
    return product(L, D, K)


def code_sums(L: int, D: int, K: int) -> int:
    """Sums over the tokens of each code, [K, L] times [L, D]: 2 K L D."""
    return product(K, L, D)


def training_parts(config: ConfigDict) -> dict[str, Cost]:
    """Operations of one window in one training step, part by part.

    The backward pass of a matrix product is two of the same size, one for each of its operands. Only one
    is needed where the other operand is data, which is the case for the first convolution of the stem; none
    for teachers and for assignments to codebooks.

    Args:
        config: of a pretraining run, see configs/common.py.

    Returns:
        Part -> cost.

    Raises:
        ValueError: unknown objective or backbone.
    """
    objective, model = config.objective, config.model
    L, C, D = tokens_of_window(config.data.window_s, config.data.rate_hz), LEADS, model.width

    def trained(forward: int) -> Cost:
        return Cost(forward, 2 * forward)

    stem_forward = stem(L, C, D)
    parts = {
        "stem": Cost(stem_forward, 2 * stem_forward - first_convolution(L, C, D)),
        "backbone": trained(backbone(L, model)),
    }
    if "teacher" in objective:
        parts["teacher"] = Cost(encoder(L, C, model), 0)

    if objective.name == "cpc":
        parts["head"] = trained(linear_head(L, D))
        parts["scores"] = trained(cpc_scores(L, D, objective.steps_ahead))
    elif objective.name in ("jepa", "data2vec"):
        parts["head"] = trained(s4_head(L, D, out=D))
    elif objective.name == "dinosr":
        used = objective.top_k * objective.codes
        parts["head"] = trained(s4_head(L, D, out=used + objective.idle_logits))
        parts["codes"] = Cost(code_scores(L, D, used) + code_sums(L, D, used), 0)
    elif objective.name == "hubertpp":
        codes = sum(objective.codes)
        parts["head"] = trained(mlp_head(L, D, out=codes))
        parts["codes"] = Cost(code_scores(L, D, codes) + code_sums(L, D, codes), 0)
    elif objective.name == "hubert":
        parts["head"] = trained(linear_head(L, D))
        parts["codes"] = trained(code_scores(L, D, objective.codes))  # the codes are parameters
    else:
        raise ValueError(f"no formula for the objective {objective.name!r}")
    return parts


def training_flops(config: ConfigDict) -> int:
    """Operations of one window in one training step: forward and backward pass of everything."""
    return sum(cost.total for cost in training_parts(config).values())
