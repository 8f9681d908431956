"""What the tests of the readers share."""

import pytest

from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.recording import BadRecording, Problem

CHALLENGE = ("Age: 50", "Sex: Male", "Dx: 426783006", "Rx: Unknown")


def refusal(path, **options) -> Problem:
    """Why a record is refused."""
    with pytest.raises(BadRecording) as error:
        read_wfdb(path, "r", **options)
    return error.value.problem


def kinds(recording) -> set[str]:
    """The kinds of its problems."""
    return {problem.kind for problem in recording.problems}
