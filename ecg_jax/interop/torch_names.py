"""What a state dict of the reference implementation must look like: its sizes are read from a few names, and then
every name and shape is known (spec §2, §3.3, §4, §5.0, §5.7). Needs no torch.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.errors import UserError
from ecg_jax.interop.torch_checkpoint import BACKBONE, HEAD, MASKING, STEM, TEACHER, count_below

Shapes = dict[str, tuple[int, ...]]

#: Heads that enter no loss (spec §5.0), of the student and of its teacher.
UNUSED_HEADS = ("ts_encoder.head.proj.0.", TEACHER + "head.proj.0.")
CLUSTERING = TEACHER + "clustering."

#: Keys that carry nothing we need -> why; matched from the left, the first that fits counts.
_IDLE = {
    r".*\.num_batches_tracked": "torch's counters of batches",
    r"ts_encoder\.(ema\.)?head\.": "a head that enters no loss",
    r".*\.kernel\.kernel\.(omega|z)": "FFT nodes of the S4 kernels, computed anew",
    r".*\.kernel\.kernel\.Q": "Q of the S4 kernels, the conjugate of P",
    r".*\.pos_encoding\.inv_freq": "rotary frequencies, computed anew",
    r".*\.(first_bn|bn\d)\.": "batch norms of Net1D that are in no path",
    r"ts_encoder\.ema\.clustering\.(?!0\.)": "codebooks that no layer of the released DinoSR uses",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """What names and shapes tell of a checkpoint.

    Attributes:
        objective: its name.
        model: the fields of `config.model` that they decide.
        fields: the fields of `config.objective` that they decide.
        expected: every name that must be there, with its shape, and no other may.
    """

    objective: str
    model: dict[str, Any]
    fields: dict[str, Any]
    expected: Shapes

    def unused(self) -> dict[str, list[str]]:
        """Why they are not used -> names of the keys that carry nothing we need."""
        groups: dict[str, list[str]] = {}
        for name in self.expected:
            why = next((why for pattern, why in _IDLE.items() if re.match(pattern, name)), None)
            if why:
                groups.setdefault(why, []).append(name)
        return groups


def read_layout(sd: Mapping[str, np.ndarray], objective: str | None = None) -> Layout:
    """The layout of a state dict with full names.

    Args:
        sd: name -> array.
        objective: None to tell it from the names.

    Raises:
        UserError: objective or backbone cannot be told, or a name is missing from which a size is read. That all
            other names and shapes are as expected is for the caller to check.
    """
    objective = objective or _objective(sd)
    width, _, _ = _shape(sd, STEM + "layers.0.0.weight", 3)
    model, backbone = _backbone(sd, width)
    encoder = {"encoder." + name: shape for name, shape in _stem(width).items()} | {
        "predictor.predictor." + name: shape for name, shape in backbone.items()
    }
    expected = {"ts_encoder." + name: shape for name, shape in encoder.items()}
    if objective == "cpc":
        return Layout(objective, model, {}, expected | {HEAD + "proj.0.weight": (width, width)})

    mask = "mask_token" if MASKING + "mask_token" in sd else "mask_item"
    expected[MASKING + mask] = (width,) if mask == "mask_token" else (1, width)
    expected |= {TEACHER + name: shape for name, shape in encoder.items()}
    for prefix in UNUSED_HEADS:
        if any(name.startswith(prefix) for name in sd):
            (out,) = _shape(sd, prefix + "bias", 1)
            expected |= {prefix + "weight": (out, width), prefix + "bias": (out,)}
    if objective == "hubertpp":
        (out,) = _shape(sd, HEAD + "proj.2.bias", 1)
        head = {"proj.0.weight": (width, width), "proj.0.bias": (width,)}
        head |= {"proj.2.weight": (out, width), "proj.2.bias": (out,)}
        return Layout(objective, model, {"outputs": out}, expected | _prefixed(head, HEAD))

    fields: dict[str, Any] = {}
    outputs = width
    if objective == "dinosr":
        sizes = []
        for i in range(count_below(sd, CLUSTERING)):
            (codes,) = _shape(sd, f"{CLUSTERING}{i}.code_cnt", 1)
            book = {"codebook": (codes, width), "code_sum": (codes, width), "code_cnt": (codes,)}
            expected |= _prefixed(book, f"{CLUSTERING}{i}.")
            sizes.append(codes)
        # The head has room for every codebook; the first alone is used, for the last layer (spec §5.7).
        outputs = sum(sizes)
        fields = {"top_k": 1, "codes": sizes[0], "idle_logits": outputs - sizes[0]}
    _, _, half, _ = _shape(sd, HEAD + "s4.s4_layers.0.kernel.kernel.C", 4)
    nodes, _ = _shape(sd, HEAD + "s4.s4_layers.0.kernel.kernel.omega", 2)
    head = _prefixed(_s4_layer(width, half, 2, nodes), "s4.s4_layers.0.")
    head |= {"s4.norms.0.weight": (width,), "s4.norms.0.bias": (width,)}
    head |= {"s4.decoder.weight": (outputs, width), "s4.decoder.bias": (outputs,)}
    # With another backbone the head's nodes are all that tells the length.
    model = {"l_max": _l_max(sd, HEAD + "s4.s4_layers.0.")} | model
    return Layout(objective, model, fields | {"head_state": 2 * half}, expected | _prefixed(head, HEAD))


def check_derived(sd: Mapping[str, np.ndarray], expected: Shapes, l_max: int | None) -> None:
    """Checks that every value is finite, and that those which are computed anew are what we compute.

    Args:
        sd: of the layout `expected`.
        l_max: tokens for which the S4 kernels were made; None without any.

    Raises:
        UserError: names the first keys that are not.
    """
    bad: dict[str, list[str]] = {}
    for name in expected:
        value = sd[name]
        if name.endswith(".num_batches_tracked"):
            if not np.issubdtype(value.dtype, np.integer):
                bad.setdefault("not whole numbers", []).append(name)
        elif not np.issubdtype(value.dtype, np.floating):
            bad.setdefault("not floating-point numbers", []).append(name)
        elif name.endswith((".kernel.kernel.omega", ".kernel.kernel.z")):
            if not _are_nodes(name.rpartition(".")[2], _complex(value), l_max):
                bad.setdefault(f"not the FFT nodes of {l_max} tokens", []).append(name)
        elif not np.isfinite(value).all():
            bad.setdefault("not finite", []).append(name)
        elif name.endswith(".kernel.kernel.Q"):
            P = _complex(sd[name.removesuffix("Q") + "P"])
            if not np.allclose(_complex(value), P.conj(), rtol=1e-5, atol=1e-6):
                bad.setdefault("not the conjugate of P", []).append(name)
        elif name.endswith(".pos_encoding.inv_freq"):
            i = np.arange(len(value))
            if not np.allclose(value, 10_000.0 ** (-i / len(value)), rtol=1e-4):
                bad.setdefault("not the rotary frequencies of base 10000", []).append(name)
        elif name.endswith((".running_var", ".code_cnt")) and (value < 0).any():
            bad.setdefault("negative", []).append(name)
    if bad:
        raise UserError("; ".join(f"{why}: {listed(names)}" for why, names in bad.items()))


def listed(names: list[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _objective(sd: Mapping[str, np.ndarray]) -> str:
    """Told by the head and by what only one objective has."""
    has = {name: any(key.startswith(name) for key in sd) for name in (MASKING, CLUSTERING, TEACHER, HEAD)}
    if not has[HEAD]:
        raise UserError(
            f"no key begins with {HEAD}, so it cannot be told which objective it was trained with"
        )
    if not has[MASKING] and not has[TEACHER]:
        return "cpc"
    if has[CLUSTERING]:
        return "dinosr"
    if HEAD + "proj.2.weight" in sd:
        return "hubertpp"
    if MASKING + "mask_token" in sd:
        return "jepa"
    if MASKING + "mask_item" in sd:
        return "data2vec"
    raise UserError(
        f"there is neither {MASKING}mask_token nor {MASKING}mask_item, so it cannot be told which objective it was "
        "trained with"
    )


def _backbone(sd: Mapping[str, np.ndarray], width: int) -> tuple[dict[str, Any], Shapes]:
    """Fields of `config.model`, and names and shapes below `BACKBONE`."""
    below = {"s4": "s4_layers.", "transformer": "layers.", "net1d": "stage_list."}
    found = [kind for kind, prefix in below.items() if any(k.startswith(BACKBONE + prefix) for k in sd)]
    if len(found) != 1:
        raise UserError(
            f"the keys that begin with {BACKBONE} are those of {' and '.join(found) or 'no backbone known here'}; "
            f"known: {', '.join(below)}"
        )
    (kind,) = found
    make = {"s4": _s4_backbone, "transformer": _transformer, "net1d": _net1d}[kind]
    fields, shapes = make(sd, width)
    return {"backbone": kind, "width": width, **fields}, shapes


def _stem(width: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(4):
        channels, kernel = (len(CANONICAL_LEADS), 3) if i == 0 else (width, 1)
        shapes |= {f"layers.{i}.0.weight": (width, channels, kernel)} | _batch_norm(f"layers.{i}.1.", width)
    return shapes


def _batch_norm(prefix: str, width: int) -> Shapes:
    names = ("weight", "bias", "running_mean", "running_var")
    return {prefix + name: (width,) for name in names} | {prefix + "num_batches_tracked": ()}


def _s4_layer(width: int, half: int, channels: int, nodes: int) -> Shapes:
    kernel = {"C": (channels, width, half, 2), "log_dt": (width,), "w": (width, half, 2)}
    kernel |= {name: (1, width, half, 2) for name in ("B", "P", "Q")}
    kernel |= {name: (nodes, 2) for name in ("omega", "z")}
    output = {"weight": (2 * width, width), "bias": (2 * width, 1)}
    return {"D": (1, width)} | _prefixed(kernel, "kernel.kernel.") | _prefixed(output, "output_linear.0.")


def _s4_backbone(sd: Mapping[str, np.ndarray], width: int) -> tuple[dict[str, Any], Shapes]:
    first = BACKBONE + "s4_layers.0."
    channels, _, half, _ = _shape(sd, first + "kernel.kernel.C", 4)
    nodes, _ = _shape(sd, first + "kernel.kernel.omega", 2)
    layers = count_below(sd, BACKBONE + "s4_layers.")
    shapes: Shapes = {}
    for i in range(layers):
        shapes |= _prefixed(_s4_layer(width, half, channels, nodes), f"s4_layers.{i}.")
        shapes |= {f"norms.{i}.weight": (width,), f"norms.{i}.bias": (width,)}
    fields = {"layers": layers, "state": 2 * half, "bidirectional": channels == 2, "l_max": _l_max(sd, first)}
    return fields, shapes


def _transformer(sd: Mapping[str, np.ndarray], width: int) -> tuple[dict[str, Any], Shapes]:
    (frequencies,) = _shape(sd, BACKBONE + "pos_encoding.inv_freq", 1)
    ff_width, _ = _shape(sd, BACKBONE + "layers.0.ff.linear1.weight", 2)
    if width % (2 * frequencies):
        raise UserError(
            f"{BACKBONE}pos_encoding.inv_freq has {frequencies} frequencies, which divide no head of the width {width}"
        )
    layers = count_below(sd, BACKBONE + "layers.")
    shapes: Shapes = {"pos_encoding.inv_freq": (frequencies,)}
    for i in range(layers):
        layer = {f"attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        layer |= {"ff.linear1": (ff_width, width), "ff.linear2": (width, ff_width)}
        layer |= {"norm1": (width,), "norm2": (width,)}
        for name, shape in layer.items():
            shapes |= {f"layers.{i}.{name}.weight": shape, f"layers.{i}.{name}.bias": shape[:1]}
    shapes |= {"final_norm.weight": (width,), "final_norm.bias": (width,)}
    return {"layers": layers, "heads": width // (2 * frequencies), "ff_width": ff_width}, shapes


def _net1d(sd: Mapping[str, np.ndarray], width: int) -> tuple[dict[str, Any], Shapes]:
    channels, _, kernel = _shape(sd, BACKBONE + "first_conv.conv.weight", 3)
    _, group_width, _ = _shape(sd, BACKBONE + "stage_list.0.block_list.0.conv2.conv.weight", 3)
    shapes: Shapes = {
        "first_conv.conv.weight": (channels, width, kernel),
        "first_conv.conv.bias": (channels,),
    }
    shapes |= _batch_norm("first_bn.", channels)
    filters, blocks = [], []
    for s in range(count_below(sd, BACKBONE + "stage_list.")):
        stage = f"stage_list.{s}.block_list."
        filters.append(_shape(sd, f"{BACKBONE}{stage}0.conv1.conv.weight", 3)[0])
        blocks.append(count_below(sd, BACKBONE + stage))
        for j in range(blocks[-1]):
            into, out, prefix = channels, filters[-1], f"{stage}{j}."
            weights = {
                "conv1.conv": (out, into, 1), "conv2.conv": (out, group_width, kernel), "conv3.conv": (out, out, 1),
                "se_fc1": (out // 2, out), "se_fc2": (out, out // 2),
            }  # fmt: skip
            for name, shape in weights.items():
                shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
            for name, norm_width in (("bn1", into), ("bn2", out), ("bn3", out)):
                shapes |= _batch_norm(f"{prefix}{name}.", norm_width)
            channels = out
    fields = {
        "filters": tuple(filters),
        "blocks": tuple(blocks),
        "kernel": kernel,
        "group_width": group_width,
    }
    return fields, shapes


def _l_max(sd: Mapping[str, np.ndarray], layer: str) -> int:
    """Tokens L of the FFT nodes exp(-2 pi i k / L), k = 0 ... L // 2."""
    name = layer + "kernel.kernel.omega"
    nodes, _ = _shape(sd, name, 2)
    angle = np.angle(_complex(sd[name])[1]) if nodes > 1 else 0.0
    L = round(-2 * np.pi / angle) if np.isfinite(angle) and angle < 0 else 0
    if nodes != L // 2 + 1:
        raise UserError(f"{name} does not hold the FFT nodes of any number of tokens")
    return L


def _are_nodes(kind: str, value: np.ndarray, L: int) -> bool:
    """Whether complex values are the `omega` or the `z` of spec §3.2 for L tokens, to what float32 can say of them."""
    if len(value) != L // 2 + 1:
        return False
    omega = np.exp(-2j * np.pi * np.arange(len(value)) / L)
    if kind == "omega":
        return np.allclose(value, omega, atol=1e-3)
    firm = np.abs(1 + omega) > 0.1  # z grows towards infinity, and with it the error
    return np.allclose(value[firm], 2 * (1 - omega[firm]) / (1 + omega[firm]), rtol=1e-2, atol=1e-3)


def _complex(pairs: np.ndarray) -> np.ndarray:
    return pairs[..., 0].astype(np.float64) + 1j * pairs[..., 1]


def _prefixed(shapes: Shapes, prefix: str) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _shape(sd: Mapping[str, np.ndarray], name: str, rank: int) -> tuple[int, ...]:
    """The shape of an array from which sizes are read."""
    if name not in sd:
        raise UserError(f"missing {name}, from which sizes are read")
    shape = sd[name].shape
    if len(shape) != rank or 0 in shape:
        raise UserError(f"{name} has the shape {shape}; {rank} axes expected, none of them empty")
    return shape
