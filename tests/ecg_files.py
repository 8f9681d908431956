"""Writing WFDB records for tests, right ones and wrong ones, independently of the readers under test."""

import struct
from pathlib import Path

import numpy as np

from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.synthetic import synthetic_recording

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "ecg"


def ecg(seconds: float = 10.0, rate: float = 500.0, index: int = 0) -> np.ndarray:
    """Synthetic twelve-lead ECG [T, 12] in millivolts."""
    return synthetic_recording(1, index, seconds, rate)[0].signal


def checksum16(samples: np.ndarray) -> int:
    """WFDB's checksum: the 16-bit signed sum of the samples."""
    total = int(samples.astype(np.int64).sum()) & 0xFFFF
    return total - 65536 if total >= 32768 else total


def write_record(
    folder: Path,
    name: str,
    signal: np.ndarray,
    leads=CANONICAL_LEADS,
    rate: float = 500,
    gain: str = "1000/mV",
    per_mv: float = 1000.0,
    mat: bool = False,
    comments=(),
    record_line: str | None = None,
    checksums=None,
    n_samples: int | None = None,
) -> Path:
    """Writes NAME.hea and NAME.dat (or a Challenge NAME.mat) and returns the header's path.

    Args:
      folder: created if need be.
      name: record name.
      signal: [T, C] millivolts, or int16 to write as it is.
      leads: C names.
      rate: for the header.
      gain: gain field of every signal line, or a list of them.
      per_mv: integers per millivolt really written, or a list.
      mat: write a MATLAB 4 matrix "val".
      comments: lines put behind "#".
      record_line: the whole first line, if it shall be wrong.
      checksums: of the header; None writes the right ones.
      n_samples: of the header; None writes the right number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    signal = np.asarray(signal)
    digital = signal if signal.dtype == np.int16 else np.rint(signal * np.asarray(per_mv)).astype("<i2")
    gains = [gain] * len(leads) if isinstance(gain, str) else gain
    totals = [checksum16(digital[:, c]) for c in range(len(leads))] if checksums is None else checksums
    file, storage = (f"{name}.mat", "16+24") if mat else (f"{name}.dat", "16")
    count = len(digital) if n_samples is None else n_samples
    lines = [record_line or f"{name} {len(leads)} {rate:g} {count}"]
    for c, lead in enumerate(leads):
        lines.append(f"{file} {storage} {gains[c]} 16 0 {digital[0, c]} {totals[c]} 0 {lead}")
    lines += [f"#{comment}" for comment in comments]
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")
    header = struct.pack("<5i", 30, len(leads), len(digital), 0, 4) + b"val\0" if mat else b""
    (folder / file).write_bytes(header + digital.astype("<i2").tobytes())
    return folder / f"{name}.hea"


def write_digital_zero(path: Path, n_leads: int, n_samples: int) -> None:
    """A Challenge .mat of zeros, for real headers whose signal is not shipped."""
    path.write_bytes(
        struct.pack("<5i", 30, n_leads, n_samples, 0, 4) + b"val\0" + bytes(2 * n_leads * n_samples)
    )
