"""`ecg-jax prepare CORPUS SOURCE STORE`: raw recordings to a store.

The list of recordings is cut into units; processes convert units to chunk files; finalisation makes them a
store. Killed at any moment, the same command goes on where it stopped. The result does not depend on the
number of processes, nor on whether shards on several hosts (--shard) did the units before --merge made them a
store.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
import time
from pathlib import Path

from ecg_jax.data.attempt import (
    last_count,
    one_shard,
    outline,
    refuse_another_job,
    shard_folder,
    whole_store,
)
from ecg_jax.data.conversion import Job, convert
from ecg_jax.data.corpora import CORPORA
from ecg_jax.data.corpora.listing import Listing
from ecg_jax.data.kept_listing import list_records
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.readers.gains import check_assume_gain
from ecg_jax.data.recording import KINDS, strict_error
from ecg_jax.data.shard import WHOLE, Shard, shards_of
from ecg_jax.data.store import PARTIAL
from ecg_jax.data.unit_files import DamagedUnits, disk_errors, finished_units
from ecg_jax.data.writer import finalise, unit_size
from ecg_jax.errors import UserError
from ecg_jax.prepare_summary import ShardSummary, Summary, Survey, summarise, survey

# A lower --clip-mv would cut off ordinary QRS complexes, and nothing after it would notice.
MIN_CLIP_MV = 0.5

HELP_WIDTH = 105


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
    shard: str | None = None,
    merge: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Summary | ShardSummary | Survey:
    """Converts the recordings of a corpus into a store.

    Many hosts that share a drive each convert one shard, then one of them merges: for i of 0 to 63, on any host and
    at any time, `prepare(..., shard=f"{i}/64")`, and after the last one `prepare(..., merge=True)`.

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
      shard: "i/n" converts the units i, i + n, i + 2n, ... only and leaves finishing the store to `merge`; what another
        shard has listed lately is not listed again (`data.kept_listing`).
      merge: finish a store whose units shards have converted.
      dry_run: look what there is to do and write nothing; with `merge`, refuse as that would.
      progress: tell on stderr how far it is: a bar in a terminal, elsewhere a line a minute.

    Returns:
      A `Summary`, with `shard` a `ShardSummary`, with `dry_run` a `Survey`; `print` it.

    Raises:
      UserError: a wrong folder, a store of another job, a full disk, a problem under `strict`, units that are missing
        under `merge`, ...
    """
    started = time.monotonic()
    source, store = Path(source), Path(store)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    rate = _check_arguments(corpus, source, store, rate, workers, clip_mv, duplicates, assume_gain)
    part = WHOLE if shard is None else Shard.parse(shard)
    if merge and shard is not None:
        raise UserError(
            "--shard converts and --merge finishes: give one of them, and --merge after all shards."
        )
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
    if merge and not any((store / name).exists() for name in ("zarr.json", f"{PARTIAL}/plan.json")):
        raise UserError(
            f"There is nothing to merge in {store}: no shard has been started; begin with --shard=0/N."
        )
    listing, digest = list_records(source, store, settings, shard is not None, dry_run, progress)
    job = _job(source, store, strict, settings, listing, digest)
    with disk_errors(store):
        refuse_another_job(store, job.settings, job.outline)
        complete = (store / "zarr.json").exists()
        if dry_run:
            if merge and not complete:
                _refuse_missing(job)
            return survey(job, part, complete)
        converted = 0
        if complete:
            shutil.rmtree(store / PARTIAL, ignore_errors=True)
        elif shard is None:
            complete = not _make_store(job, workers, merge, progress)
        else:
            with one_shard(store, job.settings, job.outline, part) as folder:
                complete = folder is None
                if not complete:
                    converted = convert(job, part, folder, workers, progress)
    if shard is None:
        return summarise(job, started, already_complete=complete)
    units = part.units(len(job.units))
    return ShardSummary(
        store=store,
        corpus=corpus,
        shard=part,
        units=len(units),
        recordings=sum(len(job.units[unit]) for unit in units),
        converted=converted,
        seconds=time.monotonic() - started,
        already_complete=complete,
    )


def _make_store(job: Job, workers: int, merge: bool, progress: bool) -> bool:
    """Converts what is not converted (not under `merge`) and makes a store of it; False if another process just did."""
    with whole_store(job.store, job.settings, job.outline) as unfinished:
        if not unfinished:
            return False
        if merge:
            _refuse_missing(job)
        else:
            with shard_folder(job.store, WHOLE) as folder:
                convert(job, WHOLE, folder, workers, progress)
        count = last_count(job.store)
        try:
            finalise(
                job.store,
                n_units=len(job.units),
                preprocessing=job.preprocessing,
                attributes=job.settings,
                label_sets=job.listing.label_sets,
                classes=job.listing.classes,
                descriptions=job.listing.descriptions,
                values=job.listing.values,
                first_problems=job.listing.problems,
                drop_duplicates=job.settings["duplicates"] == "drop",
                strict=job.strict,
                progress=progress,
            )
        except DamagedUnits as error:
            if not merge:
                raise
            how = _how_to_convert(error.units, count)
            raise UserError(
                f"{error.what}; run the same command {how} again, which writes only what is damaged, then --merge."
            ) from error
    return True


def _refuse_missing(job: Job) -> None:
    """Raises UserError when there are units that no shard has finished."""
    missing = sorted(set(range(len(job.units))) - set(finished_units(job.store, range(len(job.units)))))
    if missing:
        how = _how_to_convert(missing, last_count(job.store))
        raise UserError(
            f"{len(missing)} of {len(job.units)} units of {job.store} are not converted yet; run the same command "
            f"{how} first, which does only what is missing."
        )


def _how_to_convert(units: list[int], count: int) -> str:
    """The arguments instead of --merge that have these units done, when there were so many shards last."""
    if count == WHOLE.count:
        return "without --merge, or with --shard=i/n for all i as an array,"
    return f"with {shards_of(units, count)}"


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


def _job(source: Path, store: Path, strict: bool, settings: dict, listing: Listing, digest: str) -> Job:
    # In the order in which stores have always had them: their bytes depend on it.
    settings = {
        **{key: settings[key] for key in ("corpus", "source", "source_rate")},
        "source_digest": digest,
        **{key: settings[key] for key in ("clip_mv", "duplicates", "assume_gain")},
        "fold_source": listing.fold_source,
    }
    if strict and listing.problems:
        raise strict_error(listing.problems[0])
    n_records = len(listing.entries)
    if not n_records:
        raise UserError(f"{settings['corpus']} finds no recording in SOURCE {source}.")
    size = unit_size(n_records)
    units = [range(begin, min(begin + size, n_records)) for begin in range(0, n_records, size)]
    return Job(
        corpus=settings["corpus"],
        source=source,
        store=store,
        strict=strict,
        assume_gain=settings["assume_gain"],
        preprocessing=Preprocessing(clip_mv=settings["clip_mv"]),
        listing=listing,
        settings=settings,
        units=units,
        outline=outline(listing, units),
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
    expects = "\n".join(
        _item(name, module.EXPECTS, max(map(len, CORPORA))) for name, module in CORPORA.items()
    )
    result = argparse.ArgumentParser(
        prog="ecg-jax prepare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Convert raw ECG recordings into a store: 12 leads in canonical order, 240 Hz, int16 microvolts, one table
of records.

Leads are matched by name, absent limb leads are derived from two others, units and gains are checked, and
whatever is wrong with a recording is one line in STORE/problems.jsonl. Interrupted at any moment, the same
command goes on where it stopped; on a complete store it does nothing.

Many hosts that share a drive, here as a SLURM array of 64 tasks and a job that follows it:
  sbatch --array=0-63 --wrap 'ecg-jax prepare CORPUS SOURCE STORE --shard=$SLURM_ARRAY_TASK_ID/64'
  sbatch --dependency=afterok:JOBID --wrap 'ecg-jax prepare CORPUS SOURCE STORE --merge'
Tasks that fail are submitted again as they are; --merge names those that are missing. The first task lists SOURCE and
the others read its list; --merge looks at SOURCE again and refuses one that has changed.

CORPUS and what it expects in SOURCE:
{expects}
""",
        epilog=f"""\
examples:
  ecg-jax prepare ptbxl ptb-xl-1.0.3 stores/ptbxl
  ecg-jax prepare ptbxl ptb-xl-1.0.3 stores/ptbxl100 --source-rate=100
  ecg-jax prepare challenge challenge-2021/training stores/challenge2021 --duplicates=drop
  ecg-jax prepare wfdb ludb/data stores/ludb --assume-gain=1000
  ecg-jax prepare challenge challenge-2021/training stores/challenge2021 --dry-run

A store opens in Python with ecg_jax.data.store.Store("stores/ptbxl"), and its signal in any Zarr v3 reader.

problems, one line each in STORE/problems.jsonl, also when all recordings have the same one:
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
    add(
        "--shard",
        metavar="I/N",
        help="convert only every N-th unit from unit I (0 to N-1) on; leaves the store to be finished by --merge",
    )
    add(
        "--merge",
        action="store_true",
        help="check what all shards wrote against checksums and finish the store",
    )
    add(
        "--dry-run",
        action="store_true",
        help="write nothing; tell recordings, units, what is done, and disk needed and free, and with --merge what is "
        "missing",
    )
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
        shard=arguments.shard,
        merge=arguments.merge,
        dry_run=arguments.dry_run,
    )
    print(summary)
    if not isinstance(summary, Summary):
        return 0
    print(
        f"\nNext: ecg-jax pretrain --config=configs/cpc.py --workdir=runs/cpc --config.store={summary.store}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
