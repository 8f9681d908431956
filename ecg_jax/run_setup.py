"""What the config of a run means: the stores, objective, optimiser and first state it describes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from ecg_jax.data.mixture import StoreSet, store_paths
from ecg_jax.data.preprocessing import Preprocessing, parse_leads
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.store import Store
from ecg_jax.data.targets import Targets
from ecg_jax.errors import UserError
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


def build_objective(config: ConfigDict, axis_name: str | None):
    """The objective's Flax module as the config describes it."""
    dtype = DTYPES[config.precision]
    encoder = build_encoder(**config.model.to_dict(), dtype=dtype, axis_name=axis_name)
    fields = {name: value for name, value in config.objective.to_dict().items() if name != "teacher"}
    if "mask" in fields:
        fields["mask"] = build_masking(config)
    fields.pop("require_causal", None)  # what the config may be, not what the objective is
    return OBJECTIVES[fields.pop("name")](encoder=encoder, width=config.model.width, dtype=dtype, **fields)


def build_masking(config: ConfigDict) -> Masking:
    """How a masked objective hides what the run sees."""
    kept = parse_leads(config.data.leads)
    numbers = () if kept == CANONICAL_LEADS else tuple(CANONICAL_LEADS.index(lead) for lead in kept)
    return Masking(**config.objective.mask.to_dict(), kept_leads=numbers)


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


def open_targets(config: ConfigDict, stores: StoreSet) -> Targets | None:
    """The offline targets of the run, None for objectives without.

    Raises:
        UserError: there are several stores or no such targets, they do not fit the store, or have another number of
            codes than the config.
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
    if len(stores.stores) > 1:
        raise UserError(
            f"config.data.targets={config.data.targets!r}: offline targets lie beside one store, but config.store "
            f"names {len(stores.stores)}; pretrain on one store, or with an objective that makes its own targets"
        )
    targets = Targets(stores.stores[0], config.data.targets)
    targets.verify()
    if targets.codes != config.objective.codes:
        raise UserError(
            f"config.objective.codes={config.objective.codes}, but the targets {targets.path} have {targets.codes} "
            f"codes; set --config.objective.codes={targets.codes}"
        )
    return targets


def open_store(config: ConfigDict) -> tuple[StoreSet, Preprocessing]:
    """The stores and the contract of the run: the stores' own, with the run's window, normalisation and leads.

    Raises:
        UserError: no store given, or one has other leads or another rate than the config, or the stores were made under
            different contracts.
    """
    if config.store is None:
        raise UserError("config.store is not set; give the folder of a prepared store: --config.store=STORE")
    stores = [Store(path) for path in store_paths(config.store)]
    contract = stores[0].preprocessing
    for store in stores:
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
        try:
            contract.check_compatible(
                store.preprocessing, f"the store {stores[0].path}", f"the store {store.path}"
            )
        except UserError as error:
            raise UserError(
                f"{error} A run needs one contract: stores that are mixed have to be prepared alike, with the same "
                "--clip-mv"
            ) from error
    return StoreSet(stores), dataclasses.replace(
        contract,
        window_s=config.data.window_s,
        normalisation=config.data.normalisation,
        kept_leads=parse_leads(config.data.leads),
    )


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested fields as "a.b.c" -> value."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
