"""Every backbone under every objective: like for like on the same recordings, with the same probe.

    ecg-jax sweep configs/sweeps/backbone_objective.py --output=runs/backbone_objective --store=stores/heedb \\
        --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/backbone_objective.py:quick --output=runs/backbone_objective_quick

Arguments: data=18k|45k|106k|753k|11m, ladder=nested|paper, seeds=3|1|2|5, quick. 15 groups; at the defaults 45 runs of
180 000 windows, 8.1 million in all. Each backbone has the size of the paper (arXiv 2605.12241), so that parameters and
cost differ between them: both stand in results_table. CPC takes the causal form of each.
"""

from configs.sweeps import common
from ecg_jax.sweep_file import parse_sweep_arg


def sweep(arg=""):
    arg = parse_sweep_arg(arg, "quick", data=common.RUNGS, ladder=("nested", "paper"), seeds=common.SEEDS)
    for backbone in common.BACKBONES:
        for objective in common.OBJECTIVES:
            for seed in common.seeds(arg):
                yield common.run(
                    f"{objective}-{backbone}",
                    objective,
                    seed,
                    quick=arg.quick,
                    backbone=backbone,
                    data=arg.data,
                    ladder=arg.ladder,
                )
