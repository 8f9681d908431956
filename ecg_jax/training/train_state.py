"""What a pretraining run carries from step to step, and the step itself."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ecg_jax.models.encoder import constants
from ecg_jax.models.inputs import to_model_input
from ecg_jax.objectives.contract import Inputs, Terms
from ecg_jax.objectives.teacher import Teacher
from ecg_jax.training.parallel import AXIS


class TrainState(flax.struct.PyTreeNode):
    """State of a run. Everything but the two bases is checkpointed; they are derived from the `ssm`
    collections.

    Attributes:
        step: int32, number of optimiser updates done.
        params, opt_state: what the optimiser moves, and its moments.
        batch_stats: running statistics of the BatchNorms.
        ssm: fixed state matrices of the S4 layers: of the backbone unless they are trained, and of an S4 head.
        objective_state: codebooks and prototypes ({} for objectives without).
        teacher: the teacher's collections `params`, `batch_stats` and `ssm` ({} for objectives without).
        basis, teacher_basis: kernel bases derived from `ssm`, see `models.s4.kernel_bases`.
        rng: typed key of the run; every step folds its number in, so it never changes.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    batch_stats: Any
    ssm: Any
    objective_state: Any
    teacher: Any
    basis: Any
    teacher_basis: Any
    rng: jax.Array

    def variables(self) -> dict[str, Any]:
        """Collections for `model.apply`."""
        collections = {name: getattr(self, name) for name in ("params", "batch_stats", *_OPTIONAL)}
        return {name: tree for name, tree in collections.items() if tree or name not in _OPTIONAL}

    def teacher_variables(self) -> dict[str, Any]:
        """Collections for the teacher's `encoder.apply`."""
        return self.teacher | ({"basis": self.teacher_basis} if self.teacher_basis else {})


_OPTIONAL = ("ssm", "basis", "objective_state")


def seed_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Keys of a run: of its initial parameters, and `TrainState.rng`."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    return init_key, run_key


def step_keys(rng: jax.Array, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Keys of a step for the streams "objective" and "dropout"."""
    objective_key, dropout_key = jax.random.split(jax.random.fold_in(rng, step))
    return objective_key, dropout_key


def create_train_state(
    model,
    tx,
    *,
    seed: int,
    window_samples: int,
    leads: int,
    tokens: int,
    l_max: int,
    teacher: Teacher | None = None,
) -> TrainState:
    """Freshly initialised `TrainState`, on the default device.

    Args:
        model: an objective, e.g. `objectives.cpc.CPC`, built without axis name.
        tx: optimiser.
        seed: of parameters and of every random choice during training.
        window_samples, leads: T and C of a batch.
        tokens: L that the stem makes of T.
        l_max: tokens for which C is length-corrected.
        teacher: for objectives that have one.
    """
    init_key, run_key = seed_keys(seed)
    x, record_index = jnp.zeros((2, window_samples, leads)), jnp.arange(2)

    def init_teacher(key):
        (tokens, out), variables = model.encoder.init_with_output(key, x, record_index, train=False)
        return {"tokens": tokens, **out}, variables

    def init(key):
        features, random = init_teacher(jax.random.fold_in(key, 1)) if teacher else (None, {})
        keys = dict(zip(("params", "objective", "dropout"), jax.random.split(key, 3), strict=True))
        inputs = Inputs(x=x, record_index=record_index, step=jnp.zeros((), jnp.int32), teacher=features)
        variables = model.init(keys, inputs, train=False)
        return variables, tx.init(variables["params"]), random

    variables, opt_state, random = jax.jit(init)(init_key)
    teacher_variables = {}
    if teacher:
        student = {name: tree["encoder"] for name, tree in variables.items() if "encoder" in tree}
        teacher_variables = teacher.initial(student, random)
    return assemble_state(variables, opt_state, teacher_variables, rng=run_key, tokens=tokens, l_max=l_max)


def assemble_state(
    variables: dict[str, Any],
    opt_state: Any,
    teacher: dict[str, Any],
    *,
    rng: jax.Array,
    tokens: int,
    l_max: int,
) -> TrainState:
    """The state at step 0 from the collections of an objective and of its teacher ({} for none)."""
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        opt_state=opt_state,
        batch_stats=variables["batch_stats"],
        ssm=variables.get("ssm", {}),
        objective_state=variables.get("objective_state", {}),
        teacher=teacher,
        basis={},
        teacher_basis={},
        rng=rng,
    )
    return with_bases(state, tokens=tokens, l_max=l_max)


def with_bases(state: TrainState, *, tokens: int, l_max: int) -> TrainState:
    """The state with its kernel bases made from its own `ssm` collections, on the host; after a restore too, since a
    freshly made state may have drawn other step sizes.
    """

    def basis(ssm):
        return constants({"ssm": ssm}, length=tokens, l_max=l_max)["basis"] if ssm else {}

    return state.replace(basis=basis(state.ssm), teacher_basis=basis(state.teacher.get("ssm", {})))


def _mean_over(term: tuple[jax.Array, jax.Array], axis_name: str | None) -> jax.Array:
    """Weighted mean of (values [B], weights [B]) over the global batch; 0 without any weight."""
    values, weights = term
    total, weight = (values * weights).sum(), weights.sum()
    if axis_name:
        total, weight = jax.lax.pmean((total, weight), axis_name)
    return total / jnp.where(weight > 0, weight, 1.0)


def _inputs(
    state: TrainState,
    batch: dict[str, jax.Array],
    normalisation: str,
    kept_leads: tuple[str, ...],
    axis_name: str | None,
) -> Inputs:
    return Inputs(
        x=to_model_input(batch["signal"], normalisation, kept_leads),
        record_index=batch["record_index"],
        step=state.step,
        labels=batch.get("labels"),
        axis_name=axis_name,
    )


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model,
    tx,
    normalisation: str,
    kept_leads: tuple[str, ...],
    teacher: Teacher | None = None,
    accumulate: int = 1,
    axis_name: str | None = AXIS,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser update, as seen by one device.

    With `accumulate` n > 1 the batch passes through the model in n parts, row r in part r mod n whatever the number
    of devices, and the update takes the mean of their gradients. That saves memory, not communication: the gradients
    of every part are averaged over the devices. Each part has its own means over masked tokens, batch statistics and
    clusters; running statistics and codebooks go from part to part, the teacher's parameters move once. (HuBERT++
    draws its first prototypes anew in every part of step 0.)

    Args:
        state: replicated.
        batch: this device's rows: `signal` int16 [B, T, C] in microvolts, `record_index` int32 [B], the
            number of each row within the global batch, and for offline targets `labels` int32 [B, L]. Masks,
            negatives and dropout derive from `record_index`, so they do not depend on the number of devices.
        model: the objective, built with the same axis name.
        tx: optimiser.
        normalisation, kept_leads: see `models.inputs`.
        teacher: for objectives that have one.
        accumulate: n, a divisor of this device's rows.
        axis_name: mapped axis; None for a single device without a map.

    Returns:
        The next state and scalar metrics: `loss`, its terms, the objective's metrics, `grad_norm`.
    """

    def gradients(state, rows):
        return _gradients(state, rows, model, normalisation, kept_leads, teacher, axis_name)

    if accumulate == 1:
        state, grads, metrics = gradients(state, batch)
    else:
        parts = jax.tree.map(
            lambda rows: jnp.swapaxes(rows.reshape(-1, accumulate, *rows.shape[1:]), 0, 1), batch
        )

        def add(carry, rows):
            state, *sums = carry
            state, *more = gradients(state, rows)
            return (state, *jax.tree.map(jnp.add, sums, more)), None

        one = jax.eval_shape(gradients, state, jax.tree.map(lambda rows: rows[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one[1:])
        (state, grads, metrics), _ = jax.lax.scan(add, (state, *zeros), parts)
        grads, metrics = jax.tree.map(lambda total: total / accumulate, (grads, metrics))

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    next_teacher = state.teacher
    if teacher:
        student = {"params": params["encoder"], "batch_stats": state.batch_stats["encoder"]}
        next_teacher = teacher.follow(next_teacher, student, state.step)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, teacher=next_teacher)
    return state, metrics | {"grad_norm": optax.tree.norm(grads)}


def _gradients(
    state: TrainState,
    batch: dict[str, jax.Array],
    model,
    normalisation: str,
    kept_leads: tuple[str, ...],
    teacher: Teacher | None,
    axis_name: str | None,
) -> tuple[TrainState, Any, dict[str, jax.Array]]:
    """The state with the statistics and codebooks that a batch moves, its gradients, and its metrics with `loss`."""
    objective_key, dropout_key = step_keys(state.rng, state.step)
    inputs = _inputs(state, batch, normalisation, kept_leads, axis_name)
    next_teacher = state.teacher
    if teacher:
        features, statistics = teacher.features(
            model.encoder,
            state.teacher_variables(),
            inputs.x,
            inputs.record_index,
            dropout_key=jax.random.fold_in(dropout_key, 1),
        )
        inputs = inputs.replace(teacher=features)
        next_teacher = state.teacher | {"batch_stats": statistics}

    def loss_fn(params):
        (losses, metrics), updates = model.apply(
            {**state.variables(), "params": params},
            inputs,
            train=True,
            rngs={"objective": objective_key, "dropout": dropout_key},
            mutable=["batch_stats", "objective_state"],
        )
        losses = {name: _mean_over(term, axis_name) for name, term in losses.items()}
        metrics = {name: _mean_over(term, axis_name) for name, term in metrics.items()}
        return sum(losses.values()), (losses | metrics, updates)

    # pmean of the loss inside (in _mean_over) and of the gradients outside: the one idiom that is right under
    # shard_map with and without check_vma and under pmap.
    (total, (metrics, changed)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    if axis_name:
        grads = jax.lax.pmean(grads, axis_name)
    state = state.replace(
        batch_stats=changed["batch_stats"],
        objective_state=changed["objective_state"] if state.objective_state else {},
        teacher=next_teacher,
    )
    return state, grads, metrics | {"loss": total}


def eval_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model,
    normalisation: str,
    kept_leads: tuple[str, ...],
    teacher: Teacher | None = None,
    axis_name: str | None = AXIS,
) -> dict[str, Terms]:
    """Losses and metrics of one batch of held-out crops, in evaluation mode, as seen by one device.

    Args:
        state, model, normalisation, kept_leads, teacher, axis_name: as in `train_step`.
        batch: as in `train_step`, with `record_index` the number of each crop in the validation set (so that
            negatives are the same at every evaluation) and `weight` float32 [B], 0 for rows that only fill
            the last batch. They count in no mean, but among the tokens of the batch over which HuBERT++ balances its
            targets and over which `perplexity` and `dead_codes` are taken.

    Returns:
        {"losses": ..., "metrics": ...}, each name -> (sum of weighted values, sum of weights) over the global
        batch.
    """
    inputs = _inputs(state, batch, normalisation, kept_leads, axis_name)
    if teacher:
        features = teacher.eval_features(model.encoder, state.teacher_variables(), inputs.x)
        inputs = inputs.replace(teacher=features)
    losses, metrics = model.apply(state.variables(), inputs, train=False, rngs={"objective": state.rng})

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
        {name: value / weight if weight else 0.0 for name, (value, weight) in total[kind].items()}
        for kind in ("losses", "metrics")
    )
    return {"loss": sum(losses.values()), **losses, **metrics}
