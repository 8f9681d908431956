"""Every field of a pretraining run, declared once, with its unit. Sources: arXiv 2605.12241 and its released
configuration.
"""

from types import SimpleNamespace

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ecg_jax.config_flags import parse_arg
from ecg_jax.data import ladder

#: The pretraining ladder: name -> about how many recordings a run of that size uses.
DATA_SIZES = ladder.SIZES

BACKBONES = ("s4", "transformer", "net1d")

#: The masking strategies of ecg_jax/objectives/masking.py.
STRATEGIES = ("span", "block", "ratio", "time", "independent", "lead")

#: `described` is what the paper describes; `released` reproduces the released code as it is.
RECIPES = ("described", "released")


def get_config(backbone: str, *, bidirectional: bool) -> ConfigDict:
    """Fields that all objectives share. An objective's file adds `objective` and sets what differs.

    Args:
        backbone: one of `BACKBONES`.
        bidirectional: whether its tokens see later ones.
    """
    config = ConfigDict()
    config.model = model(backbone, bidirectional)
    config.seed = 0
    # Folder written by `ecg-jax prepare`, or several that were prepared alike (rate, --clip-mv), separated by commas.
    config.store = placeholder(str)
    config.init = ConfigDict()  # what a new run begins with
    config.init.checkpoint = (
        ""  # RUN or RUN/STEP: its parameters (domain pretraining); "": drawn from the seed
    )
    config.init.part = "all"  # or "encoder": the objective's heads, teacher and codebooks begin anew

    config.batch_size = 64  # crops a step, over all devices
    config.accumulate = 1  # parts of a batch that pass through the model one after the other, to save memory
    config.epochs = 10.0  # an epoch is as many random crops as there are recordings; see data.weights
    config.steps = 0  # optimiser updates; 0: as many as `epochs` make
    config.precision = (
        "float32"  # or "bfloat16": compute dtype; parameters, norms, S4 kernels and the loss stay float32
    )

    config.data = ConfigDict()
    config.data.ladder = "nested"  # random nested sets of patients; or "paper": the paper's sites and years
    config.data.rung = "18k"  # size of a nested set, or whose partitions; 11m takes everything
    config.data.max_records = 0  # recordings, cut down patient by patient; 0: as many as the rung has
    # selection.json of another run, whose recordings to use, held-out ones too, whatever ladder, rung and val_folds
    # say; "": those of the rung.
    config.data.selection = ""
    # "1,3": share of each store in the crops of every epoch, so that recordings of one are seen more often than those
    # of another; "": in proportion to the recordings, each once in an epoch.
    config.data.weights = ""
    config.data.rate_hz = 240.0  # samples per second; must be the store's
    config.data.window_s = 2.5  # seconds in a crop
    config.data.normalisation = (
        "none"  # or "ptbxl_canonical", "ptbxl_misordered": see ecg_jax/models/inputs.py
    )
    # "I,II,V1": the leads that the model sees; the others are what a store holds for a missing lead, zeros. "": all. A
    # checkpoint keeps it, and every probe and embedding goes by it. Offline targets come of all leads in any case.
    config.data.leads = ""
    config.data.targets = (
        ""  # offline targets beside the store, the NAME given to `ecg-jax cluster`; "": none
    )
    config.data.val_folds = 1  # how many of the highest-numbered folds are held out for the validation loss
    config.data.max_val_crops = 4096  # crops; the validation set is cut to them
    config.data.read_threads = 2  # threads that read batches ahead
    config.data.prefetch = 4  # batches read ahead by each process

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

    config.monitor = ConfigDict()  # at every logging step; see ecg_jax/training/collapse.py
    config.monitor.min_rankme = 2.0  # effective dimensions of the features; a warning below, 0: never
    config.monitor.min_feature_std = 0.03  # relative to the features' rms; of student and teacher
    config.monitor.min_perplexity = 1.25  # codes in use, of objectives with codes; mean over codebooks
    config.monitor.max_dead_share = 0.9  # share of the codes that may be dead
    config.monitor.probe_every = 500  # steps between linear probes on labelled recordings; 0: none
    config.monitor.probe_records = 512  # recordings, half to fit and half to score; each costs a forward pass
    config.monitor.task = "auto"  # one of `ecg-jax probe`; auto: the first that fits the store; "": none
    config.stop_on_collapse = False  # True: a warning ends the run, with exit code 2
    config.stall_timeout_s = (
        1800.0  # without a finished step; then stacks are printed and the run ends; 0: never. Compiling, reading and
        # writing a checkpoint may take five times as long, a write 1200 s at most whatever is said here
    )
    return config.lock()  # a misspelt field is an error, in a config file too


def model(backbone: str, bidirectional: bool) -> ConfigDict:
    """The encoder: stem, and one of three backbones (spec §3.1, §4.1, §4.2)."""
    config = ConfigDict()
    config.backbone = backbone
    config.width = 512  # D
    config.bidirectional = bidirectional  # False: a token sees itself and those before it
    config.l_max = 300  # tokens for which S4 output vectors, of a head too, are length-corrected (2.5 s)
    config.conv = (
        "auto"  # of S4 layers; heads have too many states for "chunked" and then choose by themselves
    )
    config.remat = "none"  # "block" or "dots": recompute in the backward pass, see ecg_jax/models/layers.py
    if backbone == "s4":
        config.layers = 4
        config.state = 8  # N, states of each S4 channel
        config.trainable_ssm = False  # True trains state matrices and step sizes too, in the group "ssm"
        config.dropout = 0.2
    elif backbone == "transformer":
        config.layers = 6
        config.heads = 8
        config.ff_width = 2048
        config.dropout = 0.1
        config.attention_dropout = 0.0  # of the attention weights; fused attention on a GPU has none
    elif backbone == "net1d":  # bidirectional=False: causal padding, and no squeeze-excite over time
        config.filters = (64, 128, 128, 256, 256, 512, 512)  # channels of each stage; the last is the width
        config.blocks = (2, 2, 2, 3, 3, 4, 4)  # of each stage
        config.kernel = 16  # tokens
        config.group_width = 16  # channels in a group of the middle convolution
    return config


def set_rung(config: ConfigDict, rung: str, which: str) -> None:
    """Sets the rung of the pretraining ladder, and which of the two ladders."""
    config.data.rung = rung
    config.data.ladder = which


def set_recipe(config: ConfigDict, recipe: str) -> None:
    """Sets what the recipes decide for every objective: the learning-rate groups (spec §5.0), and for masked
    objectives input, masks and teacher (§1.4, §5.2, §5.4, §5.6).
    """
    if recipe == "released":
        config.optimiser.factors.backbone = 0.1
        config.optimiser.factors.stem = 0.01
        config.optimiser.factors.ssm = 0.01
    if recipe == "released" and config.model.backbone == "transformer":
        config.model.attention_dropout = 0.1
    if "mask" not in config.objective:
        return
    config.data.normalisation = "ptbxl_canonical"
    if recipe == "released":
        config.data.normalisation = "ptbxl_misordered"
        config.objective.mask.probability = 0.0065
        config.objective.mask.last_token = False
        config.objective.mask.min_keep = 64
    if recipe == "released" and "teacher" in config.objective:
        config.objective.teacher.mode = "frozen_random"
        config.objective.teacher.train_mode = True


def masking(strategy: str) -> ConfigDict:
    """What a masked objective hides; a strategy reads its own fields only. See ecg_jax/objectives/masking.py."""
    mask = ConfigDict()
    mask.strategy = strategy  # span, block, ratio, time, independent or lead
    mask.probability = 0.065  # span: that a token is the mid-point of a span
    mask.span = 10  # span: tokens
    mask.ratio = 0.5  # ratio, time, independent, lead: share hidden
    mask.patch = 10  # ratio, time, independent: tokens in a piece
    mask.blocks = 4  # block: target blocks
    mask.target_min = 0.15  # block: shares of the window
    mask.target_max = 0.20
    mask.context_min = 0.85
    mask.context_max = 1.0
    mask.min_keep = 1  # block: tokens at least in a target block and in the context
    mask.last_token = True  # span, block: False reproduces the released samplers' edge
    return mask


def teacher() -> ConfigDict:
    """The teacher of an objective that has one. See ecg_jax/objectives/teacher.py."""
    config = ConfigDict()
    config.mode = "ema"  # or "frozen_random"
    config.momentum = 0.9996
    config.momentum_end = 0.9996  # at the last step, reached along half a cosine
    config.train_mode = False  # True: targets with dropout and batch statistics
    config.batch_stats = "own"  # running statistics of its own activations; "ema": the student's, averaged
    return config


def parse_masked(arg: str, mask: str, **choices: tuple[str, ...]) -> SimpleNamespace:
    """The argument of a masked objective's config; `mask` is its default strategy, `choices` its own keys."""
    strategies = (mask, *(name for name in STRATEGIES if name != mask))
    return parse_arg(
        arg,
        **choices,
        backbone=BACKBONES,
        data=tuple(DATA_SIZES),
        ladder=ladder.LADDERS,
        recipe=RECIPES,
        mask=strategies,
    )


def masked_objective(arg: SimpleNamespace, objective: dict, with_teacher: bool = True) -> ConfigDict:
    """The config of a masked objective.

    Args:
        arg: `backbone`, `data`, `ladder`, `recipe` and `mask` of the config's argument.
        objective: its name and its own fields.
        with_teacher: whether it has the fields of a teacher.
    """
    config = get_config(arg.backbone, bidirectional=True)
    with config.unlocked():
        config.objective = ConfigDict({**objective, "mask": masking(arg.mask)})
        if with_teacher:
            config.objective.teacher = teacher()
    config.lock()
    set_rung(config, arg.data, arg.ladder)
    set_recipe(config, arg.recipe)
    return config
