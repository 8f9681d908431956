"""What a training step of the frozen mode costs, heads together against one by one, and of fine-tuning beside it.

    pytest tests/benchmarks/test_finetune_benchmark.py --benchmark-only -s

Eight attention heads (four learning rates of two seeds) of 71 classes on the encoder of configs/cpc.py, windows of
2.5 s, on one device, by a step each, programs taking turns:
- from the signal: eight heads on tokens that are computed once, against eight runs with their own encoder pass;
- from kept tokens (float16): eight heads in one program against eight programs;
- attention pooling as it is written, against keys and values projected token by token, one head from kept tokens;
- a step of fine-tuning against one of eight frozen heads.

`ECG_JAX_BENCHMARK_BATCH` changes the batch (16), `ECG_JAX_BENCHMARK_ROUNDS` the turns (7).
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ecg_jax.config_flags import load_config
from ecg_jax.evaluation import finetune
from ecg_jax.evaluation.frozen_heads import initial_heads, programs
from ecg_jax.evaluation.head_training import ADAM, place
from ecg_jax.models.encoder import build_encoder, constants
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.models.layers import uniform_fan_in
from ecg_jax.models.probe_heads import AttentionPool, HeadedEncoder, MeanLinear
from ecg_jax.studies.timing import time_in_turns
from ecg_jax.training.parallel import AXIS, shard_batch

BATCH = int(os.environ.get("ECG_JAX_BENCHMARK_BATCH", "16"))
ROUNDS = int(os.environ.get("ECG_JAX_BENCHMARK_ROUNDS", "7"))
CLASSES, TOKENS, WIDTH = 71, 300, 512
GRID = [(seed, rate) for seed in (0, 1) for rate in (3e-4, 1e-3, 3e-3, 1e-2)]
NORMALISATION = "ptbxl_canonical"


class ProjectedPool(nn.Module):
    """`AttentionPool` with a key and a value for each token."""

    out: int
    heads: int = 16

    @nn.compact
    def __call__(self, tokens):
        D = tokens.shape[-1]
        query = self.param("query", nn.initializers.normal(D**-0.5), (D,))
        W_q, W_k, W_v = (self.param(f"{name}_proj", uniform_fan_in, (D, D)) for name in "qkv")
        q = (query @ W_q).reshape(self.heads, -1)
        k, v = ((tokens @ W).reshape(*tokens.shape[:2], self.heads, -1) for W in (W_k, W_v))
        weights = nn.softmax(jnp.einsum("blhe,he->bhl", k, q) * (D // self.heads) ** -0.5, axis=-1)
        values = jnp.einsum("bhl,blhe->bhe", weights, v).reshape(-1, D)
        return values @ self.param("c_proj", uniform_fan_in, (D, self.out))


class Bench:
    """The programs and what they are fed."""

    def __init__(self):
        self.mesh = Mesh(np.asarray(jax.devices()[:1]), (AXIS,))
        self.model = load_config("configs/cpc.py").model.to_dict()
        self.encoder = build_encoder(**self.model)
        x = jnp.zeros((1, 2 * TOKENS, 12))
        variables = jax.jit(lambda: self.encoder.init(jax.random.key(0), x, train=False))()
        self.variables = variables | constants(
            jax.device_get(variables), length=TOKENS, l_max=self.model["l_max"]
        )
        rng = np.random.default_rng(0)
        batch = {
            "signal": rng.integers(-999, 999, (BATCH, 2 * TOKENS, 12)).astype(np.int16),
            "tokens": rng.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float16),
            "targets": rng.integers(0, 2, (BATCH, CLASSES)).astype(np.float32),
            "record_index": np.arange(BATCH, dtype=np.int32),
        }
        self.batch = shard_batch(batch, self.mesh)

    def frozen(self, grid, source, head=None):
        """A function that trains the heads of a grid for one step from `source`, "signal" or "tokens"."""
        head = AttentionPool(CLASSES) if head is None else head
        train = programs(self.encoder, head, NORMALISATION, ALL_LEADS, False, self.mesh).train
        fixed = {
            "variables": self.variables,
            "learning_rate": np.array([rate for _, rate in grid], np.float32),
            "weight_decay": np.float32(1e-3),
        }
        state = [place(initial_heads(head, grid, WIDTH), self.mesh)]
        fixed = place(fixed, self.mesh)
        batch = {name: self.batch[name] for name in (source, "targets")}

        def step():
            state[0], losses = train(state[0], fixed, batch)
            return losses

        return step

    def finetuned(self):
        """A function that trains encoder and linear head for one step."""
        network = HeadedEncoder(build_encoder(**self.model, axis_name=AXIS), MeanLinear(CLASSES))
        x = jnp.zeros((1, 2 * TOKENS, 12))
        params = jax.jit(lambda: network.init(jax.random.key(0), x, train=False)["params"])()
        state = {
            "params": params,
            "moments": jax.jit(ADAM.init)(params),
            "moving": {"batch_stats": {"encoder": self.variables["batch_stats"]}},
            "step": np.int32(0),
        }
        fixed = {
            "collections": {name: {"encoder": self.variables[name]} for name in ("ssm", "basis")},
            "seed": np.uint32(0),
            "learning_rates": jax.tree.map(lambda _: np.float32(1e-4), params),
            "weight_decay": np.float32(1e-3),
        }
        train, _ = finetune._programs(network, NORMALISATION, ALL_LEADS, False, self.mesh)
        state, fixed = (place(tree, self.mesh) for tree in (state, fixed))
        held = [state]
        batch = {name: self.batch[name] for name in ("signal", "targets", "record_index")}

        def step():
            held[0], loss = train(held[0], fixed, batch)
            return loss

        return step


def one_by_one(steps):
    def run():
        for step in steps:
            loss = jax.block_until_ready(step())
        return loss

    return run


@pytest.mark.benchmark(group="frozen")
def test_heads_together_and_one_by_one(benchmark):
    bench = Bench()
    work = {}
    for source in ("signal", "tokens"):
        work[f"8 heads together, {source}"] = bench.frozen(GRID, source)
        work[f"8 heads one by one, {source}"] = one_by_one([bench.frozen([one], source) for one in GRID])
    work["1 head, tokens"] = bench.frozen(GRID[:1], "tokens")
    work["1 head with projected tokens, tokens"] = bench.frozen(GRID[:1], "tokens", ProjectedPool(CLASSES))
    work["fine-tuning"] = bench.finetuned()
    with jax.default_matmul_precision("highest"):
        timings = benchmark.pedantic(lambda: time_in_turns(work, repeats=ROUNDS), rounds=1)
    seconds = {name: timing.median for name, timing in timings.items()}
    ratios = {
        f"one by one over together, {source}": seconds[f"8 heads one by one, {source}"]
        / seconds[f"8 heads together, {source}"]
        for source in ("signal", "tokens")
    }
    ratios["projected tokens over ours"] = (
        seconds["1 head with projected tokens, tokens"] / seconds["1 head, tokens"]
    )
    ratios["fine-tuning over 8 frozen heads, signal"] = (
        seconds["fine-tuning"] / seconds["8 heads together, signal"]
    )
    print(f"\n{jax.devices()[0].device_kind}, batch {BATCH}, {ROUNDS} turns")
    for name, timing in timings.items():
        print(f"{name}: {timing.median:.4f} s ({timing.low:.4f} to {timing.high:.4f})")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    benchmark.extra_info.update(ratios)
