"""`ecg-jax embed`: a file or folder of recordings to one embedding each, by the contract in the checkpoint.

Each recording is brought under the checkpoint's preprocessing contract (leads by name, millivolts, rate, NaN
rule), cut into consecutive non-overlapping windows, and encoded; the embedding is the mean over its windows.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ecg_jax.data.crops import non_overlapping_crops
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.readers import iter_recordings
from ecg_jax.data.recording import BadRecording, Problem, Recording
from ecg_jax.errors import UserError
from ecg_jax.evaluation.features import encode_padded
from ecg_jax.training.pretrained import encode_fn, restore_encoder

DESCRIPTION = """\
Writes one row per recording: record_id, patient_id where known, n_crops, flags (what was corrected or is
missing in it, see `ecg-jax prepare --help`), and the embedding (float32, the mean over consecutive
non-overlapping windows). Preprocessing is that of the checkpoint: any lead order, rate and unit that
`ecg-jax prepare` reads will do. What cannot be embedded gets one line on stderr and in the metadata.
"""
SUFFIXES = (".npz", ".parquet")


@dataclass(frozen=True)
class Embedded:
    """One recording's embedding."""

    record_id: str
    patient_id: str | None
    n_crops: int
    flags: tuple[str, ...]
    """Kinds of the problems that `ecg-jax prepare` would report of it: a corrected gain, missing leads, ..."""
    embedding: np.ndarray
    """float32 [D]."""


class LeftOut(NamedTuple):
    """A recording that has no embedding, and why."""

    record: str
    kind: str
    """A kind of problem of `ecg-jax prepare`, or "short" or "not_finite"."""
    detail: str


def windows(
    recordings: Iterable[Recording | Problem], contract: Preprocessing, report: Callable[[LeftOut], None]
) -> Iterator[tuple[Recording, np.ndarray]]:
    """Brings recordings under a contract and cuts them.

    Args:
        recordings: from `iter_recordings`.
        contract: with a window.
        report: called with what stopped a recording.

    Yields:
        (recording, int16 [n_crops, T, 12] microvolts), n_crops >= 1.
    """
    window = contract.window_samples
    for recording in recordings:
        if isinstance(recording, Problem):
            report(LeftOut(recording.record, recording.kind, recording.detail))
            continue
        try:
            processed = contract.apply(recording)
        except BadRecording as error:
            report(LeftOut(error.problem.record, error.problem.kind, error.problem.detail))
            continue
        signal, recording.problems = processed.signal, processed.problems
        starts, _ = non_overlapping_crops([len(signal)], [0], window)
        if not len(starts):
            seconds = f"{len(signal) / contract.rate_hz:.2f} s"
            detail = f"it lasts {seconds}, less than the window of {contract.window_s:g} s."
            report(LeftOut(recording.record_id, "short", detail))
            continue
        yield recording, signal[: len(starts) * window].reshape(len(starts), window, signal.shape[1])


def embed_all(
    cut: Iterable[tuple[Recording, np.ndarray]], encode: Callable[[np.ndarray], np.ndarray], batch_size: int
) -> Iterator[Embedded]:
    """Embeds recordings in order, with batches that span recordings and memory for one batch only.

    Args:
        cut: from `windows`.
        encode: int16 [B, T, 12] -> float32 [B, D].
        batch_size: B.
    """
    pending: list[tuple[Recording, int]] = []  # recordings whose last window is not yet encoded
    crops: list[np.ndarray] = []
    sums: dict[int, np.ndarray] = {}
    owners: list[int] = []
    first = 0  # serial number of pending[0]

    def encode_batch() -> Iterator[Embedded]:
        nonlocal first
        batch, batch_owners = crops[:batch_size], owners[:batch_size]
        del crops[:batch_size], owners[:batch_size]
        for owner, vector in zip(
            batch_owners, encode_padded(encode, np.stack(batch), batch_size), strict=True
        ):
            sums[owner] = sums[owner] + vector if owner in sums else vector.astype(np.float64)
        while pending and (not owners or owners[0] > first):
            recording, n_crops = pending.pop(0)
            embedding = (sums.pop(first) / n_crops).astype(np.float32)
            first += 1
            flags = tuple(sorted({problem.kind for problem in recording.problems}))
            yield Embedded(recording.record_id, recording.patient_id, n_crops, flags, embedding)

    for serial, (recording, own) in enumerate(cut):
        pending.append((recording, len(own)))
        crops.extend(own)
        owners.extend([serial] * len(own))
        while len(crops) >= batch_size:
            yield from encode_batch()
    while crops:
        yield from encode_batch()


def write_embeddings(path: Path, rows: list[Embedded], metadata: dict) -> None:
    """Writes rows as .npz or .parquet, complete or not at all.

    The .npz holds record_id, patient_id ("" for unknown), n_crops, flags (separated by commas), embedding [n, D]
    and metadata (JSON text); the .parquet the same columns (null for unknown, flags a list, embedding a
    fixed-size list), metadata under the schema key `ecg_jax`.
    """
    embeddings = np.stack([row.embedding for row in rows])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".npz":
                np.savez(
                    file,
                    record_id=np.array([row.record_id for row in rows]),
                    patient_id=np.array([row.patient_id or "" for row in rows]),
                    n_crops=np.array([row.n_crops for row in rows], dtype=np.int32),
                    flags=np.array([",".join(row.flags) for row in rows]),
                    embedding=embeddings,
                    metadata=np.array(json.dumps(metadata)),
                )
            else:
                _write_parquet(file, rows, embeddings, metadata)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_parquet(file, rows: list[Embedded], embeddings: np.ndarray, metadata: dict) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    table = pa.table(
        {
            "record_id": pa.array([row.record_id for row in rows], pa.string()),
            "patient_id": pa.array([row.patient_id for row in rows], pa.string()),
            "n_crops": pa.array([row.n_crops for row in rows], pa.int32()),
            "flags": pa.array([list(row.flags) for row in rows], pa.list_(pa.string())),
            "embedding": vectors,
        }
    )
    pyarrow.parquet.write_table(table.replace_schema_metadata({"ecg_jax": json.dumps(metadata)}), file)


def embed(
    checkpoint: str,
    source: str | Path,
    output: str | Path,
    overwrite: bool = False,
    batch_size: int = 64,
    **reading,
) -> tuple[int, list[LeftOut]]:
    """Embeds every recording of a file or folder.

    Args:
        checkpoint: RUN or RUN/STEP of a pretraining run.
        source: file or folder, as `iter_recordings`.
        output: .npz or .parquet to write.
        overwrite: replace an existing output.
        batch_size: windows encoded at once.
        **reading: keyword arguments of `iter_recordings` (rate, unit, leads, assume_gain).

    Returns:
        (rows written, what stopped the other recordings).

    Raises:
        UserError: unknown suffix, an output that exists or lies in no folder, no such checkpoint, nothing to
            read, or no recording that could be embedded.
    """
    from tqdm import tqdm

    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output={output} must end in {' or '.join(SUFFIXES)}.")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output={output} cannot be written: its folder must exist and it must be a file.")
    if output.exists() and not overwrite:
        raise UserError(f"--output={output} exists; choose another name or add --overwrite.")
    if batch_size < 1:
        raise UserError(f"--batch-size={batch_size} must be at least 1.")
    encoder = restore_encoder(checkpoint)
    problems: list[LeftOut] = []

    def report(problem: LeftOut) -> None:
        problems.append(problem)
        tqdm.write(f"{problem.record}: {problem.kind}: {problem.detail}", file=sys.stderr)

    recordings = tqdm(iter_recordings(source, **reading), desc="embedding", unit="recording", leave=False)
    cut = windows(recordings, encoder.preprocessing, report)
    rows = []
    for row in embed_all(cut, encode_fn(encoder), batch_size):
        if np.isfinite(row.embedding).all():
            rows.append(row)
        else:
            report(LeftOut(row.record_id, "not_finite", "its embedding is not finite."))
    if not rows:
        raise UserError(
            f"None of the {len(problems)} recordings of {source} could be embedded; the lines above say why."
        )
    metadata = {
        "checkpoint": {"run": str(encoder.run.resolve()), "step": encoder.step},
        "preprocessing": encoder.preprocessing.to_dict(),
        "source": str(source),
        "not_embedded": [problem._asdict() for problem in problems],
    }
    write_embeddings(output, rows, metadata)
    for kind, count in Counter(flag for row in rows for flag in row.flags).most_common():
        print(f"{kind}: {count} of the embedded recordings", file=sys.stderr)
    return len(rows), problems


def main(argv: list[str]) -> int:
    """`ecg-jax embed`."""
    parser = argparse.ArgumentParser(
        prog="ecg-jax embed",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN[/STEP]", help="pretraining run")
    parser.add_argument("--input", required=True, metavar="PATH", help="file or folder of recordings")
    parser.add_argument("--output", required=True, metavar="FILE", help=".npz or .parquet to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--batch-size", type=int, default=64, help="windows encoded at once (default 64)")
    tables = parser.add_argument_group("tables (.csv, .npy), which do not say it themselves")
    tables.add_argument("--rate", type=float, help="samples per second")
    tables.add_argument("--unit", help="mV, uV, V or nV")
    tables.add_argument("--leads", help="lead names of .npy columns, separated by commas")
    parser.add_argument("--assume-gain", type=float, help="integers per mV, instead of a WFDB header's")
    options = parser.parse_args(argv)
    n_rows, problems = embed(
        options.checkpoint,
        options.input,
        options.output,
        options.overwrite,
        options.batch_size,
        rate=options.rate,
        unit=options.unit,
        leads=options.leads.split(",") if options.leads else None,
        assume_gain=options.assume_gain,
    )
    left_out = f", {len(problems)} left out" if problems else ""
    print(f"{n_rows} recordings embedded in {options.output}{left_out}")
    return 0
