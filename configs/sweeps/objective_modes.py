"""Which objective is best, and does that depend on how features are used? Linear, frozen, fine-tuned, on all tasks.

    ecg-jax sweep configs/sweeps/objective_modes.py --output=runs/objective_modes --store=stores/heedb \\
        --probe-store=stores/ptbxl,stores/ningbo,stores/sph
    ecg-jax sweep configs/sweeps/objective_modes.py:quick --output=runs/objective_modes_quick

Arguments: backbone=s4|transformer|net1d|all, data=18k|45k|106k|753k|11m, ladder=nested|paper, seeds=3|1|2|5, quick. A
group for each objective, and each backbone; at the defaults 15 runs of 180 000 windows, 2.7 million in all.

Each run is probed in three further ways (spec §7.1), on every task that the probe stores can serve: `linear`, `frozen`
(attention pooling) and `finetune`. The first run of JEPA on each backbone has `supervised` too: the same network from
random initialisation, without which a report of ranks is refused. Of the 26 tasks of the paper these are 12 trainings a
mode, 100 epochs each: at small rungs they, not the pretraining, are what the sweep costs, fine-tuning above all.

results.* compare linear probes on the super classes of PTB-XL. The rest is for `ecg-jax report RUNS --output=FILE`,
which ranks objectives mode by mode and task by task by paired tests over patients. It can tell which objective won at
this size and on these stores. It cannot tell that an objective is better in general: each has one learning rate here,
and losses of different objectives are not comparable. The supervised network has one seed and one learning rate.
"""

from configs.sweeps import common


def sweep(arg=""):
    arg = common.arguments(
        arg, objective=None, backbone=(*common.BACKBONES, "all"), ladder=("nested", "paper")
    )
    backbones = common.BACKBONES if arg.backbone == "all" else (arg.backbone,)
    yield from common.pairs(arg, backbones, modes=True)
