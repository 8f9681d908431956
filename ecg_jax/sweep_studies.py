"""What is made of the finished runs of a sweep: the `ecg-jax` commands that its file names in STUDIES.

Each leaves its files in OUTPUT/studies/NAME, and this module beside them made_of.json, when it has succeeded: which
command, and digests of the runs that it was made of and of the code of ecg_jax that made it.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax

import ecg_jax
from ecg_jax.errors import Stopped, UserError
from ecg_jax.files import write_atomic
from ecg_jax.sweep_entry import STUDIES, Study
from ecg_jax.sweep_file import Sweep
from ecg_jax.sweep_folder import FURTHER, is_finished, read_made
from ecg_jax.sweep_launch import COMMAND
from ecg_jax.sweep_locks import held_long
from ecg_jax.sweep_table import TABLE

MADE_OF, FAILED_NAME = "made_of.json", "failed.json"
#: A command that reads what the others have left, so that it follows when one of them is made anew.
_READS_STUDIES = "report"


class StudyState(NamedTuple):
    """How far a study is: `kind` is "made", "not made", "out of date" or "failed", the last with `error`."""

    name: str
    kind: str
    error: str


def study_states(sweep: Sweep, output: Path) -> list[StudyState]:
    """How far each study of a sweep is; writes nothing."""
    states, earlier = [], []
    for study in sweep.studies(output):
        made_of = _made_of(sweep, study, output, earlier)
        earlier.append(made_of)
        failed = _read(_folder(output, study) / FAILED_NAME)
        if _is_made(output, study, made_of):
            states.append(StudyState(study.name, "made", ""))
        elif failed and "error" in failed:
            states.append(StudyState(study.name, "failed", failed["error"]))
        else:
            there = (_folder(output, study) / MADE_OF).exists()
            states.append(StudyState(study.name, "out of date" if there else "not made", ""))
    return states


def make_studies(sweep: Sweep, output: Path, *, here: bool) -> dict[str, str]:
    """Runs the studies whose files are missing, or were made of other runs or by another version of ecg_jax.

    One that fails stops no other.

    Args:
        sweep: whose runs are all finished, and their tables written.
        output: its folder.
        here: in this process; else each in one of its own, which takes the devices that this one has left alone.

    Returns:
        Study -> why it failed.

    Raises:
        Stopped, KeyboardInterrupt: asked to stop; the same call goes on from there.
        UserError: the folder cannot be written.
    """
    studies = sweep.studies(output)
    failed, earlier = {}, []
    try:
        (output / STUDIES).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {output / STUDIES}: {error.strerror}") from error
    with held_long(output / STUDIES / ".lock"):
        for study in studies:
            made_of = _made_of(sweep, study, output, earlier)
            earlier.append(made_of)
            if _is_made(output, study, made_of):
                print(f"study {study.name}: is made already")
                continue
            print(f"\nstudy {study.name}: ecg-jax {' '.join(study.command)}", flush=True)
            if error := _run(study, output, here):
                failed[study.name] = error
                print(f"study {study.name} failed: {error}", file=sys.stderr, flush=True)
                _write(output, study, FAILED_NAME, made_of | {"error": error})
            else:
                files = _files(_folder(output, study))
                _write(output, study, MADE_OF, made_of | {"files": files})
    return failed


def all_finished(sweep: Sweep, output: Path) -> bool:
    """Whether every run of the sweep is, which studies wait for."""
    return all(is_finished(output, run) for run in sweep.runs)


def _folder(output: Path, study: Study) -> Path:
    return output / STUDIES / study.name


def _made_of(sweep: Sweep, study: Study, output: Path, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """The command, wherever the sweep's folder lies, and a digest of what it reads of the runs."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError):  # no table yet
        digest.update((output / f"{TABLE}.csv").read_bytes())
    for run in sweep.runs:
        for probe in run.further:
            folder = output / run.name / FURTHER / probe.name
            for task in sorted(task for tasks in read_made(folder).values() for task in tasks):
                with contextlib.suppress(OSError):
                    digest.update((folder / task / "results.json").read_bytes())
    command = [word.replace(str(output), "OUTPUT") for word in study.command]
    if command[0] == _READS_STUDIES:
        digest.update(json.dumps(earlier).encode())
    return {"command": command, "runs": digest.hexdigest(), "code": _code()}


@functools.cache
def _code() -> str:
    """A digest of the package's modules: of a checkout no version says what it holds."""
    root, digest = Path(ecg_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _is_made(output: Path, study: Study, made_of: dict[str, Any]) -> bool:
    """Whether a study was made of the same, and its files, and what else its command was to write, are there."""
    folder = _folder(output, study)
    before = _read(folder / MADE_OF)
    try:
        same = before is not None and all(before[key] == value for key, value in made_of.items())
        files = [folder / name for name in before["files"]] if same else []
    except (KeyError, TypeError):
        return False
    named = [word.partition("=")[2] for word in study.command if word.startswith(("--output=", "--workdir="))]
    return same and all(path.exists() for path in (*files, *map(Path, named)))


def _files(folder: Path) -> list[str]:
    """Files in a folder but those of this module."""
    own = (MADE_OF, FAILED_NAME)
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name not in own
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):  # made again
        return None
    return value if isinstance(value, dict) else None


def _write(output: Path, study: Study, name: str, value: dict[str, Any]) -> None:
    """Writes how a study ended, in the place of how it ended before."""
    folder = _folder(output, study)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    write_atomic(folder / name, (json.dumps(value, indent=1) + "\n").encode())
    if name == MADE_OF:
        (folder / FAILED_NAME).unlink(missing_ok=True)


def _run(study: Study, output: Path, here: bool) -> str:
    """Runs the command of a study; why it failed, or ""."""
    if not here:
        return _run_elsewhere(study)
    module = importlib.import_module(f"ecg_jax.{study.command[0].replace('-', '_')}")
    try:
        code = module.main(list(study.command[1:]))
    except Stopped:
        raise
    except SystemExit as error:  # argparse has said what is wrong
        code = error.code
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever it is, the other studies go on
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        jax.clear_caches()  # programs of a study that is over
    return f"exit code {code}, see above" if code else ""


def _run_elsewhere(study: Study) -> str:
    """The same in a process of its own, whose last line on stderr is why it failed."""
    last = ""
    with subprocess.Popen([*COMMAND, *study.command], stderr=subprocess.PIPE, text=True) as child:
        try:
            for line in child.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                last = line.strip() or last
        except BaseException:
            child.terminate()
            raise
    said = last.removeprefix(f"ecg-jax {study.command[0]}: error: ")
    return f"{said or 'it said nothing'} (exit code {child.returncode})" if child.returncode else ""
