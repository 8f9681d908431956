"""Folds and nested subsets in which every label is as frequent as in the whole, patients kept together.

Greedy iterative stratification of multi-label data: Sechidis, Tsoumakas, Vlahavas, On the Stratification of
Multi-Label Data, ECML PKDD 2011, Algorithm 1; by groups as in spec §1.5 and §7.4. Letters: n records, G
groups (patients), K labels, F folds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np

# Limits of age groups, years (spec §7.4), see `age_sex_labels`.
ADULT_BINS = (20, 40, 60, 80)
PAEDIATRIC_BINS = (1, 5, 12, 18)

# Halvings after which a fraction counts as reached; float64 has 53 bits.
_MAX_HALVINGS = 64


def stratified_folds(
    labels: Sequence[Sequence[str]],
    n_folds: int,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Distributes records over folds so that every fold has an equal share of every label.

    The label with the fewest records left comes first. Its groups, those with most of its records first, go
    each to the fold that lacks most records of the label; of several such folds, to the one that lacks most
    records altogether; of several such, to a random one. Groups without any label fill up the folds in the
    end. Where no record has two labels, every label that n_folds or more groups have is in every fold; with
    several labels a record this is the rule but not certain, as a group can serve only one of its labels.

    With `groups`, the fold of a group does not depend on the order of the records; without, it does (by the
    random choices only).

    Args:
      labels: n lists of labels; a label counts once a record.
      n_folds: F, at least 1.
      groups: n keys that can be sorted; records of one group come into the same fold. None: every record is
        its own.
      seed: for the random choices.

    Returns:
      int64 [n], the fold of each record, 0 to F - 1.

    Raises:
      ValueError: `groups` has a wrong length, or n_folds < 1.
    """
    if n_folds < 1:
        raise ValueError(f"n_folds must be at least 1, not {n_folds}")
    table = _tabulate(labels, groups)
    folds = _assign(table, np.full(n_folds, 1 / n_folds), np.random.default_rng(seed))
    return folds[table.group_of]


def batched_folds(
    groups: np.ndarray,
    labels: Sequence[np.ndarray | tuple[np.ndarray, np.ndarray]],
    n_folds: int,
    *,
    batch_size: int = 10_000,
    seed: int = 0,
) -> np.ndarray:
    """`stratified_folds` for millions of records: arrays instead of lists, and random batches of groups (spec §1.5).

    The batches are distributed one after another; what folds lack counts all batches before, so that what one batch
    could not share out evenly is made up for by the next. Time and memory grow with the number of records, not faster.

    Args:
      groups: integers [n]; records of one group come into the same fold.
      labels: label columns. An array of integers [n] is one label a record, negative for none; a pair (starts
        [n + 1], codes [m]) is any number of them: those of record i are `codes[starts[i]:starts[i + 1]]`. Codes
        are small numbers from 0 on, of each column by itself; a label counts as often as a record has it.
      n_folds: F, at least 1.
      batch_size: groups distributed at once.
      seed: for the order of the groups and the random choices.

    Returns:
      int16 [n], the fold of each record, 0 to F - 1. It does not depend on the order of the records.

    Raises:
      ValueError: n_folds or batch_size < 1, or a column of another length.
    """
    if n_folds < 1 or batch_size < 1:
        raise ValueError(f"n_folds and batch_size must be at least 1, not {n_folds} and {batch_size}")
    n = len(groups)
    for column in labels:
        length = len(column[0]) - 1 if isinstance(column, tuple) else len(column)
        if length != n:
            raise ValueError(f"there are {n} records but labels of {length}")
    n_codes = [
        int(codes.max(initial=-1)) + 1
        for codes in (column[1] if isinstance(column, tuple) else column for column in labels)
    ]
    first_label = np.concatenate([[0], np.cumsum(n_codes)]).astype(np.int64)
    n_labels = max(int(first_label[-1]), 1)
    rng = np.random.default_rng(seed)
    keys, group_of = np.unique(groups, return_inverse=True)
    n_groups = len(keys)
    position = rng.permutation(n_groups).astype(np.int32)[group_of]
    del group_of
    records = np.argsort(position, kind="stable")
    limits = np.searchsorted(position[records], np.arange(0, n_groups + batch_size, batch_size))
    shares = np.full(n_folds, 1 / n_folds)
    has, size = np.zeros((n_labels, n_folds)), np.zeros(n_folds)
    folds = np.empty(n, np.int16)
    for batch, (start, stop) in enumerate(itertools.pairwise(limits.tolist())):
        rows = records[start:stop]
        group = position[rows].astype(np.int64) - batch * batch_size
        pairs = []
        for column, first in zip(labels, first_label[:-1].tolist(), strict=True):
            of_group, codes = _gather(column, rows, group)
            pairs.append(of_group * n_labels + codes + first)
        flat = np.concatenate(pairs) if pairs else np.empty(0, np.int64)
        entries, count = np.unique(flat, return_counts=True)
        sizes = np.bincount(group)
        starts = np.searchsorted(entries, np.arange(len(sizes) + 1) * n_labels)
        table = _Table(group, sizes, starts, entries % n_labels, count, n_labels)
        folds[rows] = _assign(table, shares, rng, has, size)[group]
    return folds


def nested_subsets(
    labels: Sequence[Sequence[str]],
    groups: Sequence[Hashable] | None,
    fractions: Sequence[float],
    seed: int = 0,
) -> list[np.ndarray]:
    """Stratified subsets of whole groups, each contained in every larger one, e.g. for label efficiency.

    All records are halved by stratification, a half is halved again, and so on; a subset is as many of the
    parts, from the first on, as its fraction asks for. Powers of one half are therefore stratified at each
    step, other fractions are made of such parts. A subset has its fraction of the records up to the size of
    a group or so for each halving, and at least one group.

    Args:
      labels: n lists of labels.
      groups: n keys as in `stratified_folds`, or None.
      fractions: of the records, in (0, 1], in any order.
      seed: for the random choices. The subsets do not depend on which other fractions are asked for.

    Returns:
      For every fraction, the indices of its records, int64 and ascending.

    Raises:
      ValueError: a fraction outside (0, 1], or no records.
    """
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions must lie in (0, 1], not {list(fractions)}")
    if not len(labels):
        raise ValueError("there are no records to take subsets of")
    table = _tabulate(labels, groups)
    halves: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def first(part: np.ndarray, fraction: float, path: str) -> list[np.ndarray]:
        """The groups of the first `fraction` of a part; `path` tells the halvings that led to it."""
        if fraction >= 1:
            return [part]
        if len(part) == 1 or len(path) > _MAX_HALVINGS:
            return [part] if fraction >= 0.5 else []
        if path not in halves:
            rng = np.random.default_rng([seed, *path.encode()])
            side = _assign(table.of_groups(part), np.array([0.5, 0.5]), rng)
            halves[path] = part[side == 0], part[side == 1]
        left, right = halves[path]  # never empty: the second group goes where the first did not
        if fraction <= 0.5:
            return first(left, 2 * fraction, path + "0")
        return [left, *first(right, 2 * fraction - 1, path + "1")]

    everyone = np.arange(table.n_groups)
    subsets = []
    for fraction in fractions:
        chosen = np.zeros(table.n_groups, bool)
        for part in first(everyone, fraction, ""):
            chosen[part] = True
        if not chosen.any():
            part, path = everyone, ""
            while path in halves:
                part, path = halves[path][0], path + "0"
            chosen[part[0]] = True
        subsets.append(np.flatnonzero(chosen[table.group_of]))
    return subsets


def age_sex_labels(
    age: Sequence[float | None], sex: Sequence[str | None], bins: Sequence[float] = ADULT_BINS
) -> list[list[str]]:
    """Age and sex as labels to stratify by (spec §7.4).

    Args:
      age: n ages in years; None or NaN is unknown.
      sex: n of "F", "M", or None for unknown.
      bins: ascending limits between the age bins; a limit belongs to the bin above it.

    Returns:
      n lists of two labels, e.g. ["age 20-40", "sex F"].

    Raises:
      ValueError: age and sex have different lengths, or bins do not ascend.
    """
    pairs = list(itertools.pairwise(bins))
    if any(a >= b for a, b in pairs):
        raise ValueError(f"bins must ascend, not {list(bins)}")
    names = [f"age <{bins[0]:g}", *(f"age {a:g}-{b:g}" for a, b in pairs)]
    names += [f"age >={bins[-1]:g}", "age unknown"]
    years = np.array([math.nan if a is None else a for a in age], np.float64)
    index = np.where(np.isnan(years), len(names) - 1, np.searchsorted(bins, years, side="right"))
    return [
        [names[i], f"sex {s if s is not None else 'unknown'}"]
        for i, s in zip(index.tolist(), sex, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Table:
    """How many records of every label every group has, by group in compressed rows.

    Attributes:
      group_of: int64 [n], the group of each record.
      sizes: int64 [G], records of each group.
      starts: int64 [G + 1], where a group's entries lie in `label` and `count`.
      label, count: int64, labels of the groups and numbers of records with them.
      n_labels: K.
    """

    group_of: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    label: np.ndarray
    count: np.ndarray
    n_labels: int

    @property
    def n_groups(self) -> int:
        return len(self.sizes)

    def of_groups(self, rows: np.ndarray) -> _Table:
        """The table of some groups only, in their order; `group_of` stays that of all."""
        lengths = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.repeat(self.starts[rows] - starts[:-1], lengths) + np.arange(starts[-1])
        label, count = self.label[entries], self.count[entries]
        return _Table(self.group_of, self.sizes[rows], starts, label, count, self.n_labels)


def _tabulate(labels: Sequence[Sequence[str]], groups: Sequence[Hashable] | None) -> _Table:
    """Groups in order of their keys and labels in order of their names, whatever the order of the input."""
    n = len(labels)
    if groups is None:
        group_of, n_groups = np.arange(n), n
    else:
        if len(groups) != n:
            raise ValueError(f"there are {n} records but {len(groups)} groups")
        number = {key: g for g, key in enumerate(sorted(set(groups)))}
        group_of, n_groups = np.array([number[key] for key in groups], np.int64), len(number)
    of_record = [set(names) for names in labels]
    index = {name: k for k, name in enumerate(sorted(set().union(*of_record)))}
    rows = np.repeat(group_of, [len(names) for names in of_record])
    columns = np.array([index[name] for names in of_record for name in names], np.int64)
    n_labels = max(len(index), 1)
    entries, count = np.unique(rows * n_labels + columns, return_counts=True)
    starts = np.searchsorted(entries, np.arange(n_groups + 1) * n_labels)
    sizes = np.bincount(group_of, minlength=n_groups)
    return _Table(group_of, sizes, starts, entries % n_labels, count, n_labels)


def _gather(column, rows: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(group, code) of every label that some rows have in a label column of `batched_folds`."""
    if not isinstance(column, tuple):
        codes = column[rows]
        known = codes >= 0
        return group[known], codes[known].astype(np.int64)
    starts, codes = column
    lengths = (starts[rows + 1] - starts[rows]).astype(np.int64)
    ends = np.cumsum(lengths)
    places = np.repeat(starts[rows] - (ends - lengths), lengths) + np.arange(lengths.sum())
    return np.repeat(group, lengths), codes[places].astype(np.int64)


def _assign(
    table: _Table,
    shares: np.ndarray,
    rng: np.random.Generator,
    has: np.ndarray | None = None,
    size: np.ndarray | None = None,
) -> np.ndarray:
    """The fold of every group, int64 [G]; `shares` are F numbers that add up to 1.

    `has` [K, F] and `size` [F] are what the folds hold already, records of each label and altogether; they are
    brought up to date. None: nothing.
    """
    n_groups, n_folds = table.n_groups, len(shares)
    folds = np.full(n_groups, -1, np.int64)
    # Groups that are alike in all else come in random order, and so do folds.
    order = rng.permutation(n_groups)
    groups_with, counts_with = _by_label(table, order)
    left = np.bincount(table.label, table.count, table.n_labels)  # records not yet distributed
    # What a fold lacks is computed from these counts of what it has: sums of fractions would break ties.
    has = np.zeros((table.n_labels, n_folds)) if has is None else has
    size = np.zeros(n_folds) if size is None else size
    wanted = np.outer(left + has.sum(axis=1), shares)
    wanted_size = (table.sizes.sum() + size.sum()) * shares

    def put(group: int, fold: int) -> None:
        folds[group] = fold
        size[fold] += table.sizes[group]
        entries = slice(table.starts[group], table.starts[group + 1])
        has[table.label[entries], fold] += table.count[entries]
        left[table.label[entries]] -= table.count[entries]

    def neediest(lack: np.ndarray, among: np.ndarray) -> np.ndarray:
        lack = lack[among]
        return among[lack == lack.max()]

    every_fold = np.arange(n_folds)
    while (left > 0).any():
        label = int(np.where(left > 0, left, np.inf).argmin())
        groups, counts = groups_with[label], counts_with[label]
        free = folds[groups] < 0
        groups, counts = groups[free], counts[free]
        for group in groups[np.argsort(-counts, kind="stable")].tolist():
            candidates = neediest(wanted[label] - has[label], every_fold)
            if len(candidates) > 1:
                candidates = neediest(wanted_size - size, candidates)
            put(group, int(candidates[rng.integers(len(candidates))]))
    unlabelled = order[folds[order] < 0]
    for group in unlabelled[np.argsort(-table.sizes[unlabelled], kind="stable")].tolist():
        candidates = neediest(wanted_size - size, every_fold)
        put(group, int(candidates[rng.integers(len(candidates))]))
    return folds


def _by_label(table: _Table, order: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For every label, the groups that have it, in `order`, and how many of their records have it."""
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    group = np.repeat(np.arange(table.n_groups), np.diff(table.starts))
    sort = np.lexsort((position[group], table.label))
    limits = np.searchsorted(table.label[sort], np.arange(1, table.n_labels))
    return np.split(group[sort], limits), np.split(table.count[sort], limits)
