"""Listing HEEDB: seconds and memory of its tables, per recording.

    pytest tests/benchmarks/test_listing_benchmark.py --benchmark-only -s

Tables and empty files of 20,000 and 200,000 recordings of version 5, in 34 partitions; `us_per_record` says whether
time grows with the number of recordings only, `bytes_per_record` what the table of entries holds, `pickled` a unit of
4096.
"""

import pickle

import numpy as np
import pytest

from ecg_jax.data.corpora import heedb


def write(folder, n: int) -> None:
    """Tables as published, files without content."""
    rng = np.random.default_rng(0)
    partition = rng.integers(0, len(heedb.PARTITIONS), n)
    patient = rng.integers(110_000_000, 110_000_000 + n // 6, n)
    code = rng.integers(1, 900, (n, 5))
    base = folder / "I0001"
    (base / "metadata").mkdir(parents=True)
    (base / "12SL_diagnoses").mkdir()
    with (
        open(base / "metadata" / "metadata.csv", "w") as people,
        open(base / "12SL_diagnoses" / "diagnoses_v24.csv", "w") as codes,
    ):
        people.write("BDSPPatientID,FileName,PatientRace,SexDSC,AgeAtAcquisition,LanguageDSC,ReligionDSC\n")
        codes.write("FileName,codes\n")
        for i in range(n):
            where = heedb.PARTITIONS[partition[i]].replace("-", "/") + f"/{i % 12 + 1:02d}"
            name = f"de_{patient[i]}_19900713{i:06d}_19900714{i:06d}"
            people.write(f"{patient[i]},/{where}/{name},White,Male,{8000 + i % 20000},English,None given\n")
            codes.write(f'./{where}/{name},"{", ".join(map(str, code[i]))}"\n')
            path = base / "WFDB" / where
            path.mkdir(parents=True, exist_ok=True)
            (path / f"{name}.hea").touch()


@pytest.mark.parametrize("n", [20_000, 200_000])
def test_listing(benchmark, tmp_path, n):
    write(tmp_path, n)
    found = benchmark.pedantic(heedb.list_records, (tmp_path, None), rounds=1)
    assert len(found.entries) == n
    benchmark.extra_info["us_per_record"] = round(benchmark.stats["mean"] / n * 1e6, 1)
    benchmark.extra_info["bytes_per_record"] = round(found.entries.table.nbytes / n)
    benchmark.extra_info["pickled"] = len(pickle.dumps(found.entries[:4096]))
