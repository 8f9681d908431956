"""`ecg-jax prepare CORPUS SOURCE STORE`: raw recordings to a store.

The list of recordings is cut into units; processes convert units to chunk files; finalisation makes them a
store. Killed at any moment, the same command goes on where it stopped. The result does not depend on the
number of processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

from ecg_jax.data.attempt import check_same_job, partial_folder, refuse_another_job
from ecg_jax.data.conversion import Job, convert
from ecg_jax.data.corpora import CORPORA
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.readers.gains import check_assume_gain
from ecg_jax.data.recording import KINDS, Problem, strict_error
from ecg_jax.data.store import PARTIAL, Store, read_attributes
from ecg_jax.data.writer import disk_errors, finalise, unit_size
from ecg_jax.errors import UserError

# A lower --clip-mv would cut off ordinary QRS complexes, and nothing after it would notice.
MIN_CLIP_MV = 0.5

HELP_WIDTH = 105


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a store holds and how it came about.

    Attributes:
      store: its folder.
      corpus: its corpus.
      written: records in the store.
      refused: recordings that could not be used.
      problems: kind -> number of recordings.
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
            lines.append(f"  problems           one line each in {self.store / 'problems.jsonl'}")
            lines += [f"    {kind:<24} {n}" for kind, n in self.problems.items()]
        else:
            lines.append("  problems           none")
        return "\n".join(lines)


def prepare(
    corpus: str,
    source: str | os.PathLike,
    store: str | os.PathLike,
    *,
    rate: int | str | None = None,
    workers: int | None = None,
    strict: bool = False,
    clip_mv: float | None = None,
    duplicates: str = "keep",
    assume_gain: float | None = None,
    progress: bool = True,
) -> Summary:
    """Converts the recordings of a corpus into a store.

    Args:
      corpus: a name of `data.corpora.CORPORA`.
      source: folder of the corpus.
      store: folder to write; may hold an interrupted attempt of the same job, which is continued.
      rate: samples per second of the variant to take, for corpora that come at several rates (PTB-XL: 500,
        100).
      workers: processes; None takes the CPUs this process may use.
      strict: the first problem of any recording stops with an error.
      clip_mv: clip to +-clip_mv millivolts; None clips nothing.
      duplicates: "keep" marks records with an identical signal in column `duplicate_of`, "drop" leaves them
        out.
      assume_gain: integers per mV for recordings whose header gain cannot be trusted; None refuses them.
      progress: show a progress bar.

    Returns:
      A `Summary`; `print` it.

    Raises:
      UserError: a wrong folder, a store of another job, a full disk, a problem under `strict`, ...
    """
    started = time.monotonic()
    source, store = Path(source), Path(store)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    rate = _check_arguments(corpus, source, store, rate, workers, clip_mv, duplicates, assume_gain)
    settings = {
        "corpus": corpus,
        "source": str(source.resolve()),
        "source_rate": rate,
        "clip_mv": clip_mv,
        "duplicates": duplicates,
        "assume_gain": assume_gain,
    }
    # Twice: before the listing, which takes minutes for a corpus with big tables, and with what the listing says,
    # for only that tells whether labels and recordings of SOURCE still are what the store was made from.
    with disk_errors(store):
        refuse_another_job(store, settings)
    job = _job(source, store, strict, settings)
    if (store / "zarr.json").exists():
        check_same_job(store, read_attributes(store), job.settings)
        shutil.rmtree(store / PARTIAL, ignore_errors=True)
        return _summary(job, started, already_complete=True)
    with disk_errors(store), partial_folder(store, job.settings):
        convert(job, workers, progress)
        finalise(
            store,
            n_units=len(job.units),
            preprocessing=job.preprocessing,
            attributes=job.settings,
            label_sets=job.listing.label_sets,
            classes=job.listing.classes,
            descriptions=job.listing.descriptions,
            values=job.listing.values,
            first_problems=job.listing.problems,
            drop_duplicates=duplicates == "drop",
            strict=strict,
        )
    return _summary(job, started, already_complete=False)


def _check_arguments(corpus, source, store, rate, workers, clip_mv, duplicates, assume_gain) -> int | None:
    """Refuses arguments that cannot be right; returns the rate as a number."""
    if corpus not in CORPORA:
        raise UserError(f"There is no corpus {corpus!r}; there are {', '.join(CORPORA)}.")
    if duplicates not in ("keep", "drop"):
        raise UserError(f"--duplicates is keep or drop, not {duplicates!r}.")
    if workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}.")
    if clip_mv is not None and not MIN_CLIP_MV <= clip_mv <= 32.767:
        raise UserError(
            f"--clip-mv is in millivolts, from {MIN_CLIP_MV} (less cuts off the QRS complexes) to 32.767 (int16 "
            f"microvolts), not {clip_mv}."
        )
    check_assume_gain(assume_gain)
    if rate is not None:
        try:
            rate = int(rate)
        except ValueError:
            raise UserError(f"--source-rate is a number of samples per second, not {rate!r}.") from None
    if not source.is_dir():
        raise UserError(f"SOURCE {source} is not a folder; {corpus} expects {CORPORA[corpus].EXPECTS}.")
    if store.resolve().is_relative_to(source.resolve()):
        raise UserError(f"STORE {store} lies inside SOURCE {source}; choose a folder outside it.")
    if store.exists() and not store.is_dir():
        raise UserError(f"STORE {store} is a file; choose a folder.")
    return rate


def _job(source: Path, store: Path, strict: bool, settings: dict) -> Job:
    listing = CORPORA[settings["corpus"]].list_records(source, settings["source_rate"])
    # In the order in which stores have always had them: their bytes depend on it.
    settings = {
        **{key: settings[key] for key in ("corpus", "source", "source_rate")},
        "source_digest": listing.digest(),
        **{key: settings[key] for key in ("clip_mv", "duplicates", "assume_gain")},
        "fold_source": listing.fold_source,
    }
    if strict and listing.problems:
        raise strict_error(listing.problems[0])
    n = unit_size(len(listing.entries))
    units = [listing.entries[i : i + n] for i in range(0, len(listing.entries), n)]
    preprocessing = Preprocessing(clip_mv=settings["clip_mv"])
    corpus, assume_gain = settings["corpus"], settings["assume_gain"]
    return Job(corpus, source, store, strict, assume_gain, preprocessing, listing, settings, units)


def _read_problems(store: Path) -> list[Problem]:
    """The lines of problems.jsonl.

    Raises:
      UserError: it is missing, cannot be read or is not what `finalise` writes.
    """
    path = store / "problems.jsonl"
    advice = (
        f"the signals of {store} are complete, but to know its problems bring that file back or prepare anew"
    )
    try:
        # Not splitlines(): it also splits at characters that a lead's name may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"Cannot read {path}: {reason}; {advice}.") from error
    problems = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            problems.append(Problem(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"Line {number} of {path} is damaged; {advice}.") from error
    return problems


def _summary(job: Job, started: float, already_complete: bool) -> Summary:
    written = Store(job.store)
    problems = _read_problems(job.store)
    if already_complete and job.strict and problems:
        raise strict_error(problems[0])
    kinds = Counter(problem.kind for problem in problems)
    folds = Counter(written.column("fold").tolist())
    return Summary(
        store=job.store,
        corpus=job.corpus,
        written=len(written),
        refused=sum(problem.action == "refused" for problem in problems),
        problems=dict(kinds.most_common()),
        derived=kinds["derived_leads"],
        missing=kinds["missing_leads"],
        saturated=int(written.column("saturated").sum()),
        folds=dict(sorted(folds.items())),
        fold_source=written.fold_source,
        hours=float(written.column("length").sum()) / written.rate_hz / 3600,
        seconds=time.monotonic() - started,
        already_complete=already_complete,
    )


def _item(name: str, text: str, width: int) -> str:
    """An item of a list in --help, its text in a column of its own."""
    start = f"  {name:<{width}} "
    return textwrap.fill(
        text,
        HELP_WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def parser() -> argparse.ArgumentParser:
    """The command line of `ecg-jax prepare`."""
    kinds = "\n".join(_item(kind, meaning, 22) for kind, meaning in KINDS.items())
    expects = "\n".join(_item(name, module.EXPECTS, 10) for name, module in CORPORA.items())
    result = argparse.ArgumentParser(
        prog="ecg-jax prepare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Convert raw ECG recordings into a store: 12 leads in canonical order, 240 Hz, int16 microvolts, one table
of records.

Leads are matched by name, absent limb leads are derived from two others, units and gains are checked, and
whatever is wrong with a recording is one line in STORE/problems.jsonl. Interrupted at any moment, the same
command goes on where it stopped; on a complete store it does nothing.

CORPUS and what it expects in SOURCE:
{expects}
""",
        epilog=f"""\
examples:
  ecg-jax prepare ptbxl ptb-xl-1.0.3 stores/ptbxl
  ecg-jax prepare ptbxl ptb-xl-1.0.3 stores/ptbxl100 --source-rate=100
  ecg-jax prepare challenge challenge-2021/training stores/challenge2021 --duplicates=drop
  ecg-jax prepare wfdb ludb/data stores/ludb --assume-gain=1000

A store opens in Python with ecg_jax.data.store.Store("stores/ptbxl"), and its signal in any Zarr v3 reader.

problems, one line each in STORE/problems.jsonl:
{kinds}
""",
    )
    add = result.add_argument
    add("corpus", metavar="CORPUS", choices=list(CORPORA), help=" or ".join(CORPORA))
    add("source", metavar="SOURCE", type=Path, help="folder of the raw recordings; only read")
    add("store", metavar="STORE", type=Path, help="folder to write")
    add(
        "--source-rate",
        metavar="HZ",
        type=int,
        help="ptbxl: 500 or 100 (default: 500 if records500 is there)",
    )
    add("--workers", type=int, metavar="N", help="processes (default: number of CPUs)")
    add("--strict", action="store_true", help="stop at the first problem of any recording")
    add(
        "--clip-mv",
        type=float,
        metavar="MV",
        help="clip to +-MV millivolts, as the HEEDB conversion does with 3",
    )
    add(
        "--duplicates",
        choices=["keep", "drop"],
        default="keep",
        help="records with an identical signal: keep and mark them in column duplicate_of (default), or "
        "drop them",
    )
    add(
        "--assume-gain",
        type=float,
        metavar="PER_MV",
        help="integers per millivolt where the header gives no gain or one that cannot be right (LUDB; such "
        "recordings are refused otherwise), or units per millivolt of CODE-15's arrays, 1 or 10",
    )
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = parser().parse_args(argv)
    summary = prepare(
        arguments.corpus,
        arguments.source,
        arguments.store,
        rate=arguments.source_rate,
        workers=arguments.workers,
        strict=arguments.strict,
        clip_mv=arguments.clip_mv,
        duplicates=arguments.duplicates,
        assume_gain=arguments.assume_gain,
    )
    print(summary)
    print(
        f"\nNext: ecg-jax pretrain --config=configs/cpc.py --workdir=runs/cpc --config.store={summary.store}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
