"""How many labels a pretrained encoder saves: linear probes on nested subsets of the training records.

    ecg-jax label-efficiency --config=configs/label_efficiency.py:task=ptbxl_super \
        --checkpoint=runs/cpc --checkpoint=runs/jepa --store=stores/ptbxl --workdir=probes/labels_super

Argument: task=NAME of `ecg-jax tasks`.
"""

from ml_collections import ConfigDict

from ecg_jax.config_flags import parse_arg
from ecg_jax.evaluation.tasks import TASKS


def get_config(arg=""):
    arg = parse_arg(arg, task=("ptbxl_super", *TASKS))
    config = ConfigDict()
    config.task = arg.task
    # Of the training records, patients kept together; each subset is part of every larger one.
    config.fractions = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    config.seeds = 5  # draws of the subsets, each with a randomly initialised encoder of its own
    config.seed = 0  # the first of them, of the resamples, and of the first randomly initialised encoder
    config.near_duplicates = True  # look for near-identical recordings too, not only for identical ones
    config.batch_size = 64  # crops encoded at once
    config.min_count = 0  # positive records below which a class is left out; 0: the task's own number
    config.features = ""  # folder where features of encoders are kept; "": ~/.cache/ecg_jax/features

    # As in configs/probe.py. Penalty and layer are chosen on all validation records at every size.
    config.linear = ConfigDict()
    config.linear.layers = "last"
    config.linear.l2_grid = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)
    config.linear.tolerance = 1e-6
    config.linear.max_steps = 1000
    config.linear.solver = "auto"

    config.bootstrap = ConfigDict()
    config.bootstrap.resamples = 300  # of test patients; the curve is fitted to each
    config.bootstrap.level = 0.95
    return config
