"""Pooled features of a frozen encoder, computed once for every crop of a store and kept on disk.

    FOLDER/<key>/entry.json             what the features are of, for people
    FOLDER/<key>/<layer>/000000.npy     float32 [PART_CROPS, D], mean over tokens, and 16 bytes of checksum after it

The key is a hash of the encoder's weights and model config, the preprocessing contract and the store's fingerprint:
a task, a label, a seed or a penalty may change without a crop being encoded again, and nothing that changes the
features is left out. A folder may be deleted when nothing uses it. Parts are written under a temporary name and
renamed, so an interrupted run goes on where it was; a part that is short or whose checksum differs is computed again.
Several processes may work on one entry: each part is locked while it is computed, and the processes share the parts.
A process reads a part for its checksum once, unless the file changes.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import jax
import numpy as np

from ecg_jax.data.crops import non_overlapping_crops
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation.features import encode_padded
from ecg_jax.files import replace_file, write_atomic
from ecg_jax.training.pretrained import FINAL, RestoredEncoder, layer_shapes, pooled_fn

#: Raise when the encoders compute other features from the same weights, or the files change.
VERSION = 1
#: Crops of a part: 8 MB for a layer of width 512, minutes of work lost at most by an interruption.
PART_CROPS = 4096
_DIGEST_BYTES = 16


def entry_key(encoder: RestoredEncoder, store: Store) -> str:
    """32 hexadecimal digits that differ whenever the features of the store's crops may."""
    digest = hashlib.sha256()
    contract = {
        "version": VERSION,
        "model": encoder.config["model"],
        "preprocessing": encoder.preprocessing.to_dict(),
        "store": store.fingerprint,
    }
    digest.update(json.dumps(contract, sort_keys=True).encode())
    # `basis` follows from `ssm`.
    kept = {name: tree for name, tree in encoder.variables.items() if name != "basis"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class PooledFeatures:
    """Mean-over-tokens features of every non-overlapping crop of a store, one matrix for each layer, memory-mapped.

    Attributes:
        entry: folder of the parts.
        widths: layer -> D, in the order asked for.
        window: samples of a crop.
        first: int64 [n_records + 1], the first crop of each record; shorter ones than a window have none.
        parts: int64, those that are there, ascending.
    """

    entry: Path
    widths: dict[str, int]
    window: int
    first: np.ndarray
    parts: np.ndarray

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(self.widths)

    def of(self, rows, layer: str = FINAL) -> tuple[np.ndarray, np.ndarray]:
        """Features of some records, in the order and numbering of `data.crops.non_overlapping_crops`.

        Args:
            rows: int [n], rows of the store.
            layer: one of `layers`.

        Returns:
            (features float32 [n_crops, D], record int64 [n_crops], index into `rows`).

        Raises:
            ValueError: there is no such layer or row, or the features of some rows were not asked for.
        """
        if layer not in self.widths:
            raise ValueError(f"there are no features of layer {layer!r}, only of {', '.join(self.layers)}")
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self.first) - 1:
            raise ValueError(f"rows must lie between 0 and {len(self.first) - 2}")
        # The cumulative numbers of crops take the place of offsets: a crop is one "sample".
        crops, record = non_overlapping_crops(np.diff(self.first)[rows], self.first[rows], 1)
        features = np.empty((len(crops), self.widths[layer]), dtype=np.float32)
        part = crops // PART_CROPS
        if not np.isin(part, self.parts).all():
            raise ValueError("`FeatureCache.pooled` was asked for other rows than these")
        order = np.argsort(part, kind="stable")
        numbers, begins = np.unique(part[order], return_index=True)
        for number, chosen in zip(numbers, np.split(order, begins[1:]), strict=True):
            # Mapped only while it is read: there may be more parts than a process may map.
            mapped = np.load(_part_path(self.entry, layer, number), mmap_mode="r")
            features[chosen] = mapped[crops[chosen] - number * PART_CROPS]
        return features, record


class FeatureCache:
    """Pooled features under one folder, an entry for each pair of encoder and store."""

    def __init__(self, folder: str | os.PathLike):
        """A cache in a folder, made when something is first written into it."""
        self.folder = Path(folder)

    def pooled(
        self,
        encoder: RestoredEncoder,
        store: Store,
        layers: Sequence[str] = (FINAL,),
        batch_size: int = 64,
        label: str = "",
        rows=None,
    ) -> PooledFeatures:
        """Features of the crops of a store, computed where they are not there yet; one forward pass for all layers.

        Args:
            encoder: from `restore_encoder` or `random_twin`.
            store: under the encoder's contract; the caller has checked it.
            layers: names out of `training.pretrained.layer_shapes`.
            batch_size: crops encoded at once.
            label: of the encoder, in the progress bar and in errors.
            rows: int, the records whose features are needed; None for all. Parts without any of them are not computed.

        Raises:
            UserError: no record is a window long, a feature is not finite, or a part cannot be written.
            ValueError: the encoder has no such layer.
        """
        window = encoder.preprocessing.window_samples
        starts, record = non_overlapping_crops(store.column("length"), store.column("offset"), window)
        if not len(starts):
            raise UserError(
                f"No record of the store {store.path} is as long as the window of {window} samples; use a "
                "store with longer recordings."
            )
        shapes = layer_shapes(encoder)
        if unknown := [name for name in layers if name not in shapes]:
            raise ValueError(f"the encoder has no layer {', '.join(unknown)}; it has {', '.join(shapes)}")
        entry = self.folder / entry_key(encoder, store)
        slices = [
            slice(first, min(first + PART_CROPS, len(starts))) for first in range(0, len(starts), PART_CROPS)
        ]

        needed = np.isin(record, np.arange(len(store)) if rows is None else np.asarray(rows, np.int64))
        parts = np.unique(np.flatnonzero(needed) // PART_CROPS)
        work = _Work(entry, encoder, store, starts, slices, {name: shapes[name][1] for name in layers}, label)
        missing = work.missing(parts.tolist())
        if missing:
            self._describe(entry, encoder, store, len(starts))
            work.run(missing, batch_size)
        first = np.concatenate([[0], np.cumsum(np.bincount(record, minlength=len(store)))]).astype(np.int64)
        return PooledFeatures(entry, work.widths, window, first, parts)

    def _describe(self, entry: Path, encoder: RestoredEncoder, store: Store, n_crops: int) -> None:
        """`entry.json`: whose features these are."""
        about = {
            "run": str(encoder.run),
            "step": encoder.step,  # null: a random twin
            "store": str(store.path),
            "fingerprint": store.fingerprint,
            "window": encoder.preprocessing.window_samples,
            "n_crops": n_crops,
            "part_crops": PART_CROPS,
        }
        _make(entry)
        write_atomic(entry / "entry.json", (json.dumps(about, indent=1) + "\n").encode())


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot write features into {folder}: {error.strerror}; name another folder for them."
        ) from error


def _part_path(entry: Path, layer: str, number: int) -> Path:
    return entry / layer / f"{number:06d}.npy"


#: Parts whose checksum this process has found right: path -> what would change with the file.
_verified: dict[Path, tuple] = {}


def _is_whole(path: Path, shape: tuple[int, int]) -> bool:
    """Whether a part is there in full, of this shape, with the checksum it was written with."""
    try:
        about = path.stat()
        seen = (shape, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        if _verified.get(path.absolute()) == seen:
            return True
        array = np.load(path, mmap_mode="r")
        with open(path, "rb") as file:
            file.seek(array.offset + array.nbytes)
            end = file.read()
    except (OSError, ValueError, EOFError):
        return False
    whole = array.shape == shape and array.dtype == np.float32 and end == _digest(array)
    if whole:
        _verified[path.absolute()] = seen
    return whole


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=_DIGEST_BYTES).digest()


def _write(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    buffer.write(_digest(array))
    try:
        replace_file(path, buffer.getvalue(), path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    except OSError as error:
        raise UserError(
            f"Cannot write features into {path.parent}: {error.strerror}; free some space or name another folder "
            "for them, what is computed already will be used."
        ) from error


class _Work:
    """The parts of one entry."""

    def __init__(self, entry, encoder, store, starts, slices, widths, label):
        self.entry, self.encoder, self.store, self.label = entry, encoder, store, label
        self.starts, self.slices, self.widths = starts, slices, widths

    def _lacks(self, number: int, layers) -> tuple[str, ...]:
        """Which layers of a part are not there."""
        n = self.slices[number].stop - self.slices[number].start
        paths = {name: _part_path(self.entry, name, number) for name in layers}
        return tuple(name for name in layers if not _is_whole(paths[name], (n, self.widths[name])))

    def missing(self, parts: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Part -> its layers that are not there, of some parts."""
        lacking = {number: self._lacks(number, self.widths) for number in parts}
        return {number: names for number, names in lacking.items() if names}

    def run(self, missing: dict[int, tuple[str, ...]], batch_size: int) -> None:
        """Computes parts, or waits for another process to have computed them."""
        from tqdm import tqdm

        for name in self.widths:
            _make(self.entry / name)
        sizes = {number: self.slices[number].stop - self.slices[number].start for number in missing}
        bar = tqdm(
            total=sum(sizes.values()), desc=self.label, unit="crop", leave=False, disable=not self.label
        )
        programs, left = {}, dict(missing)
        with bar, open(self.entry / "lock", "ab") as file:
            # Those that another process is at come last, when they are likely to be there.
            for wait in (False, True):
                for number in list(left):
                    with _locked(file, number, wait) as ours:
                        if not ours:
                            continue
                        todo = self._lacks(number, left.pop(number))
                        if todo and todo not in programs:
                            programs[todo] = pooled_fn(self.encoder, todo)
                        if todo:
                            self._make_part(programs[todo], number, batch_size)
                    bar.update(sizes[number])

    def _make_part(self, pooled, number: int, batch_size: int) -> None:
        features = self._compute(pooled, number, batch_size)
        for name, array in features.items():
            _write(_part_path(self.entry, name, number), array)
        if self._lacks(number, tuple(features)):
            raise UserError(
                f"Part {number} of {self.entry} does not read back as it was written; check the disk."
            )

    def _compute(self, pooled, number: int, batch_size: int) -> dict[str, np.ndarray]:
        """{layer: float32 [crops of the part, D]}."""
        starts, window = self.starts[self.slices[number]], self.encoder.preprocessing.window_samples
        batches: dict[str, list[np.ndarray]] = {}
        for first in range(0, len(starts), batch_size):
            crops = self.store.read_crops(starts[first : first + batch_size], window)
            for name, array in encode_padded(pooled, crops, batch_size).items():
                batches.setdefault(name, []).append(array)
        features = {name: np.concatenate(arrays) for name, arrays in batches.items()}
        for name, array in features.items():
            if bad := int((~np.isfinite(array)).any(axis=1).sum()):
                raise UserError(
                    f"Checkpoint {self.encoder.run}{', ' + self.label if self.label else ''}: the encoder gave "
                    f"values that are not finite for {bad} of {len(array)} crops (layer {name}, store "
                    f"{self.store.path}); use an earlier step, before it diverged."
                )
        return features


@contextlib.contextmanager
def _locked(file: IO, number: int, wait: bool) -> Iterator[bool]:
    """Locks byte `number` of a file for this process; yields False if another process has it and wait is False."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
    except (BlockingIOError, PermissionError):
        yield False
        return
    except OSError:
        # A file system without locks: parts are still whole, at worst one is computed twice.
        yield True
        return
    try:
        yield True
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, number)
