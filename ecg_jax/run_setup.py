"""What the config of a run means: what it refuses, and the objective, optimiser and first state it describes."""

import contextlib
import fcntl
import json
import math
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
from ecg_jax.files import write_atomic
from ecg_jax.models.encoder import build_encoder, tokens_of
from ecg_jax.models.inputs import NORMALISATIONS
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

OBJECTIVES = {
    "cpc": CPC,
    "jepa": JEPA,
    "data2vec": Data2Vec,
    "dinosr": DinoSR,
    "hubertpp": HubertPP,
    "hubert": Hubert,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

_POSITIVE = (
    "batch_size", "epochs", "log_every", "checkpoint_every", "keep_latest", "optimiser.learning_rate",
    "optimiser.eps",
    "data.window_s", "data.rate_hz", "data.max_records", "data.max_val_crops", "data.prefetch",
    "model.width", "model.layers", "model.l_max", "monitor.probe_records",
)  # fmt: skip
_NOT_NEGATIVE = (
    "steps", "keep_best", "seed", "data.val_folds", "data.read_threads", "optimiser.warmup_steps",
    "optimiser.clip_norm", "optimiser.weight_decay", "optimiser.factors.head", "optimiser.factors.backbone",
    "optimiser.factors.stem", "optimiser.factors.ssm", "monitor.min_rankme", "monitor.min_feature_std",
    "monitor.min_perplexity", "monitor.max_dead_share", "monitor.probe_every",
)  # fmt: skip

# What may differ when a run is continued; everything else makes it another run.
_FREE_FIELDS = {
    "store",
    "log_every",
    "keep_latest",
    "keep_best",
    "tensorboard",
    "data.read_threads",
    "data.prefetch",
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


def open_targets(config: ConfigDict, store: Store) -> Targets | None:
    """The offline targets of the run, None for objectives without.

    Raises:
        UserError: there are no such targets, they do not fit the store, or have another number of codes than
            the config.
    """
    if not config.data.targets:
        return None
    targets = Targets(store, config.data.targets)
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


def check_config(config: ConfigDict) -> None:
    """Refuses values that would fail, or mislead, later.

    Raises:
        UserError: names the field and what it may be.
    """
    choices = {
        "objective.name": OBJECTIVES,
        "model.backbone": ("s4",),
        "precision": DTYPES,
        "data.normalisation": NORMALISATIONS,
        "optimiser.schedule": ("constant", "cosine"),
    }
    fields = _flatten(config.to_dict())
    for name, value in fields.items():
        if value is None and name != "store":
            raise UserError(f"config.{name} is not set; every field but the store needs a value")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{name}={value} must be a finite number")
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            raise UserError(f"config.{name}={fields[name]!r} is unknown; known: {', '.join(allowed)}")
    for name in _POSITIVE:
        if not fields[name] > 0:
            raise UserError(f"config.{name}={fields[name]!r} must be positive")
    for name in _NOT_NEGATIVE:
        if fields[name] < 0:
            raise UserError(f"config.{name}={fields[name]!r} must not be negative")
    for name in ("optimiser.b1", "optimiser.b2"):
        if not 0 <= fields[name] < 1:
            raise UserError(f"config.{name}={fields[name]} must be at least 0 and below 1")
    if config.seed >= 2**63:
        raise UserError(f"config.seed={config.seed} must be below 2^63")
    if config.model.state < 2 or config.model.state % 2:
        raise UserError(f"config.model.state={config.model.state} must be even and at least 2")
    if not 0.0 <= config.model.dropout < 1.0:
        raise UserError(f"config.model.dropout={config.model.dropout} must be at least 0 and below 1")
    _check_objective(config)
    devices = jax.device_count()
    if config.batch_size % devices:
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide over {devices} devices; use a multiple of {devices}"
        )


def _check_objective(config: ConfigDict) -> None:
    """Refuses an objective that its config, its window or its batch cannot feed, before anything is compiled."""
    objective, samples = config.objective, round(config.data.window_s * config.data.rate_hz)
    tokens = tokens_of(samples)
    try:
        build_objective(config, axis_name=None)
        build_teacher(config, steps=1)
        if "mask" in objective:
            Masking(**objective.mask.to_dict()).check(samples, len(CANONICAL_LEADS))
    except ValueError as error:
        raise UserError(f"config.objective.{error}") from error
    if objective.name == "cpc":
        for name in ("negatives", "temperature"):
            if not objective[name] > 0:
                raise UserError(f"config.objective.{name}={objective[name]!r} must be positive")
        if not 0 < objective.steps_ahead < tokens:
            raise UserError(
                f"config.objective.steps_ahead={objective.steps_ahead} must lie between 1 and {tokens - 1}, "
                f"one less than the tokens in a window of {config.data.window_s} s"
            )
        if config.model.bidirectional:
            raise UserError(
                "config.model.bidirectional=True lets CPC see the token it predicts; set it to False"
            )
    if "top_k" in objective and not 1 <= objective.top_k <= config.model.layers:
        raise UserError(
            f"config.objective.top_k={objective.top_k} must lie between 1 and "
            f"config.model.layers={config.model.layers}: the targets come from the last top_k layers of the teacher"
        )
    if objective.name in ("dinosr", "hubertpp"):
        codes = objective.codes if isinstance(objective.codes, int) else max(objective.codes)
        if codes > config.batch_size * tokens:
            raise UserError(
                f"config.objective.codes={objective.codes} asks for more codes than the {config.batch_size * tokens} "
                f"tokens of a batch ({config.batch_size} windows of {tokens}); lower it or raise config.batch_size"
            )
    if "head_state" in objective:
        if objective.head_state < 2 or objective.head_state % 2:
            raise UserError(f"config.objective.head_state={objective.head_state} must be even and at least 2")
        if not 0.0 <= objective.head_dropout < 1.0:
            raise UserError(
                f"config.objective.head_dropout={objective.head_dropout} must be at least 0 and below 1"
            )
    if "beta" in objective and objective.beta < 0:
        raise UserError(f"config.objective.beta={objective.beta} must not be negative")
    if "target_norms" in objective and objective.target_norms not in (0, 1, 2):
        raise UserError(f"config.objective.target_norms={objective.target_norms} must be 0, 1 or 2")
    if (objective.name == "hubert") != bool(config.data.targets):
        raise UserError(
            "config.data.targets is not set; the objective hubert predicts offline targets: make them with "
            "`ecg-jax cluster`, then give their name with --config.data.targets=NAME"
            if objective.name == "hubert"
            else f"config.data.targets={config.data.targets!r} is read by the objective hubert only "
            "(configs/hubert.py:variant=offline); leave it empty"
        )


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
        UserError: the workdir belongs to another run (the differing fields are named), is in use, or is no
            folder.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write into --workdir={workdir}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another `ecg-jax pretrain` is using {workdir}; choose another --workdir"
            ) from error
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
        there = _flatten(json.loads(path.read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is missing or damaged, so it cannot be told which run the checkpoints beside it belong to; "
            "put it back (a checkpoint's meta holds the config), or choose another --workdir"
        ) from error
    wanted = _flatten(wanted)
    free = _FREE_FIELDS | (_LENGTH_FIELDS if constant_schedule else set())
    names = sorted(there.keys() | wanted.keys())
    differ = [name for name in names if name not in free and there.get(name) != wanted.get(name)]
    if differ:
        shown = ", ".join(
            f"{name} ({there.get(name)!r} there, {wanted.get(name)!r} now)" for name in differ[:5]
        )
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise UserError(f"{workdir} holds another run: it differs in {shown}{more}; choose another --workdir")


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
