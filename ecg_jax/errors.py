"""What ends a command on purpose: a mistake the user can fix, or being asked to stop."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user asked for or handed over: a config field, a file, a folder, a checkpoint.

    The message is one clear sentence that names the file, field or parameter and says what to do. The command
    line prints it without a traceback and exits with code 2.
    """


class Stopped(Exception):
    """A run was asked to stop, saved, and did.

    Attributes:
        exit_code: of the command: 0 after SIGTERM or a preemption, 130 after Ctrl-C.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def closest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses `word`: the known one that is like it, or all that are known."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"
