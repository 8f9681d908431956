"""Probe of an encoder on a labelled store (spec §7).

    ecg-jax probe --config=configs/probe.py:mode=linear,task=ptbxl_super \
        --checkpoint=runs/cpc --store=stores/ptbxl --workdir=probes/cpc_super

Arguments: mode=linear|frozen|finetune|supervised; task=NAME of `ecg-jax tasks`, or task=all for every task that the
store can serve; legacy=half counts a class without positives or negatives 0.5 and resamples recordings, as the
published intervals do.
"""

from ml_collections import ConfigDict

from ecg_jax.config_flags import parse_arg
from ecg_jax.evaluation.tasks import ALL, TASKS


def get_config(arg=""):
    arg = parse_arg(
        arg,
        mode=("linear", "frozen", "finetune", "supervised"),
        task=("ptbxl_super", ALL, *TASKS),
        legacy=("none", "half"),
    )
    config = ConfigDict()
    config.mode = arg.mode
    config.task = arg.task
    config.name = ""  # of the model in tables; "": the name of the run's folder
    config.seed = 0  # of the resamples, of training, and of the first randomly initialised encoder
    config.batch_size = 64  # crops encoded at once
    config.min_count = (
        0  # positive records below which a class is left out; 0: the task's own (10, or 2000); 1: none
    )
    config.features = ""  # folder where features of encoders are kept; "": ~/.cache/ecg_jax/features
    config.near_duplicates = True  # look for near-identical recordings too, not only for identical ones
    config.baseline_seeds = 3  # randomly initialised encoders that stand beside the probe

    # mode=linear, and what stands beside every mode: a convex solve on mean-pooled features.
    config.linear = ConfigDict()
    # "last": the encoder's output. "all": every layer by itself, the best on validation. "mixture": a learned mean of
    # all layers.
    config.linear.layers = "last"
    # Penalties on the weight vector of a class, relative to its mean loss on standardised features. The one
    # with the best macro AUROC (of a regression: mean absolute error) on the validation records is taken.
    config.linear.l2_grid = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)
    config.linear.tolerance = 1e-6  # largest gradient of a converged solution
    config.linear.max_steps = 1000  # for each penalty
    config.linear.solver = "auto"  # "lbfgs", "vmap" (all penalties in one program), or what suits the device

    # mode=frozen: attention pooling with a learned query on the tokens of the frozen encoder (spec §7.1).
    config.frozen = ConfigDict()
    config.frozen.epochs = 100
    config.frozen.batch_size = 64
    config.frozen.learning_rates = (1e-3,)  # trained side by side, the best on validation
    config.frozen.seeds = 1  # heads of each learning rate
    config.frozen.weight_decay = 1e-3
    config.frozen.attention_heads = 16
    config.frozen.token_dtype = "float16"  # or "float32", of the tokens on disk
    config.frozen.token_cache_gb = (
        8.0  # tokens are kept on disk if they take no more, else encoded in every epoch
    )

    # mode=finetune: mean over tokens, linear head, everything trained (spec §7.1, §7.2).
    config.finetune = ConfigDict()
    config.finetune.epochs = 100
    config.finetune.batch_size = 64
    config.finetune.head = "linear"  # or "attention"
    config.finetune.attention_heads = 16  # of the latter
    config.finetune.learning_rate = 1e-3
    config.finetune.backbone_factor = 0.1  # times the learning rate
    config.finetune.stem_factor = 0.01
    config.finetune.layer_decay = 1.0  # factor from one block to the one below it
    config.finetune.weight_decay = 1e-3

    # mode=supervised: the same from random initialisation, at one learning rate.
    config.supervised = ConfigDict()
    config.supervised.architecture = "same"  # as --checkpoint; "s4_100hz": the reference's own (spec §4.3)
    config.supervised.epochs = 100
    config.supervised.batch_size = 64
    config.supervised.learning_rate = 1e-3
    config.supervised.weight_decay = 1e-3

    config.bootstrap = ConfigDict()
    config.bootstrap.resamples = 1000
    config.bootstrap.unit = "record" if arg.legacy == "half" else "patient"  # drawn where known
    config.bootstrap.level = 0.95  # of confidence
    config.bootstrap.interval = "percentile"  # or "bca"
    # A class without positives or negatives: "exclude" it from the macro mean, or count it "half" (0.5) as
    # the reference implementation does.
    config.bootstrap.undefined = "half" if arg.legacy == "half" else "exclude"
    return config
