"""MIMIC-IV-ECG against HEEDB at one size: what the corpus is worth when numbers of recordings and steps are equal
(spec §6; S0001-2007, with 753 thousand recordings, is the partition nearest in size to MIMIC-IV-ECG's 800 thousand).

    ecg-jax pretrain --config=configs/matched.py:corpus=mimic --workdir=runs/matched_mimic --config.store=stores/mimic
    ecg-jax pretrain --config=configs/matched.py:corpus=heedb --workdir=runs/matched_heedb --config.store=stores/heedb

Arguments: corpus=mimic|heedb, objective=cpc|jepa|data2vec|dinosr|hubert, and those of its own config but `data` and
`ladder`. Both runs take the first 700 000 recordings, less than one patient short, of random patients outside the held
out fold, and ten epochs of them, which is equally many steps but for those recordings. Where a store has fewer, the run
warns at its start: give both runs the smaller number as --config.data.max_records.
"""

from configs import cpc, data2vec, dinosr, hubert, jepa
from ecg_jax.config_flags import parse_arg
from ecg_jax.errors import UserError

OBJECTIVES = {"cpc": cpc, "jepa": jepa, "data2vec": data2vec, "dinosr": dinosr, "hubert": hubert}

# One fold of 20 is held out: 753 thousand leave 715 thousand to train on, before duplicates.
RECORDINGS = 700_000


def get_config(arg=""):
    mine = ("corpus=", "objective=")
    items = arg.split(",")
    own = parse_arg(
        ",".join(item for item in items if item.startswith(mine)),
        corpus=("mimic", "heedb"),
        objective=tuple(OBJECTIVES),
    )
    rest = [item for item in items if not item.startswith(mine)]
    if any(item.startswith(("data=", "ladder=")) for item in rest):
        raise UserError("configs/matched.py chooses the recordings itself; leave data and ladder out")
    config = OBJECTIVES[own.objective].get_config(",".join(rest))
    config.data.ladder = "paper" if own.corpus == "heedb" else "nested"
    config.data.rung = "753k"
    config.data.max_records = RECORDINGS
    return config
