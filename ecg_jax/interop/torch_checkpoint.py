"""Parameters of the reference implementation (PyTorch names and layouts) as ours (spec §2, §3.3, §11.4).
Needs no torch.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ecg_jax.errors import UserError

STEM = "ts_encoder.encoder."
BACKBONE = "ts_encoder.predictor.predictor."
HEAD = "ts_encoder.head_ssl."
MASKING = "ts_encoder.masking."
TEACHER = "ts_encoder.ema."


def convert_stem(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Stem parameters `layers.{i}.{0,1}.*` -> {"params": ..., "batch_stats": ...} of `models.stem.Stem`."""
    params, stats = {}, {}
    for i in range(count_below(sd, "layers.")):
        # torch stores convolutions as (out, in, k), Flax as (k, in, out).
        params[f"conv{i}"] = {"kernel": np.transpose(sd[f"layers.{i}.0.weight"], (2, 1, 0))}
        params[f"norm{i}"] = _norm(sd, f"layers.{i}.1")
        stats[f"norm{i}"] = {"mean": sd[f"layers.{i}.1.running_mean"], "var": sd[f"layers.{i}.1.running_var"]}
    return {"params": params, "batch_stats": stats}


def convert_s4_layer(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Parameters and buffers of one S4 layer -> {"params": ..., "ssm": ...} of `models.s4.S4Layer`.

    C is taken as stored: it is already length-corrected. Q = conj(P) is implied; the FFT nodes are
    recomputed.
    """
    kernel = {name: sd[f"kernel.kernel.{name}"] for name in ("C", "log_dt", "B", "P", "w")}
    H = kernel["log_dt"].shape[0]
    # B and P have a leading axis of size 1, and in files saved from CPU modules they are expanded views.
    B, P = (np.broadcast_to(kernel[name][0], (H, *kernel[name].shape[2:])).copy() for name in ("B", "P"))
    return {
        "params": {
            "C": kernel["C"],
            "D": sd["D"][0],
            "output": {
                "kernel": sd["output_linear.0.weight"].T,
                "bias": sd["output_linear.0.bias"].reshape(-1),
            },
        },
        "ssm": {"Lambda": np.array(kernel["w"]), "P": P, "B": B, "log_dt": kernel["log_dt"]},
    }


def convert_s4_backbone(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """`s4_layers.{l}.*` and `norms.{l}.*` -> {"params": ..., "ssm": ...} of `models.s4.S4Backbone`."""
    params, ssm = {}, {}
    for i in range(count_below(sd, "s4_layers.")):
        layer = convert_s4_layer(_under(sd, f"s4_layers.{i}."))
        params[f"layer{i}"], ssm[f"layer{i}"] = layer["params"], layer["ssm"]
        params[f"norm{i}"] = _norm(sd, f"norms.{i}")
    return {"params": params, "ssm": ssm}


def convert_transformer(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """`layers.{l}.*`, `final_norm.*` and, where widths differ, `encoder.*` -> {"params": ...} of
    `models.transformer.Transformer` (spec §4.1). The rotary frequencies are recomputed.
    """
    params = {"norm": _norm(sd, "final_norm")}
    if "encoder.weight" in sd:
        params["input"] = _linear(sd, "encoder")
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
    for i in range(count_below(sd, "layers.")):
        layer = f"layers.{i}."
        params[f"layer{i}"] = {
            "norm1": _norm(sd, layer + "norm1"),
            "attention": {name: _linear(sd, f"{layer}attn.{torch}") for name, torch in projections.items()},
            "norm2": _norm(sd, layer + "norm2"),
            "hidden": _linear(sd, layer + "ff.linear1"),
            "output": _linear(sd, layer + "ff.linear2"),
        }
    return {"params": params}


def convert_net1d(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """`first_conv.conv.*` and `stage_list.{s}.block_list.{j}.*` -> {"params": ...} of `models.net1d.Net1D`
    (spec §4.2), its blocks numbered through all stages. The idle BatchNorms are left aside.
    """
    params = {"input": _convolution(sd, "first_conv.conv")}
    for s in range(count_below(sd, "stage_list.")):
        for j in range(count_below(sd, f"stage_list.{s}.block_list.")):
            block = f"stage_list.{s}.block_list.{j}."
            pointwise = {name: _convolution(sd, f"{block}{name}.conv") for name in ("conv1", "conv3")}
            params[f"block{len(params) - 1}"] = {
                **{name: {**conv, "kernel": conv["kernel"][0]} for name, conv in pointwise.items()},
                "conv2": _convolution(sd, f"{block}conv2.conv"),
                "gate1": _linear(sd, block + "se_fc1"),
                "gate2": _linear(sd, block + "se_fc2"),
            }
    return {"params": params}


def convert_encoder(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """A reference state dict with full names -> variables of `models.encoder.Encoder`; other entries are left
    aside.
    """
    stem, backbone = convert_stem(_under(sd, STEM)), _convert_backbone(_under(sd, BACKBONE))
    variables = {
        "params": {"stem": stem["params"], "backbone": backbone["params"]},
        "batch_stats": {"stem": stem["batch_stats"]},
    }
    return variables | ({"ssm": {"backbone": backbone["ssm"]}} if "ssm" in backbone else {})


def _convert_backbone(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Whichever of the three backbones has such names."""
    if any(name.startswith("s4_layers.") for name in sd):
        return convert_s4_backbone(sd)
    return convert_net1d(sd) if "first_conv.conv.weight" in sd else convert_transformer(sd)


def convert_cpc(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """A reference CPC state dict -> variables of `objectives.cpc.CPC`."""
    variables = {collection: {"encoder": tree} for collection, tree in convert_encoder(sd).items()}
    variables["params"]["head"] = {"kernel": sd[HEAD + "proj.0.weight"].T}
    return variables


def convert_s4_head(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """`s4.s4_layers.0.*`, `s4.norms.0.*`, `s4.decoder.*` -> {"params": ..., "ssm": ...} of
    `models.heads.S4Head`.
    """
    layer = convert_s4_layer(_under(sd, "s4.s4_layers.0."))
    params = {
        "layer": layer["params"],
        "norm": _norm(sd, "s4.norms.0"),
        "decoder": _linear(sd, "s4.decoder"),
    }
    return {"params": params, "ssm": {"layer": layer["ssm"]}}


def convert_mlp_head(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """`proj.{0,2}.*` -> {"params": ...} of `models.heads.MLPHead`."""
    return {"params": {"hidden": _linear(sd, "proj.0"), "output": _linear(sd, "proj.2")}}


def convert_masked(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """A reference state dict of JEPA, data2vec, DinoSR or HuBERT++ -> `params`, `batch_stats` and `ssm` of
    the objective.

    The head that enters no loss (`ts_encoder.head.*`) is left aside, the teacher is `convert_teacher`'s.
    """
    variables = {collection: {"encoder": tree} for collection, tree in convert_encoder(sd).items()}
    head = _under(sd, HEAD)
    converted = convert_s4_head(head) if "s4.decoder.weight" in head else convert_mlp_head(head)
    for collection, tree in converted.items():
        variables.setdefault(collection, {})["head"] = tree
    name = "mask_token" if MASKING + "mask_token" in sd else "mask_item"
    variables["params"]["mask_token"] = sd[MASKING + name].reshape(-1)
    return variables


def convert_teacher(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """The teacher `ts_encoder.ema.*` of a reference state dict -> variables of `models.encoder.Encoder`."""
    return convert_encoder({"ts_encoder." + name: value for name, value in _under(sd, TEACHER).items()})


def convert_codebook(sd: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first codebook of a DinoSR state dict, the only one the released code uses (spec §5.7) -> `objective_state`
    of `objectives.dinosr.DinoSR`.
    """
    book = _under(sd, TEACHER + "clustering.0.")
    names = {"codebook": "codebook", "code_sum": "code_sum", "code_count": "code_cnt"}
    return {ours: book[theirs][None] for ours, theirs in names.items()}


def convert_objective(sd: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """A whole reference state dict -> collections of its objective: `params`, `batch_stats`, and where it has them
    `ssm` and `objective_state`.
    """
    if not any(name.startswith(MASKING) for name in sd):
        return convert_cpc(sd)
    variables = convert_masked(sd)
    if TEACHER + "clustering.0.codebook" in sd:
        variables["objective_state"] = convert_codebook(sd)
    return variables


def count_below(sd: Mapping[str, np.ndarray], prefix: str) -> int:
    """One more than the largest number that follows `prefix` in a name.

    Raises:
        UserError: no name goes on with a number, or one with a number of four digits.
    """
    numbers = [re.match(r"\d+", name.removeprefix(prefix)) for name in sd if name.startswith(prefix)]
    found = [int(number.group()) for number in numbers if number]
    if not found or max(found) >= 1000:
        raise UserError(f"the keys that begin with {prefix} are not numbered as layers are")
    return 1 + max(found)


def _linear(sd: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"kernel": sd[f"{name}.weight"].T, "bias": sd[f"{name}.bias"]}


def _convolution(sd: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"kernel": np.transpose(sd[f"{name}.weight"], (2, 1, 0)), "bias": sd[f"{name}.bias"]}


def _norm(sd: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"scale": sd[f"{name}.weight"], "bias": sd[f"{name}.bias"]}


def _under(sd: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in sd.items() if name.startswith(prefix)}
