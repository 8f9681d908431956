"""Where the first parameters of a run come from when they are another run's (domain pretraining)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ecg_jax.data.mixture import store_paths
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.errors import UserError
from ecg_jax.models.encoder import tokens_of
from ecg_jax.objectives.teacher import Teacher
from ecg_jax.training.checkpoint import (
    CHECKPOINTS,
    finished_steps,
    first_line,
    read_arrays,
    read_meta,
    resolve_checkpoint,
    stored_shapes,
)
from ecg_jax.training.checkpoint_tree import checksums, describe_mismatch, flat_shapes
from ecg_jax.training.train_state import TrainState, with_bases
from ecg_jax.workdir import stored_config

# Everything that training has moved or drawn, but the optimiser and the key of the run. What depends on the step, as
# the teacher's momentum does, begins anew.
_COLLECTIONS = ("params", "batch_stats", "ssm", "objective_state", "teacher")


def describe_run(run: Path, step: int) -> dict[str, Any]:
    """What has to be known of a checkpoint to tell, without it, which recordings its parameters have seen.

    Returns:
        JSON-able: `run`, `step`, `store` (absolute), `store_fingerprint` and `selection_fingerprint` (None where
        unknown), `data` (its `config.data`), `window_samples`, and `origin`, the same of the run that it began with, or
        None.

    Raises:
        UserError: the checkpoint is damaged.
    """
    meta = _meta(run, step)
    config, contract = meta["config"], Preprocessing.from_dict(meta["preprocessing"])
    # Checkpoints written before there were selections and origins have neither.
    known = {name: meta.get(name) for name in ("selection_fingerprint", "origin")}
    return {
        "run": str(run.resolve()),
        "step": step,
        "store": config["store"]
        and ",".join(str(Path(path).resolve()) for path in store_paths(config["store"])),
        "store_fingerprint": meta["store_fingerprint"],
        "data": config["data"],
        "window_samples": contract.window_samples,
        **known,
    }


def find_origin(config: ConfigDict, workdir: Path, contract: Preprocessing) -> dict[str, Any] | None:
    """`describe_run` of the checkpoint that a run begins or began with, None without one.

    A run that goes on knows it from its own workdir; the checkpoint may be gone.

    Args:
        config: of the run.
        workdir: of the run.
        contract: of the run.

    Raises:
        UserError: there is no such checkpoint, it is damaged, of another objective (`config.init.part=all`),
            normalisation or rate.
    """
    if not config.init.checkpoint:
        return None
    if finished_steps(workdir):
        return stored_config(workdir).get("origin")
    name = f"config.init.checkpoint={config.init.checkpoint}"
    try:
        run, step = resolve_checkpoint(config.init.checkpoint)
    except UserError as error:
        raise UserError(f"config.init.checkpoint: {error}") from error
    meta = _meta(run, step)
    there = Preprocessing.from_dict(meta["preprocessing"])
    for field in ("normalisation", "rate_hz"):
        values = getattr(there, field), getattr(contract, field)
        if values[0] != values[1]:
            raise UserError(
                f"{name} was pretrained with data.{field}={values[0]!r}, and this run has {values[1]!r}, so "
                f"that its parameters would mean nothing; set --config.data.{field}={values[0]}"
            )
    objective = meta["config"]["objective"]["name"]
    if config.init.part == "all" and objective != config.objective.name:
        raise UserError(
            f"{name} was pretrained with the objective {objective}, and this run has {config.objective.name}; set "
            "--config.init.part=encoder to begin with its encoder alone"
        )
    return describe_run(run, step)


def begin_with(
    state: TrainState,
    origin: dict[str, Any],
    config: ConfigDict,
    contract: Preprocessing,
    teacher: Teacher | None,
) -> TrainState:
    """A fresh state with the parameters of another run; optimiser, step and key stay fresh.

    Args:
        state: from `initial_state`, of the run that begins.
        origin: from `find_origin`.
        config: of the run that begins. `init.part` "all" takes parameters, running statistics, state matrices,
            codebooks and the teacher; "encoder" those of the encoder, of which an averaged teacher is a copy.
        contract: of the run that begins.
        teacher: of the run that begins, if it has one.

    Raises:
        UserError: missing, extra or differently shaped arrays, all of them in one sentence; a damaged checkpoint.
    """
    run, step = Path(origin["run"]), origin["step"]
    if config.init.part == "all":
        wanted = {name: getattr(state, name) for name in _COLLECTIONS}
        prefixes = tuple(f"{name}/" for name in _COLLECTIONS)
    else:
        whole = {name: getattr(state, name) for name in ("params", "batch_stats", "ssm")}
        wanted = {name: {"encoder": tree["encoder"]} for name, tree in whole.items() if "encoder" in tree}
        prefixes = tuple(f"{name}/encoder/" for name in whole)
    wanted = {name: tree for name, tree in wanted.items() if tree}
    path = run / CHECKPOINTS / str(step)
    try:
        stored = stored_shapes(path)
    except Exception as error:
        raise _damaged(path, error) from error
    there = {name: shape for name, shape in stored.items() if name.startswith(prefixes)}
    if mismatch := describe_mismatch(there, flat_shapes(wanted)):
        hint = (
            "" if config.init.part == "encoder" else ", or take its encoder alone (config.init.part=encoder)"
        )
        raise UserError(
            f"config.init.checkpoint: {path} does not fit this run: {mismatch}; give the run the model and objective "
            f"of the checkpoint{hint}"
        )
    try:
        arrays = read_arrays(path, wanted)
        kept = read_meta(path)["checksums"]
        if any(checksum != kept[name] for name, checksum in checksums(arrays).items()):
            raise OSError("the checksums of its arrays do not match")
    except Exception as error:
        raise _damaged(path, error) from error
    taken = {name: jax.tree.map(jnp.asarray, tree) for name, tree in arrays.items()}
    if config.init.part == "encoder":
        if teacher:
            student = {name: tree["encoder"] for name, tree in taken.items()}
            taken["teacher"] = teacher.initial(student, random=state.teacher)
        for name in ("params", "batch_stats", "ssm"):
            if name in taken:
                taken[name] = getattr(state, name) | taken[name]
    return with_bases(
        state.replace(**taken), tokens=tokens_of(contract.window_samples), l_max=config.model.l_max
    )


def _meta(run: Path, step: int) -> dict[str, Any]:
    path = run / CHECKPOINTS / str(step)
    try:
        meta = read_meta(path)
        Preprocessing.from_dict(meta["preprocessing"])
    except Exception as error:
        raise _damaged(path, error) from error
    return meta


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"checkpoint {path} is damaged ({first_line(error)}); choose another step of the run")
