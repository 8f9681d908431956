"""Which kind of folder a study or report was given; needs no JAX."""

from pathlib import Path

from ecg_jax.errors import UserError
from ecg_jax.studies.figure_folder import INDEX

SWEEP = "sweep.json"
_RUN_FILES = ("config.json", "preprocessing.json")


def is_study(folder: Path) -> bool:
    """Whether a folder is, or holds, more than finished probes: a sweep, a pretraining run, or a study's figures."""
    inside = [folder, *subfolders(folder)] if folder.is_dir() else []
    return any(
        (each / INDEX).is_file() or (each / SWEEP).is_file() or is_run(each) or is_run(each / "run")
        for each in inside
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is the workdir of a pretraining run."""
    return all((folder / name).is_file() for name in _RUN_FILES)


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder by name, hidden ones left out.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError as error:
        raise UserError(f"Cannot read the folder {folder}: {error.strerror}.") from error
