"""The programs of the frozen mode: many heads, one encoder, the tokens of a batch computed once for all of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ecg_jax.evaluation import head_training as training
from ecg_jax.models.encoder import Encoder
from ecg_jax.models.inputs import to_model_input
from ecg_jax.training.parallel import AXIS


class Programs(NamedTuple):
    """The programs of a pair of encoder and head, see `programs`."""

    train: Callable
    predict: Callable
    encode: Callable


@functools.lru_cache(maxsize=8)
def programs(
    encoder: Encoder,
    head: nn.Module,
    normalisation: str,
    kept_leads: tuple[str, ...],
    regression: bool,
    mesh: Mesh,
) -> Programs:
    """Training step and prediction of all heads, and the tokens of a batch; kept from fit to fit.

    A batch has `signal` int16 [B, T, C] or `tokens` [B, L, D], and `targets` [B, K] to train on. State: `params` and
    `moments`, each leaf with a leading axis of H heads. Fixed: `variables` of the encoder, `learning_rate` [H] and
    `weight_decay`. Step: (state, fixed, batch) -> (state, losses [H]); prediction -> [B, H, K]; tokens -> [B, L, D].
    """

    def tokens_of(fixed, batch):
        if "tokens" in batch:
            return batch["tokens"].astype(jnp.float32)
        x = to_model_input(batch["signal"], normalisation, kept_leads)
        return encoder.apply(fixed["variables"], x, train=False)[0].astype(jnp.float32)

    def train(state, fixed, batch):
        tokens = tokens_of(fixed, batch)

        def one(params, moments, learning_rate):
            def loss_fn(params):
                outputs = head.apply({"params": params}, tokens)
                return training.masked_loss(outputs, batch["targets"], regression=regression, axis_name=AXIS)

            loss, grads = jax.value_and_grad(loss_fn)(params)
            grads = jax.lax.pmean(grads, AXIS)
            rates = jax.tree.map(lambda _: learning_rate, params)
            settings = {"learning_rates": rates, "weight_decay": fixed["weight_decay"]}
            return *training.adamw(params, grads, moments, **settings), loss

        params, moments, losses = jax.vmap(one)(state["params"], state["moments"], fixed["learning_rate"])
        return {"params": params, "moments": moments}, losses

    def predict(state, fixed, batch):
        tokens = tokens_of(fixed, batch)
        outputs = jax.vmap(lambda params: head.apply({"params": params}, tokens), out_axes=1)(state["params"])
        return outputs if regression else jax.nn.sigmoid(outputs)

    return Programs(
        training.map_training(train, mesh),
        training.map_prediction(predict, mesh),
        training.map_prediction(lambda _, fixed, batch: tokens_of(fixed, batch), mesh),
    )


def initial_heads(head: nn.Module, grid: Sequence[tuple[int, float]], width: int) -> dict[str, Any]:
    """`params` and `moments` of one head for each (seed, learning rate), stacked along the first axis."""
    keys = jax.vmap(jax.random.key)(jnp.asarray([seed for seed, _ in grid], jnp.uint32))
    params = training.head_init(head, width)(keys)
    return {"params": params, "moments": jax.jit(jax.vmap(training.ADAM.init))(params)}
