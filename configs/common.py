"""Every field of a pretraining run, declared once, with its unit. Sources: arXiv 2605.12241 and its released
configuration.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

#: The pretraining ladder: name -> largest number of recordings a run of that size uses.
DATA_SIZES = {"18k": 18_000, "45k": 45_000, "106k": 106_000, "753k": 753_000, "11m": 11_000_000}

#: `described` is what the paper describes; `released` reproduces the released code as it is.
RECIPES = ("described", "released")


def get_config() -> ConfigDict:
    """Fields that all objectives share. An objective's file adds `objective` and sets what differs."""
    config = ConfigDict()
    config.seed = 0
    config.store = placeholder(str)  # folder written by `ecg-jax prepare`

    config.batch_size = 64  # crops a step, over all devices
    config.epochs = 10.0  # an epoch is one random crop of each recording
    config.steps = 0  # optimiser updates; 0: as many as `epochs` make
    config.precision = (
        "float32"  # or "bfloat16": compute dtype; parameters, norms, S4 kernels and the loss stay float32
    )

    config.data = ConfigDict()
    config.data.max_records = DATA_SIZES["18k"]  # recordings; a larger store is cut down patient by patient
    config.data.rate_hz = 240.0  # samples per second; must be the store's
    config.data.window_s = 2.5  # seconds in a crop
    config.data.normalisation = (
        "none"  # or "ptbxl_canonical", "ptbxl_misordered": see ecg_jax/models/inputs.py
    )
    config.data.val_folds = 1  # how many of the highest-numbered folds are held out for the validation loss
    config.data.max_val_crops = 4096  # crops; the validation set is cut to them
    config.data.read_threads = 2  # threads that read batches ahead
    config.data.prefetch = 4  # batches read ahead by each process

    config.model = ConfigDict()
    config.model.backbone = "s4"
    config.model.width = 512  # D
    config.model.state = 8  # N, states of each S4 channel
    config.model.layers = 4
    config.model.l_max = 300  # tokens for which the S4 output vector is length-corrected (2.5 s)
    config.model.bidirectional = True
    config.model.trainable_ssm = (
        False  # True trains the state matrices and step sizes too, in the group "ssm"
    )
    config.model.dropout = 0.2

    config.optimiser = ConfigDict()
    config.optimiser.learning_rate = 3e-3
    config.optimiser.schedule = "constant"  # or "cosine"
    config.optimiser.warmup_steps = 0
    config.optimiser.weight_decay = 1e-3  # decoupled; never on the group "ssm"
    config.optimiser.b1 = 0.9
    config.optimiser.b2 = 0.999
    config.optimiser.eps = 1e-8
    config.optimiser.clip_norm = 0.0  # global gradient norm; 0: no clipping
    config.optimiser.factors = ConfigDict()  # learning rate of each group, relative to learning_rate
    config.optimiser.factors.head = 1.0
    config.optimiser.factors.backbone = 1.0
    config.optimiser.factors.stem = 1.0
    config.optimiser.factors.ssm = 0.1

    config.log_every = 50  # steps
    config.checkpoint_every = 1000  # steps; each checkpoint comes with a validation loss
    config.keep_latest = 2  # checkpoints
    config.keep_best = 1  # checkpoints
    config.tensorboard = True
    return config.lock()  # a misspelt field is an error, in a config file too


def set_size(config: ConfigDict, size: str) -> None:
    """Sets the rung of the pretraining ladder."""
    config.data.max_records = DATA_SIZES[size]


def set_recipe(config: ConfigDict, recipe: str) -> None:
    """Sets what the recipes decide for every objective: the learning-rate groups (spec §5.0)."""
    if recipe == "released":
        config.optimiser.factors.backbone = 0.1
        config.optimiser.factors.stem = 0.01
        config.optimiser.factors.ssm = 0.01
