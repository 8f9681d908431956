"""HEEDB-Emory: a million recordings of 10 s at 250 or 500 Hz from Emory University Hospital (institution I0006 of the
Harvard-Emory ECG Database, versions 3 to 5), in partitions of a year, 2010 to 2018.

Koscova et al., medRxiv 2024.09.27.24314503; Brain Data Science Platform, https://doi.org/10.60508/rv6h-7d10,
credentialed access under its data use agreement. Files: `ECG/I0006/WFDB/2010/NAME.hea` with .dat, metadata/metadata.csv
(FileName such as WFDB/2010/NAME, BDSPPatientID with gaps, PatientRace, Sex, AgeAtAcquisition in days) and in
12SL_diagnoses/ diagnoses_v24.csv (FileName, codes) and diagnoses_dictionary.csv (codes, diagnoses). Folders, names of
files and columns are those that public descriptions and several public programs agree on; nothing was verified on
published files. The paper trains on years 2010 to 2018, but how it converted them is not published.
"""

from __future__ import annotations

import re
from pathlib import Path

from ecg_jax.data.corpora import heedb
from ecg_jax.data.corpora.entries import refuse_rate
from ecg_jax.data.corpora.heedb_listing import list_institution
from ecg_jax.data.corpora.listing import Listing
from ecg_jax.errors import UserError

EXPECTS = (
    "the HEEDB folder, version 3 to 5, with I0006/WFDB/2010/..., I0006/metadata/ and I0006/12SL_diagnoses/; any of its "
    "years"
)

#: The partitions the paper was trained on (spec §6).
PARTITIONS = tuple(f"emory-{year}" for year in range(2010, 2019))

INSTITUTION = "I0006"
_PARTITION = re.compile(r"(?:^|/)WFDB/(\d{4})/")

read = heedb.read


def partition_of(source_file: str) -> str | None:
    """ "emory-2010" from "ECG/I0006/WFDB/2010/NAME.hea", whatever is before WFDB; None for another path."""
    match = _PARTITION.search(source_file)
    return None if match is None else f"emory-{match[1]}"


def list_records(source: Path, rate: int | None) -> Listing:
    """Lists every .hea of the years that are in SOURCE, in order of year and name, as `heedb.list_records` does.

    Raises:
      UserError: `rate` is given, a table is missing or another one, or no record is there.
    """
    refuse_rate(rate, "HEEDB-Emory")
    layout = heedb.institution_layout(source, INSTITUTION, r"\d{4}", "2010")
    if layout is None:
        raise UserError(
            f"{source} is not the HEEDB folder: {INSTITUTION}/metadata/metadata.csv is missing (expected {EXPECTS})."
        )
    return list_institution(source, layout, _name_of, PARTITIONS, EXPECTS)


def _name_of(folder: str) -> str:
    return f"emory-{folder}"
