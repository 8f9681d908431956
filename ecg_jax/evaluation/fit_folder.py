"""Where a fit that is trained for epochs keeps its state, so that a killed one goes on and a finished one is not
repeated.

    FOLDER/fit.json         what is fitted: settings, encoder, examples
    FOLDER/state.msgpack    after the last whole epoch; gone when the fit is finished
    FOLDER/scratch/         what can be computed again, such as tokens; gone when the fit is finished
    FOLDER/fitted.npz       the predictions and the report of the finished fit
    FOLDER/lock             held by the process that fits
"""

import contextlib
import hashlib
import io
import json
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization

from ecg_jax.errors import UserError
from ecg_jax.evaluation.examples import Examples, Fitted
from ecg_jax.files import lock, write_atomic

#: What NumPy, zipfile (RuntimeError of a flag that says "encrypted"), msgpack and JSON raise on files that are
#: damaged or missing; a full memory is not among it.
DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def examples_key(examples: Examples) -> str:
    """32 hexadecimal digits that differ whenever the records or targets of any part may."""
    digest = hashlib.sha256(json.dumps([examples.task.name, examples.classes]).encode())
    for part in (examples.train, examples.val, examples.test):
        digest.update(part.store.fingerprint.encode())
        for array in (np.asarray(part.rows, np.int64), np.asarray(part.targets, np.float64)):
            digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


class FitFolder:
    """The folder of one fit; with `path` None nothing is kept. Used as a context, it is locked for this process."""

    def __init__(self, path: Path | str | None, identity: dict[str, Any]):
        """Opens the folder or makes it, and locks it until `close`.

        Args:
            path: the folder, or None.
            identity: JSON-able: everything that the result depends on.

        Raises:
            UserError: another process fits in it, it holds another fit, or cannot be made, read or written.
        """
        self._path = None if path is None else Path(path)
        self._held = contextlib.ExitStack()
        if self._path is None:
            return
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            file = self._held.enter_context((self._path / "lock").open("ab"))
        except OSError as error:
            raise UserError(
                f"cannot use the folder {self._path}: {error.strerror}; choose another --workdir."
            ) from error
        try:
            lock(
                file,
                f"another process is fitting in {self._path}; wait until it is done, or choose another --workdir.",
            )
            self._check(json.loads(json.dumps(identity)))
        except BaseException:
            self._held.close()
            raise

    def _check(self, identity: dict[str, Any]) -> None:
        about = self._path / "fit.json"
        try:
            before = json.loads(about.read_text()) if about.exists() else identity
        except OSError as error:
            raise UserError(f"{about} cannot be read: {error.strerror}; choose another --workdir.") from error
        except ValueError as error:
            raise UserError(f"{about} is no JSON; choose another --workdir.") from error
        if before != identity:
            known = before if isinstance(before, dict) else {}
            names = {name for name in {*identity, *known} if (name in identity) != (name in known)}
            names |= {name for name in identity if name in known and known[name] != identity[name]}
            raise UserError(
                f"{self._path} holds another fit (other {', '.join(sorted(names))}); choose another --workdir or "
                "remove this folder."
            )
        if not about.exists():
            write_atomic(about, (json.dumps(identity, indent=1) + "\n").encode())

    def __enter__(self) -> "FitFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process fit here."""
        self._held.close()

    @property
    def scratch(self) -> Path | None:
        """Folder, not made yet, for what can be computed again; None if nothing is kept."""
        return None if self._path is None else self._path / "scratch"

    def finished(self) -> Fitted | None:
        """The result, if the fit was finished.

        Raises:
            UserError: its file cannot be read.
        """
        if self._path is None or not (self._path / "fitted.npz").exists():
            return None
        with _reading(self._path / "fitted.npz") as path, np.load(path, allow_pickle=False) as file:
            fitted = Fitted(file["val"], file["test"], json.loads(str(file["report"])))
        self._tidy()
        return fitted

    def restore(self, template: Any) -> Any:
        """The state saved last, in the structure of `template`; None if there is none.

        Raises:
            UserError: its file cannot be read or has another structure.
        """
        if self._path is None or not (self._path / "state.msgpack").exists():
            return None
        with _reading(self._path / "state.msgpack") as path:
            return serialization.from_bytes(template, path.read_bytes())

    def save(self, state: Any) -> None:
        """Keeps a tree of NumPy arrays, numbers and strings, in place of the one before."""
        if self._path is not None:
            write_atomic(self._path / "state.msgpack", serialization.to_bytes(state))

    def finish(self, fitted: Fitted) -> Fitted:
        """Keeps the result; state and scratch are not needed any more.

        Raises:
            UserError: it cannot be written; a fit that goes on has its last epoch still.
        """
        if self._path is not None:
            buffer = io.BytesIO()
            np.savez_compressed(
                buffer, val=fitted.val, test=fitted.test, report=np.array(json.dumps(fitted.report))
            )
            write_atomic(self._path / "fitted.npz", buffer.getvalue())
            self._tidy()
        return fitted

    def _tidy(self) -> None:
        try:
            (self._path / "state.msgpack").unlink(missing_ok=True)
            if self.scratch.exists():
                shutil.rmtree(self.scratch)
        except OSError as error:
            raise UserError(
                f"cannot remove what the finished fit in {self._path} does not need: {error.strerror}"
            ) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Says which file it was when reading it fails because it is damaged or has another structure."""
    try:
        yield path
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to fit again.") from error
