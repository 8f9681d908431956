"""What the config of a run means: what it refuses, and the objective, optimiser and first state it describes."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.store import Store
from ecg_jax.data.targets import Targets
from ecg_jax.errors import UserError
from ecg_jax.files import lock, write_atomic
from ecg_jax.models import convolution
from ecg_jax.models.encoder import build_encoder, tokens_of
from ecg_jax.objectives.cpc import CPC
from ecg_jax.objectives.data2vec import Data2Vec
from ecg_jax.objectives.dinosr import DinoSR
from ecg_jax.objectives.hubert import Hubert, HubertPP
from ecg_jax.objectives.jepa import JEPA
from ecg_jax.objectives.masking import Masking
from ecg_jax.objectives.teacher import Teacher
from ecg_jax.training import optim
from ecg_jax.training.checkpoint import finished_steps
from ecg_jax.training.train_state import TrainState, create_train_state

#: Name of an objective -> its module.
OBJECTIVES = {
    "cpc": CPC,
    "jepa": JEPA,
    "data2vec": Data2Vec,
    "dinosr": DinoSR,
    "hubertpp": HubertPP,
    "hubert": Hubert,
}
#: Name of an objective -> the shipped config that declares its fields; a config of one's own has the same.
CONFIGS = {
    "cpc": "configs/cpc.py",
    "jepa": "configs/jepa.py",
    "data2vec": "configs/data2vec.py",
    "dinosr": "configs/dinosr.py",
    "hubertpp": "configs/hubert.py",
    "hubert": "configs/hubert.py:variant=offline",
}
#: What `ecg-jax import-checkpoint` writes beside a checkpoint, and no run of ours.
IMPORT_NAME = "import.json"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# What may differ when a run is continued; everything else makes it another run.
_FREE_FIELDS = {
    "store",
    "log_every",
    "keep_latest",
    "keep_best",
    "tensorboard",
    "stall_timeout_s",
    "data.read_threads",
    "data.prefetch",
    # How a step is computed, not what.
    "model.conv", "model.remat",
    # Monitoring reads the state and never changes it.
    "stop_on_collapse", "monitor.min_rankme", "monitor.min_feature_std", "monitor.min_perplexity",
    "monitor.max_dead_share", "monitor.probe_every", "monitor.probe_records", "monitor.task",
}  # fmt: skip
# The length of a run shapes its learning rates and the teacher's momentum unless they are constant.
_LENGTH_FIELDS = {"steps", "epochs"}


def build_objective(config: ConfigDict, axis_name: str | None):
    """The objective's Flax module as the config describes it."""
    dtype = DTYPES[config.precision]
    encoder = build_encoder(**config.model.to_dict(), dtype=dtype, axis_name=axis_name)
    fields = {name: value for name, value in config.objective.to_dict().items() if name != "teacher"}
    if "mask" in fields:
        fields["mask"] = Masking(**fields["mask"])
    fields.pop("require_causal", None)  # what the config may be, not what the objective is
    return OBJECTIVES[fields.pop("name")](encoder=encoder, width=config.model.width, dtype=dtype, **fields)


def build_teacher(config: ConfigDict, steps: int) -> Teacher | None:
    """The teacher of a run of `steps` steps, None for objectives without one."""
    return (
        Teacher(**config.objective.teacher.to_dict(), steps=steps) if "teacher" in config.objective else None
    )


def build_optimiser(config: ConfigDict, steps: int) -> tuple[Callable, Any]:
    """Learning-rate schedule and optimiser of a run of `steps` steps."""
    fields = config.optimiser.to_dict()
    schedule = optim.learning_rate(
        base=fields.pop("learning_rate"),
        schedule=fields.pop("schedule"),
        warmup_steps=fields.pop("warmup_steps"),
        steps=steps,
    )
    return schedule, optim.build_optimiser(schedule, **fields)


def initial_state(
    config: ConfigDict, tx, preprocessing: Preprocessing, teacher: Teacher | None
) -> TrainState:
    """The state at step 0."""
    return create_train_state(
        build_objective(config, axis_name=None),
        tx,
        seed=config.seed,
        window_samples=preprocessing.window_samples,
        leads=len(preprocessing.leads),
        tokens=tokens_of(preprocessing.window_samples),
        l_max=config.model.l_max,
        teacher=teacher,
    )


def convolutions(config: ConfigDict, tokens: int) -> list[str]:
    """What each kind of S4 layer of the run convolves windows of `tokens` tokens with, one sentence each."""
    model, objective = config.model, config.objective
    layers = []
    if model.backbone == "s4":
        layers.append(("S4", model.conv, model.state, model.bidirectional, not model.trainable_ssm))
    if "head_state" in objective:
        layers.append(("S4 head", model.conv, objective.head_state, True, True))
    lines = []
    for name, conv, state, bidirectional, fixed in layers:
        algorithm, reason = convolution.choose(
            conv,
            length=tokens,
            width=model.width,
            state=state,
            channels=1 + bidirectional,
            dtype=DTYPES[config.precision],
            fixed=fixed,
        )
        lines.append(f"{name} convolution: {algorithm} ({reason})")
    return lines


def open_targets(config: ConfigDict, store: Store) -> Targets | None:
    """The offline targets of the run, None for objectives without.

    Raises:
        UserError: there are no such targets, they do not fit the store, or have another number of codes than
            the config.
    """
    objective = config.objective
    if (objective.name == "hubert") != bool(config.data.targets):
        raise UserError(
            "config.data.targets is not set; the objective hubert predicts offline targets: make them with "
            "`ecg-jax cluster`, then give their name with --config.data.targets=NAME"
            if objective.name == "hubert"
            else f"config.data.targets={config.data.targets!r} is read by the objective hubert only "
            "(configs/hubert.py:variant=offline); leave it empty"
        )
    if not config.data.targets:
        return None
    targets = Targets(store, config.data.targets)
    targets.verify()
    if targets.codes != config.objective.codes:
        raise UserError(
            f"config.objective.codes={config.objective.codes}, but the targets {targets.path} have {targets.codes} "
            f"codes; set --config.objective.codes={targets.codes}"
        )
    return targets


def open_store(config: ConfigDict) -> tuple[Store, Preprocessing]:
    """The store and the contract of the run: the store's own, with the run's window and normalisation.

    Raises:
        UserError: no store given, or it has other leads or another rate than the config.
    """
    if config.store is None:
        raise UserError("config.store is not set; give the folder of a prepared store: --config.store=STORE")
    store = Store(config.store)
    if store.leads != CANONICAL_LEADS:
        raise UserError(
            f"the store {store.path} has the leads {', '.join(store.leads)}; a run needs "
            f"{', '.join(CANONICAL_LEADS)}"
        )
    if store.rate_hz != config.data.rate_hz:
        raise UserError(
            f"the store {store.path} has {store.rate_hz:g} samples per second, config.data.rate_hz is "
            f"{config.data.rate_hz:g}; prepare the recordings again or change the field"
        )
    contract = store.preprocessing.to_dict() | {
        "window_s": config.data.window_s,
        "normalisation": config.data.normalisation,
    }
    return store, Preprocessing.from_dict(contract)


@contextlib.contextmanager
def claim_workdir(
    workdir: Path, config: ConfigDict, preprocessing: Preprocessing, store: Store, targets: Targets | None
) -> Iterator[None]:
    """Holds the workdir for this run: locked against a second process, and known to belong to this very
    config.

    Writes config.json and preprocessing.json when no run with a checkpoint is there yet. A store is known by
    its
    content: config.json holds its fingerprint beside the config, and the store may have moved when a run goes
    on. So are offline targets.

    Raises:
        UserError: the workdir belongs to another run (the differing fields are named) or holds an imported
            checkpoint, is in use, or is no folder.
    """
    if jax.process_index() != 0:
        yield
        return
    if (workdir / IMPORT_NAME).exists():
        raise UserError(
            f"{workdir} is an imported checkpoint, which can be probed but not continued: its store and optimiser are "
            "not known; choose another --workdir"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        held = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write into --workdir={workdir}: {error.strerror}") from error
    with held:
        lock(held, f"another `ecg-jax pretrain` is using {workdir}; choose another --workdir")
        wanted = json.loads(json.dumps(config.to_dict())) | {"store_fingerprint": store.fingerprint}
        if targets:
            wanted |= {"targets_fingerprint": targets.fingerprint}
        if finished_steps(workdir):
            _check_same_run(workdir, wanted, constant_schedule=_is_constant(config))
        else:
            files = {"preprocessing.json": preprocessing.to_dict(), "config.json": wanted}
            for name, value in files.items():
                write_atomic(workdir / name, (json.dumps(value, indent=2) + "\n").encode())
        yield


def _is_constant(config: ConfigDict) -> bool:
    """Whether a run of another length would have the same steps as far as both go."""
    moving = "teacher" in config.objective and (
        config.objective.teacher.momentum != config.objective.teacher.momentum_end
    )
    return config.optimiser.schedule == "constant" and not moving


def _check_same_run(workdir: Path, wanted: dict[str, Any], constant_schedule: bool) -> None:
    """Compares a config with the one that a workdir's checkpoints were written under."""
    path = workdir / "config.json"
    try:
        there = flatten(json.loads(path.read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is missing or damaged, so it cannot be told which run the checkpoints beside it belong to; "
            "put it back (a checkpoint's meta holds the config), or choose another --workdir"
        ) from error
    wanted = flatten(wanted)
    free = _FREE_FIELDS | (_LENGTH_FIELDS if constant_schedule else set())
    names = sorted(there.keys() | wanted.keys())
    differ = [name for name in names if name not in free and there.get(name) != wanted.get(name)]
    if differ:
        shown = ", ".join(
            f"{name} ({there.get(name)!r} there, {wanted.get(name)!r} now)" for name in differ[:5]
        )
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise UserError(f"{workdir} holds another run: it differs in {shown}{more}; choose another --workdir")


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested fields as "a.b.c" -> value."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
