"""The endless order of a run: what stands at each position, as functions of (seed, position) that keep no table.

A position is the number of a crop in the endless global order. Every choice is a hash of (seed, stream, position), so
the global batch of a step is the same for any number of processes, and resuming at any step costs nothing.
"""

from collections.abc import Sequence

import numpy as np

# Streams keep choices apart.
_CROPS, _ORDER, _TURNS, _FIRST_STORE = 0, 1, 2, 16

# One per round: multiples of 2^64 / golden ratio.
_FEISTEL_CONSTANTS = [np.uint64(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(6)]


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): a hash of uint64 to uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _hash(seed: int, stream: int, value: np.ndarray) -> np.ndarray:
    """uint64 hash of (seed, stream, value)."""
    key = np.array([(seed * 0x9E3779B97F4A7C15 + stream * 0xD1342543DE82EF95) % 2**64], np.uint64)
    return _mix(_mix(np.asarray(value).astype(np.uint64) + _mix(key)))


def uniform_by_position(seed: int, position: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), a pure function of (seed, position).

    Args:
        seed: of the run.
        position: integers [B].

    Returns:
        float64 [B].
    """
    return (_hash(seed, _CROPS, position) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled_by_position(seed: int, position: np.ndarray, n: int, stream: int = _ORDER) -> np.ndarray:
    """Which of n items stands at each position of the endless order.

    Positions e n .. (e+1) n - 1 hold a permutation of 0 .. n-1, another one for each epoch e: a Feistel network
    on the smallest even number of bits that holds n, walked until the result is below n (Black & Rogaway 2002).
    No table is kept, so 11 million items cost as much as 11.

    Args:
        seed: of the run.
        position: integers [B].
        n: number of items.
        stream: orders of different streams are unrelated.

    Returns:
        int64 [B], each below n.
    """
    epoch, index = np.divmod(np.asarray(position, np.int64), n)
    half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    key, value = _hash(seed, stream, epoch), index.astype(np.uint64)
    pending = np.arange(len(value))
    while len(pending):
        left, right = value[pending] >> half, value[pending] & mask
        for constant in _FEISTEL_CONSTANTS:
            left, right = right, left ^ (_mix(right + key[pending] + constant) & mask)
        value[pending] = left << half | right
        pending = pending[value[pending] >= n]
    return value.astype(np.int64)


def mixed_by_position(
    seed: int, position: np.ndarray, shares: Sequence[int], sizes: Sequence[int]
) -> np.ndarray:
    """Which of the items of several stores stands at each position, when each store has a fixed share of them.

    Positions come in cycles of P = sum(shares). Of the P slots of a cycle, in an order drawn anew for each cycle,
    `shares[s]` are store s's, so that shares are exact after every cycle. Slot number r of store s in cycle c holds
    item c * shares[s] + r of that store's own endless shuffled order: each store has its own epochs, and one that is
    small for its share is simply seen more often.

    Args:
        seed: of the run.
        position: integers [B].
        shares: slots of each store in a cycle, each at least 1.
        sizes: items of each store, each at least 1.

    Returns:
        int64 [B], places in the items of all stores one after the other.
    """
    position = np.asarray(position, np.int64)
    ends = np.cumsum(shares)
    slot = shuffled_by_position(seed, position, int(ends[-1]), _TURNS)
    cycle = position // ends[-1]
    chosen = np.empty(len(position), np.int64)
    first = 0
    for store, (share, end, size) in enumerate(zip(shares, ends, sizes, strict=True)):
        mine = (slot >= end - share) & (slot < end)
        item = cycle[mine] * share + slot[mine] - (end - share)
        chosen[mine] = first + shuffled_by_position(seed, item, size, _FIRST_STORE + store)
        first += size
    return chosen
