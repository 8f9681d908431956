"""What the probes that learn by gradient descent share: order of the crops, loss, AdamW, scores, parallel map."""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ecg_jax.data.pipeline import shuffled_by_position, uniform_by_position
from ecg_jax.errors import UserError
from ecg_jax.evaluation import metrics
from ecg_jax.evaluation.examples import Examples, Part
from ecg_jax.evaluation.features import encode_padded
from ecg_jax.evaluation.tasks import TaskUnavailable
from ecg_jax.training.parallel import AXIS, replicate

# Batches read before they are needed.
_AHEAD = 2

# More attention heads are not proposed to anybody.
_MOST_HEADS = 32

#: Moments of AdamW with torch's constants, which are optax's too (spec §5.0).
ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


def is_regression(examples: Examples) -> bool:
    """Whether the targets are values instead of classes."""
    return examples.task.kind == "regression"


def check_trainable(examples: Examples, *, mode: str, batch_size: int, epochs: int, mesh: Mesh) -> None:
    """Refuses what cannot be trained or chosen between.

    Args:
        examples: what to train and validate on.
        mode: "frozen", "finetune" or "supervised": the section of the config that errors name.
        batch_size, epochs, mesh: of the fit.

    Raises:
        TaskUnavailable: fewer training records than devices or than a batch, or no target that a validation score can
            be computed from.
        UserError: no epoch, or a batch that does not divide over the devices.
    """
    if epochs < 1:
        raise UserError(f"--config.{mode}.epochs={epochs} must be at least 1.")
    n_train, n_val = len(examples.train.rows), len(examples.val.rows)
    if n_train < mesh.size:
        raise TaskUnavailable(
            f"There are {n_train} training records, fewer than the {mesh.size} devices that share a batch; use more "
            "data or fewer devices."
        )
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(
            f"--config.{mode}.batch_size={batch_size} cannot be shared evenly by {mesh.size} devices; use a multiple "
            f"of {mesh.size}."
        )
    if n_train < batch_size:
        raise TaskUnavailable(
            f"There are {n_train} training records, fewer than --config.{mode}.batch_size={batch_size}, so that an "
            "epoch has no batch; lower it or use more data."
        )
    targets = examples.val.targets
    known = (~np.isnan(targets)).any(axis=0) if is_regression(examples) else metrics.has_both_kinds(targets)
    if not known.any():
        missing = "known value" if is_regression(examples) else "class with both positives and negatives"
        raise TaskUnavailable(
            f"There is no {missing} among the {n_val} validation records, so no epoch can be chosen; use more data."
        )


def check_attention_heads(width: int, attention_heads: int, mode: str) -> None:
    """Refuses attention heads that do not divide the width D of an encoder's tokens.

    Raises:
        UserError: names the field of config.<mode> and the numbers that do.
    """
    if attention_heads < 1 or width % attention_heads:
        fitting = [str(n) for n in range(1, min(width, _MOST_HEADS) + 1) if width % n == 0]
        raise UserError(
            f"--config.{mode}.attention_heads={attention_heads} does not divide the width {width} of the encoder's "
            f"tokens; use one of {', '.join(fitting)}."
        )


def read_ahead(read: Callable[[int], Any], steps: int) -> Iterator[Any]:
    """read(0), read(1), ... read(steps - 1), each made in a thread before it is asked for."""
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(read, step) for step in range(min(_AHEAD, steps)))
        for step in range(steps):
            result = pending.popleft().result()
            if step + _AHEAD < steps:
                pending.append(pool.submit(read, step + _AHEAD))
            yield result


def draw(seed: int, epoch: int, step: int, n: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of n records a step sees, and a uniform number for the crop of each; every epoch drops its last n mod B.

    Both are functions of (seed, position) as in `data.pipeline`, so they depend neither on devices nor on what was
    trained before.

    Returns:
        int64 [B], each record at most once in an epoch, and float64 [B] in [0, 1).
    """
    position = np.int64(epoch) * n + step * batch_size + np.arange(batch_size)
    return shuffled_by_position(seed, position, n), uniform_by_position(seed, position)


def crop_reader(
    part: Part, *, window: int, seed: int, epoch: int, batch_size: int
) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> {"signal": int16 [B, T, C], "targets": float32 [B, K], "record_index": int32 [B]}: one uniform crop of
    each of the records that `draw` names.
    """
    offsets, choices = part.column("offset"), part.column("length") - window + 1
    targets = part.targets.astype(np.float32)

    def read(step: int) -> dict[str, np.ndarray]:
        chosen, uniform = draw(seed, epoch, step, len(part.rows), batch_size)
        start = offsets[chosen] + (uniform * choices[chosen]).astype(np.int64)
        return {
            "signal": part.store.read_crops(start, window),
            "targets": targets[chosen],
            "record_index": np.arange(batch_size, dtype=np.int32),
        }

    return read


def predict_crops(
    run: Callable[[np.ndarray], jax.Array],
    read: Callable[[int, int], np.ndarray],
    n_crops: int,
    batch_size: int,
) -> np.ndarray:
    """Runs a program over crops 0 .. n-1 in batches of one shape.

    Args:
        run: crops [B, ...] -> [B, ...].
        read: (first, last) -> [last - first, ...], crops first .. last - 1.
        n_crops: n.
        batch_size: B; the last batch is filled up with zeros.

    Returns:
        float32 [n, ...].
    """

    def batch(step: int) -> np.ndarray:
        return read(step * batch_size, min((step + 1) * batch_size, n_crops))

    # Waits for each result: programs that do not depend on each other can block each other on a CPU of few threads.
    batches = read_ahead(batch, -(-n_crops // batch_size))
    return np.concatenate([encode_padded(run, rows, batch_size) for rows in batches])


def masked_loss(outputs: jax.Array, targets: jax.Array, *, regression: bool, axis_name: str) -> jax.Array:
    """For every label the mean over its known records of the global batch, then the mean over labels (spec §7.2).

    The term is BCE with logits, or |output - target|. Labels without any known record in the batch are left out;
    where nothing is unknown this is the mean over all entries.

    Args:
        outputs: [B, K] logits or values.
        targets: [B, K], NaN where unknown.
        regression: which of the two.
        axis_name: mapped axis of the devices.

    Returns:
        Scalar; 0 where nothing is known.
    """
    known = ~jnp.isnan(targets)
    targets = jnp.where(known, targets, 0.0)
    term = jnp.abs(outputs - targets) if regression else optax.sigmoid_binary_cross_entropy(outputs, targets)
    sums = jnp.where(known, term, 0.0).sum(axis=0), known.sum(axis=0) * 1.0
    # The mean over devices is as good as the sum: a label's quotient is the same.
    total, count = jax.lax.pmean(sums, axis_name)
    per_label = total / jnp.where(count > 0, count, 1.0)
    return per_label.sum() / jnp.maximum((count > 0).sum(), 1)


@functools.lru_cache(maxsize=8)
def head_init(head: nn.Module, width: int) -> Callable[[jax.Array], Any]:
    """keys [H] -> the parameters of H heads on tokens of this width, stacked along the first axis; kept, so that
    another task or seed compiles nothing again.
    """
    return jax.jit(jax.vmap(lambda key: head.init(key, jnp.zeros((1, 1, width)))["params"]))


def n_parameters(params: Any) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(params))


def adamw(params, grads, moments, *, learning_rates, weight_decay, decays=None):
    """One step of AdamW with decoupled decay: p <- p - learning_rate * (m / (sqrt(v) + eps) + decay * p).

    Args:
        params, grads: trees.
        moments: of `ADAM`.
        learning_rates: tree like params of scalars.
        weight_decay: scalar.
        decays: tree like params of True and False: whether the leaf decays; None for all.

    Returns:
        (params, moments).
    """
    direction, moments = ADAM.update(grads, moments, params)
    decays = jax.tree.map(lambda _: True, params) if decays is None else decays

    def step(p, d, rate, decay):
        return p - rate * (d + weight_decay * p if decay else d)

    return jax.tree.map(step, params, direction, learning_rates, decays), moments


def map_training(step: Callable, mesh: Mesh) -> Callable:
    """(state, fixed, batch) -> (state, losses): state and fixed replicated, state donated, batch split."""
    specs = {"in_specs": (P(), P(), P(AXIS)), "out_specs": (P(), P())}
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=True, **specs), donate_argnums=0)


def map_prediction(predict: Callable, mesh: Mesh) -> Callable:
    """(state, fixed, batch) -> [B, ...], split over the devices as the batch is."""
    specs = {"in_specs": (P(), P(), P(AXIS)), "out_specs": P(AXIS)}
    return jax.jit(jax.shard_map(predict, mesh=mesh, check_vma=True, **specs))


def score(examples: Examples, part: Part, predictions: np.ndarray) -> float:
    """Macro AUROC, or the mean over targets of the mean absolute error; undefined ones are left out.

    NaN if none is defined, or if a prediction is NaN.
    """
    if not np.isfinite(predictions).all():
        return float("nan")
    if is_regression(examples):
        per_target, _ = metrics.mean_absolute_error(part.targets, predictions)
        return float(metrics.macro(per_target))
    return metrics.macro_auroc(part.targets, predictions)


def better(examples: Examples, new, old):
    """Whether a score beats another: the lower error, the higher AUROC. NaN beats nothing and loses to all."""
    new, old = (np.asarray(v, np.float64) * (-1.0 if is_regression(examples) else 1.0) for v in (new, old))
    return (new > old) | (np.isnan(old) & ~np.isnan(new))


def number(value) -> float | None:
    """A number as JSON knows it: None for NaN and infinity."""
    return float(value) if np.isfinite(value) else None


def host_copy(tree: Any) -> Any:
    """The tree as NumPy arrays that share no memory with the device's."""
    return jax.tree.map(np.array, jax.device_get(tree))


def place(tree: Any, mesh: Mesh) -> Any:
    """A copy of the tree on every device. What is donated later must not be somebody else's buffer."""
    return replicate(jax.tree.map(jnp.array, tree), mesh)
