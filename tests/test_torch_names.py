"""What names and shapes tell of a reference checkpoint."""

import numpy as np
import pytest

from ecg_jax.errors import UserError
from ecg_jax.interop.torch_checkpoint import BACKBONE, HEAD, MASKING, STEM, TEACHER
from ecg_jax.interop.torch_names import check_derived, read_layout
from reference_files import small_sd, with_nodes


@pytest.mark.parametrize(
    ("backbone", "objective", "total"),
    [
        ("s4", "cpc", 3_194_880 + 16_384), ("s4", "jepa", 4_067_328 - 262_656), ("s4", "hubertpp", 3_409_280),
        ("transformer", "cpc", 18_915_328 + 808_960 + 262_144), ("net1d", "cpc", 9_678_464 + 808_960 + 262_144),
    ],
)  # fmt: skip
def test_names_and_shapes_of_the_full_size(backbone, objective, total):
    """The trainable parameters of a full-size checkpoint are those of spec §5.9, §4; a bidirectional CPC has 4 x 4 096
    more, and the unused head is not asked for.
    """
    shapes = {STEM + "layers.0.0.weight": (512, 12, 3)}
    shapes |= {
        "s4": {f"{BACKBONE}s4_layers.{i}.kernel.kernel.C": (2, 512, 4, 2) for i in (0, 3)},
        "transformer": {
            BACKBONE + "pos_encoding.inv_freq": (32,), BACKBONE + "layers.5.norm1.bias": (512,),
            BACKBONE + "layers.0.ff.linear1.weight": (2048, 512),
        },
        "net1d": {
            BACKBONE + "first_conv.conv.weight": (64, 512, 16),
            BACKBONE + "stage_list.0.block_list.0.conv2.conv.weight": (64, 16, 16),
        },
    }[backbone]  # fmt: skip
    if backbone == "net1d":
        for s, (filters, blocks) in enumerate(
            zip((64, 128, 128, 256, 256, 512, 512), (2, 2, 2, 3, 3, 4, 4), strict=True)
        ):
            for j in range(blocks):
                shapes[f"{BACKBONE}stage_list.{s}.block_list.{j}.conv1.conv.weight"] = (filters, 1, 1)
    if objective == "jepa":
        shapes |= {HEAD + "s4.s4_layers.0.kernel.kernel.C": (2, 512, 32, 2), MASKING + "mask_token": (512,)}
    else:
        shapes |= {HEAD + "proj.0.weight": (512, 512)}
    if objective == "hubertpp":
        shapes |= {
            HEAD + "proj.2.weight": (384, 512),
            HEAD + "proj.2.bias": (384,),
            MASKING + "mask_item": (1, 512),
        }
    layout = read_layout(with_nodes({n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}))
    buffers = (
        "running_mean",
        "running_var",
        ".num_batches_tracked",
        "inv_freq",
        ".B",
        ".P",
        ".Q",
        ".w",
        ".log_dt",
        "omega",
        ".z",
    )
    idle = {name for names in layout.unused().values() for name in names}
    count = sum(
        int(np.prod(shape)) for name, shape in layout.expected.items()
        if not name.startswith(TEACHER) and not name.endswith(buffers) and name not in idle
    )  # fmt: skip
    assert count == total
    if backbone == "net1d":
        affine = [
            shape[0]
            for name, shape in layout.expected.items()
            if name in idle and name.endswith((".weight", ".bias"))
        ]
        assert sum(affine) == 36_864


@pytest.mark.parametrize("tokens", [299, 1200, 5000])
def test_length_of_the_kernels_is_read_from_the_nodes(tokens):
    sd = with_nodes(small_sd("s4", "cpc"), tokens)
    layout = read_layout(sd)
    assert layout.model["l_max"] == tokens
    check_derived(sd, layout.expected, tokens)
    with pytest.raises(UserError, match="not the FFT nodes of"):
        check_derived(sd, layout.expected, 2 * tokens)
