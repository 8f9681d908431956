"""Recordings for the tests of `ecg-jax prepare`, and what those tests share."""

import json
from pathlib import Path

import pytest

import ecg_jax
from ecg_files import ecg, write_record
from ecg_jax.prepare import prepare

SAMPLE = Path(ecg_jax.__file__).parent / "assets" / "ptbxl_sample"
N_MADE = 100
N_UNITS = 4  # of at most 32 recordings


def write_source(folder: Path) -> Path:
    """Writes `N_MADE` WFDB records with a problem here and there; every fifth has to be resampled."""
    for i in range(N_MADE):
        rate = 250 if i % 5 == 2 else 240
        signal = ecg(2.6 + 0.1 * (i % 3), float(rate), i)
        if i % 17 == 3:
            signal[:, 8] = 0
        path = write_record(folder / f"patient{i // 2:03d}", f"r{i:03d}", signal, rate=rate)
        if i % 29 == 5:
            path.with_suffix(".dat").unlink()
    return folder


def write_source_with_twins(folder: Path) -> Path:
    """`write_source` and three equal recordings, far apart, so that some shard sees only the later ones."""
    write_source(folder)
    for name in ("patient000/twin", "patient020/twin", "patient049/twin"):
        write_record(folder / name[:10], name[11:], ecg(2.6, 240.0, 0), rate=240)
    return folder


def finished(store: Path) -> list[int]:
    """The units that have a sidecar."""
    return sorted(int(path.stem.removeprefix("unit-")) for path in (store / ".partial").glob("unit-*.json"))


def files_of(store: Path) -> dict[str, bytes]:
    """Path in the store -> content, of all its files."""
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def problems_of(store: Path) -> list[dict]:
    """The lines of problems.jsonl."""
    return [json.loads(line) for line in (store / "problems.jsonl").read_text().splitlines()]


def interrupt_finalisation(source: Path, store: Path, **options) -> None:
    """Prepares until all units are done; raises KeyboardInterrupt instead of finalising."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ecg_jax.prepare.finalise", interrupted)
        prepare("wfdb", source, store, workers=1, progress=False, **options)
