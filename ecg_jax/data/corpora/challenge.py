"""PhysioNet/CinC Challenge 2020 and 2021: .mat and .hea pairs at any depth, SNOMED codes in the Dx comment.

Reyna et al., CinC 2021, https://doi.org/10.23919/CinC53138.2021.9662687; Perez Alday et al., Physiol Meas 41:124003
(2020), https://doi.org/10.1088/1361-6579/abc960; PhysioNet challenge-2020 and challenge-2021, CC BY 4.0. Verified on
published files of every dataset except INCART, of which only headers.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from ecg_jax.data.corpora.entries import refuse_rate
from ecg_jax.data.corpora.listing import HASHED_FOLDS, Entry, Listing, drop_repeated, find_files
from ecg_jax.data.readers.wfdb import read_wfdb
from ecg_jax.data.recording import Problem, Recording, cannot_read, is_absent
from ecg_jax.errors import UserError

#: Tables of the Challenges' organisers: diagnoses and the weights of their scores.
TABLES = Path(__file__).parents[2] / "assets" / "challenge"

EXPECTS = "a folder with the Challenge's .mat and .hea files, at any depth"


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists every .hea below `source`; the record id is its name without the suffix.

    Raises:
      UserError: `rate` is given, or there is no .hea with a .mat in the folder.
    """
    refuse_rate(rate, "Challenge")
    entries, signals = [], []
    for path in find_files(source, (".hea", ".mat")):
        file = path.relative_to(source)
        if path.suffix.lower() == ".hea":
            entries.append(Entry(path.stem, file.as_posix()))
        else:
            signals.append(file)
    if not entries or not (signals or any(_is_challenge(source / e.file) for e in entries)):
        raise UserError(f"No Challenge recordings found in {source} (expected {EXPECTS}).")
    entries.sort(key=lambda entry: (entry.record_id, entry.file))
    headers = {entry.file.removesuffix(".hea") for entry in entries}
    problems = [
        Problem(file.stem, "missing_header", "refused", f"{file.as_posix()} has no .hea beside it.")
        for file in signals
        if file.with_suffix("").as_posix() not in headers
    ]
    entries, repeated = drop_repeated(entries)
    return Listing(entries, problems + repeated, ("dx",), None, {"dx": snomed_names()}, HASHED_FOLDS)


def read(source: Path, entry: Entry, assume_gain: float | None) -> Recording:
    """Reads one record through the tolerant header parser. Blank or absent Dx gives an empty label list.

    Raises:
      BadRecording: it cannot be used.
    """
    recording = read_wfdb(source / entry.file, entry.record_id, repair=True, assume_gain=assume_gain)
    recording.labels.setdefault("dx", [])
    return recording


def snomed_names() -> dict[str, str]:
    """SNOMED CT code -> name and abbreviation, from the tables of the Challenges of 2021 and 2020."""
    names: dict[str, str] = {}
    for year, code in (("2021", "SNOMEDCTCode"), ("2020", "SNOMED CT Code")):
        for kind in ("scored", "unscored"):
            with open(TABLES / year / f"dx_mapping_{kind}.csv", newline="", encoding="utf-8-sig") as file:
                for row in csv.DictReader(file):
                    names.setdefault(row[code], f"{row['Dx']} ({row['Abbreviation']})")
    return names


_DATASETS = {
    "A": "cpsc2018", "Q": "cpsc_extra", "I": "st_petersburg", "S": "ptb", "HR": "ptbxl", "E": "georgia",
}  # fmt: skip
_NAME = re.compile(r"([A-Z]+)(\d+)")
_LAST_OF_CHAPMAN = 10646


def dataset_of(record_id: str) -> str | None:
    """The dataset a Challenge record came from, which its name tells: "cpsc2018" (A0001), "cpsc_extra" (Q0001),
    "st_petersburg" (I0001), "ptb" (S0001), "ptbxl" (HR00001), "georgia" (E00001), "chapman" (JS00001 to JS10646),
    "ningbo" (JS10647 on); None for another name.
    """
    match = _NAME.fullmatch(record_id)
    if match is None:
        return None
    if match[1] == "JS":
        return "chapman" if int(match[2]) <= _LAST_OF_CHAPMAN else "ningbo"
    return _DATASETS.get(match[1])


def _is_challenge(path: Path) -> bool:
    """Whether a header without signal file belongs to the Challenge: it names a .mat file."""
    try:
        return ".mat" in path.read_text(errors="replace")
    except OSError as error:
        if is_absent(error):
            return False  # a broken link
        raise cannot_read(path, error) from error
