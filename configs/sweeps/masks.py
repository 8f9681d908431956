"""What should a masked objective hide? Six strategies, and spans as sparse as those of the released code.

    ecg-jax sweep configs/sweeps/masks.py:objective=data2vec --output=runs/masks --store=stores/heedb \\
        --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/masks.py:quick --output=runs/masks_quick

Arguments: objective=jepa|data2vec|dinosr|hubertpp, backbone=s4|transformer|net1d, data=18k|45k|106k|753k|11m,
seeds=3|1|2|5, quick. Seven groups: span, block, ratio, time, independent and lead, each at the defaults of
configs/common.py, and `span-sparse`, which differs from span in its probability alone: 0.0065 instead of 0.065, so that
6 % of the tokens are hidden instead of half (spec §5.4). At the defaults 21 runs of 180 000 windows, 3.8 million in
all. `ecg-jax show-masks` draws each.

The table can tell which of these the features are better for, at one probe. It cannot tell by losses: val_loss is
another task's in each group. Nor can it part how from how much: strategies hide different shares, and have one each.
"""

from configs.common import STRATEGIES
from configs.sweeps import common

SPARSE = 0.0065  # spec §5.4

#: Group -> fields.
GROUPS = {strategy: {"mask": strategy} for strategy in STRATEGIES} | {
    "span-sparse": {"mask": "span", "objective__mask__probability": SPARSE}
}


def sweep(arg=""):
    arg = common.arguments(arg, objective=common.MASKED)
    for group, fields in GROUPS.items():
        for seed in common.seeds(arg):
            yield common.run(
                f"{arg.objective}-{arg.backbone}-{group}",
                arg.objective,
                seed,
                **common.settings(arg),
                **fields,
            )
