"""The input pipeline: which recordings, in which order, which crop. The one file that imports Grain.

Three indices, kept apart:

    position       of a crop in the endless global order, 0, 1, 2, ... ; step s holds positions s*B .. (s+1)*B
    - 1 record_index   position within the global batch, 0 .. B-1; every random choice on the device derives
    from it row            of the store's records table

The order is a function of (seed, position), and so is the offset of each crop: the global batch of a step is
the same for any number of processes, and the step number is the whole state of the pipeline. Process p of P
reads positions p, p+P, p+2P, ...
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from ecg_jax.data.crops import non_overlapping_crops
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError


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
    held_out = np.isin(folds, np.unique(folds)[-val_folds:] if val_folds else [])
    train = np.flatnonzero(usable & ~held_out)
    if not len(train):
        raise UserError(
            f"The store {store.path} leaves no recording to train on: of {len(store)} records "
            f"{int(long_enough.sum())} are at least {window_samples} samples long, and none of them is both "
            "outside the held-out folds and no duplicate."
        )
    available = len(train)
    if available > max_records:
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


def uniform_by_position(seed: int, position: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), a pure function of (seed, position): SplitMix64 (Steele, Lea & Flood 2014)
    as a counter hash.

    Args:
        seed: of the run.
        position: integers [B].

    Returns:
        float64 [B].
    """
    with np.errstate(over="ignore"):
        z = np.asarray(position).astype(np.uint64) + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        for _ in range(2):  # one round leaves neighbouring seeds correlated
            z = z + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


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

    Returns:
        An iterator (close it with `.close()`) of {"signal": int16 [B/P, T, C], "record_index": int32 [B/P],
        "row": int64 [B/P]}.

    Raises:
        ValueError: B is not a multiple of P.
    """
    import grain

    if batch_size % processes:
        raise ValueError(f"batch size {batch_size} is not a multiple of {processes} processes")
    local = batch_size // processes
    offsets, lengths = store.column("offset")[rows], store.column("length")[rows]
    record_index = np.arange(local, dtype=np.int32) * processes + process

    def gather(step, chosen):
        chosen = np.asarray(chosen)
        uniform = uniform_by_position(seed, np.int64(step) * batch_size + record_index)
        start = offsets[chosen] + (uniform * (lengths[chosen] - window_samples + 1)).astype(np.int64)
        return {
            "signal": store.read_crops(start, window_samples),
            "record_index": record_index,
            "row": rows[chosen],
        }

    # Indices are batched and gathered together: element by element Grain would spend its time in Python.
    dataset = (
        grain.MapDataset.range(len(rows))
        .seed(seed)
        .shuffle()
        .repeat()
        .slice(slice(process, None, processes))
        .batch(local)
        .map_with_index(gather)
    )
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(dataset[start_step:].to_iter_dataset(read))


def val_batches(
    store: Store,
    rows: np.ndarray,
    *,
    batch_size: int,
    window_samples: int,
    max_crops: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """The validation crops in fixed order, the same number of batches on every process.

    Non-overlapping crops of every row; if there are more than `max_crops`, that many at even distances. The
    last batch is filled up with rows of weight 0.

    Yields:
        {"signal": int16 [B/P, T, C], "record_index": int32 [B/P] number of the crop, "weight": float32
        [B/P]}.
    """
    lengths, offsets = store.column("length")[rows], store.column("offset")[rows]
    starts, _ = non_overlapping_crops(lengths, offsets, window_samples)
    if len(starts) > max_crops:
        starts = starts[np.linspace(0, len(starts) - 1, max_crops).round().astype(np.int64)]
    for first in range(0, len(starts), batch_size):
        number = np.arange(first + process, first + batch_size, processes)
        real = number < len(starts)
        yield {
            "signal": store.read_crops(starts[np.where(real, number, 0)], window_samples),
            "record_index": number.astype(np.int32),
            "weight": real.astype(np.float32),
        }
