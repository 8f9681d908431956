"""made_with.json of a pretraining run: which versions, which revision of the code and which devices each of its starts
had, and how long each took."""

import contextlib
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import ecg_jax
from ecg_jax.errors import UserError
from ecg_jax.files import write_atomic
from ecg_jax.json_fields import FLAG, OBJECT, TEXT, Kind, number, object_of, or_null, whole, wrong_field
from ecg_jax.probe_provenance import made_with

MADE_WITH = "made_with.json"
PACKAGES = ("ecg-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_GIT_S = 20.0  # on a slow network file system
_LEAST_S = 1e-3  # no run is shorter
_START: dict[str, Kind] = {
    "step": whole(0), "versions": object_of(TEXT), "git": or_null(OBJECT), "devices": whole(1), "device_kind": TEXT,
    "processes": whole(1), "parameters": whole(0), "seconds": or_null(number(0, 1e12)),
}  # fmt: skip
_GIT: dict[str, Kind] = {"git.revision": TEXT, "git.dirty": FLAG}


class Damaged(UserError):
    """made_with.json is no record of starts."""


@contextlib.contextmanager
def noted_start(workdir: Path, step: int, parameters: int, began: float) -> Iterator[None]:
    """Adds this start to made_with.json, and at its end, whatever ends it, how many seconds it took.

    For process 0 alone, in a workdir that is its own. Of a start that was killed `seconds` stays null.

    Args:
        workdir: of the run.
        step: from which this start goes on.
        parameters: trainable ones of the whole objective.
        began: `time.monotonic()` when it did.

    Raises:
        UserError: the file there cannot be read or written. A damaged one is set aside, said on stderr, and a new one
            begins: it only says how the run was made, which is no reason not to go on.
    """
    path, devices = workdir / MADE_WITH, jax.devices()
    try:
        before = read_starts(workdir)
    except Damaged as error:
        aside = path.with_name(f"{MADE_WITH}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        path.rename(aside)
        print(f"warning: {error} It is now {aside.name}, and a new file begins.", file=sys.stderr, flush=True)
        before = []
    start: dict[str, Any] = {
        "step": step,
        **made_with(PACKAGES),
        "git": git_state(Path(ecg_jax.__file__).resolve().parent.parent),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "processes": jax.process_count(),
        "parameters": int(parameters),
        "seconds": None,
    }

    def write() -> None:
        write_atomic(path, (json.dumps({"starts": [*before, start]}, indent=1) + "\n").encode())

    write()
    try:
        yield
    finally:
        start["seconds"] = time.monotonic() - began
        start["ended"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        # What ended the run is raised, also where a full disk keeps this from being written down.
        try:
            write()
        except UserError as error:
            lost = f"the {start['seconds']:.0f} seconds that this start took are not noted"
            print(f"warning: {lost}: {error}", file=sys.stderr, flush=True)


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """The starts of a run in order, [] of one from before they were noted.

    Raises:
        Damaged: the file is.
        UserError: it cannot be read.
    """
    path = workdir / MADE_WITH
    damaged = f"{path}, which says how the run was made, is damaged"
    try:
        starts = json.loads(path.read_text())["starts"]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{damaged}.") from error
    if not isinstance(starts, list):
        raise Damaged(f"{damaged}: its starts are no list.")
    for i, start in enumerate(starts):
        where = f"starts[{i}]."
        wrong = wrong_field(start, _START, where)
        if not wrong and start["git"] is not None:
            wrong = wrong_field(start, _GIT, where)
        if wrong:
            raise Damaged(f"{damaged}: {wrong}.")
    return starts


class Cost(NamedTuple):
    """What the starts of a run took.

    Attributes:
        seconds: of those that were measured; None where none was.
        unmeasured: how many were killed, whose seconds are in no figure.
        device_hours: seconds times devices, summed over the starts, in hours; None unless all of the run was measured.
        remark: why `device_hours` is None; else "".
    """

    seconds: float | None
    unmeasured: int
    device_hours: float | None
    remark: str


def cost_of(starts: Sequence[dict[str, Any]]) -> Cost:
    """What a run took.

    Args:
        starts: one or more, from `read_starts`.
    """
    measured = [start for start in starts if start["seconds"] is not None]
    seconds = sum(start["seconds"] for start in measured) if measured else None
    killed = len(starts) - len(measured)
    if starts[0]["step"]:
        remark = (
            f"its device-hours are not known: nothing is noted of the time before step {starts[0]['step']}"
        )
    elif killed:
        remark = f"its device-hours are not known: {killed} of {len(starts)} attempts were killed"
    elif seconds < _LEAST_S:
        remark = f"its device-hours are not known: {MADE_WITH} says that it took {seconds:g} seconds"
    else:
        hours = sum(start["seconds"] * start["devices"] for start in starts) / 3600
        return Cost(seconds, 0, hours, "")
    return Cost(seconds, killed, None, remark)


def git_state(root: Path) -> dict[str, Any] | None:
    """Revision of a checkout and whether a tracked file differs from it; None where `root` is no checkout's top folder.

    A package installed into an environment that lies in somebody's repository is not of that repository.
    """
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(root), "--no-optional-locks", *arguments)
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_GIT_S
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):  # no git here, no commit yet, or not this user's checkout
        return None
