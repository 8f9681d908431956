"""A sweep that only pretrains, in a second or two a run, for tests that look at how sweeps are run."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from ecg_jax.training.checkpoint import CHECKPOINTS

_TEXT = """
from ecg_jax.sweep_file import synthetic_store

KEYS = ("probe", "store", "probes", "init")
SMALL = {
    "model.width": 16, "model.state": 4, "model.layers": 1, "model.l_max": 60, "data.window_s": 0.5,
    "objective.steps_ahead": 4, "objective.negatives": 8, "batch_size": 8, "log_every": 1, "checkpoint_every": 2,
    "data.max_val_crops": 8, "tensorboard": False, "monitor.task": "",
}

def run(name, seed=0, **fields):
    keys = {"probe": None, "store": "--store"} | {key: fields.pop(key) for key in KEYS if key in fields}
    fields = {key.replace("__", "."): value for key, value in fields.items()}
    return {"name": name, "group": name, "config": "configs/cpc.py",
            "overrides": {**SMALL, "steps": 4, "seed": seed, **fields}} | keys

def sweep():
"""
#: A run that ends itself before its first step: no recording is as long as its window.
FAILS = 'run("fails", data__window_s=60.0)'
#: A run that is still going when a test has seen enough.
LONG = 'run("long", steps=1_000_000, checkpoint_every=5)'


def write_sweep(folder: Path, *runs: str) -> Path:
    """Writes a sweep file whose runs are these Python expressions."""
    path = folder / "tiny.py"
    path.write_text(_TEXT + "".join(f"    yield {run}\n" for run in runs))
    return path


def write_studies(path: Path, studies: Sequence[tuple[str, list[str]]]) -> None:
    """Gives a sweep file these studies, in the place of those it had; {output} in a word is the sweep's folder."""
    text = path.read_text().split("\ndef STUDIES")[0]
    made = f"[(name, [word.replace('{{output}}', output) for word in words]) for name, words in {studies!r}]"
    path.write_text(f"{text}\ndef STUDIES(output):\n    return {made}\n" if studies else text)


def trained(config, workdir: Path) -> SimpleNamespace:
    """In the place of `pretrain`: as far as the sweep can tell a finished one, of no parameters."""
    checkpoint = workdir / CHECKPOINTS / "4"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "_CHECKPOINT_METADATA").touch()
    return SimpleNamespace(params={})


def status(output: Path, run: str) -> dict:
    """The status.json of a run."""
    return json.loads((output / run / "status.json").read_text())
