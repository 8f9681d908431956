"""`ecg-jax import-checkpoint`: a checkpoint of the reference implementation becomes a run that probe and embed take."""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ecg_jax.config_checks import check_config
from ecg_jax.config_flags import load_config, override, split_overrides, with_argument
from ecg_jax.data.preprocessing import INT16_MAX, MICROVOLTS_PER_MV, Preprocessing, parse_leads
from ecg_jax.errors import UserError
from ecg_jax.files import write_atomic
from ecg_jax.interop.teacher_check import check_teacher
from ecg_jax.interop.torch_checkpoint import convert_objective, convert_teacher
from ecg_jax.interop.torch_file import TorchCheckpoint, read_torch_checkpoint, sha256_of
from ecg_jax.interop.torch_names import Layout, check_derived, listed, read_layout
from ecg_jax.models.encoder import tokens_of
from ecg_jax.objectives.contract import Inputs
from ecg_jax.run_setup import CONFIGS, IMPORT_NAME, build_objective, build_optimiser, flatten
from ecg_jax.training.checkpoint import Checkpoints
from ecg_jax.training.checkpoint_tree import describe_mismatch, flat_shapes
from ecg_jax.training.train_state import TrainState, seed_keys

DESCRIPTION = """\
Turns a Lightning checkpoint of the reference implementation (arXiv 2605.12241) into a run directory that
`ecg-jax probe` and `ecg-jax embed` accept as any other: encoder, head, mask token, teacher and codebooks, with a
fresh optimiser. Reading the file needs torch: pip install 'ecg_jax[torch]'.

  ecg-jax import-checkpoint jepa_e10.ckpt --workdir=runs/jepa_e10

Objective, backbone and all sizes are read from the names and shapes in the file; one that is missing, unknown or of
another shape stops it. What a file cannot tell (input normalisation, window, rate, settings of the objective) is
that of the released recipe, and is printed.
"""
OBJECTIVES = ("cpc", "jepa", "data2vec", "dinosr", "hubertpp")

#: Fields that are printed when they do not come from the file; import.json has all of them.
_SHOWN = (
    "data.rate_hz",
    "data.window_s",
    "data.normalisation",
    "clip_mv",
    "model.",
    "objective.",
    "precision",
)


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was made of a file.

    Attributes:
        config: of the run.
        preprocessing: its contract.
        state: to be saved; without kernel bases.
        report: JSON-able, the content of import.json.
    """

    config: ConfigDict
    preprocessing: Preprocessing
    state: TrainState
    report: dict[str, Any]


def convert(
    checkpoint: TorchCheckpoint,
    *,
    objective: str | None = None,
    overrides: Mapping[str, str] | None = None,
    clip_mv: float | None = None,
) -> Imported:
    """A reference checkpoint as config, contract and state.

    Args:
        checkpoint: as read.
        objective: None to tell it from the names.
        overrides: dotted config field -> text, for what a file cannot tell.
        clip_mv: of the contract.

    Raises:
        UserError: missing, extra or misshaped keys, or an override that contradicts the file.
    """
    sd, overrides = checkpoint.state_dict, overrides or {}
    layout = read_layout(sd, objective)
    stored = {name: tuple(value.shape) for name, value in sd.items()}
    if mismatch := describe_mismatch(stored, layout.expected, limit=4):
        raise UserError(f"it is not a {layout.objective} checkpoint as the reference writes it: {mismatch}")
    config, read = _config(layout, overrides)
    check_derived(sd, layout.expected, config.model.l_max)
    preprocessing = Preprocessing(
        rate_hz=config.data.rate_hz,
        window_s=config.data.window_s,
        normalisation=config.data.normalisation,
        kept_leads=parse_leads(config.data.leads),
        clip_mv=clip_mv,
    )
    state = _state(config, preprocessing, sd, checkpoint.global_step)
    fields = flatten(config.to_dict())
    report = {
        "objective": layout.objective,
        "backbone": config.model.backbone,
        "global_step": checkpoint.global_step,
        "epoch": checkpoint.epoch,
        "arrays": len(sd),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "from_file": {name: fields[name] for name in read},
        "given": {name: fields[name] for name in overrides},
        "from_released_recipe": {n: v for n, v in fields.items() if n not in read and n not in overrides},
        "not_used": layout.unused(),
        "notes": _notes(config, layout),
        "teacher": None,
    }
    report["from_released_recipe" if clip_mv is None else "given"]["clip_mv"] = clip_mv
    if state.teacher:
        student = {name: getattr(state, name)["encoder"] for name in ("params", "batch_stats")}
        checked = check_teacher(jax.device_get(student), jax.device_get(state.teacher))
        report["teacher"] = dataclasses.asdict(checked) | {"sentence": checked.sentence()}
    return Imported(config, preprocessing, state, report)


def _config(layout: Layout, overrides: Mapping[str, str]) -> tuple[ConfigDict, list[str]]:
    """The config of the run, and the names of the fields that were read from the file."""
    backbone = layout.model["backbone"]
    config = load_config(with_argument(CONFIGS[layout.objective], backbone=backbone, recipe="released"))
    outputs = layout.fields.get("outputs")
    read = {"objective.name": layout.objective}
    read |= {f"model.{name}": value for name, value in layout.model.items()} | {
        f"objective.{name}": value for name, value in layout.fields.items() if name != "outputs"
    }
    for name, value in read.items():
        group, field = name.split(".")
        config[group][field] = value
    for name, text in overrides.items():
        if name in read:
            raise UserError(f"--config.{name} cannot be set: the file decides it ({read[name]!r})")
        override(config, name, text)
    if outputs is not None and sum(config.objective.codes) != outputs:
        raise UserError(
            f"its head has {outputs} outputs, but config.objective.codes={config.objective.codes} asks for "
            f"{sum(config.objective.codes)}; say how they are divided among the codebooks: "
            "--config.objective.codes='(K1,K2)'"
        )
    check_config(config)
    return config, list(read)


def _state(
    config: ConfigDict, preprocessing: Preprocessing, sd: Mapping[str, np.ndarray], step: int
) -> TrainState:
    """Everything that the file holds, and fresh what it does not."""
    model = build_objective(config, axis_name=None)
    _, tx = build_optimiser(config, max(step, 1))
    init_key, run_key = seed_keys(config.seed)

    def init(key):
        x, record_index = (
            jnp.zeros((2, preprocessing.window_samples, len(preprocessing.leads))),
            jnp.arange(2),
        )
        (tokens, out), _ = model.encoder.init_with_output(key, x, record_index, train=False)
        keys = dict(zip(("params", "objective", "dropout"), jax.random.split(key, 3), strict=True))
        first = jnp.zeros((), jnp.int32)
        inputs = Inputs(x=x, record_index=record_index, step=first, teacher={"tokens": tokens, **out})
        return model.init(keys, inputs, train=False)

    wanted = jax.eval_shape(init, init_key)
    found = convert_objective(sd)
    if "objective_state" in wanted and "objective_state" not in found:
        found["objective_state"] = jax.jit(lambda key: init(key)["objective_state"])(init_key)
    if "teacher" in config.objective:
        found["teacher"] = convert_teacher(sd)
        wanted["teacher"] = {name: tree["encoder"] for name, tree in wanted.items() if "encoder" in tree}
    if mismatch := describe_mismatch(flat_shapes(found), flat_shapes(wanted)):
        raise UserError(f"what it holds does not fit the config: {mismatch}")
    found = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), found)
    found = {"ssm": {}, "objective_state": {}, "teacher": {}, **found}
    return TrainState(
        **found,
        step=jnp.asarray(step, jnp.int32),
        opt_state=tx.init(found["params"]),
        basis={},
        teacher_basis={},
        rng=run_key,
    )


def _notes(config: ConfigDict, layout: Layout) -> list[str]:
    """What a person should know beside the fields."""
    notes = []
    tokens = tokens_of(round(config.data.window_s * config.data.rate_hz))
    made_for = layout.model.get("l_max")
    if made_for is not None and made_for != tokens:
        seconds = 2 * made_for / config.data.rate_hz
        notes.append(
            f"the S4 kernels were made for {made_for} tokens ({seconds:g} s), the window has {tokens}; "
            f"--window-s={seconds:g} if it was trained on so long a window"
        )
    if made_for is not None and made_for % 2:
        notes.append(
            f"the reference evaluates its kernels wrongly for an odd number of tokens ({made_for}), so that its own "
            "features differ from those computed here"
        )
    if layout.objective == "hubertpp":
        notes.append(
            "the reference does not store HuBERT++ prototypes; those of the run are fresh and random, and features "
            "do not depend on them"
        )
    return notes


def import_checkpoint(
    source: str | Path,
    workdir: str | Path,
    *,
    objective: str | None = None,
    overrides: Mapping[str, str] | None = None,
    clip_mv: float | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint file and writes the run directory, complete or not at all.

    Args:
        source: the checkpoint file.
        workdir: folder to make; an empty one may be there.
        objective, overrides, clip_mv: see `convert`.

    Returns:
        What import.json holds.

    Raises:
        UserError: anything in the file, the options or the workdir that does not fit; nothing was written.
    """
    source, workdir = Path(source), Path(workdir)
    _check_workdir(workdir)
    if clip_mv is not None and not 0 < clip_mv <= INT16_MAX / MICROVOLTS_PER_MV:
        raise UserError(
            f"--clip-mv={clip_mv} must be above 0 and at most 32.767 mV, as for `ecg-jax prepare`"
        )
    digest = sha256_of(source)
    checkpoint = read_torch_checkpoint(source)
    try:
        imported = convert(checkpoint, objective=objective, overrides=overrides, clip_mv=clip_mv)
    except UserError as error:
        raise UserError(f"{source} cannot be imported: {error}") from error
    report = {"file": source.name, "sha256": digest, **imported.report}
    parent = workdir.absolute().parent
    temporary = parent / f".{workdir.absolute().name}.{os.getpid()}.tmp"
    made = [folder for folder in (parent, *parent.parents) if not os.path.exists(folder)]
    try:
        temporary.mkdir(parents=True)
        _write_run(temporary, imported, report)
        temporary.rename(workdir)
    except OSError as error:
        raise UserError(f"cannot write --workdir={workdir}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first of them is not empty when the run is there
            for folder in made:
                folder.rmdir()
    return report


def _check_workdir(workdir: Path) -> None:
    try:
        taken = any(workdir.iterdir()) if workdir.exists() else False
    except OSError as error:
        raise UserError(f"--workdir={workdir} is no folder to write into: {error.strerror}") from error
    if taken:
        raise UserError(f"--workdir={workdir} is not empty; name a folder that does not exist yet")


def _write_run(folder: Path, imported: Imported, report: dict[str, Any]) -> None:
    config, contract = imported.config.to_dict(), imported.preprocessing.to_dict()
    # There was no store: the run can be probed and embedded with, but not continued.
    provenance = {"store_fingerprint": None}
    checkpoints = Checkpoints(
        folder,
        keep_latest=1,
        keep_best=0,
        meta={"config": config, "preprocessing": contract, "targets_fingerprint": None, **provenance},
    )
    checkpoints.save(imported.state, val_loss=None)
    checkpoints.close()
    files = {"config.json": config | provenance, "preprocessing.json": contract, IMPORT_NAME: report}
    for name, value in files.items():
        write_atomic(folder / name, (json.dumps(value, indent=2) + "\n").encode())


def summary(report: dict[str, Any]) -> str:
    """What was read, what was assumed, and what was left, for the console."""

    def fields(values: dict[str, Any]) -> str:
        return ", ".join(f"{name}={value}" for name, value in values.items()) or "nothing"

    assumed = {n: v for n, v in report["from_released_recipe"].items() if n.startswith(_SHOWN)}
    epoch = "" if report["epoch"] is None else f", epoch {report['epoch']}"
    lines = [
        f"{report['file']}: {report['objective']} on {report['backbone']}, step {report['global_step']}{epoch}, "
        f"{report['parameters']:,} parameters, {report['arrays']} arrays",
        f"read from the file: {fields(report['from_file'])}",
        f"not in the file, taken from the released recipe (--config.FIELD=VALUE changes it): {fields(assumed)}",
    ]
    if report["given"]:
        lines.append(f"given: {fields(report['given'])}")
    for why, names in report["not_used"].items():
        lines.append(f"not used: {len(names)} x {why} ({listed(names, limit=2)})")
    lines += [f"note: {note}" for note in report["notes"]]
    if report["teacher"]:
        lines.append(f"teacher: {report['teacher']['sentence']}")
    return "\n".join(lines)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Options, and config fields that were given."""
    parser = argparse.ArgumentParser(
        prog="ecg-jax import-checkpoint",
        description=DESCRIPTION,
        epilog="Other fields than those with an option of their own: --config.FIELD=VALUE, as in `ecg-jax pretrain`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint (.ckpt) of the reference implementation")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run; made, or empty")
    parser.add_argument("--objective", choices=OBJECTIVES, help="instead of what the names in the file tell")
    parser.add_argument("--normalisation", metavar="NAME", help="of the input: --config.data.normalisation")
    parser.add_argument("--window-s", metavar="SECONDS", help="of a crop: --config.data.window_s")
    parser.add_argument("--clip-mv", type=float, metavar="MV", help="of the stores it will be probed on")
    given, rest = split_overrides(argv)
    overrides = dict(given)
    options = parser.parse_args(rest)
    for field, value in (("data.normalisation", options.normalisation), ("data.window_s", options.window_s)):
        if value is not None:
            overrides[field] = value
    return options, overrides


def main(argv: list[str]) -> int:
    """`ecg-jax import-checkpoint`."""
    options, overrides = _parse(argv)
    report = import_checkpoint(
        options.file,
        options.workdir,
        objective=options.objective,
        overrides=overrides,
        clip_mv=options.clip_mv,
    )
    print(summary(report))
    print(f"written to {options.workdir}; next: ecg-jax embed --checkpoint={options.workdir} ...")
    return 0
