"""Which recordings a run uses, of one store or several, and the small file that says so.

`select_records` makes a selection, `write_selection` keeps it as `selection.json`: one bit for each record of each
store, beside the fingerprints of the stores, so that the file alone tells the recordings of a run, today and from
another machine. Columns stay in Arrow and NumPy: of 11 million records none becomes an object of Python.
"""

import base64
import dataclasses
import functools
import hashlib
import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.data import ladder as ladders
from ecg_jax.data.between_stores import of_held_out_patients, repeated_signals
from ecg_jax.data.folds import highest_folds
from ecg_jax.data.mixture import StoreSet, as_set
from ecg_jax.data.patient_order import first_patients
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.files import write_atomic

#: Name of the file in a run's workdir.
SELECTION_NAME = "selection.json"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """How recordings were chosen.

    Attributes:
        ladder, rung: see `data/ladder.py`.
        max_records: largest number of training recordings; None: no cut.
        val_folds: how many of the highest-numbered folds of each store are held out.
        window_samples: shorter records are left out.
        whole_patients: a cut takes no patient in part. Runs begun before selections were files cut at a record.
    """

    ladder: str
    rung: str
    max_records: int | None
    val_folds: int
    window_samples: int
    whole_patients: bool

    @property
    def cut_by_number(self) -> bool:
        """Whether `max_records` was given as a number, and is not that of a rung."""
        return self.max_records is not None and (self.rung == "" or self.ladder == "paper")

    def sentence(self, available: int) -> str:
        """The rule for people, `available` training recordings before a cut."""
        held = f"the {self.val_folds} highest folds of each store are held out"
        left = f"records shorter than {self.window_samples} samples and duplicate signals are left out"
        of = "everything" if self.ladder == "nested" else f"the partitions of rung {self.rung} of the paper"
        cut = ""
        if self.max_records is not None:
            unit = "whole patients" if self.whole_patients else "patients, the last perhaps in part,"
            cut = f"; at most {self.max_records} records of {unit} in an order given by a hash of their ids"
            if available <= self.max_records:
                cut += f" (not reached: there are {available})"
        return f"{of}; {held}; {left}{cut}"


@dataclasses.dataclass(frozen=True)
class Source:
    """A store that recordings were chosen from: corpus, fingerprint, number of records."""

    corpus: str
    fingerprint: str
    records: int


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows of a store, or of several one after the other, that a run uses.

    Attributes:
        train, val: int64 joint rows, ascending.
        too_short: records left out because they are shorter than a window.
        duplicates: records left out because an earlier one has the same signal.
        held_elsewhere: records left out because their patient is held out in another store of the corpus.
        available: training records there were before `rule.max_records` cut them down.
        sources: the stores.
        rule: how the records were chosen.
        missing: partitions of the rung that no store has.
    """

    train: np.ndarray
    val: np.ndarray
    too_short: int
    duplicates: int
    held_elsewhere: int
    available: int
    sources: tuple[Source, ...]
    rule: Rule
    missing: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for people."""
        line = f"{len(self.train)} recordings to train on, {len(self.val)} held out"
        if self.rule.ladder == "paper":
            line += f"; rung {self.rule.rung} of the paper"
        if len(self.train) < self.available:
            by = "data.max_records" if self.rule.cut_by_number else f"rung {self.rule.rung}"
            line += f"; cut down from {self.available} by {by}"
        if self.too_short:
            line += f"; {self.too_short} shorter than a window left out"
        if self.duplicates:
            line += f"; {self.duplicates} duplicate signals left out"
        if self.held_elsewhere:
            line += f"; {self.held_elsewhere} of patients who are held out in another store left out"
        return line

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of the stores and the rows, whatever rule led to them."""
        digest = hashlib.sha256()
        for source, train, val in zip(
            self.sources, self._bits(self.train), self._bits(self.val), strict=True
        ):
            digest.update(f"{source.fingerprint} {source.records}\n".encode())
            digest.update(train)
            digest.update(val)
        return digest.hexdigest()

    def rows_of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(train, val) as rows of store `number` itself."""
        bounds = np.cumsum([0, *(source.records for source in self.sources)])
        first, end = bounds[number : number + 2]
        train, val = (
            rows[np.searchsorted(rows, first) : np.searchsorted(rows, end)] - first
            for rows in (self.train, self.val)
        )
        return train, val

    def _bits(self, rows: np.ndarray) -> list[bytes]:
        """One bit for each record of each store."""
        bounds = np.cumsum([0, *(source.records for source in self.sources)])
        chosen = np.zeros(bounds[-1], bool)
        chosen[rows] = True
        return [np.packbits(chosen[first:end]).tobytes() for first, end in itertools.pairwise(bounds)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, see `write_selection`."""
        bits = zip(self._bits(self.train), self._bits(self.val), strict=True)
        stores = []
        for number, (source, (train, val)) in enumerate(zip(self.sources, bits, strict=True)):
            rows = self.rows_of(number)
            stores.append(
                dataclasses.asdict(source)
                | {"train": len(rows[0]), "val": len(rows[1])}
                | {"train_rows": _packed(train), "val_rows": _packed(val)}
            )
        return {
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "rule": self.rule.sentence(self.available),
            **dataclasses.asdict(self.rule),
            "train": len(self.train),
            "val": len(self.val),
            "available": self.available,
            "too_short": self.too_short,
            "duplicates": self.duplicates,
            "held_elsewhere": self.held_elsewhere,
            "missing_partitions": list(self.missing),
            "stores": stores,
        }


def _packed(bits: bytes) -> str:
    return base64.b64encode(zlib.compress(bits)).decode()


def write_selection(path: Path, selection: Selection) -> None:
    """Writes a selection: counts, rule, and of each store a bit per record (packed, zlib, base64)."""
    write_atomic(path, (json.dumps(selection.to_dict(), indent=2) + "\n").encode())


def read_selection(path: str | Path) -> Selection:
    """Reads what `write_selection` wrote.

    Raises:
        UserError: there is no such file, it is damaged, or of another version.
    """
    try:
        content = json.loads(Path(path).read_text())
        version = content["version"]
    except OSError as error:
        raise UserError(f"cannot read the selection {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no selection of recordings (a run writes one as WORKDIR/selection.json)"
        ) from error
    if version != _VERSION:
        raise UserError(
            f"the selection {path} has version {version}, this ecg_jax reads version {_VERSION}; make it anew"
        )
    try:
        sources = tuple(
            Source(store["corpus"], store["fingerprint"], store["records"]) for store in content["stores"]
        )
        selection = Selection(
            train=_unpacked(content["stores"], "train_rows"),
            val=_unpacked(content["stores"], "val_rows"),
            too_short=content["too_short"],
            duplicates=content["duplicates"],
            # The first files did not look from one store into another.
            held_elsewhere=content.get("held_elsewhere", 0),
            available=content["available"],
            sources=sources,
            rule=Rule(**{field.name: content[field.name] for field in dataclasses.fields(Rule)}),
            missing=tuple(content["missing_partitions"]),
        )
        sound = selection.fingerprint == content["fingerprint"]
    except (ValueError, KeyError, TypeError, IndexError, zlib.error):
        sound = False
    if not sound:
        raise UserError(f"the selection {path} is damaged; copy it again from the run that wrote it")
    return selection


def _unpacked(stores: list[dict[str, Any]], name: str) -> np.ndarray:
    """The joint rows whose bits are set."""
    bits = []
    for store in stores:
        packed = np.frombuffer(zlib.decompress(base64.b64decode(store[name])), np.uint8)
        if len(packed) != -(-store["records"] // 8):
            raise ValueError(name)
        bits.append(np.unpackbits(packed, count=store["records"]))
    return np.flatnonzero(np.concatenate(bits))


def use_selection(path: str | Path, store: Store | StoreSet, window_samples: int) -> Selection:
    """The selection in a file, for stores that it was made of.

    Raises:
        UserError: see `read_selection`; or it is of other stores, or of shorter windows.
    """
    selection, given = read_selection(path), as_set(store)
    there = [source.fingerprint for source in selection.sources]
    if there != [each.fingerprint for each in given.stores]:
        corpora = ", ".join(source.corpus for source in selection.sources)
        raise UserError(
            f"the selection {path} was made of other stores (of {corpora}; their fingerprints differ from those of "
            f"{given}); give those stores, in the same order, or make another selection"
        )
    if selection.rule.window_samples < window_samples:
        raise UserError(
            f"the selection {path} may hold records of {selection.rule.window_samples} samples, shorter than a window "
            f"of {window_samples}; make another, or shorten config.data.window_s"
        )
    return selection


def knows_selections(data: dict[str, Any]) -> bool:
    """Whether `config.data` of a run is from when selections had become files, and took whole patients."""
    return "ladder" in data


def select_as_configured(
    store: Store | StoreSet, data: dict[str, Any], window_samples: int, kept: Path | None = None
) -> Selection:
    """The selection that `config.data` of a run asks for, by the rule of its time.

    Args:
        store: of the run.
        data: `config.data` as a plain dict.
        window_samples: T of the run.
        kept: the file of a run that goes on, if it has one. Where it is of these stores and this rule, it is the
            selection: choosing among millions takes time.

    Raises:
        UserError: see `use_selection` and `select_records`; or the kept file is damaged.
    """
    known = knows_selections(data)
    if known and data["selection"]:
        return use_selection(data["selection"], store, window_samples)
    rule = _rule(
        window_samples=window_samples,
        val_folds=data["val_folds"],
        max_records=data["max_records"],
        ladder=data["ladder"] if known else "nested",
        rung=data["rung"] if known else ladders.EVERYTHING,
        whole_patients=known,
    )
    stores = as_set(store)
    if kept is not None and kept.exists():
        before = read_selection(kept)
        if (before.rule, before.sources) == (rule, _sources(stores)):
            return before
    return _select(stores, rule)


def select_records(
    store: Store | StoreSet,
    *,
    window_samples: int,
    val_folds: int,
    max_records: int = 0,
    ladder: str = "nested",
    rung: str = ladders.EVERYTHING,
    whole_patients: bool = True,
) -> Selection:
    """Chooses the recordings of a run.

    The `val_folds` largest fold numbers of each store are held out. Records shorter than a window and records whose
    signal an earlier record has (they may lie in other folds), of any of the stores, are left out of both. Nobody is
    trained on who is held out in another store of the same corpus. `ladder="paper"` takes the partitions of the rung
    only. If there are more than `max_records`, or on the ladder "nested" more than the rung has, whole patients of all
    stores together are taken in an order given by a hash of their ids, as many as fit: a smaller selection is contained
    in a larger one, and short of its number by less than one patient. (If the very first patient has too many records,
    as many of them as fit.) A record of an unknown patient is a patient of its own.

    Args:
        store: one or several.
        window_samples: T.
        val_folds: how many folds to hold out.
        max_records: 0: as many as the rung has.
        ladder, rung: see `data/ladder.py`.
        whole_patients: False cuts at the very number, in the middle of a patient.

    Raises:
        UserError: nothing is left to train on, or the stores lack partitions of the rung.
    """
    rule = _rule(
        window_samples=window_samples,
        val_folds=val_folds,
        max_records=max_records,
        ladder=ladder,
        rung=rung,
        whole_patients=whole_patients,
    )
    return _select(as_set(store), rule)


def _rule(
    *, window_samples: int, val_folds: int, max_records: int, ladder: str, rung: str, whole_patients: bool
) -> Rule:
    return Rule(
        ladder=ladder,
        # A number of records has no name on the nested ladder.
        rung="" if max_records and ladder == "nested" else rung,
        max_records=max_records or (ladders.nested_size(rung) if ladder == "nested" else None),
        val_folds=val_folds,
        window_samples=window_samples,
        whole_patients=whole_patients,
    )


def _sources(stores: StoreSet) -> tuple[Source, ...]:
    return tuple(Source(each.corpus, each.fingerprint, len(each)) for each in stores.stores)


def _select(stores: StoreSet, rule: Rule) -> Selection:
    masks = [_masks(each, rule.window_samples, rule.val_folds) for each in stores.stores]
    long_enough, first, held_out = (np.concatenate(parts) for parts in zip(*masks, strict=True))
    usable, missing = long_enough & first, ()
    duplicates, held_elsewhere = int((long_enough & ~first).sum()), 0
    if rule.ladder == "paper":
        in_rung, missing = ladders.in_rung(stores, rule.rung)
        usable &= in_rung
    several = len(stores.stores) > 1
    if several:
        repeated = repeated_signals(stores, np.flatnonzero(usable))
        usable[repeated] = False
        elsewhere = usable & of_held_out_patients(stores, usable & held_out)
        usable &= ~elsewhere
        duplicates, held_elsewhere = duplicates + len(repeated), int(elsewhere.sum())
    train = np.flatnonzero(usable & ~held_out)
    if not len(train):
        raise UserError(
            f"The store{'s' if several else ''} {stores} leave{'' if several else 's'} no recording to train on: of "
            f"{len(stores)} records {int(long_enough.sum())} are at least {rule.window_samples} samples long, and none "
            "of them is both outside the held-out folds and no duplicate."
        )
    available = len(train)
    if rule.max_records is not None and available > rule.max_records:
        train = first_patients(stores, train, rule.max_records, rule.whole_patients)
    return Selection(
        train=train,
        val=np.flatnonzero(usable & held_out),
        too_short=int((~long_enough).sum()),
        duplicates=duplicates,
        held_elsewhere=held_elsewhere,
        available=available,
        sources=_sources(stores),
        rule=rule,
        missing=missing,
    )


def _masks(store: Store, window_samples: int, val_folds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool [n] each: long enough, first of its signal, held out."""
    folds = store.arrow_column("fold").fill_null(-1).to_numpy()
    first = store.arrow_column("duplicate_of").is_null().to_numpy()
    held_out = np.isin(folds, highest_folds(folds, val_folds))
    return store.arrow_column("length").to_numpy() >= window_samples, first, held_out
