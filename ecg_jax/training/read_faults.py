"""What errors of reading a checkpoint mean: damage of its files, or a system that cannot read them now."""

from pathlib import Path


def first_line(error: BaseException) -> str:
    """What an error says in one line, or its type when it says nothing."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Some of Orbax's carry the traceback of another as their text.
    line = lines[-1 if lines[0].startswith("Traceback") else 0]
    # Those of tensorstore begin with what was done and end with the system's reason, many paths apart.
    return line if len(line) <= 240 else f"{line[:100]} ... {line[-120:]}"


def not_readable(error: Exception) -> str | None:
    """What the system says when it cannot read what is there; None for other errors, missing files among them."""
    missing = FileNotFoundError | NotADirectoryError | IsADirectoryError
    return error.strerror if isinstance(error, OSError) and not isinstance(error, missing) else None


def first_not_readable(folder: Path) -> str | None:
    """What the system says about the first file of a folder that it cannot read; None when it reads all there are.

    The errors of storage formats do not tell a disk that does not answer from a file that is not whole.
    """
    try:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    while file.read(2**24):
                        pass
    except OSError as error:
        return not_readable(error)
    return None
