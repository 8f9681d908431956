"""Arrays of signals: one recording in an HDF5 file, or thousands as rows of an HDF5 or .npy array.

A row is named `FILE#ROW` in a list of recordings. The file read last stays open, one in each process: the
recordings of a unit lie in one file, and opening it costs more than reading a row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ecg_jax.data.recording import BadRecording, cannot_read, is_absent
from ecg_jax.errors import UserError

# A path of SOURCE may hold "#" itself, so the row is what follows the last one.
_ROW = "#"

_open_hdf5: dict[tuple, object] = {}
_open_npy: dict[tuple, np.ndarray] = {}


def row_name(file: str, row: int) -> str:
    """`FILE#ROW`, the name of one row of an array."""
    return f"{file}{_ROW}{row}"


def split_row_name(name: str) -> tuple[str, int]:
    """The file and the row of `row_name`."""
    file, _, row = name.rpartition(_ROW)
    return file, int(row)


def read_hdf5(path: Path, dataset: str, record_id: str) -> np.ndarray:
    """The whole dataset of a file that holds one recording.

    Raises:
      BadRecording: `missing_signal`; `array_refused` when the file is damaged or has no such dataset of
        numbers.
      UserError: the file is there and cannot be read.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get(dataset), h5py.Dataset):
                found = ", ".join(file) or "nothing"
                detail = f"{path.name} has no dataset {dataset!r} (found: {found})."
                raise BadRecording(record_id, "array_refused", detail)
            values = file[dataset][()]
    except OSError as error:
        if error.errno is not None and not is_absent(error):
            raise cannot_read(path, error) from error
        if error.errno is not None:
            detail = f"its signal file {path.name} is not there."
            raise BadRecording(record_id, "missing_signal", detail) from error
        # h5py's own errors, e.g. of a truncated file, have no number.
        raise BadRecording(record_id, "array_refused", f"{path.name} is no HDF5 file: {error}.") from error
    if values.dtype.kind not in "iuf":
        detail = f"{path.name} holds {values.dtype} in {dataset!r}, not numbers."
        raise BadRecording(record_id, "array_refused", detail)
    return values


def hdf5_datasets(path: Path, names: tuple[str, ...]) -> list:
    """Datasets of a file of many recordings, which stays open until another file is asked for.

    Returns:
      `h5py.Dataset`s in the order of `names`.

    Raises:
      UserError: the file cannot be read, is no HDF5 file, or lacks a dataset.
    """
    import h5py

    key = _key(path)
    try:
        if key not in _open_hdf5:
            for file in _open_hdf5.values():
                file.close()
            _open_hdf5.clear()
            _open_hdf5[key] = h5py.File(path, "r")
        file = _open_hdf5[key]
        missing = [name for name in names if not isinstance(file.get(name), h5py.Dataset)]
    except OSError as error:
        if error.errno is not None:
            raise cannot_read(path, error) from error
        raise UserError(f"{path} is no HDF5 file ({error}); download it again.") from error
    if missing:
        found = ", ".join(file) or "nothing"
        raise UserError(f"{path} has no dataset {', '.join(missing)} (found: {found}); download it again.")
    return [file[name] for name in names]


def npy_array(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory; it stays open until another file is asked for.

    Raises:
      UserError: the file cannot be read or is no complete .npy array of numbers.
    """
    key = _key(path)
    if key not in _open_npy:
        _open_npy.clear()
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise cannot_read(path, error) from error
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is no complete .npy array ({error}); download it again.") from error
        if array.dtype.kind not in "iuf":
            raise UserError(f"{path} holds {array.dtype}, not numbers; download it again.")
        _open_npy[key] = array
    return _open_npy[key]


def _key(path: Path) -> tuple:
    """A file that has been replaced is another file."""
    try:
        status = path.stat()
    except OSError as error:
        raise cannot_read(path, error) from error
    return str(path), status.st_size, status.st_mtime_ns
