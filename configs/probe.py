"""Probe of a pretrained encoder on a labelled store (spec §7).

    ecg-jax probe --config=configs/probe.py:mode=linear,task=ptbxl_super \
        --checkpoint=runs/cpc --store=stores/ptbxl --workdir=probes/cpc_super

Arguments: mode=linear, task=ptbxl_super|ptbxl_sub|ptbxl_diag|ptbxl_form|ptbxl_rhythm|ptbxl_all|challenge_dx.
"""

from ml_collections import ConfigDict

from ecg_jax.config_flags import parse_arg
from ecg_jax.evaluation.tasks import TASKS


def get_config(arg=""):
    arg = parse_arg(arg, mode=("linear", "frozen", "finetune", "supervised"), task=tuple(TASKS))
    config = ConfigDict()
    config.mode = arg.mode
    config.task = arg.task
    config.seed = 0  # of the resamples and of the randomly initialised encoder
    config.batch_size = 64  # crops encoded at once
    config.min_count = 10  # positive records in the store below which a class is left out

    config.linear = ConfigDict()
    # Penalties on the weight vector of a class, relative to its mean loss on standardised features. The one
    # with the best macro AUROC on the validation records is taken.
    config.linear.l2_grid = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)
    config.linear.tolerance = 1e-6  # largest gradient of a converged solution
    config.linear.max_steps = 1000  # of L-BFGS, for each penalty

    config.bootstrap = ConfigDict()
    config.bootstrap.resamples = 1000
    config.bootstrap.level = 0.95  # of confidence
    # A class without positives or negatives: "exclude" it from the macro mean, or count it "half" (0.5) as
    # the reference implementation does.
    config.bootstrap.undefined = "exclude"
    return config
