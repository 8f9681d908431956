"""A sweep that only pretrains, in a second or two a run, for tests that look at how sweeps are run."""

import json
from pathlib import Path

_TEXT = """
SMALL = {
    "model.width": 16, "model.state": 4, "model.layers": 1, "model.l_max": 60, "data.window_s": 0.5,
    "objective.steps_ahead": 4, "objective.negatives": 8, "batch_size": 8, "log_every": 1, "checkpoint_every": 2,
    "data.max_val_crops": 8, "tensorboard": False, "monitor.task": "",
}

def run(name, seed=0, **fields):
    fields = {key.replace("__", "."): value for key, value in fields.items()}
    return {"name": name, "group": name, "config": "configs/cpc.py",
            "overrides": {**SMALL, "steps": 4, "seed": seed, **fields}, "probe": None, "store": "--store"}

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


def status(output: Path, run: str) -> dict:
    """The status.json of a run."""
    return json.loads((output / run / "status.json").read_text())
