"""The whole chain of the study in small: five objectives, three backbones, three rungs, on two CPU cores.

    ecg-jax sweep configs/sweeps/mini_study.py --output=runs/mini_study
    ecg-jax report runs/mini_study --output=runs/mini_study.html

45 runs of narrow encoders on 64, 256 and 1024 recordings, four epochs each: synthetic ECG, one in four of them a real
one of the PTB-XL sample that ships with the package. Each is probed linearly on the rhythm of synthetic recordings,
which the table compares, and on the diagnostic superclasses of the real ones; the largest rung of S4 also with a frozen
encoder and by finetuning, and each backbone is trained from scratch. Then follow scaling fits, CKA and efficiency, into
studies/.

What it shows is that every number of the study comes from a command, and from which run. What it cannot show is which
objective or backbone is better for ECG: the recordings are synthetic for the most part, the encoders are small, three
sizes cannot carry a fit of three parameters, one seed says nothing about other seeds, and 40 real test recordings
tell few models apart. Argument: quick, two objectives on S4.
"""

from configs.sweeps import common
from ecg_jax.sweep_file import SAMPLE_STORE, parse_sweep_arg, synthetic_store

NOTE = (
    "A demonstration on synthetic ECG and 304 real recordings: which objective or backbone is better cannot be seen "
    "at this size."
)

RECORDINGS = (64, 256, 1024)
SYNTHETIC = synthetic_store(960)
BACKBONES = {
    "s4": {"model.width": 64, "model.layers": 2},
    # Attention over 300 tokens is what costs here, so that it has one layer and one head.
    "transformer": {"model.width": 64, "model.layers": 1, "model.heads": 1, "model.ff_width": 128},
    "net1d": {"model.width": 64, "model.filters": (64, 64), "model.blocks": (1, 1)},
}
# The published momentum of 0.9996 averages over 2500 updates, more than a run has here; 0.99 averages over 100.
TEACHER = {"objective.teacher.momentum": 0.99, "objective.teacher.momentum_end": 0.99}
OBJECTIVES = {
    "cpc": {},
    "jepa": TEACHER,
    "data2vec": TEACHER,
    "dinosr": TEACHER,
    "hubertpp": {**TEACHER, "objective.temperature_steps": 16},
}
SMALL = {
    "batch_size": 16,
    "epochs": 4.0,
    "log_every": 6,
    "checkpoint_every": 64,  # and validate
    "data.max_val_crops": 512,
    "monitor.probe_every": 0,
}

RHYTHM = "configs/probe.py:mode=linear,task=synthetic_rhythm"


def sweep(arg=""):
    arg = parse_sweep_arg(arg, "quick")
    backbones, objectives = _chosen(arg)
    for backbone in backbones:
        for objective in objectives:
            for recordings in RECORDINGS:
                name = f"{objective}-{backbone}-{recordings}"
                yield {
                    "name": name,
                    "group": name,
                    "config": f"{common.OBJECTIVES[objective]}:backbone={backbone},data=11m",
                    "overrides": SMALL
                    | BACKBONES[backbone]
                    | OBJECTIVES[objective]
                    | _targets(objective, backbone)
                    | {"data.max_records": recordings, "seed": 0},
                    "store": f"{SAMPLE_STORE},{SYNTHETIC}",
                    "probe": RHYTHM,
                    "probe_store": SYNTHETIC,
                    "probes": dict(_further(objective, backbone, recordings)),
                }


def _chosen(arg):
    """Backbones and objectives."""
    return list(BACKBONES)[: 1 if arg.quick else None], list(OBJECTIVES)[: 2 if arg.quick else None]


def _targets(objective, backbone):
    """From how many of the teacher's layers, of those that there are, targets come."""
    if objective not in ("data2vec", "dinosr"):
        return {}
    return {"objective.top_k": 1 if backbone == "transformer" else 2}


def _further(objective, backbone, recordings):
    """Name and probe of each further one of a run."""

    def probe(mode, task, store, **overrides):
        return {"probe": f"configs/probe.py:mode={mode},task={task}", "store": store, "overrides": overrides}

    yield "real", probe("linear", "ptbxl_super", SAMPLE_STORE)
    if recordings != RECORDINGS[-1]:
        return
    if backbone == "s4":
        yield "real-frozen", probe("frozen", "ptbxl_super", SAMPLE_STORE, **{"frozen.epochs": 10})
        yield "real-finetune", probe("finetune", "ptbxl_super", SAMPLE_STORE, **{"finetune.epochs": 10})
    if objective == "cpc":  # whose config gives the architecture; nothing else of it is used
        real, synthetic = {"supervised.epochs": 20}, {"supervised.epochs": 6}
        yield "real-scratch", probe("supervised", "ptbxl_super", SAMPLE_STORE, **real)
        yield "scratch", probe("supervised", "synthetic_rhythm", SYNTHETIC, **synthetic)


def STUDIES(output, arg=""):
    backbones, objectives = _chosen(parse_sweep_arg(arg, "quick"))
    largest = [
        f"{output}/{name}-{backbone}-{RECORDINGS[-1]}/run" for backbone in backbones for name in objectives
    ]
    return [
        ("scaling", ["scaling", f"--runs={output}", f"--output={output}/studies/scaling"]),
        (
            "cka",
            [
                "cka",
                f"--checkpoints={','.join(largest)}",
                f"--store={output}/store",
                f"--output={output}/studies/cka",
                "--random",
            ],
        ),
        (
            "efficiency",
            [
                "efficiency",
                "--quick",
                f"--backbones={','.join(backbones)}",
                f"--objectives={','.join(objectives)}",
                f"--output={output}/studies/efficiency",
                f"--results={output}",
            ],
        ),
    ]
