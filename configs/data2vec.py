"""data2vec: regress the mean of a teacher's last layers at masked tokens (arXiv 2605.12241; spec §5.5).

    ecg-jax pretrain --config=configs/data2vec.py:data=18k --workdir=runs/data2vec --config.store=stores/ptbxl

Arguments: backbone=s4|transformer|net1d, data=18k|45k|106k|753k|11m, ladder=nested|paper,
recipe=described|released, mask=span|block|ratio|time|independent|lead.
"""

from configs import common


def get_config(arg=""):
    arg = common.parse_masked(arg, mask="span")
    return common.masked_objective(
        arg,
        {
            "name": "data2vec",
            "top_k": 2,  # last layers of the teacher, averaged
            "beta": 1.0,  # of the smooth L1 loss
            "head_state": 64,  # states of each channel of the S4 head
            "head_dropout": 0.2,
        },
    )
