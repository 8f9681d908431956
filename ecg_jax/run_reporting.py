"""What a pretraining run shows of itself while it goes: the first lines, the log, warnings of a collapse."""

import sys
from pathlib import Path
from typing import Any

import jax
from clu.parameter_overview import count_parameters
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from ecg_jax.evaluation import online_probe
from ecg_jax.models.encoder import tokens_of
from ecg_jax.run_data import RunData
from ecg_jax.run_setup import convolutions
from ecg_jax.training import collapse
from ecg_jax.training.metric_writers import (
    WARNING,
    JsonlWriter,
    MultiWriter,
    TensorBoardWriter,
    rewind_log,
)
from ecg_jax.training.train_state import TrainState


def announce(config: ConfigDict, data: RunData, state: TrainState, steps: int) -> None:
    """Prints what the run is, for people."""
    start, devices = int(state.step), jax.devices()
    parameters = count_parameters(state.params)
    lines = data.describe()
    lines.append(
        f"{config.objective.name} on {config.model.backbone}: {parameters:,} trainable parameters, "
        f"{config.precision}, {len(devices)} x {devices[0].device_kind}"
    )
    lines += convolutions(config, tokens_of(round(config.data.window_s * config.data.rate_hz)))
    lines.append(
        f"continuing at step {start} of {steps}" if start else f"{steps} steps of {config.batch_size} windows"
    )
    lines.append(data.watched.line)
    print("\n".join(lines))


def build_monitor(config: ConfigDict, data: RunData, mesh: Mesh, bound: dict[str, Any]) -> collapse.Monitor:
    """What watches a run as `config.monitor` says."""
    probe = data.watched.chosen and online_probe.OnlineProbe(
        data.watched.chosen,
        data.watched.store,
        mesh,
        model=bound["model"],
        normalisation=bound["normalisation"],
        kept_leads=bound["kept_leads"],
        batch_size=config.batch_size,
        window_samples=data.preprocessing.window_samples,
    )
    limits = collapse.Limits(
        min_rankme=config.monitor.min_rankme,
        min_feature_std=config.monitor.min_feature_std,
        min_perplexity=config.monitor.min_perplexity,
        max_dead_share=config.monitor.max_dead_share,
    )
    return collapse.Monitor(limits, mesh, probe=probe, probe_every=config.monitor.probe_every, **bound)


def open_writer(workdir: Path, start: int, tensorboard: bool) -> MultiWriter:
    """Log and TensorBoard of a run that goes on from step `start`; later entries are set aside."""
    rewind_log(workdir, start)
    return MultiWriter(JsonlWriter(workdir), *([TensorBoardWriter(workdir, start)] if tensorboard else []))


def summary(scalars: dict[str, float]) -> str:
    """A step in a few words, for the progress bar."""
    names = [name for name in ("loss", "accuracy", "val_loss") if name in scalars]
    shown = [f"{name} {scalars[name]:.4g}" for name in names]
    if "windows_per_s" in scalars:
        shown.append(f"{scalars['windows_per_s']:.0f} windows/s")
    return ", ".join(shown)


def warn(monitor: collapse.Monitor, scalars: dict[str, float], step: int, writer: MultiWriter) -> list[str]:
    """Writes what looks like a collapse into the log at every step it holds, and on stderr when it is news."""
    collapsed, news = monitor.judge(scalars)
    for sentence in collapsed:
        writer.write_texts(step, {WARNING: sentence})
    for sentence in news if jax.process_index() == 0 else ():
        tqdm.write(f"warning: step {step}: {sentence}", file=sys.stderr)
    return collapsed
