"""CPC: predict the token 117 ms ahead among 128 negatives of the same recording (arXiv 2605.12241; spec
§5.3).

    ecg-jax pretrain --config=configs/cpc.py:data=18k --workdir=runs/cpc --config.store=stores/ptbxl
    ecg-jax pretrain --config=configs/cpc.py:data=11m --workdir=runs/cpc_11m \
        --config.store=stores/heedb,stores/heedb_emory,stores/code15

Arguments: backbone=s4|transformer|net1d, data=18k|45k|106k|753k|11m, ladder=nested|paper,
recipe=described|released.
At the defaults 3 194 880 trainable parameters; 10 epochs of 18k recordings are 2 800 steps.
"""

from ml_collections import ConfigDict

from configs import common
from ecg_jax.config_flags import parse_arg
from ecg_jax.data import ladder


def get_config(arg=""):
    arg = parse_arg(
        arg,
        backbone=common.BACKBONES,
        data=tuple(common.DATA_SIZES),
        ladder=ladder.LADDERS,
        recipe=common.RECIPES,
    )
    # CPC must not see what it predicts. Released Net1D has one form only, and that one does.
    released_net1d = arg.backbone == "net1d" and arg.recipe == "released"
    config = common.get_config(arg.backbone, bidirectional=released_net1d)
    with config.unlocked():
        config.objective = ConfigDict(
            {
                "name": "cpc",
                "steps_ahead": 14,  # tokens of 1/120 s
                "negatives": 128,
                "temperature": 1.0,
                "normalise": False,  # True: cosine scores instead of dot products
                "require_causal": arg.recipe != "released",  # refuse a backbone that sees what it predicts
            }
        )
    config.lock()
    common.set_rung(config, arg.data, arg.ladder)
    common.set_recipe(config, arg.recipe)
    return config
