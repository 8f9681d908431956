"""HuBERT++: masked prediction of online Sinkhorn-Knopp clusters of a teacher's features (arXiv 2605.12241;
spec §5.8); with variant=offline its predecessor HuBERT-ECG (Coppola et al., 2024), whose clusters are made
beforehand.

    ecg-jax pretrain --config=configs/hubert.py:data=18k --workdir=runs/hubert --config.store=stores/ptbxl

    ecg-jax cluster --store=stores/ptbxl --name=spectrum500 --features=spectrum --codes=500
    ecg-jax pretrain --config=configs/hubert.py:variant=offline --workdir=runs/hubert_offline \
        --config.store=stores/ptbxl --config.data.targets=spectrum500

Arguments: variant=online|offline, backbone=s4|transformer|net1d, data=18k|45k|106k|753k|11m,
ladder=nested|paper, recipe=described|released, mask=span|block|ratio|time|independent|lead.
"""

from configs import common
from ecg_jax.errors import UserError


def get_config(arg=""):
    arg = common.parse_masked(arg, mask="span", variant=("online", "offline"))
    if arg.variant == "offline":
        if arg.recipe == "released":
            raise UserError(
                "recipe=released: no code was published for HuBERT with offline targets; leave recipe out"
            )
        return _offline(arg)
    return common.masked_objective(
        arg,
        {
            "name": "hubertpp",
            "codes": (128, 256),  # prototypes of each clustering
            "alpha": 0.75,  # weight of masked tokens; 1 - alpha is that of visible ones
            "student_temperature": 0.1,
            "student_temperature_start": 0.5,
            "teacher_temperature": 0.07,
            "teacher_temperature_start": 0.15,
            "temperature_steps": 200,  # steps from start to final temperature, along half a cosine
            "sinkhorn_rounds": 3,
            "prototype_momentum": 0.99,
            "entropy_weight": 0.001,  # of the student's entropy, which it lowers
        },
    )


def _offline(arg):
    return common.masked_objective(
        arg,
        {
            "name": "hubert",
            "codes": 500,  # must be the number that the targets were made with
            "temperature": 0.1,
            "alpha": 1.0,  # weight of masked tokens; 1 - alpha is that of visible ones
        },
        with_teacher=False,
    )
