"""Where a fit that is trained for epochs keeps its state, so that a killed one goes on and a finished one is not
repeated.

    FOLDER/fit.json         what is fitted: settings, encoder, examples
    FOLDER/state.msgpack    after the last whole epoch; gone when the fit is finished
    FOLDER/fitted.npz       the predictions and the report of the finished fit
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization

from ecg_jax.errors import UserError
from ecg_jax.evaluation.examples import Examples, Fitted
from ecg_jax.files import write_atomic


def examples_key(examples: Examples) -> str:
    """32 hexadecimal digits that differ whenever the records or targets of any part may."""
    digest = hashlib.sha256(json.dumps([examples.task.name, examples.classes]).encode())
    for part in (examples.train, examples.val, examples.test):
        digest.update(part.store.fingerprint.encode())
        for array in (np.asarray(part.rows, np.int64), np.asarray(part.targets, np.float64)):
            digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


class FitFolder:
    """The folder of one fit; with `path` None nothing is kept."""

    def __init__(self, path: Path | str | None, identity: dict[str, Any]):
        """Opens the folder or makes it.

        Args:
            path: the folder, or None.
            identity: JSON-able: everything that the result depends on.

        Raises:
            UserError: it holds another fit, or cannot be made, read or written.
        """
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        about = self._path / "fit.json"
        identity = json.loads(json.dumps(identity))
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            before = json.loads(about.read_text()) if about.exists() else identity
        except OSError as error:
            raise UserError(f"cannot use the folder {self._path}: {error.strerror}; name another.") from error
        except ValueError as error:
            raise UserError(f"{about} is no JSON; name another folder.") from error
        if before != identity:
            known = before if isinstance(before, dict) else {}
            names = {name for name in {*identity, *known} if (name in identity) != (name in known)}
            names |= {name for name in identity if name in known and known[name] != identity[name]}
            raise UserError(
                f"{self._path} holds another fit (other {', '.join(sorted(names))}); name another folder or "
                "remove this one."
            )
        if not about.exists():
            write_atomic(about, (json.dumps(identity, indent=1) + "\n").encode())

    def finished(self) -> Fitted | None:
        """The result, if the fit was finished.

        Raises:
            UserError: its file cannot be read.
        """
        if self._path is None or not (self._path / "fitted.npz").exists():
            return None
        with _reading(self._path / "fitted.npz") as path, np.load(path, allow_pickle=False) as file:
            return Fitted(file["val"], file["test"], json.loads(str(file["report"])))

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
        """Keeps the result; the state is not needed any more."""
        if self._path is not None:
            buffer = io.BytesIO()
            np.savez_compressed(
                buffer, val=fitted.val, test=fitted.test, report=np.array(json.dumps(fitted.report))
            )
            write_atomic(self._path / "fitted.npz", buffer.getvalue())
            (self._path / "state.msgpack").unlink(missing_ok=True)
        return fitted


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Says which file it was when reading it fails, in whatever way a damaged file makes it fail."""
    try:
        yield path
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to fit again.") from error
