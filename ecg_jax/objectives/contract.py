"""What the training step hands to an objective, and what it gets back.

An objective is a Flax module with the fields `encoder`, `width`, `dtype` and those of `config.objective`:

    def __call__(self, inputs: Inputs, *, train: bool) -> tuple[Terms, Terms]

It returns losses and metrics, each name -> (values [B], weights [B]). A term is the weighted mean over the global
batch, 0 where no record has a weight; the loss is the sum of all losses. A mean over masked tokens is the mean of
each record with the number of its masked tokens as weight: `mean_over_tokens`. A number that is global already is
returned by `global_metric`.

Randomness comes from `make_rng("objective")`, folded with the record's number; dropout takes `record_index` too.
State other than parameters (codebooks, prototypes) lives in the collection "objective_state", the same on every
device: sums over tokens that enter it are taken over `inputs.axis_name`. It is saved with every checkpoint.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ecg_jax.models.heads import S4Head
from ecg_jax.objectives.masking import Mask

Terms = dict[str, tuple[jax.Array, jax.Array]]


class Inputs(flax.struct.PyTreeNode):
    """One batch, as one device sees it.

    Attributes:
        x: [B, T, C] model input, normalised, nothing hidden. Token l of the stem is centred on sample 2 l.
        record_index: int32 [B], number of each record within the global batch.
        step: int32 [], optimiser updates done before this one.
        teacher: for objectives with a teacher, what its encoder makes of x, without gradient: "tokens" [B, L,
            D], "stem" and the backbone's intermediates ("layer{i}", "block{i}"); None for the others.
        labels: int32 [B, L], offline targets, -1 where there is none; None unless the run reads them.
        axis_name: mapped device axis; None outside a map.
    """

    x: jax.Array
    record_index: jax.Array
    step: jax.Array
    teacher: dict[str, jax.Array] | None = None
    labels: jax.Array | None = None
    axis_name: str | None = flax.struct.field(pytree_node=False, default=None)


def encode_masked(objective: nn.Module, inputs: Inputs, *, train: bool) -> tuple[jax.Array, Mask]:
    """What the student makes of a batch of which it sees a part: tokens [B, L, D], and the masks.

    Args:
        objective: with the fields `encoder`, `width` and `mask`, inside its compact `__call__`; gets the parameter
            `mask_token` [D], drawn from N(0, 1).
        inputs, train: as given to it.
    """
    x, record_index = inputs.x, inputs.record_index
    mask = objective.mask.draw(
        objective.make_rng("objective"), record_index, samples=x.shape[1], leads=x.shape[2]
    )
    mask_token = objective.param("mask_token", nn.initializers.normal(1.0), (objective.width,))
    tokens, _ = objective.encoder(
        mask.hide(x), record_index, train=train, hidden=mask.hidden, mask_token=mask_token
    )
    return tokens, mask


def predict_with_s4(
    objective: nn.Module, tokens: jax.Array, inputs: Inputs, *, out: int, train: bool
) -> jax.Array:
    """Predictions float32 [B, L, out] from tokens [B, L, D] by an S4 head, the submodule `head`.

    Args:
        objective: with the fields `encoder`, `width`, `head_state`, `head_dropout` and `dtype`, inside its compact
            `__call__`.
        tokens, inputs, train: of the student.
        out: width of the predictions.
    """
    head = S4Head(
        width=objective.width,
        out=out,
        l_max=objective.encoder.l_max,
        state=objective.head_state,
        dropout=objective.head_dropout,
        conv=objective.encoder.conv,
        dtype=objective.dtype,
        name="head",
    )
    return head(tokens, inputs.record_index, train=train)


def mean_over_tokens(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The term whose global value is the mean of `values` [B, L] under `weights` [B, L]."""
    weights = weights.astype(jnp.float32)
    total = weights.sum(axis=1)
    return (values * weights).sum(axis=1) / jnp.where(total > 0, total, 1.0), total


def global_metric(value: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
    """The term whose global value is `value`, a scalar that is the same on every device."""
    return jnp.full(batch, value, jnp.float32), jnp.ones(batch, jnp.float32)


def last_layers(intermediates: dict[str, jax.Array], kind: str, count: int) -> list[jax.Array]:
    """The last `count` intermediates called `kind` + number, the deepest last.

    Raises:
        ValueError: there are fewer.
    """
    depth = sum(name.startswith(kind) and name.removeprefix(kind).isdigit() for name in intermediates)
    if not 1 <= count <= depth:
        raise ValueError(f"top_k={count} must lie between 1 and {depth}, the layers of the backbone")
    return [intermediates[f"{kind}{i}"] for i in range(depth - count, depth)]


def smooth_l1(predicted: jax.Array, targets: jax.Array, beta: float) -> jax.Array:
    """0.5 e^2 / beta below |e| = beta and |e| - 0.5 beta above; the squared error e^2 for beta = 0 (spec
    §5.5).
    """
    error = predicted - targets
    if beta == 0:
        return jnp.square(error)
    size = jnp.abs(error)
    return jnp.where(size < beta, 0.5 * jnp.square(error) / beta, size - 0.5 * beta)
