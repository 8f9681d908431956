"""One program on every device: mesh, placement, and the parallel map of a per-device function.

A step is written for one device with the mapped axis `AXIS` and run as jit(shard_map(...)). Inside, everything is
local but our own reductions: plain jit with shardings would all-gather the batch at every FFT. `check_vma=True` turns
a forgotten reduction into an error at trace time.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"


def make_mesh() -> Mesh:
    """All devices of all processes along one axis."""
    return Mesh(np.asarray(jax.devices()), (AXIS,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places a copy of every leaf on each device. A state placed before its first step compiles that step
    once.
    """
    sharding = NamedSharding(mesh, P())

    def place(leaf):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(leaf, sharding)
        # device_put refuses typed keys on a mesh of several processes.
        words = jax.device_put(jax.random.key_data(leaf), sharding)
        return jax.jit(jax.random.wrap_key_data, out_shardings=sharding)(words)

    return jax.tree.map(place, tree)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays [B, ...] from this process's rows [B / processes, ...]."""
    sharding = NamedSharding(mesh, P(AXIS))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def map_train_step(step: Callable, mesh: Mesh) -> Callable:
    """(state, batch) -> (state, metrics): state replicated and donated, batch split over the devices."""
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(P(), P()), check_vma=True)
    return jax.jit(mapped, donate_argnums=0)


def map_eval_step(step: Callable, mesh: Mesh) -> Callable:
    """(state, batch) -> metrics: like `map_train_step`, nothing donated."""
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=True)
    return jax.jit(mapped)
