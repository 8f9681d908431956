"""Domain pretraining: a run that begins with the parameters of another one, on another store.

    ecg-jax pretrain --config=configs/domain.py:objective=cpc --workdir=runs/cpc_then_mimic \
        --config.init.checkpoint=runs/cpc --config.store=stores/mimic

Arguments: objective=cpc|jepa|data2vec|dinosr|hubert, and those of its own config. `data` is 11m, all of the store,
unless it is given; backbone and recipe must be those of the checkpoint. Codebooks, prototypes and teacher come along
and go on from where they were; the optimiser, and schedules of learning rate and of the teacher's momentum, begin anew.
`--config.init.part=encoder` takes the encoder alone, for another objective.
"""

from ml_collections import config_dict

from configs import cpc, data2vec, dinosr, hubert, jepa
from ecg_jax.config_flags import parse_arg

OBJECTIVES = {"cpc": cpc, "jepa": jepa, "data2vec": data2vec, "dinosr": dinosr, "hubert": hubert}


def get_config(arg=""):
    items = arg.split(",")
    if not any(item.startswith("data=") for item in items):
        items.append("data=11m")
    own = parse_arg(
        ",".join(item for item in items if item.startswith("objective=")), objective=tuple(OBJECTIVES)
    )
    config = OBJECTIVES[own.objective].get_config(
        ",".join(item for item in items if not item.startswith("objective="))
    )
    with config.unlocked():
        config.init.checkpoint = config_dict.placeholder(str)  # RUN or RUN/STEP; has to be given
    # The parameters begin near a minimum, and Adam's moments begin at zero: at the rate for random parameters its
    # first updates, about one rate each whatever the gradient, would undo what the parameters know.
    config.optimiser.learning_rate = config.optimiser.learning_rate / 10
    return config.lock()
