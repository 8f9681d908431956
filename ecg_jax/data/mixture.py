"""Several stores as one: joint rows, joint samples, and the share of each in every batch."""

import functools
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError

#: Slots of a cycle of `order.mixed_by_position`; more means weights with digits that nobody needs.
MOST_SHARES = 10_000


def joint_fingerprint(fingerprints: Sequence[str]) -> str:
    """Of one store its own fingerprint, of several the SHA-256 of theirs in order."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()


def store_paths(text: str) -> list[str]:
    """The folders that `config.store` names, "A" or "A, B"."""
    return [path.strip() for path in text.split(",")]


def parse_weights(text: str) -> tuple[int, ...] | None:
    """Shares of the stores as the smallest whole numbers of the same ratio; None for "".

    Args:
        text: positive decimal numbers separated by commas, e.g. "1,3" or "0.25,0.75".

    Raises:
        UserError: it is something else, or the numbers make a cycle of more than `MOST_SHARES` slots.
    """
    if not text:
        return None
    try:
        fractions = [Fraction(number) for number in text.split(",")]
    except (ValueError, ZeroDivisionError):
        fractions = []
    if not fractions or min(fractions) <= 0:
        raise UserError(
            f"config.data.weights={text!r} must be positive numbers separated by commas, one for each store"
        )
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * common) for fraction in fractions]
    shares = tuple(number // math.gcd(*whole) for number in whole)
    if sum(shares) > MOST_SHARES:
        raise UserError(
            f"config.data.weights={text!r} is the ratio {':'.join(map(str, shares))}, finer than {MOST_SHARES} parts; "
            "round the numbers"
        )
    return shares


class StoreSet:
    """One store or several, one after the other, read like one.

    Attributes:
        stores: in order.
        bounds: int64 [S+1]; store s has the joint rows bounds[s] .. bounds[s+1] - 1.
        fingerprint: of one store its own, of several the SHA-256 of theirs in order.
        leads, rate_hz: of all of them.
    """

    def __init__(self, stores: Sequence[Store]):
        """Of stores of the same leads and rate.

        Raises:
            UserError: they differ in leads or rate, or two are copies of each other.
        """
        self.stores = tuple(stores)
        first = self.stores[0]
        for other in self.stores[1:]:
            if (other.leads, other.rate_hz) != (first.leads, first.rate_hz):
                raise UserError(
                    f"the stores {first.path} and {other.path} have different leads or rates "
                    f"({first.rate_hz:g} and {other.rate_hz:g} samples per second); stores that are mixed have to be "
                    "prepared alike"
                )
        prints = [store.fingerprint for store in self.stores]
        for i, text in enumerate(prints):
            if text in prints[:i]:
                twin = self.stores[prints.index(text)]
                raise UserError(
                    f"the stores {twin.path} and {self.stores[i].path} hold the same recordings; name one of them"
                )
        self.bounds = np.cumsum([0, *(len(store) for store in self.stores)])
        self.fingerprint = joint_fingerprint(prints)
        self.leads, self.rate_hz = first.leads, first.rate_hz

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __str__(self) -> str:
        return ", ".join(str(store.path) for store in self.stores)

    @functools.cached_property
    def first_samples(self) -> np.ndarray:
        """int64 [S], where the samples of each store begin in joint coordinates."""
        lengths = [0]
        for store in self.stores[:-1]:
            ends = store.column("offset") + store.column("length")
            lengths.append(int(ends.max(initial=0)))
        return np.cumsum(lengths)

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """Ascending joint rows as the rows of each store."""
        cuts = np.searchsorted(rows, self.bounds)
        return [
            rows[begin:end] - first
            for begin, end, first in zip(cuts[:-1], cuts[1:], self.bounds[:-1], strict=True)
        ]

    def column(self, name: str) -> np.ndarray:
        """A column of all records, as `Store.column` gives it; "offset" is in joint coordinates.

        Raises:
            UserError: a store has no such column.
        """
        columns = [store.column(name) for store in self.stores]
        if len(columns) == 1:
            return columns[0]
        if name == "offset":
            columns = [column + first for column, first in zip(columns, self.first_samples, strict=True)]
        return np.concatenate(columns)

    def arrow_column(self, name: str):
        """A column of all records as a `pyarrow.ChunkedArray`, offsets too as their stores have them.

        Raises:
            UserError: a store has no such column.
        """
        import pyarrow as pa

        columns = [store.arrow_column(name) for store in self.stores]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)

    def read_crops(self, starts: np.ndarray, n_samples: int, out: np.ndarray | None = None) -> np.ndarray:
        """`Store.read_crops` with `starts` in joint coordinates.

        Returns:
            int16 [B, n_samples, C] microvolts (`out` if given).

        Raises:
            ValueError: a crop leaves its chunk, or `out` does not fit.
            UserError: a chunk file is missing or ends too early.
        """
        if len(self.stores) == 1:
            return self.stores[0].read_crops(starts, n_samples, out)
        starts = np.asarray(starts, np.int64)
        if out is None:
            out = np.empty((len(starts), n_samples, len(self.leads)), "<i2")
        owner = np.searchsorted(self.first_samples, starts, side="right") - 1
        if len(starts) and starts.min() < 0:
            raise ValueError("a crop lies outside the stores")
        for number, store in enumerate(self.stores):
            mine = np.flatnonzero(owner == number)
            if len(mine):
                out[mine] = store.read_crops(starts[mine] - self.first_samples[number], n_samples)
        return out

    def close(self) -> None:
        """Closes the chunk files of every store; the next read opens them again."""
        for store in self.stores:
            store.close()


def as_set(store: Store | StoreSet) -> StoreSet:
    """A store as a set of one."""
    return store if isinstance(store, StoreSet) else StoreSet([store])
