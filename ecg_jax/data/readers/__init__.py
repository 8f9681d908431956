"""Readers: one file per format, each yielding `Recording`s in millivolts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ecg_jax.data.recording import BadRecording, Problem, Recording
from ecg_jax.errors import UserError

TABLES = (".csv", ".npy")


def iter_recordings(
    path: str | Path,
    *,
    rate: float | None = None,
    unit: str | None = None,
    leads: Sequence[str] | None = None,
    assume_gain: float | None = None,
) -> Iterator[Recording | Problem]:
    """Reads any recordings `prepare` can read, by the same rules, without a corpus.

    Args:
      path: a .hea file or the .dat or .mat beside it, a .csv or .npy table, or a folder. Of a folder all
        .hea at any depth are read, and the tables only if `rate` and `unit` are given; ids are paths below
        it without suffix.
      rate: samples per second of tables; WFDB headers give theirs.
      unit: unit of tables (mV, uV, V, nV).
      leads: lead names of .npy tables.
      assume_gain: integers per mV where a WFDB header cannot be trusted.

    Yields:
      In sorted order, a `Recording`, or the `Problem` of one that cannot be read. `Preprocessing.apply` can
      refuse a recording as well (`BadRecording`, whose `problem` has the same form).

    Raises:
      UserError: there is nothing to read at `path`, a table without rate and unit, or an `assume_gain` that
        cannot be right.
    """
    from ecg_jax.data.corpora.listing import find_files
    from ecg_jax.data.readers.gains import check_assume_gain
    from ecg_jax.data.readers.table import read_table
    from ecg_jax.data.readers.wfdb import read_wfdb

    check_assume_gain(assume_gain)
    path = Path(path)
    if path.is_dir():
        with_tables = rate is not None and unit is not None
        files = list(find_files(path, (".hea", *TABLES) if with_tables else (".hea",)))
        if not files:
            hint = "" if with_tables else " (.csv and .npy are read when rate and unit are given)"
            raise UserError(f"There are no recordings in {path}{hint}.")
        named = [(file.relative_to(path).with_suffix("").as_posix(), file) for file in files]
    else:
        file = path if path.suffix.lower() in (".hea", *TABLES) else path.with_suffix(".hea")
        if not file.is_file():
            raise UserError(
                f"There is no recording {path}: expected a .hea (beside .dat or .mat), .csv or .npy file."
            )
        named = [(file.stem, file)]
    for record_id, file in named:
        try:
            if file.suffix.lower() in TABLES:
                yield read_table(file, record_id, rate, unit, leads)
            else:
                yield read_wfdb(file, record_id, repair=True, assume_gain=assume_gain)
        except BadRecording as error:
            yield error.problem
