"""All five objectives, and HuBERT with offline targets, on a store as small as the PTB-XL sample: three seeds of each.

    ecg-jax sweep configs/sweeps/objectives_quick.py --output=runs/objectives_quick

Half an hour on two CPU cores. It shows that every objective runs from raw files to a probed checkpoint; with 304
recordings and 180 small steps it cannot show which objective is better.
"""

from configs.sweeps import common

SEEDS = (0, 1, 2)
STEPS = 180

NOTE = (
    "A pipeline check on {recordings} training recordings, and no ranking of objectives: so few recordings, steps and "
    "test patients cannot tell them apart."
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
CODES = 100

#: Group -> config, overrides.
GROUPS = {
    "cpc": (common.CONFIGS["cpc"], {}),
    "jepa": (common.CONFIGS["jepa"], TEACHER),
    "data2vec": (common.CONFIGS["data2vec"], TEACHER),
    "dinosr": (common.CONFIGS["dinosr"], TEACHER),
    # 200 steps, the default, would leave the temperatures on their way for the whole run.
    "hubert": (common.CONFIGS["hubertpp"], {**TEACHER, "objective.temperature_steps": STEPS // 3}),
    "hubert_offline": (common.CONFIGS[common.OFFLINE], {"objective.codes": CODES}),
}


def sweep():
    for group, (config, overrides) in GROUPS.items():
        for seed in SEEDS:
            yield {
                "name": f"{group}-seed{seed}",
                "group": group,
                "config": config,
                "overrides": {"seed": seed, **SMALL, **overrides},
                "probe": common.linear_probe(),
                "targets": common.offline_targets(CODES) if group == "hubert_offline" else None,
            }
