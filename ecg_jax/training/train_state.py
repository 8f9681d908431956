"""What a pretraining run carries from step to step, and the step itself."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ecg_jax.models.encoder import constants
from ecg_jax.models.inputs import to_model_input
from ecg_jax.training.parallel import AXIS


class TrainState(flax.struct.PyTreeNode):
    """State of a run. Everything but `basis` is checkpointed; `basis` is derived from `ssm`.

    Attributes:
        step: int32, number of optimiser updates done.
        params, opt_state: what the optimiser moves, and its moments.
        batch_stats: running statistics of the BatchNorms.
        ssm: fixed state matrices of the S4 layers ({} when they are trained).
        basis: kernel bases derived from `ssm`, see `models.s4.kernel_bases`.
        rng: typed key of the run; every step folds its number in, so it never changes.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    batch_stats: Any
    ssm: Any
    basis: Any
    rng: jax.Array

    def variables(self) -> dict[str, Any]:
        """Collections for `model.apply`."""
        return {
            "params": self.params,
            "batch_stats": self.batch_stats,
            **({"ssm": self.ssm, "basis": self.basis} if self.ssm else {}),
        }


def create_train_state(model, tx, *, seed: int, window_samples: int, leads: int, tokens: int, l_max: int):
    """Freshly initialised `TrainState`, on the default device.

    Args:
        model: an objective, e.g. `objectives.cpc.CPC`, built without axis name.
        tx: optimiser.
        seed: of parameters and of every random choice during training.
        window_samples, leads: T and C of a batch.
        tokens: L that the stem makes of T.
        l_max: tokens for which C is length-corrected.
    """
    root = jax.random.key(seed)
    init_key, run_key = jax.random.split(root)

    def init(key):
        keys = dict(zip(("params", "objective", "dropout"), jax.random.split(key, 3), strict=True))
        x = jnp.zeros((2, window_samples, leads))
        variables = model.init(keys, x, jnp.arange(2), train=False)
        return variables, tx.init(variables["params"])

    variables, opt_state = jax.jit(init)(init_key)
    fixed = constants(variables, length=tokens, l_max=l_max)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        opt_state=opt_state,
        batch_stats=variables["batch_stats"],
        ssm=variables["ssm"] if fixed else {},
        basis=fixed["basis"] if fixed else {},
        rng=run_key,
    )


def _mean_over(term: tuple[jax.Array, jax.Array], axis_name: str | None) -> jax.Array:
    """Weighted mean of (values [B], weights [B]) over the global batch."""
    values, weights = term
    total, weight = (values * weights).sum(), weights.sum()
    if axis_name:
        total, weight = jax.lax.pmean((total, weight), axis_name)
    return total / weight


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model,
    tx,
    normalisation: str,
    axis_name: str | None = AXIS,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser update, as seen by one device.

    Args:
        state: replicated.
        batch: this device's rows: `signal` int16 [B, T, C] in microvolts, `record_index` int32 [B], the
            number of each row within the global batch. Masks, negatives and dropout derive from it, so they
            do not depend on the number of devices.
        model: the objective, built with the same axis name.
        tx: optimiser.
        normalisation: see `models.inputs`.
        axis_name: mapped axis; None for a single device without a map.

    Returns:
        The next state and scalar metrics: `loss`, its terms, the objective's metrics, `grad_norm`.
    """
    objective_key, dropout_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
    x = to_model_input(batch["signal"], normalisation)

    def loss_fn(params):
        (losses, metrics), updates = model.apply(
            {**state.variables(), "params": params},
            x,
            batch["record_index"],
            train=True,
            rngs={"objective": objective_key, "dropout": dropout_key},
            mutable=["batch_stats"],
        )
        losses = {name: _mean_over(term, axis_name) for name, term in losses.items()}
        metrics = {name: _mean_over(term, axis_name) for name, term in metrics.items()}
        return sum(losses.values()), (losses | metrics, updates["batch_stats"])

    # pmean of the loss inside (in _mean_over) and of the gradients outside: the one idiom that is right under
    # shard_map with and without check_vma and under pmap.
    (total, (metrics, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    if axis_name:
        grads = jax.lax.pmean(grads, axis_name)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        batch_stats=batch_stats,
    )
    return state, metrics | {"loss": total, "grad_norm": optax.tree.norm(grads)}


def eval_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model,
    normalisation: str,
    axis_name: str | None = AXIS,
) -> dict[str, dict[str, tuple[jax.Array, jax.Array]]]:
    """Losses and metrics of one batch of held-out crops, in evaluation mode, as seen by one device.

    Args:
        state, model, normalisation, axis_name: as in `train_step`.
        batch: as in `train_step`, with `record_index` the number of each crop in the validation set (so that
            negatives are the same at every evaluation) and `weight` float32 [B], 0 for rows that only fill
            the last batch.

    Returns:
        {"losses": ..., "metrics": ...}, each name -> (sum of weighted values, sum of weights) over the global
        batch.
    """
    x = to_model_input(batch["signal"], normalisation)
    losses, metrics = model.apply(
        state.variables(), x, batch["record_index"], train=False, rngs={"objective": state.rng}
    )

    def summed(term):
        values, weights = term
        weights = weights * batch["weight"]
        pair = (values * weights).sum(), weights.sum()
        return jax.lax.psum(pair, axis_name) if axis_name else pair

    return {
        "losses": {name: summed(term) for name, term in losses.items()},
        "metrics": {name: summed(term) for name, term in metrics.items()},
    }


def mean_of_sums(batches: list[dict]) -> dict[str, float]:
    """Means over all batches from what `eval_step` returned for each; `loss` is the sum of the loss terms. {}
    for no batch.
    """
    if not batches:
        return {}
    total = jax.tree.map(lambda *parts: float(sum(parts)), *batches)
    losses, metrics = (
        {name: value / weight for name, (value, weight) in total[kind].items()}
        for kind in ("losses", "metrics")
    )
    return {"loss": sum(losses.values()), **losses, **metrics}
