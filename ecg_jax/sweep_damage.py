"""What the files of a run must hold, field by field: one that is damaged is named, and stops no other run."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ecg_jax.errors import UserError
from ecg_jax.json_fields import ANY_TEXT, OBJECT, TEXT, Kind, number, one_of, or_null, whole, wrong_field

_SCORE = number(-2, 2)  # an AUROC, or a difference of two
_INTERVAL = {"macro_auroc": _SCORE, "ci_low": or_null(_SCORE), "ci_high": or_null(_SCORE)}
_INTERVALS = (
    "difference_to_random_init",
    *(f"baselines.{name}" for name in ("random_init", "ecg_features", "majority")),
)
STATUS_FIELDS: Mapping[str, Kind] = {
    "state": one_of(("running", "finished", "failed", "stopped")), "error": ANY_TEXT, "attempts": whole(1),
    "host": ANY_TEXT, "process": whole(0), "began": TEXT, "ended": or_null(TEXT), "device": or_null(TEXT),
    "parameters": or_null(whole(0)), "recordings": or_null(whole(0)), "versions": OBJECT,
}  # fmt: skip
#: Of a probe's results.json, what tables are made of.
PROBE_FIELDS: Mapping[str, Kind] = {
    "task": TEXT, "seed": whole(0), "n_records": whole(1), "n_patients": or_null(whole(1)),
    "encoder_parameters": whole(0), "preprocessing": OBJECT,
    **_INTERVAL, **{f"{name}.{field}": kind for name in _INTERVALS for field, kind in _INTERVAL.items()},
    "bootstrap.resamples": whole(1), "bootstrap.level": number(0.01, 0.999),
    "bootstrap.undefined": one_of(("exclude", "half")),
    "store.path": TEXT, "store.corpus": TEXT, "store.fingerprint": TEXT,
    "pretraining_config.seed": whole(0), "pretraining_config.model": OBJECT,
}  # fmt: skip
SELECTION_FIELDS: Mapping[str, Kind] = {"train": whole(0)}


class Damaged(UserError):
    """Files of a run cannot be read; the other runs can."""


class Unfit(ValueError):
    """What a file holds; inside `damage`, which names the file or its folder."""


def check(name: str, content: Any, fields: Mapping[str, Kind], where: str = "") -> None:
    """Compares what a file holds with its fields, see `json_fields.wrong_field`.

    Args:
        name: of the file, for the message.

    Raises:
        Unfit: names the first field that is missing, or is what it cannot be.
    """
    if wrong := wrong_field(content, fields, where):
        raise Unfit(f"{name}: {wrong}")


def read_checked(path: Path, fields: Mapping[str, Kind]) -> dict[str, Any]:
    """The object of a JSON file, inside `damage`.

    Raises:
        Unfit: see `check`.
        OSError, ValueError: it cannot be read, or is no JSON.
    """
    value = json.loads(path.read_text())
    check(path.name, value, fields)
    return value


@contextlib.contextmanager
def damage(path: Path, remedy: str = "remove it, and it is made anew") -> Iterator[None]:
    """Whatever goes wrong while the files of a run are read becomes one sentence.

    Args:
        path: the folder, or the file, that the sentence is about.
        remedy: what is to be done.
    """
    try:
        yield
    except Exception as error:  # of json, zipfile, numpy, a missing key, ...
        said = next(iter(str(error).splitlines()), "")
        said = said if isinstance(error, Unfit) else f"{type(error).__name__}: {said}"
        raise Damaged(f"{path} is damaged ({said}); {remedy}") from error


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """A file or folder of a run that cannot be looked at, as one of another user, becomes one sentence."""
    try:
        yield
    except OSError as error:
        raise Damaged(f"cannot read {error.filename or path}: {error.strerror}") from error
