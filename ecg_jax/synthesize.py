"""`ecg-jax synthesize STORE`: a store of synthetic 12-lead ECG with known labels, of any size."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ecg_jax.data import synthetic_cases as cases
from ecg_jax.data.attempt import check_same_job, refuse_another_job, whole_store
from ecg_jax.data.corpora.listing import hash_fold
from ecg_jax.data.preprocessing import Preprocessing, Processed
from ecg_jax.data.progress import Progress
from ecg_jax.data.recording import CANONICAL_LEADS, Recording
from ecg_jax.data.store import BYTES_PER_SAMPLE, Store, read_attributes
from ecg_jax.data.synthetic_signal import draw_signal
from ecg_jax.data.unit_files import disk_errors, finished_units
from ecg_jax.data.workers import do_all, stopped
from ecg_jax.data.writer import UnitWriter, finalise, unit_size
from ecg_jax.errors import UserError

# A permutation of fewer leaves too many, or all, with their own labels.
LEAST_TO_SHUFFLE = 20
# Raised whenever the same arguments give other signals or labels, so that a half-made store is not finished by another
# generator.
GENERATOR = 1
SECONDS = (2.5, 600.0)
MAX_DISTINCT = 4096

MOST_RECORDS = 10**9  # 58 TB of ten seconds each
_SETS = "\n".join(f"  {label_set:<12}{', '.join(classes)}" for label_set, classes in cases.CLASSES.items())
DESCRIPTION = f"""\
Writes a store of synthetic 12-lead ECG: for load studies at any size, for controls (with --shuffle-labels AUROC of a
probe must be 0.5 within its confidence interval), and to see whether an encoder finds what is known to be there. It is
no substitute for ECG: a model is not good because it is good here, and every store, record id and result says that it
is synthetic.

Each recording has five label sets, and the numbers behind them as values `truth`:
{_SETS}

A patient keeps conduction, axis and voltages over all recordings. With --distinct no patient does: few signals are
repeated for all patients, in all folds, so every probe on such a store is leaky; it is for load studies only.

Signals are drawn at the rate and in the unit of a store, without preprocessing; the limb-lead identities hold exactly
in the stored integers. The bytes depend on the arguments only, and not on the number of processes; interrupted, the
same command goes on where it stopped.

  ecg-jax synthesize stores/synthetic --records=20000
  ecg-jax synthesize stores/control --records=20000 --shuffle-labels
  ecg-jax synthesize stores/load --records=11000000 --patients=1800000 --distinct=64     (634 GB)
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a store is made from.

    Attributes:
      store: its folder.
      records, patients: how many.
      seconds: length of each recording.
      seed: of everything.
      shuffle_labels: give each patient the labels and values of another.
      distinct: draw only so many signals and repeat them, each copy with some microvolts of its own on the chest
        leads; 0: draw every one. Labels are those of the signal, whoever's it is: for load studies only.
    """

    store: Path
    records: int
    patients: int
    seconds: float
    seed: int
    shuffle_labels: bool
    distinct: int

    def settings(self) -> dict:
        """What is compared before a store is continued, and kept in its attributes."""
        return {
            "corpus": "synthetic",
            "source": "",
            "synthetic": True,
            "generator": GENERATOR,
            **{key: value for key, value in dataclasses.asdict(self).items() if key != "store"},
            "fold_source": "SHA-256 of the patient id into 10 folds",
        }

    @property
    def n_units(self) -> int:
        """Number of chunk files."""
        return -(-self.records // unit_size(self.records))

    def unit(self, number: int) -> range:
        """The records of one chunk file."""
        size = unit_size(self.records)
        return range(number * size, min((number + 1) * size, self.records))


def synthesize(
    store: str | os.PathLike,
    *,
    records: int,
    patients: int | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    shuffle_labels: bool = False,
    distinct: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Store:
    """Writes a store of synthetic ECG, or goes on with one that was begun with the same arguments.

    Args:
      store: folder to write.
      records: number of recordings.
      patients: number of patients; None: half as many as recordings.
      seconds: length of each recording.
      seed: of everything.
      shuffle_labels: give each patient the labels and values of another one.
      distinct: draw only so many signals and repeat them; 0 draws every one.
      workers: processes; None takes the CPUs this process may use.
      progress: tell how far it is.

    Returns:
      The store, complete.

    Raises:
      UserError: an argument that cannot be, a folder of something else, a disk that is full or too small.
    """
    patients = max(1, records // 2) if patients is None else patients
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    job = Job(Path(store), records, patients, seconds, seed, shuffle_labels, distinct)
    _check(job, workers)
    settings = job.settings()
    with disk_errors(job.store):
        refuse_another_job(job.store, settings)
        if (job.store / "zarr.json").exists():
            check_same_job(job.store, read_attributes(job.store), settings)
            return Store(job.store)
        with whole_store(job.store, settings, {}) as unfinished:
            if unfinished:
                _draw(job, workers, progress)
                _finalise(job, settings, progress)
    return Store(job.store)


def _check(job: Job, workers: int) -> None:
    low, high = SECONDS
    for wrong, message in (
        (
            not 1 <= job.records <= MOST_RECORDS,
            f"--records is from 1 to {MOST_RECORDS}, not {job.records}",
        ),
        (
            not 1 <= job.patients <= job.records,
            f"--patients is from 1 to the number of records ({job.records}), not {job.patients}",
        ),
        (not low <= job.seconds <= high, f"--seconds is from {low:g} to {high:g}, not {job.seconds:g}"),
        (job.seed < 0, f"--seed must not be negative, and is {job.seed}"),
        (
            job.shuffle_labels and job.patients < LEAST_TO_SHUFFLE,
            f"--shuffle-labels needs at least {LEAST_TO_SHUFFLE} patients, not {job.patients}: of fewer too many would "
            "get their own labels",
        ),
        (workers < 1, f"--workers must be at least 1, not {workers}"),
        (
            not 0 <= job.distinct <= MAX_DISTINCT,
            f"--distinct is from 1 to {MAX_DISTINCT} (or 0: every signal is drawn), not {job.distinct}",
        ),
        (job.store.exists() and not job.store.is_dir(), f"STORE {job.store} is a file; choose a folder"),
    ):
        if wrong:
            raise UserError(f"{message}.")


def _draw(job: Job, workers: int, progress: bool) -> None:
    """Writes all units that are not there yet.

    Raises:
      UserError: the disk is too small, a worker process died.
    """
    units = range(job.n_units)
    todo = sorted(set(units) - set(finished_units(job.store, units)))
    n_todo = sum(len(job.unit(unit)) for unit in todo)
    samples = round(job.seconds * Preprocessing().rate_hz)
    need, free = n_todo * samples * BYTES_PER_SAMPLE, shutil.disk_usage(job.store).free
    if need > free:
        raise UserError(
            f"STORE {job.store} needs {need / 1e9:.1f} GB more, but its disk has {free / 1e9:.1f} GB free; choose "
            "another folder or fewer records."
        )
    with Progress("synthesize", job.records, job.records - n_todo, show=progress) as bar:
        do_all(functools.partial(_draw_unit, job), todo, min(workers, len(todo)), bar)


def _draw_unit(job: Job, unit: int, count: Callable[[], None]) -> None:
    """Draws and writes the records of one chunk file; calls `count` after each."""
    preprocessing = Preprocessing()
    order = _order(job) if job.shuffle_labels else None
    none = np.zeros(12, bool)
    with disk_errors(job.store), UnitWriter(job.store, unit, "synthetic") as writer:
        for index in job.unit(unit):
            if stopped():
                return
            labelled = index if order is None else cases.shuffled_source(index, job.records, order)
            case, known = _case(job, index), _case(job, labelled)
            number = cases.patient_of(index, job.records, job.patients)
            patient, name = _patient(job.seed, number), f"p{number:08d}"
            recording = Recording(
                record_id=f"synthetic{index:08d}",
                signal=np.zeros((0, 12)),  # in the store's own format below
                rate=preprocessing.rate_hz,
                leads=CANONICAL_LEADS,
                patient_id=name,
                fold=hash_fold(name),
                labels=known.labels(),
                values={"truth": known.values()},
                age=patient.age,
                sex=patient.sex,
            )
            signal = _signal(job, index, case, preprocessing.rate_hz)
            writer.append(recording, Processed(signal, none, none, none, 0, []), "")
            count()
        writer.finish()


@functools.lru_cache(1)
def _order(job: Job) -> np.ndarray:
    return cases.patient_order(job.seed, job.patients)


@functools.lru_cache(256)
def _patient(seed: int, number: int) -> cases.Patient:
    return cases.draw_patient(seed, number)


def _case(job: Job, index: int) -> cases.Case:
    """What a recording shows. Repeated ones show what the first of them does, whoever's they are."""
    return _drawn_case(job, index % job.distinct if job.distinct else index)


@functools.lru_cache(MAX_DISTINCT)
def _drawn_case(job: Job, index: int) -> cases.Case:
    patient = _patient(job.seed, cases.patient_of(index, job.records, job.patients))
    return cases.draw_case(job.seed, index, patient, job.seconds)


def _signal(job: Job, index: int, case: cases.Case, rate: float) -> np.ndarray:
    """int16 [T, 12] microvolts."""
    if not job.distinct:
        return draw_signal(job.seed, index, case, rate)
    copy, source = divmod(index, job.distinct)
    signal = _kept_signal(job, source).copy()
    # No two records may be identical. The digits of the copy's number in base 64, a microvolt each, on the chest leads,
    # where no identity of leads is broken.
    signal[:, 6:] += (copy // 64 ** np.arange(6) % 64).astype(np.int16)
    return signal


@functools.lru_cache(MAX_DISTINCT)
def _kept_signal(job: Job, source: int) -> np.ndarray:
    return draw_signal(job.seed, source, _case(job, source), Preprocessing().rate_hz)


def _finalise(job: Job, settings: dict, progress: bool) -> None:
    finalise(
        job.store,
        n_units=job.n_units,
        preprocessing=Preprocessing(),
        attributes=settings,
        label_sets=tuple(cases.CLASSES),
        classes={label_set: list(classes) for label_set, classes in cases.CLASSES.items()},
        descriptions={
            label_set: {name: text for name, (_, text) in classes.items()}
            for label_set, classes in cases.CLASSES.items()
        },
        values={"truth": cases.VALUES},
        first_problems=[],
        drop_duplicates=False,
        strict=False,
        progress=progress,
    )


def parser() -> argparse.ArgumentParser:
    """The command line of `ecg-jax synthesize`."""
    result = argparse.ArgumentParser(
        prog="ecg-jax synthesize",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("store", metavar="STORE", type=Path, help="folder to write")
    add("--records", type=int, required=True, metavar="N", help="number of recordings")
    add("--patients", type=int, metavar="N", help="number of patients (default: half of the recordings)")
    add("--seconds", type=float, default=10.0, metavar="S", help="length of a recording (default: 10)")
    add("--seed", type=int, default=0, metavar="N", help="of everything (default: 0)")
    add("--workers", type=int, metavar="N", help="processes (default: number of CPUs)")
    add(
        "--shuffle-labels",
        action="store_true",
        help="negative control: patients, at least 20, change labels and values at random",
    )
    add(
        "--distinct",
        type=int,
        default=0,
        metavar="K",
        help="for load studies only, not for probes: draw K signals and repeat them for all patients, with microvolts "
        "of difference (default: draw all)",
    )
    return result


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    arguments = parser().parse_args(argv)
    started = time.monotonic()
    store = synthesize(
        arguments.store,
        records=arguments.records,
        patients=arguments.patients,
        seconds=arguments.seconds,
        seed=arguments.seed,
        shuffle_labels=arguments.shuffle_labels,
        distinct=arguments.distinct,
        workers=arguments.workers,
    )
    print(
        f"{store.path}: {len(store)} synthetic recordings of {arguments.seconds:g} s, in "
        f"{time.monotonic() - started:.1f} s"
    )
    for label_set, classes in store.class_info.items():
        counts = ", ".join(f"{name} {info['count']}" for name, info in classes.items())
        print(f"  {label_set:<12}{counts}")
    if arguments.shuffle_labels:
        print(
            "Its labels are shuffled among patients: AUROC of a probe must be 0.5 within its confidence interval."
        )
    if arguments.distinct:
        print(
            "Its recordings are copies of few, in all folds: for load studies only, every probe on it is leaky."
        )
    print(
        "No result from it says anything about ECG.\n\n"
        f"Next: ecg-jax pretrain --config=configs/cpc.py --workdir=runs/synthetic --config.store={store.path}"
    )
    return 0
