"""`ecg-jax pretrain`: a store and a config become a run with checkpoints."""

import argparse
import collections
import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ecg_jax.config_flags import parse_command
from ecg_jax.data.pipeline import Selection, select_records, train_batches, val_batches
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.files import write_atomic
from ecg_jax.models.encoder import build_encoder, tokens_of
from ecg_jax.models.inputs import NORMALISATIONS
from ecg_jax.objectives.cpc import CPC
from ecg_jax.training import distributed, optim, parallel
from ecg_jax.training.checkpoint import Checkpoints
from ecg_jax.training.metric_writers import JsonlWriter, MultiWriter, TensorBoardWriter, rewind_log
from ecg_jax.training.train_state import TrainState, create_train_state, eval_step, mean_of_sums, train_step

OBJECTIVES = {"cpc": CPC}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# What may differ when a run is continued; everything else makes it another run.
_FREE_FIELDS = {"log_every", "keep_latest", "keep_best", "tensorboard", "data.read_threads", "data.prefetch"}
# The length of a run shapes its learning rates unless the schedule is constant.
_LENGTH_FIELDS = {"steps", "epochs"}


def pretrain(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Runs or continues pretraining until the configured step.

    Writes `config.json`, `preprocessing.json`, `log.jsonl`, `tensorboard/` and `checkpoints/STEP/` into the workdir. A run that was
    stopped at any moment continues exactly: the same losses and parameters as without the stop, on the same devices.

    Args:
        config: see `configs/common.py`.
        workdir: of this run; created if needed.

    Returns:
        The last state.

    Raises:
        UserError: the config, the store, the workdir and the devices do not fit together; or a loss or gradient norm was not
            finite (no checkpoint of that step is written).
    """
    workdir = Path(workdir)
    check_config(config)
    store, preprocessing = open_store(config)
    selection = select_records(
        store,
        window_samples=preprocessing.window_samples,
        val_folds=config.data.val_folds,
        max_records=config.data.max_records,
    )
    steps = config.steps or math.ceil(config.epochs * len(selection.train) / config.batch_size)
    claim_workdir(workdir, config, preprocessing)

    mesh = parallel.make_mesh()
    schedule, tx = build_optimiser(config, steps)
    state = parallel.replicate(initial_state(config, tx, preprocessing), mesh)
    checkpoints = Checkpoints(
        workdir,
        keep_latest=config.keep_latest,
        keep_best=config.keep_best,
        meta={
            "config": config.to_dict(),
            "preprocessing": preprocessing.to_dict(),
            "store_fingerprint": store.fingerprint,
        },
    )
    state = checkpoints.restore_latest(state, state.step.sharding) or state
    start = int(state.step)

    bound = {"model": build_objective(config, parallel.AXIS), "normalisation": config.data.normalisation}
    step_fn = parallel.map_train_step(functools.partial(train_step, tx=tx, **bound), mesh)
    eval_fn = parallel.map_eval_step(functools.partial(eval_step, **bound), mesh)
    reading = {
        "batch_size": config.batch_size,
        "window_samples": preprocessing.window_samples,
        "process": jax.process_index(),
        "processes": jax.process_count(),
    }
    batches = train_batches(
        store,
        selection.train,
        seed=config.seed,
        start_step=start,
        threads=config.data.read_threads,
        prefetch=config.data.prefetch,
        **reading,
    )

    def validate(state: TrainState) -> dict[str, float]:
        crops = val_batches(store, selection.val, max_crops=config.data.max_val_crops, **reading)
        sums = jax.device_get([eval_fn(state, parallel.shard_batch(batch, mesh)) for batch in crops])
        return {f"val_{name}": value for name, value in mean_of_sums(sums).items()}

    primary = jax.process_index() == 0
    if primary:
        _announce(config, store, selection, state, steps)
    writer = _open_writer(workdir, start, config.tensorboard) if primary else MultiWriter()
    progress = tqdm(total=steps, initial=start, unit="step", desc="pretrain", disable=not primary)
    meter = _Meter(config.batch_size)
    unread: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
    saved = start if start else None

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(distributed.StopSignal(active=jax.process_count() == 1))
        stack.enter_context(
            jax.default_matmul_precision("highest" if config.precision == "float32" else "default")
        )
        for resource in (checkpoints, writer, batches, progress):
            stack.callback(resource.close)

        # The order of this loop: log the previous step, save if due, check preemption, next batch, step. A checkpoint at step s has
        # consumed exactly s batches, and a step is logged while the next one runs, so that the loop never waits for the device.
        for step in range(start, steps + 1):
            stopping = stop.received is not None or checkpoints.reached_preemption(step)
            last = stopping or step == steps
            due = step > start and (last or step % config.checkpoint_every == 0)
            while len(unread) > (0 if due else 1):
                done, metrics = unread.popleft()
                scalars = _finite(jax.device_get(metrics), done, workdir, saved)
                if done == start + 1:
                    meter.restart(done)  # the first step compiles
                save_now = due and done == step
                if save_now or done % config.log_every == 0:
                    scalars |= {"learning_rate": float(schedule(done - 1))} | meter.read(done)
                    if save_now and not stopping:
                        scalars |= validate(state)
                    writer.write_scalars(done, scalars)
                    progress.set_postfix_str(_summary(scalars))
                if save_now:
                    checkpoints.save(state, val_loss=scalars.get("val_loss"))
                    saved = step
                    meter.restart(step)
            if last:
                break
            with meter.waiting_for_data():
                batch = next(batches)
            state, metrics = step_fn(state, parallel.shard_batch(_device_part(batch), mesh))
            unread.append((step + 1, metrics))
            progress.update()

    if stopping and primary:
        print(
            f"{stop.received or 'preemption'} at step {step}: saved; run the same command again to continue"
        )
    return state


def build_objective(config: ConfigDict, axis_name: str | None):
    """The objective's Flax module as the config describes it."""
    dtype = DTYPES[config.precision]
    encoder = build_encoder(**config.model.to_dict(), dtype=dtype, axis_name=axis_name)
    fields = config.objective.to_dict()
    return OBJECTIVES[fields.pop("name")](encoder=encoder, width=config.model.width, dtype=dtype, **fields)


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


def initial_state(config: ConfigDict, tx, preprocessing: Preprocessing) -> TrainState:
    """The state at step 0."""
    return create_train_state(
        build_objective(config, axis_name=None),
        tx,
        seed=config.seed,
        window_samples=preprocessing.window_samples,
        leads=len(preprocessing.leads),
        tokens=tokens_of(preprocessing.window_samples),
        l_max=config.model.l_max,
    )


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
            f"the store {store.path} has the leads {', '.join(store.leads)}; a run needs {', '.join(CANONICAL_LEADS)}"
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
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            raise UserError(f"config.{name}={fields[name]!r} is unknown; known: {', '.join(allowed)}")
    positive = ("batch_size", "epochs", "data.window_s", "data.rate_hz", "data.max_records", "model.width", "model.layers",
                "model.l_max", "log_every", "checkpoint_every", "keep_latest", "optimiser.learning_rate")  # fmt: skip
    for name in positive:
        if not fields[name] > 0:
            raise UserError(f"config.{name}={fields[name]!r} must be positive")
    for name in (
        "steps",
        "keep_best",
        "seed",
        "data.val_folds",
        "optimiser.warmup_steps",
        "optimiser.clip_norm",
    ):
        if fields[name] < 0:
            raise UserError(f"config.{name}={fields[name]!r} must not be negative")
    if config.model.state < 2 or config.model.state % 2:
        raise UserError(f"config.model.state={config.model.state} must be even and at least 2")
    if not 0.0 <= config.model.dropout < 1.0:
        raise UserError(f"config.model.dropout={config.model.dropout} must be at least 0 and below 1")
    if config.objective.name == "cpc":
        tokens = tokens_of(round(config.data.window_s * config.data.rate_hz))
        if not 0 < config.objective.steps_ahead < tokens:
            raise UserError(
                f"config.objective.steps_ahead={config.objective.steps_ahead} must lie between 1 and {tokens - 1}, one less than the "
                f"tokens in a window of {config.data.window_s} s"
            )
        if config.model.bidirectional:
            raise UserError(
                "config.model.bidirectional=True lets CPC see the token it predicts; set it to False"
            )
    devices = jax.device_count()
    if config.batch_size % devices:
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide over {devices} devices; use a multiple of {devices}"
        )


def claim_workdir(workdir: Path, config: ConfigDict, preprocessing: Preprocessing) -> None:
    """Writes config.json and preprocessing.json, or checks that the workdir holds this very run.

    Raises:
        UserError: the workdir belongs to another run (the differing fields are named) or is no folder.
    """
    path = workdir / "config.json"
    wanted = json.loads(json.dumps(config.to_dict()))
    if path.exists():
        there, wanted = _flatten(json.loads(path.read_text())), _flatten(wanted)
        free = _FREE_FIELDS | (_LENGTH_FIELDS if config.optimiser.schedule == "constant" else set())
        names = sorted(there.keys() | wanted.keys())
        differ = [name for name in names if name not in free and there.get(name) != wanted.get(name)]
        if differ:
            shown = ", ".join(
                f"{name} ({there.get(name)!r} there, {wanted.get(name)!r} now)" for name in differ[:5]
            )
            more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise UserError(
                f"{workdir} holds another run: it differs in {shown}{more}; choose another --workdir"
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for file, value in ((workdir / "preprocessing.json", preprocessing.to_dict()), (path, wanted)):
                write_atomic(file, (json.dumps(value, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write into --workdir={workdir}: {error.strerror}") from error


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _device_part(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: batch[name] for name in ("signal", "record_index")}


def _finite(metrics: dict[str, Any], step: int, workdir: Path, saved: int | None) -> dict[str, float]:
    """Metrics as floats; raises when the loss or the gradient norm is not finite."""
    scalars = {name: float(value) for name, value in metrics.items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(scalars[name]):
            last = (
                f"the last good checkpoint is {workdir / 'checkpoints' / str(saved)}"
                if saved
                else "no checkpoint was written yet"
            )
            raise UserError(
                f"{name} is {scalars[name]} at step {step}; {last}. A lower optimiser.learning_rate or clip_norm may help"
            )
    return scalars


def _open_writer(workdir: Path, start: int, tensorboard: bool) -> MultiWriter:
    rewind_log(workdir, start)
    return MultiWriter(JsonlWriter(workdir), *([TensorBoardWriter(workdir)] if tensorboard else []))


def _summary(scalars: dict[str, float]) -> str:
    names = [name for name in ("loss", "accuracy", "val_loss") if name in scalars]
    shown = [f"{name} {scalars[name]:.4g}" for name in names]
    if "windows_per_s" in scalars:
        shown.append(f"{scalars['windows_per_s']:.0f} windows/s")
    return ", ".join(shown)


def _announce(config: ConfigDict, store: Store, selection: Selection, state: TrainState, steps: int) -> None:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    devices = jax.devices()
    print(f"store {store.path}: {selection.describe()}")
    if selection.available < config.data.max_records:
        print(
            f"data.size={config.data.size} allows {config.data.max_records} recordings; the store has {selection.available} to train on"
        )
    print(f"{config.objective.name} on {config.model.backbone}: {parameters:,} trainable parameters, {config.precision}, "
          f"{len(devices)} x {devices[0].device_kind}")  # fmt: skip
    start = int(state.step)
    print(
        f"continuing at step {start} of {steps}" if start else f"{steps} steps of {config.batch_size} windows"
    )


class _Meter:
    """Windows per second, and the share of time the loop waited for data, since the last reading.

    The first step compiles and is left out.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._step: int | None = None

    def restart(self, step: int) -> None:
        """Begins anew at the end of `step`."""
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting."""
        begin = time.perf_counter()
        yield
        if self._step is not None:
            self._waited += time.perf_counter() - begin

    def read(self, step: int) -> dict[str, float]:
        """Rates since the last restart or reading, at the end of `step`; {} when no step was timed."""
        if self._step is None or step <= self._step:
            return {}
        elapsed = time.perf_counter() - self._since
        rates = {
            "windows_per_s": (step - self._step) * self._batch_size / elapsed,
            "data_wait": self._waited / elapsed,
        }
        self.restart(step)
        return rates


def main(argv: list[str]) -> int:
    """Entry point of `ecg-jax pretrain`."""

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--workdir",
            required=True,
            metavar="DIR",
            help="folder of the run; an interrupted run in it is continued",
        )
        group = parser.add_argument_group(
            "several processes (see launch/; under srun they are found by themselves)"
        )
        group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
        group.add_argument("--num-processes", type=int, metavar="N")
        group.add_argument("--process-id", type=int, metavar="I")

    config, args = parse_command(
        "pretrain",
        "Pretrains an encoder on a prepared store. Run the same command again to continue an interrupted run, exactly.\n\n"
        "  ecg-jax pretrain --config=configs/cpc.py:data=18k --workdir=runs/cpc --config.store=stores/ptbxl",
        argv,
        options,
    )
    distributed.initialise(args.coordinator, args.num_processes, args.process_id)
    pretrain(config, args.workdir)
    if jax.process_index() == 0:
        print(f"done; next: ecg-jax probe --config=configs/probe.py:mode=linear,task=ptbxl_super --checkpoint={args.workdir} "
              f"--store={config.store} --workdir={args.workdir}-probe")  # fmt: skip
    return 0
