"""Fine-tuning: encoder and head trained together, with a learning rate for each part (spec §7.1, §7.2)."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.errors import UserError
from ecg_jax.evaluation import head_training as training
from ecg_jax.evaluation.examples import Examples, Fitted
from ecg_jax.evaluation.feature_cache import entry_key
from ecg_jax.evaluation.features import mean_per_record
from ecg_jax.evaluation.fit_folder import FitFolder, examples_key
from ecg_jax.models.encoder import build_encoder
from ecg_jax.models.inputs import to_model_input
from ecg_jax.models.probe_heads import HeadedEncoder, build_head
from ecg_jax.training.optim import group_of
from ecg_jax.training.parallel import AXIS, make_mesh, shard_batch
from ecg_jax.training.pretrained import FINAL, RestoredEncoder, layer_shapes

#: Learning-rate factors of the reference (spec §7.1).
FACTORS = {"head": 1.0, "backbone": 0.1, "stem": 0.01}

# Keeps the key of the initial head apart from those of the steps, which fold in small numbers.
_HEAD = 1 << 31

_BLOCK = re.compile(r"(?:layer|norm|block)(\d+)")


class Recipe(NamedTuple):
    """How a network is trained; the fields are keyword arguments of `fit_finetune`."""

    epochs: int
    batch_size: int
    learning_rate: float
    factors: dict[str, float]
    layer_decay: float
    weight_decay: float
    seed: int


class _Best(NamedTuple):
    """What is known of the best epoch so far: its number, its score, and the network after it."""

    epoch: int
    score: float
    params: Any
    moving: Any


def learning_rate_factors(params: dict[str, Any], factors: dict[str, float], layer_decay: float) -> Any:
    """A tree like params with the learning-rate factor of each leaf.

    The factor of the leaf's group, times `layer_decay`^(n + 1 - d) with d = 0 for the stem and what feeds the first of
    n blocks, 1 .. n for the blocks, and n + 1 for what follows them (Bao et al., arXiv 2106.08254). State matrices
    that are trained move as their block.

    Args:
        params: `encoder` {`stem`, `backbone`} and `head`.
        factors: of the groups "head", "backbone" and "stem".
        layer_decay: 1.0 leaves the factors as they are, as the reference has it.

    Raises:
        ValueError: a group has no factor.
    """
    if missing := {"head", "backbone", "stem"} - set(factors):
        raise ValueError(f"factors has no value for {', '.join(sorted(missing))}")
    numbers = [_BLOCK.fullmatch(name) for name in params["encoder"]["backbone"]]
    blocks = 1 + max((int(match[1]) for match in numbers if match), default=-1)

    def factor(path, _) -> float:
        names = tuple(entry.key for entry in path)
        if names[0] == "head":
            return factors["head"]
        if names[1] == "stem":
            return factors["stem"] * layer_decay ** (blocks + 1)
        match = _BLOCK.fullmatch(names[2])
        depth = 1 + int(match[1]) if match else 0 if names[2] == "input" else blocks + 1
        return factors["backbone"] * layer_decay ** (blocks + 1 - depth)

    return jax.tree.map_with_path(factor, params)


@functools.lru_cache(maxsize=8)
def _programs(
    network: HeadedEncoder,
    normalisation: str,
    kept_leads: tuple[str, ...],
    regression: bool,
    mesh: Mesh,
) -> tuple[Callable, Callable]:
    """(training step, prediction) of an architecture; kept, so that another task or seed compiles nothing again.

    State: `params`, `moments`, `moving` (the collection `batch_stats`, {} without BatchNorm) and `step`. Fixed: the
    collections `ssm` and `basis` under `collections`, the scalars `seed` and `weight_decay`, and a learning rate for
    each parameter.
    """

    def train(state, fixed, batch):
        x = to_model_input(batch["signal"], normalisation, kept_leads)
        key = jax.random.fold_in(jax.random.key(fixed["seed"]), state["step"])
        constant = {**state["moving"], **fixed["collections"]}

        def loss_fn(params):
            outputs, moved = network.apply(
                {"params": params, **constant},
                x,
                batch["record_index"],
                train=True,
                rngs={"dropout": key},
                mutable=list(state["moving"]),
            )
            loss = training.masked_loss(outputs, batch["targets"], regression=regression, axis_name=AXIS)
            return loss, moved

        (loss, moved), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
        params, moments = training.adamw(
            state["params"],
            jax.lax.pmean(grads, AXIS),
            state["moments"],
            learning_rates=fixed["learning_rates"],
            weight_decay=fixed["weight_decay"],
            # State matrices never decay (spec §3.3).
            decays=jax.tree.map_with_path(
                lambda path, _: group_of(tuple(entry.key for entry in path)) != "ssm", state["params"]
            ),
        )
        state = {"params": params, "moments": moments, "moving": dict(moved), "step": state["step"] + 1}
        return state, loss

    def predict(state, fixed, batch):
        variables = {"params": state["params"], **state["moving"], **fixed["collections"]}
        x = to_model_input(batch["signal"], normalisation, kept_leads)
        outputs = network.apply(variables, x, train=False)
        return outputs if regression else jax.nn.sigmoid(outputs)

    return training.map_training(train, mesh), training.map_prediction(predict, mesh)


def fit_network(
    mode: str,
    encoder: nn.Module,
    head: nn.Module,
    variables: dict[str, Any],
    preprocessing: Preprocessing,
    examples: Examples,
    recipe: Recipe,
    *,
    identity: dict[str, Any],
    folder: Path | str | None,
    mesh: Mesh | None,
    label: str | None,
) -> Fitted:
    """Trains an encoder with a head on top, from the variables given; `fit_finetune` says how.

    Args:
        mode: "finetune" or "supervised": the section of the config that errors name.
        encoder: maps model input to (tokens, intermediates), built with `axis_name=AXIS`; its parameters lie under
            `stem` and `backbone`.
        head: maps tokens to logits or values.
        variables: of the encoder: `params`, and `batch_stats`, `ssm` and `basis` where it has them.
        preprocessing: window, normalisation and kept leads of what it is fed.
        examples: what to train, validate and test on.
        recipe: how.
        identity: what beside recipe and examples the result depends on, JSON-able.
        folder, mesh, label: as in `fit_finetune`.
    """
    mesh = make_mesh() if mesh is None else mesh
    training.check_trainable(
        examples, mode=mode, batch_size=recipe.batch_size, epochs=recipe.epochs, mesh=mesh
    )
    about = {**recipe._asdict(), "examples": examples_key(examples), **identity}
    with FitFolder(folder, about) as keeper:
        if (fitted := keeper.finished()) is not None:
            return fitted
        with jax.default_matmul_precision("highest"):
            run = _Run(mode, HeadedEncoder(encoder, head), variables, preprocessing, examples, recipe, mesh)
            run.restore(keeper)
            progress = tqdm(
                total=recipe.epochs,
                initial=run.epoch,
                desc=label,
                unit="epoch",
                disable=label is None,
                leave=False,
            )
            with progress:
                while run.epoch < recipe.epochs:
                    run.train_epoch()
                    keeper.save(run.kept())
                    progress.update()
            return keeper.finish(run.fitted())


class _Run:
    """A network on the devices, and what is remembered of its epochs."""

    def __init__(self, mode, network, variables, preprocessing, examples, recipe, mesh):
        self._mode, self._examples, self._recipe, self._mesh = mode, examples, recipe, mesh
        self._window = preprocessing.window_samples
        self._steps = len(examples.train.rows) // recipe.batch_size
        collections = {name: {"encoder": tree} for name, tree in variables.items()}
        params = collections["params"] | {"head": self._initial_head(network, variables, preprocessing)}
        state = {
            "params": params,
            "moments": jax.jit(training.ADAM.init)(params),
            "moving": {name: tree for name, tree in collections.items() if name == "batch_stats"},
            "step": np.int32(0),
        }
        fixed = {
            "collections": {name: tree for name, tree in collections.items() if name in ("ssm", "basis")},
            "seed": np.uint32(recipe.seed),
            "learning_rates": jax.tree.map(
                lambda factor: np.float32(recipe.learning_rate * factor),
                learning_rate_factors(params, recipe.factors, recipe.layer_decay),
            ),
            "weight_decay": np.float32(recipe.weight_decay),
        }
        self._state, self._fixed = (training.place(tree, mesh) for tree in (state, fixed))
        self._train, self._predict = _programs(
            network,
            preprocessing.normalisation,
            preprocessing.kept_leads,
            training.is_regression(examples),
            mesh,
        )
        self.epoch, self._curve = 0, []
        host = training.host_copy(state)
        self._best = _Best(-1, float("nan"), host["params"], host["moving"])

    def _initial_head(self, network, variables, preprocessing):
        x = jax.ShapeDtypeStruct((1, self._window, len(preprocessing.leads)), jnp.float32)
        tokens, _ = jax.eval_shape(lambda v, x: network.encoder.apply(v, x, train=False), variables, x)
        key = jax.random.fold_in(jax.random.key(self._recipe.seed), _HEAD)
        params = jax.device_get(training.head_init(network.head, tokens.shape[-1])(key[None]))
        return jax.tree.map(lambda leaf: leaf[0], params)

    def train_epoch(self) -> None:
        """One pass over the training records, then the validation score.

        Raises:
            UserError: the loss or a prediction is not finite.
        """
        recipe, part = self._recipe, self._examples.val
        read = training.crop_reader(
            self._examples.train,
            window=self._window,
            seed=recipe.seed,
            epoch=self.epoch,
            batch_size=recipe.batch_size,
        )
        losses = []
        for batch in training.read_ahead(read, self._steps):
            self._state, loss = self._train(self._state, self._fixed, shard_batch(batch, self._mesh))
            losses.append(loss)
        loss = float(np.mean(jax.device_get(losses), dtype=np.float64))
        score = training.score(self._examples, part, self._predictions(part)) if np.isfinite(loss) else loss
        if not np.isfinite(score):
            raise UserError(
                f"The {'loss' if not np.isfinite(loss) else 'validation score'} of epoch {self.epoch + 1} is not "
                f"finite; lower --config.{self._mode}.learning_rate={recipe.learning_rate:g}."
            )
        self._curve.append({"loss": loss, "validation": score})
        if training.better(self._examples, score, self._best.score):
            host = training.host_copy({name: self._state[name] for name in ("params", "moving")})
            self._best = _Best(self.epoch, score, host["params"], host["moving"])
        self.epoch += 1

    def _predictions(self, part) -> np.ndarray:
        starts, record = part.crops(self._window)

        def read(first, last):
            return part.store.read_crops(starts[first:last], self._window)

        def run(signal):
            return self._predict(self._state, self._fixed, shard_batch({"signal": signal}, self._mesh))

        crops = training.predict_crops(run, read, len(starts), self._recipe.batch_size)
        return mean_per_record(crops, record, len(part.rows))

    def kept(self) -> dict[str, Any]:
        """What continues the fit."""
        return {
            "state": training.host_copy(self._state),
            "best": self._best._asdict(),
            "curve": json.dumps(self._curve),
        }

    def restore(self, keeper: FitFolder) -> None:
        """Goes on where the folder's last whole epoch ended, if there is one."""
        kept = keeper.restore(self.kept())
        if kept is not None:
            self._state = training.place(kept["state"], self._mesh)
            self._best, self._curve = _Best(**kept["best"]), json.loads(kept["curve"])
            self.epoch = len(self._curve)

    def fitted(self) -> Fitted:
        """Predictions of the best epoch, and the report."""
        best = {**self._state, "params": self._best.params, "moving": self._best.moving}
        self._state = training.place(best, self._mesh)
        val, test = (self._predictions(part) for part in (self._examples.val, self._examples.test))
        report = {
            **self._recipe._asdict(),
            "parameters": training.n_parameters(self._best.params),
            "metric": self._examples.task.metric,
            "steps_per_epoch": self._steps,
            "best_epoch": self._best.epoch + 1,
            "validation": self._best.score,
            "curve": self._curve,
        }
        return Fitted(val, test, report)


def fit_finetune(
    encoder: RestoredEncoder,
    examples: Examples,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    factors: dict[str, float] = FACTORS,
    layer_decay: float = 1.0,
    weight_decay: float = 1e-3,
    head: str = "linear",
    attention_heads: int = 16,
    seed: int = 0,
    folder: Path | str | None = None,
    mesh: Mesh | None = None,
    label: str | None = None,
) -> Fitted:
    """Trains the encoder together with a head, and predicts with the epoch that validates best.

    The encoder is in training mode: dropout keyed by record, BatchNorm over the batch of all devices. AdamW at a
    constant rate; one random crop of each record per epoch, the last incomplete batch dropped. After every epoch the
    validation records are scored, predictions averaged over their non-overlapping crops (spec §7.1-7.3). Results do
    not depend on the number of devices, up to rounding; a fit that is killed and continued gives the same bits.

    Args:
        encoder: from `restore_encoder` or `random_twin`.
        examples: what to train, validate and test on; targets that are NaN enter no loss and no score.
        epochs: passes over the training records.
        batch_size: B, over all devices.
        learning_rate: of factor 1.
        factors: learning-rate factors of "head", "backbone" and "stem".
        layer_decay: see `learning_rate_factors`.
        weight_decay: decoupled, on everything but trained state matrices.
        head: "linear", mean over tokens and a linear map, or "attention", attention pooling.
        attention_heads: of the latter, a divisor of the width of the tokens.
        seed: of head, order, crops and dropout.
        folder: where the state of every epoch and the result are kept; None keeps nothing.
        mesh: the devices; None for all.
        label: of a progress bar, None for none.

    Raises:
        UserError: see `head_training.check_trainable`; attention heads that do not divide the width; the folder holds
            another fit or a damaged file, or another process fits in it; a loss is not finite.
        ValueError: unknown head, or a group without factor.
    """
    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        factors=dict(factors),
        layer_decay=layer_decay,
        weight_decay=weight_decay,
        seed=seed,
    )
    described = {"head": head, "attention_heads": attention_heads if head == "attention" else None}
    module = build_head(head, out=len(examples.classes), attention_heads=attention_heads)
    if head == "attention":
        training.check_attention_heads(layer_shapes(encoder)[FINAL][1], attention_heads, "finetune")
    fitted = fit_network(
        "finetune",
        build_encoder(**encoder.config["model"], axis_name=AXIS),
        module,
        encoder.variables,
        encoder.preprocessing,
        examples,
        recipe,
        identity={"encoder": entry_key(encoder, examples.train.store), **described},
        folder=folder,
        mesh=mesh,
        label=label,
    )
    return Fitted(fitted.val, fitted.test, {**described, **fitted.report})
