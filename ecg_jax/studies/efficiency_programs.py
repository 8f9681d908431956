"""The programs whose cost `efficiency` measures: a training step and the encoder alone, on the first device."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ecg_jax.data.preprocessing import Preprocessing, parse_leads
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.models.encoder import build_encoder
from ecg_jax.run_setup import build_objective, build_optimiser, build_teacher, initial_state
from ecg_jax.studies import flops
from ecg_jax.studies.programs import Program, compile_program, memory_errors
from ecg_jax.studies.roofline import MATMUL_PRECISION
from ecg_jax.training import parallel
from ecg_jax.training.train_state import TrainState, seed_keys, train_step


def random_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """A batch of a run: random walks, int16 [B, T, C] in microvolts; no program's cost depends on the signal."""
    rng = np.random.default_rng(0)
    samples = round(config.data.window_s * config.data.rate_hz)
    steps = rng.integers(-50, 51, (config.batch_size, samples, len(CANONICAL_LEADS)), np.int16)
    batch = {
        "signal": np.cumsum(steps, axis=1, dtype=np.int16),
        "record_index": np.arange(config.batch_size, dtype=np.int32),
    }
    if config.objective.name == "hubert":
        shape = (config.batch_size, flops.tokens_of_window(config.data.window_s, config.data.rate_hz))
        batch["labels"] = rng.integers(0, config.objective.codes, shape, np.int32)
    return batch


class Model(NamedTuple):
    """What a config describes, ready to be compiled."""

    config: ConfigDict
    state: TrainState
    tx: Any
    teacher: Any

    def encoder_variables(self) -> dict[str, Any]:
        """Collections for the encoder's `apply`, in memory of their own: a step donates the state's."""
        variables = {
            name: tree["encoder"] for name, tree in self.state.variables().items() if "encoder" in tree
        }
        return jax.tree.map(jnp.copy, variables)


def build(config: ConfigDict) -> Model:
    """State, optimiser and teacher as a run of 1000 steps has them; the state lies on the first device.

    The parameters are drawn by the device's own generator: as good for a measurement, and a program that draws dozens
    of arrays by JAX's own takes several times as long to compile. The key that the steps take is one of JAX's own.
    """
    contract = Preprocessing(window_s=config.data.window_s, normalisation=config.data.normalisation)
    teacher, (_, tx) = build_teacher(config, steps=1000), build_optimiser(config, steps=1000)
    with jax.default_prng_impl("unsafe_rbg"):
        state = initial_state(config, tx, contract, teacher)
    state = parallel.replicate(state.replace(rng=seed_keys(config.seed)[1]), one_device())
    return Model(config, state, tx, teacher)


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    return Mesh(np.asarray(jax.devices()[:1]), (parallel.AXIS,))


def step_program(model: Model) -> Program:
    """One optimiser update, the program of `ecg-jax pretrain`: each call moves the state on."""
    config, mesh = model.config, one_device()
    step = functools.partial(
        train_step,
        model=build_objective(config, parallel.AXIS),
        tx=model.tx,
        normalisation=config.data.normalisation,
        kept_leads=parse_leads(config.data.leads),
        teacher=model.teacher,
        accumulate=config.accumulate,
    )
    states, batch = [model.state], parallel.shard_batch(random_batch(config), mesh)
    compiled, program = compile_program(
        parallel.map_train_step(step, mesh), states[0], batch, precision=config.precision
    )

    def run():
        states[0], metrics = compiled(states[0], batch)
        return metrics

    return program._replace(run=run)


def step_forward_flops(model: Model) -> float | None:
    """The compiler's count of a step without gradient and update: the loss in train mode, with the teacher, the running
    statistics and the codebooks. The program is compiled and never run; None where the compiler makes no count.
    """
    config = model.config

    def forward(state, batch):
        # What is not returned is not computed: the compiler drops the gradients, and all that follows from them.
        state, metrics = train_step(
            state,
            batch,
            model=build_objective(config, None),
            tx=model.tx,
            normalisation=config.data.normalisation,
            kept_leads=parse_leads(config.data.leads),
            teacher=model.teacher,
            accumulate=config.accumulate,
            axis_name=None,
        )
        losses = {name: value for name, value in metrics.items() if name != "grad_norm"}
        return losses, state.batch_stats, state.objective_state

    # Operations are counted before machine code is made of them, which is most of the work on a CPU.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    with jax.default_matmul_precision(MATMUL_PRECISION[config.precision]), memory_errors():
        lowered = jax.jit(forward).lower(model.state, random_batch(config))
        cost = lowered.compile(compiler_options=options).cost_analysis() or {}
    return cost.get("flops")


def encoder_program(config: ConfigDict, variables: dict[str, Any], *, gradient: bool) -> Program:
    """The encoder alone.

    Args:
        config: of a run.
        variables: the encoder's collections.
        gradient: False is the forward pass in evaluation mode; True the forward pass in train mode and the gradient
            of the parameters.
    """
    encoder = build_objective(config, axis_name=None).encoder
    samples = round(config.data.window_s * config.data.rate_hz)
    rng = np.random.default_rng(0)
    shape = (config.batch_size, samples, len(CANONICAL_LEADS))
    x = jnp.asarray(rng.standard_normal(shape, np.float32))
    record_index = jnp.arange(len(x))

    def forward(variables, x):
        return encoder.apply(variables, x, record_index, train=False)[0]

    if not gradient:
        return compile_program(jax.jit(forward), variables, x, precision=config.precision)[1]

    def forward_and_backward(params, fixed, x, cotangent):
        def in_training(params):
            (tokens, _), changed = encoder.apply(
                {**fixed, "params": params},
                x,
                record_index,
                train=True,
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            )
            return tokens, changed

        _, pull_back, changed = jax.vjp(in_training, params, has_aux=True)
        return pull_back(cotangent), changed

    params, fixed = variables["params"], {name: tree for name, tree in variables.items() if name != "params"}
    tokens = jax.eval_shape(forward, variables, x)
    cotangent = jnp.asarray(rng.standard_normal(tokens.shape, np.float32), tokens.dtype)
    both = jax.jit(forward_and_backward)
    return compile_program(both, params, fixed, x, cotangent, precision=config.precision)[1]


def parameter_count(tree: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def encoder_parameters(config: ConfigDict) -> int:
    """Trainable numbers of the encoder that a config describes; nothing is computed."""
    encoder = build_encoder(**config.model.to_dict(), dtype=jnp.float32, axis_name=None)
    samples = round(config.data.window_s * config.data.rate_hz)
    x = jax.ShapeDtypeStruct((2, samples, len(CANONICAL_LEADS)), jnp.float32)
    init = functools.partial(encoder.init, train=False)
    return parameter_count(jax.eval_shape(init, jax.random.key(0), x, jnp.arange(2))["params"])
