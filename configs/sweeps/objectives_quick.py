"""All five objectives, and HuBERT with offline targets, on a store as small as the PTB-XL sample: three seeds of each.

    ecg-jax sweep configs/sweeps/objectives_quick.py --output=runs/objectives_quick

Half an hour on two CPU cores. It shows that every objective runs from raw files to a probed checkpoint; with 304
recordings and 180 small steps it cannot show which objective is better.
"""

SEEDS = (0, 1, 2)
STEPS = 180

NOTE = (
    "A pipeline check on {recordings} recordings, and no ranking of objectives: so few recordings, steps and test "
    "patients cannot tell them apart."
)

SMALL = {
    "model.width": 64,
    "batch_size": 32,
    "steps": STEPS,
    "log_every": 10,
    "checkpoint_every": 60,
}

# The published momentum of 0.9996 averages over 2500 updates: in so short a run the teacher would stay what it
# was at the start. 0.99 averages over 100.
TEACHER = {"objective.teacher.momentum": 0.99, "objective.teacher.momentum_end": 0.99}

OBJECTIVES = {
    "cpc": {"config": "configs/cpc.py", "overrides": {}, "targets": None},
    "jepa": {"config": "configs/jepa.py", "overrides": TEACHER, "targets": None},
    "data2vec": {"config": "configs/data2vec.py", "overrides": TEACHER, "targets": None},
    "dinosr": {"config": "configs/dinosr.py", "overrides": TEACHER, "targets": None},
    # 200 steps, the default, would leave the temperatures on their way for the whole run.
    "hubert": {
        "config": "configs/hubert.py",
        "overrides": {**TEACHER, "objective.temperature_steps": STEPS // 3},
        "targets": None,
    },
    "hubert_offline": {
        "config": "configs/hubert.py:variant=offline",
        "overrides": {"objective.codes": 100},
        "targets": {"features": "spectrum", "codes": 100},
    },
}


def sweep():
    for group, run in OBJECTIVES.items():
        for seed in SEEDS:
            yield {
                "name": f"{group}-seed{seed}",
                "group": group,
                "config": run["config"],
                "overrides": {"seed": seed, **SMALL, **run["overrides"]},
                "probe": "configs/probe.py:mode=linear,task=ptbxl_super",
                "targets": run["targets"],
            }
