"""What `ecg-jax prepare` says in the end, and what it would do."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ecg_jax.data.attempt import last_count
from ecg_jax.data.conversion import Job
from ecg_jax.data.progress import bytes_text, count_text, duration_text, rate_text
from ecg_jax.data.recording import Problem, strict_error
from ecg_jax.data.shard import WHOLE, Shard, shards_of
from ecg_jax.data.store import BYTES_PER_SAMPLE, Store
from ecg_jax.data.unit_files import chunk_path, finished_units
from ecg_jax.errors import UserError

# What is assumed of recordings while none has been converted.
TYPICAL_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a store holds and how it came about.

    Attributes:
      store: its folder.
      corpus: its corpus.
      written: records in the store.
      refused: recordings that could not be used.
      problems: kind -> number of recordings.
      problem_bytes: size of problems.jsonl.
      derived: recordings with limb leads derived.
      missing: recordings with missing leads.
      saturated: saturated samples, all recordings together.
      folds: fold -> records.
      fold_source: where the folds come from.
      hours: recorded time.
      seconds: wall time of this call.
      already_complete: nothing had to be done.
    """

    store: Path
    corpus: str
    written: int
    refused: int
    problems: dict[str, int]
    problem_bytes: int
    derived: int
    missing: int
    saturated: int
    folds: dict[int, int]
    fold_source: str
    hours: float
    seconds: float
    already_complete: bool

    def __str__(self) -> str:
        lines = [
            f"{self.store}: {self.written} records of {self.corpus}, {self.hours:.2f} hours"
            + (
                " (was complete already, nothing done)"
                if self.already_complete
                else f", in {self.seconds:.1f} s"
            ),
            f"  refused            {self.refused}",
            f"  leads              {self.derived} records with derived, {self.missing} with missing leads",
            f"  saturated samples  {self.saturated}",
            f"  folds              {', '.join(f'{fold}: {n}' for fold, n in self.folds.items())}",
            f"                     from {self.fold_source}",
        ]
        if self.problems:
            # All of them are kept, however often one repeats: what is left out of a study must be found by its record.
            size = f"{count_text(sum(self.problems.values()))}, {bytes_text(self.problem_bytes)}"
            lines.append(f"  problems           one line each in {self.store / 'problems.jsonl'} ({size})")
            for kind, n in self.problems.items():
                everywhere = " (as many as there are records)" if n >= self.written else ""
                lines.append(f"    {kind:<24} {n}{everywhere}")
        else:
            lines.append("  problems           none")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class ShardSummary:
    """What a call with --shard did.

    Attributes:
      store: folder of the store.
      corpus: its corpus.
      shard: which part of it.
      units: units of this shard.
      recordings: recordings in them.
      converted: recordings that this call dealt with.
      seconds: wall time of this call.
      already_complete: the store was complete, so nothing had to be done.
    """

    store: Path
    corpus: str
    shard: Shard
    units: int
    recordings: int
    converted: int
    seconds: float
    already_complete: bool

    def __str__(self) -> str:
        if self.already_complete:
            return f"{self.store}: shard {self.shard} of {self.corpus}, the store is complete already, nothing done"
        rate = rate_text(self.converted, self.seconds, of_bytes=False)
        return (
            f"{self.store}: shard {self.shard} of {self.corpus} is done, {count_text(self.recordings)} recordings in "
            f"{self.units} units; {count_text(self.converted)} of them in this call, in "
            f"{duration_text(self.seconds)}, {rate}"
        )


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a call would do.

    Attributes:
      store: folder of the store.
      corpus: its corpus.
      recordings: of the whole corpus.
      refused: recordings refused already by the tables of the corpus.
      units: of the whole corpus.
      shard: which part of it would be done; 0/1 is everything.
      shard_units, shard_recordings: of that part.
      done_units, done_recordings: of those, finished already.
      missing: shards with units that are not finished, in words; empty where none has been started.
      bytes_needed: of disk for what is not done.
      bytes_each: per recording, from which that follows.
      bytes_free: on the disk of the store.
      complete: the store is complete already.
    """

    store: Path
    corpus: str
    recordings: int
    refused: int
    units: int
    shard: Shard
    shard_units: int
    shard_recordings: int
    done_units: int
    done_recordings: int
    missing: str
    bytes_needed: int
    bytes_each: float
    bytes_free: int
    complete: bool

    def __str__(self) -> str:
        rows = [f"{self.store}: nothing written, this is what a call would do"]

        def row(name: str, text: str) -> None:
            rows.append(f"  {name:<18} {text}")

        row(
            "corpus",
            f"{self.corpus}, {count_text(self.recordings)} recordings in {count_text(self.units)} units",
        )
        if self.refused:
            row("refused", f"{count_text(self.refused)} recordings by the tables of the corpus")
        if self.complete:
            row("done", "everything, the store is complete")
            return "\n".join(rows)
        part = "everything" if self.shard == WHOLE else f"shard {self.shard}"
        row(part, f"{count_text(self.shard_recordings)} recordings in {count_text(self.shard_units)} units")
        row(
            "done already",
            f"{count_text(self.done_recordings)} recordings in {count_text(self.done_units)} units",
        )
        if self.missing:
            row("units missing in", self.missing)
        how = "as in the units done" if self.done_units else f"if recordings last {TYPICAL_SECONDS:g} s"
        row(
            "disk needed",
            f"{bytes_text(self.bytes_needed)} at {self.bytes_each / 1e3:.1f} kB a recording, {how}",
        )
        row(
            "disk free",
            bytes_text(self.bytes_free) + (", not enough" if self.bytes_free < self.bytes_needed else ""),
        )
        return "\n".join(rows)


def survey(job: Job, shard: Shard, complete: bool) -> Survey:
    """Looks what a job would do; writes nothing, and does not read what is done already."""
    units = shard.units(len(job.units))
    finished = [] if complete else finished_units(job.store, range(len(job.units)))
    done = sorted(set(units) & set(finished))
    converted = sum(len(job.units[unit]) for unit in finished)
    if converted:
        each = sum(_size(chunk_path(job.store, unit)) for unit in finished) / converted
    else:
        each = TYPICAL_SECONDS * job.preprocessing.rate_hz * BYTES_PER_SAMPLE
    recordings = sum(len(job.units[unit]) for unit in units)
    done_recordings = sum(len(job.units[unit]) for unit in done)
    count = last_count(job.store)
    missing = sorted(set(range(len(job.units))) - set(finished))
    existing = next(folder for folder in (job.store, *job.store.resolve().parents) if folder.is_dir())
    return Survey(
        store=job.store,
        corpus=job.corpus,
        recordings=len(job.listing.entries),
        refused=len(job.listing.problems),
        units=len(job.units),
        shard=shard,
        shard_units=len(units),
        shard_recordings=recordings,
        done_units=len(done),
        done_recordings=done_recordings,
        missing=shards_of(missing, count) if missing and count > 1 else "",
        bytes_needed=round((recordings - done_recordings) * each),
        bytes_each=each,
        bytes_free=shutil.disk_usage(existing).free,
        complete=complete,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def read_problems(store: Path) -> Iterator[Problem]:
    """The lines of problems.jsonl.

    Raises:
      UserError: it is missing, cannot be read or is not what `finalise` writes.
    """
    path = store / "problems.jsonl"
    advice = (
        f"the signals of {store} are complete, but to know its problems bring that file back or prepare anew"
    )
    try:
        # In bytes: lines of text also end at characters that a lead's name may hold.
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield Problem(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise UserError(f"Line {number} of {path} is damaged; {advice}.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}; {advice}.") from error


def summarise(job: Job, started: float, already_complete: bool) -> Summary:
    """What the store of a job holds.

    Args:
      job: which is done.
      started: `time.monotonic()` when the call began.
      already_complete: before it.

    Raises:
      UserError: a problem under `strict`, or the store is damaged.
    """
    written = Store(job.store)
    kinds: Counter[str] = Counter()
    refused = 0
    for problem in read_problems(job.store):
        if already_complete and job.strict:
            raise strict_error(problem)
        kinds[problem.kind] += 1
        refused += problem.action == "refused"
    folds, counts = np.unique(written.column("fold"), return_counts=True)
    return Summary(
        store=job.store,
        corpus=job.corpus,
        written=len(written),
        refused=refused,
        problems=dict(kinds.most_common()),
        problem_bytes=(job.store / "problems.jsonl").stat().st_size,
        derived=kinds["derived_leads"],
        missing=kinds["missing_leads"],
        saturated=int(written.column("saturated").sum()),
        folds=dict(zip(folds.tolist(), counts.tolist(), strict=True)),
        fold_source=written.fold_source,
        hours=float(written.column("length").sum()) / written.rate_hz / 3600,
        seconds=time.monotonic() - started,
        already_complete=already_complete,
    )
