"""The tree of arrays in a checkpoint, between device, host and file: names, shapes, checksums, placement."""

import zlib
from typing import Any

import jax
import numpy as np


def flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Leaves of a tree as "a/b/c" -> shape; key arrays as their underlying words."""
    return {
        name: tuple((jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf).shape)
        for name, leaf in _named_leaves(tree).items()
    }


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.flatten_with_path(tree)[0]
    return {"/".join(_key_name(key) for key in path): leaf for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of random keys (leaves of stored metadata never are)."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _key_name(key: Any) -> str:
    """The bare name of a pytree key: of a dict entry, an attribute, or a position."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unexpected pytree key {key!r}")


def describe_mismatch(
    stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], limit: int = 8
) -> str | None:
    """One sentence that lists missing, extra and differently shaped parameters; None when the two agree."""

    def listed(names):
        names = sorted(names, key=lambda name: (not name.startswith("params/"), name))
        more = f" and {len(names) - limit} more" if len(names) > limit else ""
        return ", ".join(names[:limit]) + more

    parts = []
    if missing := wanted.keys() - stored.keys():
        parts.append(f"missing {listed(missing)}")
    if extra := stored.keys() - wanted.keys():
        parts.append(f"extra {listed(extra)}")
    if different := [name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name]]:
        parts.append(
            "shaped differently "
            + listed(f"{name} (stored {stored[name]}, expected {wanted[name]})" for name in different)
        )
    return "; ".join(parts) or None


def checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of every leaf of a tree on the host, by path."""
    return {name: zlib.crc32(np.ascontiguousarray(leaf)) for name, leaf in _named_leaves(tree).items()}


def to_host(tree: Any) -> Any:
    """This process's copy of a replicated tree as numpy arrays, keys as their words. On a CPU they are views."""

    def fetch(leaf):
        local = leaf.addressable_data(0)
        return np.asarray(jax.random.key_data(local) if _is_key(leaf) else local)

    return jax.tree.map(fetch, tree)


def words_of(tree: Any) -> Any:
    """Shapes and types of `tree` as `to_host` makes them: keys as their words."""
    return jax.tree.map(
        lambda leaf: jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf, tree
    )


def place(tree: Any, like: Any, sharding: jax.sharding.Sharding) -> Any:
    """Arrays of the host on the devices of all processes, each of which holds the same tree.

    Args:
        tree: numpy arrays, from `to_host` of any number of processes.
        like: a tree of the same structure; its keys tell which leaves of `tree` are words of keys.
        sharding: of every leaf.
    """

    def put(leaf, wanted):
        placed = jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
        return (
            jax.jit(jax.random.wrap_key_data, out_shardings=sharding)(placed) if _is_key(wanted) else placed
        )

    return jax.tree.map(put, tree, like)
