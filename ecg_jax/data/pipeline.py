"""The input pipeline: recordings in their order, and a crop of each. The one file that imports Grain.

Three indices, kept apart:

    position      of a crop in the endless global order, 0, 1, 2, ...; step s holds positions s*B .. (s+1)*B - 1
    record_index  position within the global batch, 0 .. B-1; every random choice on the device derives from it
    row           of the store's records table

The order is a function of (seed, position), and so is the offset of each crop: the global batch of a step is
the same for any number of processes, and the step number is the whole state of the pipeline. Process p of P
reads positions p, p+P, p+2P, ...
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ecg_jax.data.crops import non_overlapping_crops
from ecg_jax.data.mixture import StoreSet, as_set
from ecg_jax.data.order import mixed_by_position, shuffled_by_position, uniform_by_position
from ecg_jax.data.store import Store
from ecg_jax.data.targets import TOKEN_SAMPLES, Targets


def train_batches(
    store: Store | StoreSet,
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
    shares: Sequence[int] | None = None,
):
    """Endless training batches of this process, from step `start_step` on.

    Each epoch visits every row once in a new order, with a new uniform crop; epochs follow each other without
    a gap, so a batch may hold the end of one and the beginning of the next. With `shares` each store has its own
    epochs, see `order.mixed_by_position`.

    Args:
        store: to read from, one or several.
        rows: ascending (joint) rows of the store, e.g. `Selection.train`.
        batch_size: B, over all processes.
        window_samples: T.
        seed: of order and crops.
        start_step: steps already done.
        process, processes: this process and how many there are.
        threads, prefetch: threads that read, and batches held ready.
        targets: of the same store, for objectives that predict offline labels.
        shares: of each store in the crops, as whole numbers; None mixes all rows, each as often as any other.

    Returns:
        An iterator (close it with `.close()`) of {"signal": int16 [B/P, T, C], "record_index": int32 [B/P],
        "row": int64 [B/P]}, and with targets "labels": int32 [B/P, L], -1 where there is none.

    Raises:
        ValueError: B is not a multiple of P, or a store with a share has no rows.
    """
    import grain

    if batch_size % processes:
        raise ValueError(f"batch size {batch_size} is not a multiple of {processes} processes")
    sizes = [] if shares is None else [len(part) for part in as_set(store).split(rows)]
    if not all(sizes):
        raise ValueError(f"every store needs rows for its share, but they have {sizes}")
    local = batch_size // processes
    offsets, lengths = store.column("offset")[rows], store.column("length")[rows]
    record_index = np.arange(local, dtype=np.int32) * processes + process

    def read(step):
        position = np.int64(step) * batch_size + record_index
        if shares is None:
            chosen = shuffled_by_position(seed, position, len(rows))
        else:
            chosen = mixed_by_position(seed, position, shares, sizes)
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
    store: Store | StoreSet,
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
