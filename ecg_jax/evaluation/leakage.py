"""Whether test recordings, or patients, were seen in training or pretraining: the verdict beside every result.

Two recordings are identical when their int16 samples are (by checksum), near-identical when
`near_duplicates` takes one for a copy of the other under another gain, filter, rate, shift or crop. Patient ids
mean the same people within one corpus only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecg_jax.data.mixture import joint_fingerprint
from ecg_jax.data.store import Store
from ecg_jax.evaluation.near_duplicates import near_identical, too_many
from ecg_jax.evaluation.signatures import Signatures, signatures


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What some test recordings have in common with other recordings.

    Attributes:
      identical: rows of the test recordings that occur there bit for bit, increasing.
      near: those that occur there near-identical and not bit for bit, increasing; None if not looked for.
      bit_for_bit_only: test recordings that could be looked for bit for bit only, as they are too short or show no
        beat; 0 where `near` is None.
      patients: known patients that are in both, sorted; None across corpora and where ids are unknown.
    """

    identical: list[int]
    near: list[int] | None
    bit_for_bit_only: int
    patients: list[str] | None

    @property
    def rows(self) -> list[int]:
        """Test recordings that occur there in either way."""
        return sorted({*self.identical, *(self.near or [])})


def identical_pairs(a: Store, rows_a: np.ndarray, b: Store, rows_b: np.ndarray) -> list[tuple[int, int]]:
    """(row of a, row of b) of equal samples, sorted; the same rows of one store twice: every pair once.

    Raises:
      UserError: a store is damaged.
    """
    where: dict[str, list[int]] = {digest: [] for digest in a.column("checksum")[rows_a]}
    for row, digest in zip(rows_b, b.column("checksum")[rows_b], strict=True):
        if digest in where:
            where[digest].append(int(row))
    one_store = a.path.resolve() == b.path.resolve()
    once = one_store and np.array_equal(rows_a, rows_b)
    pairs = []
    for row, digest in zip(rows_a, a.column("checksum")[rows_a], strict=True):
        for other in where[digest]:
            if not one_store or (row < other if once else row != other):
                pairs.append((int(row), other))
    return sorted(pairs)


def shared_patients(a: Store, rows_a: np.ndarray, b: Store, rows_b: np.ndarray) -> list[str] | None:
    """Known patients with recordings among both, sorted.

    None across corpora, whose ids mean other people, and where one side knows no patient at all.
    """
    if a.corpus != b.corpus:
        return None
    known = [set(s.column("patient_id")[rows]) - {None, ""} for s, rows in ((a, rows_a), (b, rows_b))]
    return sorted(known[0] & known[1]) if all(known) else None


def find_overlap(
    test: Store,
    test_rows: np.ndarray,
    other: Store,
    rows: np.ndarray,
    described: tuple[Signatures, Signatures] | None,
) -> Overlap:
    """Looks for test recordings and their patients among other recordings.

    Args:
      test: store of the test recordings.
      test_rows: int [n], which they are.
      other: where to look; may be the same store.
      rows: int [m], which of its recordings count.
      described: signatures of both, to look for near-identical recordings too; None looks for identical ones only.

    Raises:
      UserError: signatures of stores of different rates, or a damaged store.
    """
    identical = {a for a, _ in identical_pairs(test, test_rows, other, rows)}
    if test.path.resolve() == other.path.resolve():
        identical.update(np.intersect1d(test_rows, rows).tolist())  # trained on the test recording itself
    identical = sorted(identical)
    found, bit_for_bit_only = None, 0
    if described is not None:
        found = sorted({match.row_a for match in near_identical(*described)} - set(identical))
        bit_for_bit_only = len(described[0].without)
    return Overlap(identical, found, bit_for_bit_only, shared_patients(test, test_rows, other, rows))


def verdict(
    store: Store,
    test_rows: np.ndarray,
    train_rows: np.ndarray,
    pretraining: Store | Sequence[tuple[Store, np.ndarray]] | None,
    near: bool,
    *,
    test_store: Store | None = None,
    pretraining_rows: np.ndarray | None = None,
    pretrained: bool = True,
    cache: Path | None = None,
) -> dict:
    """What a result has to say about leakage, JSON-able; it belongs under "leakage" in results.json.

    Args:
      store: trained on, and tested on unless `test_store` is given.
      test_rows: int [n], recordings tested on.
      train_rows: int [m], recordings trained and validated on.
      pretraining: stores that the encoder was pretrained on, each with the rows it has seen, or one store; nothing if
        it was not pretrained or not all of its stores are at hand, and the verdict says that this was not examined.
      near: look for near-identical recordings too, not only for identical ones, where there are no more than
        `near_duplicates.MAX_RECORDINGS`.
      test_store: of the test rows, if it is another one.
      pretraining_rows: int, the recordings of the one store; None takes all of them.
      pretrained: whether there was any pretraining.
      cache: folder that keeps signatures of the recordings that were compared.

    Returns:
      {"identical_train_test", "near_identical_train_test": numbers of test recordings, "patients_train_test": number
      of patients, "records_train_test": ids of those test recordings, "pretraining": None or {"store", "fingerprint",
      "identical_test", "near_identical_test", "same_patients", "records_test"}, "examined": {"identical": True,
      "near_identical": whether those were looked for in all that was examined, "pretraining": whether its recordings
      were examined, None without any}, "clean": whether nothing was found in what was examined, "verdict": a sentence
      that also says what was not examined}. Numbers that were not looked for, or cannot be known, are None.

    Raises:
      UserError: stores of different rates with `near`, or a damaged one.
    """
    tested = store if test_store is None else test_store
    ids = tested.column("record_id")
    sides = [(store, np.asarray(train_rows), "the training and validation recordings")]
    if isinstance(pretraining, Store):
        every = np.arange(len(pretraining))
        pretraining = [(pretraining, every if pretraining_rows is None else pretraining_rows)]
    for other, rows in pretraining or ():
        of = f" of {other.path}" if len(pretraining) > 1 else ""
        sides.append((other, np.asarray(rows), f"the {len(rows)} pretraining recordings{of}"))
    described = (
        _described(tested, test_rows, [(store, rows) for store, rows, _ in sides], cache) if near else {}
    )

    overlaps, sentences = [], []
    for number, (other, rows, where) in enumerate(sides):
        overlap = find_overlap(tested, test_rows, other, rows, described.get(number))
        overlaps.append(overlap)
        too_large = too_many(len(test_rows), len(rows)) if near else None
        sentences.append(_sentence(overlap, len(test_rows), where, too_large))
    training, of_pretraining = overlaps[0], None
    if not pretraining:
        sentences.append(
            "pretraining recordings were not examined" if pretrained else "there was no pretraining"
        )
    else:
        overlap = _joined(overlaps[1:])
        of_pretraining = {
            "store": ", ".join(str(other.path) for other, _ in pretraining),
            "fingerprint": joint_fingerprint([other.fingerprint for other, _ in pretraining]),
            "identical_test": len(overlap.identical),
            "near_identical_test": _count(overlap.near),
            "same_patients": _count(overlap.patients),
            "records_test": [str(ids[row]) for row in overlap.rows],
        }
    text = "; ".join(sentences) + "."
    return {
        "identical_train_test": len(training.identical),
        "near_identical_train_test": _count(training.near),
        "patients_train_test": _count(training.patients),
        "records_train_test": [str(ids[row]) for row in training.rows],
        "pretraining": of_pretraining,
        "examined": {
            "identical": True,
            "near_identical": all(overlap.near is not None for overlap in overlaps),
            "pretraining": of_pretraining is not None if pretrained else None,
        },
        "clean": not any(overlap.rows or overlap.patients for overlap in overlaps),
        "verdict": text[0].upper() + text[1:],
    }


def _joined(overlaps: list[Overlap]) -> Overlap:
    """What test recordings have in common with any of several stores; near ones unknown if they are for one of them,
    patients unknown if they are for all of them (where a corpus differs, they can be no one's).
    """
    identical = sorted({row for overlap in overlaps for row in overlap.identical})
    near = None
    if all(overlap.near is not None for overlap in overlaps):
        near = sorted({row for overlap in overlaps for row in overlap.near} - set(identical))
    known = [overlap.patients for overlap in overlaps if overlap.patients is not None]
    patients = sorted({patient for each in known for patient in each}) if known else None
    return Overlap(identical, near, max(overlap.bit_for_bit_only for overlap in overlaps), patients)


def _described(
    tested: Store, test_rows: np.ndarray, sides: list[tuple[Store, np.ndarray]], cache: Path | None
) -> dict[int, tuple[Signatures, Signatures]]:
    """Signatures of the test recordings and of each of the sides that is not too large, by its place.

    Those of one store are made together, once for each of its recordings.
    """
    compared = {
        place: (store, rows)
        for place, (store, rows) in enumerate(sides)
        if too_many(len(test_rows), len(rows)) is None
    }
    if not compared:
        return {}
    needed: dict[Path, tuple[Store, list[np.ndarray]]] = {}
    for store, rows in ((tested, test_rows), *compared.values()):
        needed.setdefault(store.path.resolve(), (store, []))[1].append(rows)
    of_store = {
        path: signatures(store, np.concatenate(rows), cache) for path, (store, rows) in needed.items()
    }

    def of(store: Store, rows: np.ndarray) -> Signatures:
        return of_store[store.path.resolve()].of(rows)

    return {place: (of(tested, test_rows), of(*side)) for place, side in compared.items()}


def _count(found: list | None) -> int | None:
    return None if found is None else len(found)


def _sentence(overlap: Overlap, n_test: int, where: str, too_large: str | None) -> str:
    """What of the test recordings is found there, and what was not looked for."""
    if overlap.near is None:
        why = f": {too_large}" if too_large else ""
        recordings = f"{len(overlap.identical)} bit for bit (near-identical ones were not looked for{why})"
    else:
        recordings = f"{len(overlap.identical)} bit for bit and {len(overlap.near)} near-identical"
        if overlap.bit_for_bit_only:
            recordings += (
                f" ({overlap.bit_for_bit_only} of the test recordings, too short or without beats, were looked for "
                "bit for bit only)"
            )
    patients = (
        "patients cannot be compared (other corpora, or no ids)"
        if overlap.patients is None
        else f"patients in both: {len(overlap.patients)}"
    )
    return f"of {n_test} test recordings, {where} hold {recordings}, {patients}"
