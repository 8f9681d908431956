"""What the sweep files of this folder share.

Each takes `quick`: the same runs, tiny, on the sample that ships with the package, to see that everything works before
a cluster is booked. Without it a sweep needs a store (--store) and, if that one is not PTB-XL, a labelled one to probe
on (--probe-store). Its docstring says what it asks, what it costs in windows, and what its table can tell and cannot.
Hours on your device are windows / (3600 x windows/s), and windows/s of every backbone and objective is what `ecg-jax
efficiency` measures. Each run is probed linearly, and the table compares those probes.

A table of groups says how sure a difference is over test patients and seeds. It does not say that a setting is right
elsewhere: at other sizes, or at learning rates that were not tried.
"""

from ecg_jax.config_flags import with_argument
from ecg_jax.errors import UserError
from ecg_jax.sweep_file import GIVEN, parse_sweep_arg

#: Objective -> its config file.
OBJECTIVES = {
    "cpc": "configs/cpc.py",
    "jepa": "configs/jepa.py",
    "data2vec": "configs/data2vec.py",
    "dinosr": "configs/dinosr.py",
    "hubertpp": "configs/hubert.py",
}
#: Those that hide a part of the window.
MASKED = tuple(name for name in OBJECTIVES if name != "cpc")
#: As `objective` of `run`: HuBERT-ECG, whose clusters are made beforehand. Its runs need `offline_targets`.
OFFLINE = "hubert"
CONFIGS = OBJECTIVES | {OFFLINE: f"{OBJECTIVES['hubertpp']}:variant=offline"}
BACKBONES = ("s4", "transformer", "net1d")
RUNGS = ("18k", "45k", "106k", "753k", "11m")
#: How many seeds a sweep file may be asked for; intervals over seeds need at least two.
SEEDS = ("3", "1", "2", "5")
TASK = "ptbxl_super"
#: Whether runs are probed further, in the three modes of the study and on every task that the probe stores can serve.
PROBES = ("none", "modes")

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
    OFFLINE: {},
}
_QUICK_PROBE = {"bootstrap.resamples": 100, "baseline_seeds": 1}
_QUICK_EPOCHS = {"linear": {}} | {
    mode: {f"{mode}.epochs": 2, f"{mode}.batch_size": 16} for mode in ("frozen", "finetune", "supervised")
}


_ARGUMENTS = ("data", "ladder", "recipe", "mask")  # of the configs


def arguments(arg, *flags, in_full=(), **others):
    """The argument of a sweep file: quick, objective, backbone, data and seeds, as most of them take.

    Args:
        arg: what follows the colon of the file.
        flags: words that the file knows besides.
        in_full: keys that say nothing of the quick variant, which refuses them.
        others: key -> allowed values, as in `parse_sweep_arg`; those of a usual key replace its own, and None leaves
            it out.

    Raises:
        UserError: from `parse_sweep_arg`; or `quick` stands beside a key that it does not take.
    """
    usual = {"objective": tuple(OBJECTIVES), "backbone": BACKBONES, "data": RUNGS, "seeds": SEEDS}
    choices = {key: values for key, values in (usual | others).items() if values is not None}
    parsed = parse_sweep_arg(arg, "quick", *flags, **choices)
    for word in arg.split(",") if parsed.quick else ():
        if word.partition("=")[0] in in_full:
            raise UserError(
                f"sweep argument {word!r} says nothing of the quick variant; leave it or quick out"
            )
    return parsed


def settings(arg):
    """What `run` takes of the argument of a file as it is."""
    return {key: value for key, value in vars(arg).items() if key in ("quick", "backbone", "data", "ladder")}


def seeds(arg):
    """The seeds that the argument asks for; a quick sweep takes two at most."""
    return range(min(2, int(arg.seeds)) if arg.quick else int(arg.seeds))


def run(group, objective, seed, *, quick, backbone="s4", **overrides):
    """One run of a group.

    Args:
        group: its name.
        objective: one of `CONFIGS`.
        seed: of the run.
        quick: whether it is tiny and on the sample.
        backbone: one of `BACKBONES`.
        overrides: fields, "__" for the dot; `data`, `ladder`, `recipe` and `mask` are arguments of the config.
    """
    arguments = {key: overrides.pop(key) for key in _ARGUMENTS if key in overrides}
    small = _QUICK | _QUICK_BACKBONE[backbone] | _QUICK_OBJECTIVE[objective] if quick else {}
    return {
        "name": f"{group}-seed={seed}",
        "group": group,
        "config": with_argument(CONFIGS[objective], backbone=backbone, **arguments),
        "overrides": small
        | {name.replace("__", "."): value for name, value in overrides.items()}
        | {"seed": seed},
        "probe": linear_probe(),
        **({} if quick else {"store": GIVEN}),
    }


def linear_probe(task=""):
    """The probe that tables compare, on another task than the usual if one is named."""
    return f"configs/probe.py:mode=linear,task={task or TASK}"


def pairs(arg, backbones, *, modes):
    """A run of every seed for every backbone under every objective.

    Args:
        arg: of the file.
        backbones: names.
        modes: whether each is probed in the three modes of the study too.
    """
    for backbone in backbones:
        for objective in OBJECTIVES:
            for seed in seeds(arg):
                made = run(
                    f"{objective}-{backbone}", objective, seed, **settings(arg) | {"backbone": backbone}
                )
                yield made | {"probes": in_modes(objective, seed, quick=arg.quick) if modes else {}}


def in_modes(objective, seed, *, quick):
    """Further probes of a run in the three modes of the study, on every task that the probe stores can serve; quick: on
    one task, which its main probe has done linearly, and hardly trained.

    The first run of JEPA, which stands for its backbone as it is without a pretext task (bidirectional, inputs
    standardised), also trains the network from scratch.
    """
    names = ["frozen", "finetune"] if quick else ["linear", "frozen", "finetune"]
    names += ["supervised"] * (objective == "jepa" and seed == 0)
    task = TASK if quick else "all"
    return {
        mode: {
            "probe": f"configs/probe.py:mode={mode},task={task}",
            "overrides": _QUICK_PROBE | _QUICK_EPOCHS[mode] if quick else {},
        }
        for mode in names
    }


def offline_targets(codes):
    """As `targets` of a run: k-means clusters of spectra, made beside its store before it begins."""
    return {"features": "spectrum", "codes": codes}


def given(arg, name, meaning):
    """The text of an argument that has no default.

    Raises:
        UserError: it was not given.
    """
    if not getattr(arg, name):
        raise UserError(f"sweep argument {name} is not given: {name}=..., {meaning}")
    return getattr(arg, name)


def number(arg, name, default, least=1):
    """The whole number of an argument that is free text.

    Raises:
        UserError: it is none, or less than `least`.
    """
    text = getattr(arg, name) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UserError(f"sweep argument {name}={text!r} must be a whole number, at least {least}")
    return int(text)
