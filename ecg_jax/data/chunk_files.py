"""The chunk files of a store: kept open, read with `os.preadv`."""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ecg_jax.errors import UserError

# Descriptors a store keeps open; chunks beyond that are opened for each read, which costs several times the read.
# 11 million records of 10 s are 2686 chunks.
MAX_OPEN_CHUNKS = 16384
# Descriptors left to everything else in the process.
RESERVED_DESCRIPTORS = 256
# What the limit of descriptors is raised to, where the system allows it.
WANTED_DESCRIPTORS = 65536


class ChunkFiles:
    """The files of the chunks that hold records. Safe to share between threads, and to pickle into worker processes.

    Attributes:
      store: folder of the store.
      chunk_bytes: size of each file.
      occupied: numbers of the chunks that hold records; all others have no file and read as zeros.
    """

    def __init__(self, store: Path, chunk_bytes: int, occupied: frozenset[int]):
        self.store, self.chunk_bytes, self.occupied = store, chunk_bytes, occupied
        self._prepare()

    def _prepare(self) -> None:
        self._fds: dict[int, int] = {}
        self._full = False
        self._lock = threading.Lock()
        _raise_descriptor_limit(min(len(self.occupied), MAX_OPEN_CHUNKS))

    def path(self, chunk: int) -> Path:
        """The file of a chunk."""
        return self.store / "signal" / "c" / str(chunk) / "0"

    def problem(self, chunk: int) -> str | None:
        """What one `stat` tells to be wrong with a file that has to be there; None if nothing is."""
        try:
            size = self.path(chunk).stat().st_size
        except OSError:
            return f"its file {self.path(chunk)} is missing; copy or prepare it again"
        if size != self.chunk_bytes:
            return (
                f"its file {self.path(chunk)} has {size} bytes instead of {self.chunk_bytes}; copy or prepare it "
                "again"
            )
        return None

    def check(self) -> None:
        """One `stat` per file: a damaged copy is found here and not at step 50 000.

        Raises:
          UserError: a file is missing or of another size.
        """
        for chunk in sorted(self.occupied):
            if problem := self.problem(chunk):
                raise UserError(f"The store {self.store} is damaged: {problem}.")

    def read(self, chunks: np.ndarray, positions: np.ndarray, size: int, buffer: memoryview) -> None:
        """Reads pieces of one size one behind the other.

        Args:
          chunks: int [B], chunk of each piece.
          positions: int [B], its first byte in the chunk.
          size: bytes of each piece.
          buffer: B * size writable bytes.

        Raises:
          UserError: a file is missing, cannot be opened or ends too early.
        """
        fds, preadv = self._fds, os.preadv
        end = 0
        for chunk, position in zip(chunks.tolist(), positions.tolist(), strict=True):
            begin, end = end, end + size
            fd = fds[chunk] if chunk in fds else self._open(chunk)
            if fd is None:
                self._read_uncached(chunk, position, buffer[begin:end])
            elif preadv(fd, (buffer[begin:end],), position) != size:
                self._read_rest(fd, chunk, position, buffer[begin:end])

    def close(self) -> None:
        """Closes the files; the next read opens them again."""
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()
            self._full = False

    def __getstate__(self) -> dict:
        # Descriptors and locks belong to one process.
        return {"store": self.store, "chunk_bytes": self.chunk_bytes, "occupied": self.occupied}

    def __setstate__(self, state: Mapping) -> None:
        self.__dict__.update(state)
        self._prepare()

    def __del__(self):
        # At interpreter exit modules are gone already, and the system closes what is open.
        if "_lock" in self.__dict__ and not sys.is_finalizing():
            self.close()

    def _open(self, chunk: int) -> int | None:
        """The cached descriptor of a chunk; None when no more are kept or the chunk has no file."""
        with self._lock:
            if chunk in self._fds:
                return self._fds[chunk]
            if self._full or len(self._fds) >= MAX_OPEN_CHUNKS or chunk not in self.occupied:
                return None
            fd = self._open_file(chunk)
            # The system gives out the lowest free number, so a high one says that few are left to the process,
            # whoever took them: several stores, checkpoints, sockets.
            if fd >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_DESCRIPTORS:
                os.close(fd)
                self._full = True
                return None
            self._fds[chunk] = fd
            return fd

    def _open_file(self, chunk: int) -> int:
        try:
            return os.open(self.path(chunk), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"Cannot open {self.path(chunk)}: {error.strerror}.") from error

    def _read_uncached(self, chunk: int, position: int, target: memoryview) -> None:
        if chunk not in self.occupied:
            target[:] = bytes(len(target))
            return
        fd = self._open_file(chunk)
        try:
            self._read_rest(fd, chunk, position, target)
        finally:
            os.close(fd)

    def _read_rest(self, fd: int, chunk: int, position: int, target: memoryview) -> None:
        """Reads until `target` is full: the kernel may hand over less than asked for."""
        done = 0
        while done < len(target):
            n = os.preadv(fd, (target[done:],), position + done)
            if n == 0:
                raise UserError(
                    f"The store {self.store} is damaged: its file {self.path(chunk)} ends too early; "
                    "copy or prepare it again."
                )
            done += n


def _raise_descriptor_limit(wanted: int) -> None:
    """Raises the soft limit of descriptors of this process where `wanted` more might not fit.

    Most systems begin with 1024 for the sake of programs that call select(2); the hard limit is their real one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, WANTED_DESCRIPTORS)
    # Half of it: several stores may be open at once.
    if wanted > (soft - RESERVED_DESCRIPTORS) // 2 and limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
