"""The frozen mode: heads of several seeds and learning rates trained together on one encoder's tokens (spec §7.1)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ecg_jax.errors import UserError
from ecg_jax.evaluation import head_training as training
from ecg_jax.evaluation.examples import Examples, Fitted
from ecg_jax.evaluation.feature_cache import entry_key
from ecg_jax.evaluation.features import encode_padded, mean_per_record
from ecg_jax.evaluation.fit_folder import FitFolder, examples_key
from ecg_jax.evaluation.frozen_heads import initial_heads, programs
from ecg_jax.evaluation.token_cache import TYPES, KeptTokens, kept_tokens
from ecg_jax.models.encoder import build_encoder
from ecg_jax.models.probe_heads import AttentionPool
from ecg_jax.training.parallel import make_mesh, shard_batch
from ecg_jax.training.pretrained import FINAL, RestoredEncoder, layer_shapes


class Recipe(NamedTuple):
    """How the heads are trained; the fields are keyword arguments of `fit_frozen`."""

    epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    weight_decay: float
    attention_heads: int
    token_dtype: str
    token_cache_bytes: int

    def grid(self) -> list[tuple[int, float]]:
        """(seed, learning rate) of every head."""
        return [(seed, rate) for seed in self.seeds for rate in self.learning_rates]


class _Tokens:
    """Batches of crops of the parts, as tokens where those are kept and as signal elsewhere."""

    def __init__(
        self, encoder: RestoredEncoder, examples: Examples, recipe: Recipe, scratch: Path | None, encode
    ):
        self._examples, self._recipe = examples, recipe
        self._window = encoder.preprocessing.window_samples
        self._crops = {name: getattr(examples, name).crops(self._window) for name in ("train", "val", "test")}
        shape = layer_shapes(encoder)[FINAL]
        left, size = recipe.token_cache_bytes, int(np.prod(shape)) * np.dtype(recipe.token_dtype).itemsize
        self.kept: dict[str, KeptTokens] = {}
        # Validation first: its crops are the same in every epoch, kept or not. Test crops are needed once.
        for name in ("val", "train"):
            part, (starts, _) = getattr(examples, name), self._crops[name]
            if len(starts) * size > left:
                continue
            left -= len(starts) * size
            self.kept[name] = kept_tokens(
                scratch / name,
                lambda first, last, part=part, starts=starts: encode(
                    part.store.read_crops(starts[first:last], self._window)
                ),
                n_crops=len(starts),
                shape=shape,
                dtype=recipe.token_dtype,
                batch_size=recipe.batch_size,
            )

    def training_reader(self, epoch: int) -> Callable[[int], dict[str, np.ndarray]]:
        """step -> batch: one crop of each record that `head_training.draw` names."""
        part, size, seed = self._examples.train, self._recipe.batch_size, self._recipe.seeds[0]
        if "train" not in self.kept:
            read = training.crop_reader(part, window=self._window, seed=seed, epoch=epoch, batch_size=size)
            return lambda step: {k: v for k, v in read(step).items() if k != "record_index"}
        n_crops = np.bincount(self._crops["train"][1], minlength=len(part.rows))
        first, targets = np.cumsum(n_crops) - n_crops, part.targets.astype(np.float32)

        def read_kept(step: int) -> dict[str, np.ndarray]:
            chosen, uniform = training.draw(seed, epoch, step, len(part.rows), size)
            crops = first[chosen] + (uniform * n_crops[chosen]).astype(np.int64)
            return {"tokens": self.kept["train"].take(crops), "targets": targets[chosen]}

        return read_kept

    def predictions(self, name: str, run: Callable[[str, np.ndarray], Any]) -> list[np.ndarray]:
        """Of each head float64 [n, K]: predictions of a part, averaged over the crops of each record.

        Args:
            name: of the part.
            run: ("tokens" or "signal", crops [B, ...]) -> [B, H, K].
        """
        part, (starts, record) = getattr(self._examples, name), self._crops[name]
        source = "tokens" if name in self.kept else "signal"

        def read(first, last):
            if source == "tokens":
                return self.kept[name].take(np.arange(first, last))
            return part.store.read_crops(starts[first:last], self._window)

        crops = training.predict_crops(
            lambda rows: run(source, rows), read, len(starts), self._recipe.batch_size
        )
        return [mean_per_record(crops[:, h], record, len(part.rows)) for h in range(crops.shape[1])]


class _Heads:
    """The heads on the devices, and what is remembered of their epochs."""

    def __init__(
        self, encoder: RestoredEncoder, examples: Examples, recipe: Recipe, scratch: Path | None, mesh: Mesh
    ):
        self._examples, self._recipe, self._mesh = examples, recipe, mesh
        head = AttentionPool(len(examples.classes), recipe.attention_heads)
        self._programs = programs(
            build_encoder(**encoder.config["model"]),
            head,
            encoder.preprocessing.normalisation,
            encoder.preprocessing.kept_leads,
            training.is_regression(examples),
            mesh,
        )
        self._fixed = self._placed(
            {
                "variables": encoder.variables,
                "learning_rate": np.array([rate for _, rate in recipe.grid()], np.float32),
                "weight_decay": np.float32(recipe.weight_decay),
            }
        )
        self._state = self._placed(initial_heads(head, recipe.grid(), layer_shapes(encoder)[FINAL][1]))

        def encode(signal):
            def run(signal):
                return self._programs.encode({}, self._fixed, shard_batch({"signal": signal}, mesh))

            return encode_padded(run, signal, recipe.batch_size)

        self.tokens = _Tokens(encoder, examples, recipe, scratch, encode)
        n_heads = len(recipe.grid())
        self._best = {
            "params": training.host_copy(self._state["params"]),
            "epoch": np.full(n_heads, -1),
            "score": np.full(n_heads, np.nan),
        }
        self.losses, self.scores = np.zeros((0, n_heads)), np.zeros((0, n_heads))

    def _placed(self, tree):
        return training.place(tree, self._mesh)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.scores)

    def train_epoch(self) -> None:
        """One pass over the training records for all heads, then their validation scores.

        A head whose loss is not finite has the score NaN from then on; the others go on.
        """
        steps, losses = len(self._examples.train.rows) // self._recipe.batch_size, []
        for batch in training.read_ahead(self.tokens.training_reader(self.epoch), steps):
            self._state, loss = self._programs.train(self._state, self._fixed, shard_batch(batch, self._mesh))
            losses.append(loss)
        loss = np.mean(jax.device_get(losses), axis=0, dtype=np.float64)
        part = self._examples.val
        score = np.array([training.score(self._examples, part, p) for p in self._predictions("val")])
        score[~np.isfinite(loss)] = np.nan
        improved = training.better(self._examples, score, self._best["score"])
        if improved.any():
            for best, now in zip(
                jax.tree.leaves(self._best["params"]),
                jax.tree.leaves(jax.device_get(self._state["params"])),
                strict=True,
            ):
                best[improved] = now[improved]
            self._best["epoch"] = np.where(improved, self.epoch, self._best["epoch"])
            self._best["score"] = np.where(improved, score, self._best["score"])
        self.losses, self.scores = np.vstack([self.losses, loss]), np.vstack([self.scores, score])

    def _predictions(self, name: str) -> list[np.ndarray]:
        def run(source, rows):
            batch = shard_batch({source: rows}, self._mesh)
            return self._programs.predict({"params": self._state["params"]}, self._fixed, batch)

        return self.tokens.predictions(name, run)

    def kept(self) -> dict[str, Any]:
        """What continues the fit."""
        state = training.host_copy(self._state)
        return {"state": state, "best": self._best, "losses": self.losses, "scores": self.scores}

    def restore(self, keeper: FitFolder) -> None:
        """Goes on where the folder's last whole epoch ended, if there is one."""
        kept = keeper.restore(self.kept())
        if kept is not None:
            self._state = self._placed(kept["state"])
            self._best = jax.tree.map(np.array, kept["best"])
            self.losses, self.scores = kept["losses"], kept["scores"]

    def fitted(self) -> Fitted:
        """Predictions of the first seed's best head, and the report on all of them.

        Raises:
            UserError: no head of a seed ever had a finite score.
        """
        recipe, examples = self._recipe, self._examples
        self._state = {"params": self._placed(self._best["params"])}
        val, test = self._predictions("val"), self._predictions("test")
        chosen = [self._chosen(number) for number in range(len(recipe.seeds))]
        scores = [training.score(examples, examples.test, test[h]) for h in chosen]
        report = {
            **recipe._asdict(),
            "head": "attention",
            "parameters": training.n_parameters(self._best["params"]) // len(recipe.grid()),
            "metric": examples.task.metric,
            "crops": "drawn among the non-overlapping ones"
            if "train" in self.tokens.kept
            else "drawn at random",
            "order_of_crops": f"of seed {recipe.seeds[0]} for all heads",
            "tokens_kept": sorted(self.tokens.kept),
            "grid": [self._described(h) for h in range(len(recipe.grid()))],
            "chosen": [
                {
                    "seed": recipe.grid()[h][0],
                    "learning_rate": recipe.grid()[h][1],
                    "learning_rate_at_edge": self._edge(recipe.grid()[h][1]),
                    "best_epoch": int(self._best["epoch"][h]) + 1,
                    "validation": training.number(self._best["score"][h]),
                    "test": training.number(score),
                }
                for h, score in zip(chosen, scores, strict=True)
            ],
            "seeds": {
                "test": [training.number(score) for score in scores],
                "mean": training.number(np.mean(scores)),
                "sd": training.number(np.std(scores, ddof=1)) if len(scores) > 1 else None,
            },
        }
        return Fitted(val[chosen[0]], test[chosen[0]], report)

    def _chosen(self, number: int) -> int:
        """The best head of a seed; of equal ones the learning rate listed first."""
        n, best = len(self._recipe.learning_rates), number * len(self._recipe.learning_rates)
        scores = self._best["score"]
        for h in range(number * n, (number + 1) * n):
            if training.better(self._examples, scores[h], scores[best]):
                best = h
        if np.isnan(scores[best]):
            raise UserError(
                f"The loss of every head of seed {self._recipe.seeds[number]} was not finite in the first epoch; "
                f"lower --config.frozen.learning_rates={list(self._recipe.learning_rates)}."
            )
        return best

    def _edge(self, rate: float) -> str | None:
        """The end of the grid that a learning rate is (a wider grid may do better), or None."""
        low, high = min(self._recipe.learning_rates), max(self._recipe.learning_rates)
        return None if low == high or low < rate < high else "lowest" if rate == low else "highest"

    def _described(self, h: int) -> dict[str, Any]:
        seed, rate = self._recipe.grid()[h]
        diverged = np.flatnonzero(np.isnan(self.scores[:, h]))
        return {
            "seed": seed,
            "learning_rate": rate,
            "best_epoch": int(self._best["epoch"][h]) + 1 or None,
            "validation": training.number(self._best["score"][h]),
            "diverged_in_epoch": int(diverged[0]) + 1 if len(diverged) else None,
            "losses": [training.number(v) for v in self.losses[:, h]],
            "validations": [training.number(v) for v in self.scores[:, h]],
        }


def fit_frozen(
    encoder: RestoredEncoder,
    examples: Examples,
    *,
    epochs: int,
    batch_size: int,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    weight_decay: float,
    token_cache_bytes: int,
    token_dtype: str = "float16",
    attention_heads: int = 16,
    folder: Path | str | None = None,
    mesh: Mesh | None = None,
    label: str | None = None,
) -> Fitted:
    """Trains attention pooling on the tokens of an encoder in evaluation mode; predicts with the best on validation.

    One head for each seed and learning rate, all in one program: the tokens of a batch are computed once for all of
    them. AdamW at a constant rate; one random crop of each record per epoch, the last incomplete batch dropped. After
    every epoch the validation records are scored, predictions averaged over their non-overlapping crops, and of each
    seed the epoch and learning rate with the best score are kept (spec §7.1-7.3). Order and crops are those of the
    first seed for all heads, so seeds differ in the initial head only. The predictions returned are those of the first
    seed's best head, not a mean over seeds, which would be another estimator; `seeds` of the report has the test score
    of each seed's best head, their mean and their standard deviation (with n - 1).

    Where their tokens fit into `token_cache_bytes`, the crops of the validation records, and then of the training
    records, are encoded once and kept in the folder until the fit is finished; training crops are then drawn among the
    non-overlapping ones. The report says which were.

    Args:
        encoder: from `restore_encoder` or `random_twin`.
        examples: what to train, validate and test on; targets that are NaN enter no loss and no score.
        epochs: passes over the training records.
        batch_size: B, over all devices.
        learning_rates, seeds: of the heads.
        weight_decay: decoupled, on every parameter of a head.
        token_cache_bytes: most that tokens may take on disk; 0 keeps none, as does `folder=None`.
        token_dtype: "float16" or "float32", of the tokens kept; heads compute in float32.
        attention_heads: a divisor of the width of the tokens.
        folder: where tokens, the state of every epoch and the result are kept; None keeps nothing.
        mesh: the devices; None for all.
        label: of a progress bar, None for none.

    Raises:
        UserError: see `head_training.check_trainable`; attention heads that do not divide the width; the folder holds
            another fit or a damaged file, or another process fits in it; every head of a seed diverged; tokens that
            cannot be kept.
        ValueError: no seed or learning rate, or an unknown token type.
    """
    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        learning_rates=tuple(float(rate) for rate in learning_rates),
        seeds=tuple(int(seed) for seed in seeds),
        weight_decay=weight_decay,
        attention_heads=attention_heads,
        token_dtype=token_dtype,
        token_cache_bytes=0 if folder is None else token_cache_bytes,
    )
    if not recipe.grid():
        raise ValueError("seeds and learning_rates must have at least one entry each")
    if token_dtype not in TYPES:
        raise ValueError(f"token_dtype={token_dtype!r} is unknown; known: {', '.join(TYPES)}")
    mesh = make_mesh() if mesh is None else mesh
    training.check_trainable(examples, mode="frozen", batch_size=batch_size, epochs=epochs, mesh=mesh)
    training.check_attention_heads(layer_shapes(encoder)[FINAL][1], attention_heads, "frozen")
    identity = {"examples": examples_key(examples), "encoder": entry_key(encoder, examples.train.store)}
    with FitFolder(folder, {**recipe._asdict(), **identity}) as keeper:
        if (fitted := keeper.finished()) is not None:
            return fitted
        with jax.default_matmul_precision("highest"):
            run = _Heads(encoder, examples, recipe, keeper.scratch, mesh)
            run.restore(keeper)
            progress = tqdm(
                total=epochs, initial=run.epoch, desc=label, unit="epoch", disable=label is None, leave=False
            )
            with progress:
                while run.epoch < epochs:
                    run.train_epoch()
                    keeper.save(run.kept())
                    progress.update()
            return keeper.finish(run.fitted())
