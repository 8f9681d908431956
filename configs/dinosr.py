"""DinoSR: classify masked tokens by online codebooks of a teacher's last layers (arXiv 2605.12241; spec
§5.7).

    ecg-jax pretrain --config=configs/dinosr.py:data=18k --workdir=runs/dinosr --config.store=stores/ptbxl

Arguments: backbone=s4|transformer|net1d, data=18k|45k|106k|753k|11m, ladder=nested|paper,
recipe=described|released, mask=span|block|ratio|time|independent|lead.
"""

from configs import common


def get_config(arg=""):
    arg = common.parse_masked(arg, mask="span")
    config = common.masked_objective(
        arg,
        {
            "name": "dinosr",
            "top_k": 2,  # last layers of the teacher, a codebook each
            "codes": 256,  # in each codebook
            "codebook_momentum": 0.9,
            "temperature": 1.0,
            "idle_logits": 0,  # outputs of the head that no loss uses
            "head_state": 64,  # states of each channel of the S4 head
            "head_dropout": 0.2,
        },
    )
    if arg.recipe == "released":
        config.objective.top_k = 1
        config.objective.idle_logits = 256
    return config
