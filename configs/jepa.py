"""JEPA: predict an averaged teacher's features in four blocks from the rest of the window (arXiv 2605.12241;
spec §5.6).

    ecg-jax pretrain --config=configs/jepa.py:data=18k --workdir=runs/jepa --config.store=stores/ptbxl

Arguments: backbone=s4|transformer|net1d, data=18k|45k|106k|753k|11m, ladder=nested|paper,
recipe=described|released, mask=block|span|ratio|time|independent|lead.
"""

from configs import common


def get_config(arg=""):
    arg = common.parse_masked(arg, mask="block")
    config = common.masked_objective(
        arg,
        {
            "name": "jepa",
            "target_norms": 1,  # how often the targets are standardised token by token
            "beta": 1.0,  # of the smooth L1 loss
            "head_state": 64,  # states of each channel of the S4 head
            "head_dropout": 0.2,
        },
    )
    if arg.recipe == "released":
        config.objective.target_norms = 2
    return config
