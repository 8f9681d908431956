"""`ecg-jax pretrain`: a store and a config become a run with checkpoints."""

import argparse
import collections
import contextlib
import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu.parameter_overview import count_parameters
from ml_collections import ConfigDict
from tqdm import tqdm

from ecg_jax.config_checks import check_config
from ecg_jax.config_flags import parse_command
from ecg_jax.data.pipeline import train_batches, val_batches
from ecg_jax.errors import Stopped, UserError
from ecg_jax.models.encoder import tokens_of
from ecg_jax.run_data import RunData, open_data
from ecg_jax.run_origin import begin_with
from ecg_jax.run_reporting import announce, build_monitor, open_writer, summary, warn
from ecg_jax.run_setup import build_objective, build_optimiser, build_teacher, initial_state
from ecg_jax.run_starts import noted_start
from ecg_jax.training import distributed, parallel
from ecg_jax.training.agreement import on_first
from ecg_jax.training.checkpoint import Checkpoints, finished_steps
from ecg_jax.training.metric_writers import (
    MultiWriter,
    RateMeter,
)
from ecg_jax.training.train_state import TrainState, eval_step, mean_of_sums, train_step, with_bases
from ecg_jax.training.watchdog import Watchdog
from ecg_jax.workdir import claim_workdir

DESCRIPTION = """\
Pretrains an encoder on a prepared store. Run the same command again to continue an interrupted run, exactly.

  ecg-jax pretrain --config=configs/cpc.py:data=18k --workdir=runs/cpc --config.store=stores/ptbxl

Several stores, separated by commas, are mixed; --config.init.checkpoint=RUN begins with the parameters of another run.
Writes into the workdir: config.json, preprocessing.json, selection.json, made_with.json, log.jsonl, tensorboard/ and
checkpoints/STEP/.
SIGTERM or Ctrl-C saves and stops (exit code 0 or 130); of several processes SIGTERM to one saves and stops all, and
Ctrl-C ends them without saving. A run that makes no progress, or one of whose processes is lost, ends with exit
code 75: run it again to continue. A loss that is not finite stops the run and names the last good checkpoint.
Features that collapse are warned of, on stderr and in the log; with --config.stop_on_collapse=True they stop the
run too.
"""


def pretrain(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Runs or continues pretraining until the configured step.

    Writes `config.json`, `preprocessing.json`, `selection.json`, `log.jsonl`, `tensorboard/` and
    `checkpoints/STEP/` into the workdir. A run that was stopped at any moment continues exactly: the same losses and
    parameters as without the stop, on the same devices.

    Args:
        config: see `configs/common.py`.
        workdir: of this run; created if needed.

    Returns:
        The last state.

    Raises:
        UserError: the config, the store, the workdir and the devices do not fit together; or a loss or
            gradient norm was not finite, or the features collapsed and `stop_on_collapse` is set (no checkpoint
            of that step is written).
        Stopped: SIGTERM, Ctrl-C or a preemption came, and the state is saved.
    """
    check_config(config)
    workdir = Path(workdir)
    data = open_data(config, workdir)
    steps = config.steps or math.ceil(config.epochs * len(data.selection.train) / config.batch_size)
    if config.optimiser.warmup_steps > steps:
        raise UserError(
            f"config.optimiser.warmup_steps={config.optimiser.warmup_steps} exceeds the {steps} steps of the run"
        )
    with (
        claim_workdir(workdir, config, data),
        Watchdog(config.stall_timeout_s, workdir) as watchdog,
    ):
        return _run(config, workdir, data, steps, watchdog)


def _run(config: ConfigDict, workdir: Path, data: RunData, steps: int, watchdog: Watchdog) -> TrainState:
    """The run itself, in a workdir that is this process's."""
    began = time.monotonic()
    mesh, preprocessing = parallel.make_mesh(), data.preprocessing
    schedule, tx = build_optimiser(config, steps)
    teacher = build_teacher(config, steps)
    state = initial_state(config, tx, preprocessing, teacher)
    watchdog.beat("the first parameters", slow=True)
    if data.origin and not finished_steps(workdir):
        state = begin_with(state, data.origin, config, preprocessing, teacher)
    state = parallel.replicate(state, mesh)
    watchdog.beat("reading the newest checkpoint", slow=True)
    checkpoints = Checkpoints(
        workdir,
        keep_latest=config.keep_latest,
        keep_best=config.keep_best,
        meta={
            "config": config.to_dict(),
            "preprocessing": preprocessing.to_dict(),
            **data.provenance(),
        },
    )
    if restored := checkpoints.restore_latest(state, state.step.sharding):
        tokens = tokens_of(preprocessing.window_samples)
        state = with_bases(restored, tokens=tokens, l_max=config.model.l_max)
        bases = parallel.replicate({"basis": state.basis, "teacher_basis": state.teacher_basis}, mesh)
        state = state.replace(**bases)
    watchdog.beat("what comes before the first step", slow=True)
    start = int(state.step)
    if start > steps:
        raise UserError(
            f"{workdir} is at step {start} already, beyond the {steps} steps asked for; raise config.steps"
        )

    bound = {
        "model": build_objective(config, parallel.AXIS),
        "teacher": teacher,
        "normalisation": preprocessing.normalisation,
        "kept_leads": preprocessing.kept_leads,
    }
    step_fn = parallel.map_train_step(
        functools.partial(train_step, tx=tx, accumulate=config.accumulate, **bound), mesh
    )
    eval_fn = parallel.map_eval_step(functools.partial(eval_step, **bound), mesh)
    reading = {
        "batch_size": config.batch_size,
        "window_samples": preprocessing.window_samples,
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "targets": data.targets,
    }
    batches = train_batches(
        data.store,
        data.selection.train,
        shares=data.shares,
        seed=config.seed,
        start_step=start,
        threads=config.data.read_threads,
        prefetch=config.data.prefetch,
        **reading,
    )

    def validate(state: TrainState) -> dict[str, float]:
        crops = val_batches(data.store, data.selection.val, max_crops=config.data.max_val_crops, **reading)
        sums = []
        for i, batch in enumerate(crops):
            watchdog.beat(f"batch {i + 1} of the validation", slow=i == 0)  # the first compiles
            sums.append(eval_fn(state, parallel.shard_batch(batch, mesh)))
            jax.block_until_ready(sums[max(i - 1, 0)])  # one is computed while the next is read
        sums = jax.device_get(sums)
        return {f"val_{name}": value for name, value in mean_of_sums(sums).items()}

    monitor = build_monitor(config, data, mesh, bound)

    def is_logged(step: int) -> bool:
        return step % config.log_every == 0 or step % config.checkpoint_every == 0 or step == steps

    primary = jax.process_index() == 0
    if primary:
        announce(config, data, state, steps)
    writer = open_writer(workdir, start, config.tensorboard) if primary else MultiWriter()
    progress = tqdm(
        total=steps,
        initial=start,
        unit="step",
        desc="pretrain",
        disable=not primary,
        mininterval=0.1 if sys.stderr.isatty() else 30.0,  # seconds; a log file wants few lines
    )
    meter = RateMeter(config.batch_size)
    unread: collections.deque[tuple[int, dict[str, jax.Array], dict[str, Any]]] = collections.deque()
    saved = start if start else None

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(distributed.StopSignal(active=jax.process_count() == 1))
        stack.enter_context(
            jax.default_matmul_precision("highest" if config.precision == "float32" else "default")
        )
        if primary:
            stack.enter_context(noted_start(workdir, start, count_parameters(state.params), began))
        for resource in (checkpoints, writer, batches, progress):
            stack.callback(resource.close)

        # The order of this loop: log the previous step, save if due, check preemption, next batch, step. A
        # checkpoint at step s has consumed exactly s batches, and a step is logged while the next one runs,
        # so that the loop never waits for the device; what the log needs of its state is started beside it.
        for step in range(start, steps + 1):
            watchdog.beat(f"step {step}", slow=step <= start + 1)  # the first compiles
            stopping = stop.received is not None or checkpoints.reached_preemption(step)
            last = stopping or step == steps
            due = step > start and (last or step % config.checkpoint_every == 0)
            while len(unread) > (0 if due else 1):
                done, metrics, seen = unread.popleft()
                scalars = _finite(jax.device_get(metrics), done, workdir, saved)
                if done == start + 1:
                    meter.restart(done)  # the first step compiles
                save_now = due and done == step
                if save_now or seen:
                    scalars |= {"learning_rate": float(schedule(done - 1))} | meter.read(done)
                    scalars |= monitor.read(seen) | checkpoints.read()
                    if save_now and not stopping:
                        scalars |= validate(state)
                    writer.write_scalars(done, scalars)
                    progress.set_postfix_str(summary(scalars))
                    collapsed = warn(monitor, scalars, done, writer)
                    # Each process judges by its own floating point, and they must not part.
                    if config.stop_on_collapse and (
                        reason := on_first("collapse", lambda seen=collapsed: "; ".join(seen[:1]))
                    ):
                        raise UserError(f"collapse at step {done}: {reason}; {_last_good(workdir, saved)}")
                    watchdog.beat(f"step {step}")
                if save_now:
                    watchdog.beat(f"the checkpoint of step {step}", slow=True)
                    checkpoints.save(state, val_loss=scalars.get("val_loss"))
                    saved = step
                    meter.restart(step)
            if last:
                break
            watchdog.beat(f"reading the batch of step {step + 1}", slow=step == start)
            with meter.waiting_for_data():
                batch = next(batches)
            watchdog.beat(f"step {step + 1}", slow=step == start)
            batch = parallel.shard_batch(_device_part(batch), mesh)
            state, metrics = step_fn(state, batch)
            if step == start:
                monitor.compile(state, batch)  # before any step is timed
            seen = monitor.watch(state, batch, step + 1, is_logged(step + 1))
            unread.append((step + 1, metrics, seen))
            progress.update()
        watchdog.beat("the end of the last write", slow=True)
        checkpoints.finish()

    if stopping:
        cause = stop.received or "preemption"
        kept = "saved" if saved is not None else "nothing to save yet"
        raise Stopped(
            f"{cause} at step {step} of {steps}: {kept}; run the same command again to continue",
            exit_code=130 if cause == "SIGINT" else 0,
        )
    return state


def _device_part(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: rows for name, rows in batch.items() if name != "row"}


def _finite(metrics: dict[str, Any], step: int, workdir: Path, saved: int | None) -> dict[str, float]:
    """Metrics as floats; raises when the loss or the gradient norm is not finite."""
    scalars = {name: float(value) for name, value in metrics.items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(scalars[name]):
            raise UserError(
                f"{name} is {scalars[name]} at step {step}; {_last_good(workdir, saved)}. "
                "A lower optimiser.learning_rate, or optimiser.clip_norm, may help"
            )
    return scalars


def _last_good(workdir: Path, saved: int | None) -> str:
    if saved is None:
        return "no checkpoint was written yet"
    return f"the last good checkpoint is {workdir / 'checkpoints' / str(saved)}"


def main(argv: list[str]) -> int:
    """Entry point of `ecg-jax pretrain`."""

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--workdir",
            required=True,
            metavar="DIR",
            help="folder of the run; an interrupted run in it is continued",
        )
        group = parser.add_argument_group("several processes (under srun they are found by themselves)")
        group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
        group.add_argument("--num-processes", type=int, metavar="N")
        group.add_argument("--process-id", type=int, metavar="I")
        group.add_argument(
            "--init-timeout",
            type=float,
            default=distributed.INIT_TIMEOUT_S,
            metavar="SECONDS",
            help="wait so long until all processes have started (default: %(default)g)",
        )
        group.add_argument(
            "--heartbeat-timeout",
            type=float,
            default=distributed.HEARTBEAT_S,
            metavar="SECONDS",
            help="a process that was not heard of for so long is lost, and the others end (default: %(default)g); one "
            "that is killed is noticed at once",
        )

    config, args = parse_command(
        "pretrain",
        DESCRIPTION,
        argv,
        options,
        like="configs/cpc.py",
    )
    together = distributed.initialise(
        args.coordinator,
        args.num_processes,
        args.process_id,
        init_timeout_s=args.init_timeout,
        heartbeat_s=args.heartbeat_timeout,
        run=args.workdir,
    )
    with together:
        pretrain(config, args.workdir)
    if jax.process_index() == 0:
        print(
            "done; next, with a labelled STORE and a TASK that `ecg-jax tasks STORE` lists: ecg-jax probe "
            f"--config=configs/probe.py:mode=linear,task=TASK --checkpoint={args.workdir} --store=STORE "
            f"--workdir={args.workdir}-probe"
        )
    return 0
