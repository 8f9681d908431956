"""What the sweep files of this folder share.

Each takes `quick`: the same runs, tiny, on the sample that ships with the package, to see that everything works before
a cluster is booked. Without it a sweep needs a store (--store) and, if that one is not PTB-XL, a labelled one to probe
on (--probe-store). Its docstring says what it costs in windows; hours on your device are windows / (3600 x windows/s),
and windows/s of every backbone and objective is what `ecg-jax efficiency` measures. Each run is probed linearly.
"""

from ecg_jax.config_flags import with_argument
from ecg_jax.sweep_file import GIVEN

#: Objective -> its config file.
OBJECTIVES = {
    "cpc": "configs/cpc.py",
    "jepa": "configs/jepa.py",
    "data2vec": "configs/data2vec.py",
    "dinosr": "configs/dinosr.py",
    "hubertpp": "configs/hubert.py",
}
BACKBONES = ("s4", "transformer", "net1d")
RUNGS = ("18k", "45k", "106k", "753k", "11m")
#: How many seeds a sweep file may be asked for; intervals over seeds need at least two.
SEEDS = ("3", "1", "2", "5")
PROBE = "configs/probe.py:mode=linear,task=ptbxl_super"

_QUICK = {"batch_size": 16, "steps": 12, "log_every": 4, "checkpoint_every": 12, "data.max_val_crops": 64}
_QUICK_BACKBONE = {
    "s4": {"model.width": 32, "model.layers": 2},
    "transformer": {"model.width": 32, "model.layers": 2, "model.heads": 4, "model.ff_width": 64},
    "net1d": {"model.width": 32, "model.filters": (16, 32), "model.blocks": (1, 1)},
}
# The published momentum averages over 2500 updates; the teacher of so short a run would stay what it was.
_QUICK_TEACHER = {"objective.teacher.momentum": 0.9, "objective.teacher.momentum_end": 0.9}
_QUICK_OBJECTIVE = {
    "cpc": {},
    "jepa": _QUICK_TEACHER,
    "data2vec": {**_QUICK_TEACHER, "objective.top_k": 1},
    "dinosr": {**_QUICK_TEACHER, "objective.top_k": 1},
    "hubertpp": {**_QUICK_TEACHER, "objective.temperature_steps": 4},
}


def seeds(arg):
    """The seeds that the argument asks for; a quick sweep takes two at most."""
    return range(min(2, int(arg.seeds)) if arg.quick else int(arg.seeds))


def run(group, objective, seed, *, quick, backbone="s4", **overrides):
    """One run of a group.

    Args:
        group: its name.
        objective: one of `OBJECTIVES`.
        seed: of the run.
        quick: whether it is tiny and on the sample.
        backbone: one of `BACKBONES`.
        overrides: fields, "__" for the dot; `data` and `ladder` are arguments of the config.
    """
    arguments = {key: overrides.pop(key) for key in ("data", "ladder") if key in overrides}
    small = _QUICK | _QUICK_BACKBONE[backbone] | _QUICK_OBJECTIVE[objective] if quick else {}
    return {
        "name": f"{group}-seed={seed}",
        "group": group,
        "config": with_argument(OBJECTIVES[objective], backbone=backbone, **arguments),
        "overrides": small
        | {name.replace("__", "."): value for name, value in overrides.items()}
        | {"seed": seed},
        "probe": PROBE,
        **({} if quick else {"store": GIVEN}),
    }
