"""What the paper says its backbones cost, beside ours, and the counting that gives its figures.

Published (arXiv 2605.12241): parameters and GFLOPs "forward" and "backward" of one crop, see `PUBLISHED`. Ours are of
the encoder (stem and backbone, no head) as the shipped configs have it, for a window of 2.5 s at 240 Hz.

All six published GFLOPs come out of `flops` under one reading, to every digit that was published:

- "backward" is forward and backward together, without the gradient of the data (S4: 1.741 and 5.213).
- S4 sees 300 tokens, as ours does. The Transformer and the Net1D see 600, as many as the crop has samples: no stride in
  time. Attention over 600 tokens is counted, both products. Beside the backbone there are an input convolution and one
  more product of 512 x 512 at each token, the size of one 1x1 convolution of the stem or of a linear head; which of the
  two cannot be told from these numbers. Our stem has three such convolutions at 300 tokens.
- For the Net1D the gradient of the weights of grouped convolutions counts as if they were dense, which is 47.3 of the
  73.8 GFLOPs and is never computed. PyTorch's `torch.utils.flop_counter` counted so until groups were heeded there
  (github.com/pytorch/pytorch/pull/183405).

The parameters agree with the same reading: 19.2 M, and 10.0 M for the Net1D with its unused BatchNorms. None of this
proves how the paper measured: its code for that is not public. It says only which counting gives its numbers, and two
crops, four convolutions in the stem, or attention left out give others.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from ecg_jax.config_flags import load_config, with_argument
from ecg_jax.models.encoder import BACKBONES
from ecg_jax.run_setup import CONFIGS
from ecg_jax.studies import flops

SOURCE = "arXiv 2605.12241"

#: Tokens of a crop of 600 samples without a stride in time.
UNSTRIDED_TOKENS = 600


class Published(NamedTuple):
    """What the paper gives for a backbone, as text with the digits that it gives."""

    parameters_m: str
    """Millions."""
    forward_gflop: str
    backward_gflop: str
    about: bool
    """The parameters are given roughly."""


PUBLISHED = {
    "s4": Published("3", "1.741", "5.213", about=True),
    "transformer": Published("19.2", "27.4", "82.2", about=False),
    "net1d": Published("10", "8.8", "73.8", about=False),
}

#: What differs between our encoder and the counting that gives the published figures.
DIFFERENCE = {
    "s4": "nothing: the same operations; the published backward is forward and backward together",
    "transformer": "600 tokens instead of 300 and a stem of one 1x1 convolution instead of three; "
    "the published backward is forward and backward together",
    "net1d": "600 tokens instead of 300 and a stem of one 1x1 convolution instead of three; the published "
    "backward is forward and backward together, and has the gradient of grouped weights as if they were dense",
}


class Compared(NamedTuple):
    """One published figure beside ours.

    Attributes:
        backbone: its name.
        quantity: "parameters", "forward" or "backward".
        published: in millions, or GFLOPs.
        digits: as it is given.
        ours: of our encoder, in the same unit; for "backward" forward and backward together.
        counted: by formula under the reading that the module describes.
        about: the published figure is a rough one.
    """

    backbone: str
    quantity: str
    published: float
    digits: str
    ours: float
    counted: float
    about: bool

    @property
    def ratio(self) -> float:
        """Published over ours."""
        return self.published / self.ours

    @property
    def reproduced(self) -> bool:
        """The counted figure rounds to the published one."""
        decimals = len(self.digits.partition(".")[2])
        return f"{self.counted:.{decimals}f}" == self.digits


def shipped_config(backbone: str) -> ConfigDict:
    """The config whose encoder is compared: CPC's of S4; JEPA's of the others, whose backbone is not causal."""
    objective = "cpc" if backbone == "s4" else "jepa"
    return load_config(with_argument(CONFIGS[objective], backbone=backbone))


def counted_as_published(backbone: str) -> tuple[float, float]:
    """(forward, forward and backward) in GFLOPs of one crop, under the reading that gives the published figures."""
    config = shipped_config(backbone)
    model = config.model
    if backbone == "s4":
        cost = flops.encoder_cost(config)
        return cost.forward / 1e9, cost.total / 1e9
    L, D = UNSTRIDED_TOKENS, model.width
    first = flops.first_convolution(L, flops.LEADS, D)
    forward = first + flops.product(L, D, D) + flops.backbone(L, model)
    total = 3 * forward - first
    if backbone == "net1d":
        total += as_if_dense(L, model)
    return forward / 1e9, total / 1e9


def as_if_dense(L: int, model: ConfigDict) -> int:
    """What counting grouped convolutions as dense adds to the gradient of their weights: of each block with f channels
    and k taps 2 L k f f instead of 2 L k f group_width.
    """
    return sum(
        blocks
        * (flops.product(L, model.kernel * f, f) - flops.product(L, model.kernel * model.group_width, f))
        for f, blocks in zip(model.filters, model.blocks, strict=True)
    )


def counted_parameters(backbone: str, ours: int) -> int:
    """Parameters under the same reading: the stem has one 1x1 convolution with its norm instead of three, and the Net1D
    of the reference also holds the weights of BatchNorms that it does not use (spec §4.2): 2 for each channel that the
    three convolutions of a block take and the first convolution makes.

    Args:
        backbone: its name.
        ours: parameters of our encoder.
    """
    model = shipped_config(backbone).model
    if backbone == "s4":
        return ours
    D = model.width
    count = ours - 2 * (D * D + 2 * D)
    if backbone == "net1d":
        channels = model.filters[0]
        count += 2 * channels
        for f, blocks in zip(model.filters, model.blocks, strict=True):
            for _ in range(blocks):
                count += 2 * (channels + 2 * f)
                channels = f
    return count


def compare(parameters: dict[str, int]) -> list[Compared]:
    """Every published figure beside ours.

    Args:
        parameters: backbone -> trainable parameters of our encoder, of `shipped_config`.
    """
    rows = []
    for backbone in BACKBONES:
        if backbone not in parameters:
            continue
        published, cost = PUBLISHED[backbone], flops.encoder_cost(shipped_config(backbone))
        forward, total = counted_as_published(backbone)
        ours = parameters[backbone]
        counted = counted_parameters(backbone, ours)
        for quantity, digits, mine, theirs in (
            ("parameters", published.parameters_m, ours / 1e6, counted / 1e6),
            ("forward", published.forward_gflop, cost.forward / 1e9, forward),
            ("backward", published.backward_gflop, cost.total / 1e9, total),
        ):
            about = published.about and quantity == "parameters"
            rows.append(Compared(backbone, quantity, float(digits), digits, mine, theirs, about))
    return rows
