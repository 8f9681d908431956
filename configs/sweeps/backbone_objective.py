"""Every backbone under every objective: like for like on the same recordings, with the same probe.

    ecg-jax sweep configs/sweeps/backbone_objective.py --output=runs/backbone_objective --store=stores/heedb \\
        --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/backbone_objective.py:quick --output=runs/backbone_objective_quick

Arguments: data=18k|45k|106k|753k|11m, ladder=nested|paper, seeds=3|1|2|5, probes=none|modes, quick. 15 groups; at the
defaults 45 runs of 180 000 windows, 8.1 million in all. probes=modes probes each run further, linearly, frozen and
fine-tuned, on every task of the probe stores, and each backbone once from scratch, as objective_modes.py says; that
costs more than the pretraining of a small rung.

Each backbone has the size of the paper (arXiv 2605.12241), so that parameters and cost differ between them: both stand
in results_table. CPC takes the causal form of each. The table can tell which pair did best at one learning rate for all
and one number of epochs. It cannot tell what a backbone could do with a rate, a warm-up or a size of its own.
"""

from configs.sweeps import common


def sweep(arg=""):
    arg = common.arguments(
        arg, objective=None, backbone=None, ladder=("nested", "paper"), probes=common.PROBES
    )
    yield from common.pairs(arg, common.BACKBONES, modes=arg.probes == "modes")
