"""The input pipeline: which recordings, in which order, which crop. The one file that imports Grain.

Three indices, kept apart:

    position      of a crop in the endless global order, 0, 1, 2, ...; step s holds positions s*B .. (s+1)*B - 1
    record_index  position within the global batch, 0 .. B-1; every random choice on the device derives from it
    row           of the store's records table

The order is a function of (seed, position), and so is the offset of each crop: the global batch of a step is
the same for any number of processes, and the step number is the whole state of the pipeline. Process p of P
reads positions p, p+P, p+2P, ...
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from ecg_jax.data.crops import non_overlapping_crops
from ecg_jax.data.folds import highest_folds
from ecg_jax.data.store import Store
from ecg_jax.data.targets import TOKEN_SAMPLES, Targets
from ecg_jax.errors import UserError

# One per round: multiples of 2^64 / golden ratio.
_FEISTEL_CONSTANTS = [np.uint64(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(6)]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows of a store that a run uses.

    Attributes:
        train, val: int64 rows of `store.records`, ascending.
        too_short: records left out because they are shorter than a window.
        duplicates: records left out because an earlier one has the same signal.
        available: training records there were before `max_records` cut them down.
    """

    train: np.ndarray
    val: np.ndarray
    too_short: int
    duplicates: int
    available: int

    def describe(self) -> str:
        """One line for people."""
        line = f"{len(self.train)} recordings to train on, {len(self.val)} held out"
        if len(self.train) < self.available:
            line += f"; cut down from {self.available} by data.max_records"
        if self.too_short:
            line += f"; {self.too_short} shorter than a window left out"
        if self.duplicates:
            line += f"; {self.duplicates} duplicate signals left out"
        return line


def select_records(store: Store, *, window_samples: int, val_folds: int, max_records: int) -> Selection:
    """Chooses the recordings of a run.

    The `val_folds` largest fold numbers are held out. Records shorter than a window and records whose signal
    an earlier record has (they may lie in other folds) are left out of both. If more than `max_records`
    remain to train on, whole patients are taken in an order given by a hash of their id, so that a smaller
    selection is contained in a larger one.

    Raises:
        UserError: nothing is left to train on.
    """
    long_enough = store.column("length") >= window_samples
    first = np.array([original is None for original in store.column("duplicate_of")], bool)
    usable = long_enough & first
    folds = store.column("fold")
    held_out = np.isin(folds, highest_folds(folds, val_folds))
    train = np.flatnonzero(usable & ~held_out)
    if not len(train):
        raise UserError(
            f"The store {store.path} leaves no recording to train on: of {len(store)} records "
            f"{int(long_enough.sum())} are at least {window_samples} samples long, and none of them is both "
            "outside the held-out folds and no duplicate."
        )
    available = len(train)
    if max_records and available > max_records:
        patients, records = store.column("patient_id"), store.column("record_id")
        owner = [patients[row] if patients[row] is not None else records[row] for row in train]
        order = sorted(
            range(available),
            key=lambda i: (hashlib.blake2b(str(owner[i]).encode(), digest_size=8).digest(), train[i]),
        )
        train = np.sort(train[order[:max_records]])
    return Selection(
        train=train,
        val=np.flatnonzero(usable & held_out),
        too_short=int((~long_enough).sum()),
        duplicates=int((long_enough & ~first).sum()),
        available=available,
    )


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): a hash of uint64 to uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _hash(seed: int, stream: int, value: np.ndarray) -> np.ndarray:
    """uint64 hash of (seed, stream, value); streams keep order, crops and rounds apart."""
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
    return (_hash(seed, 0, position) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled_by_position(seed: int, position: np.ndarray, n: int) -> np.ndarray:
    """Which of n items stands at each position of the endless order.

    Positions e n .. (e+1) n - 1 hold a permutation of 0 .. n-1, another one for each epoch e: a Feistel network
    on the smallest even number of bits that holds n, walked until the result is below n (Black & Rogaway 2002).
    No table is kept, so 11 million items cost as much as 11.

    Args:
        seed: of the run.
        position: integers [B].
        n: number of items.

    Returns:
        int64 [B], each below n.
    """
    epoch, index = np.divmod(np.asarray(position, np.int64), n)
    half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    key, value = _hash(seed, 1, epoch), index.astype(np.uint64)
    pending = np.arange(len(value))
    while len(pending):
        left, right = value[pending] >> half, value[pending] & mask
        for constant in _FEISTEL_CONSTANTS:
            left, right = right, left ^ (_mix(right + key[pending] + constant) & mask)
        value[pending] = left << half | right
        pending = pending[value[pending] >= n]
    return value.astype(np.int64)


def train_batches(
    store: Store,
    rows: np.ndarray,
    *,
    batch_size: int,
    window_samples: int,
    seed: int,
    start_step: int = 0,
    process: int = 0,
    processes: int = 1,
    threads: int = 2,
    prefetch: int = 4,
    targets: Targets | None = None,
):
    """Endless training batches of this process, from step `start_step` on.

    Each epoch visits every row once in a new order, with a new uniform crop; epochs follow each other without
    a gap, so a batch may hold the end of one and the beginning of the next.

    Args:
        store: to read from.
        rows: rows of the store, e.g. `Selection.train`.
        batch_size: B, over all processes.
        window_samples: T.
        seed: of order and crops.
        start_step: steps already done.
        process, processes: this process and how many there are.
        threads, prefetch: threads that read, and batches held ready.
        targets: of the same store, for objectives that predict offline labels.

    Returns:
        An iterator (close it with `.close()`) of {"signal": int16 [B/P, T, C], "record_index": int32 [B/P],
        "row": int64 [B/P]}, and with targets "labels": int32 [B/P, L], -1 where there is none.

    Raises:
        ValueError: B is not a multiple of P.
    """
    import grain

    if batch_size % processes:
        raise ValueError(f"batch size {batch_size} is not a multiple of {processes} processes")
    local = batch_size // processes
    offsets, lengths = store.column("offset")[rows], store.column("length")[rows]
    record_index = np.arange(local, dtype=np.int32) * processes + process

    def read(step):
        position = np.int64(step) * batch_size + record_index
        chosen = shuffled_by_position(seed, position, len(rows))
        choices = lengths[chosen] - window_samples + 1
        start = offsets[chosen] + (uniform_by_position(seed, position) * choices).astype(np.int64)
        return {
            "signal": store.read_crops(start, window_samples),
            "record_index": record_index,
            "row": rows[chosen],
            **_labels(targets, start, window_samples),
        }

    # One Grain element is a whole batch: element by element Grain spends four times as long in Python.
    dataset = grain.MapDataset.range(2**40).map(read)[start_step:]
    return iter(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    )


def val_batches(
    store: Store,
    rows: np.ndarray,
    *,
    batch_size: int,
    window_samples: int,
    max_crops: int,
    process: int = 0,
    processes: int = 1,
    targets: Targets | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The validation crops in fixed order, the same number of batches on every process.

    Non-overlapping crops of every row; if there are more than `max_crops`, that many at even distances. The
    last batch is filled up with rows of weight 0.

    Yields:
        {"signal": int16 [B/P, T, C], "record_index": int32 [B/P] number of the crop, "weight": float32
        [B/P]}, and with targets "labels": int32 [B/P, L], -1 where there is none.
    """
    lengths, offsets = store.column("length")[rows], store.column("offset")[rows]
    starts, _ = non_overlapping_crops(lengths, offsets, window_samples)
    if len(starts) > max_crops:
        starts = starts[np.linspace(0, len(starts) - 1, max_crops).round().astype(np.int64)]
    for first in range(0, len(starts), batch_size):
        number = np.arange(first + process, first + batch_size, processes)
        real = number < len(starts)
        chosen = starts[np.where(real, number, 0)]
        yield {
            "signal": store.read_crops(chosen, window_samples),
            "record_index": number.astype(np.int32),
            "weight": real.astype(np.float32),
            **_labels(targets, chosen, window_samples),
        }


def _labels(targets: Targets | None, starts: np.ndarray, window_samples: int) -> dict[str, np.ndarray]:
    """{"labels": int32 [B, L]} of the tokens of crops; {} without targets."""
    if targets is None:
        return {}
    return {"labels": targets.read(starts, -(-window_samples // TOKEN_SAMPLES)).astype(np.int32)}
