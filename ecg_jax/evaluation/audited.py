"""Which recordings of a store an audit takes, and which of them are test, validation and training."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np

from ecg_jax.data.folds import highest_folds
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import tasks
from ecg_jax.evaluation.examples import choose_examples


@dataclasses.dataclass(frozen=True)
class Audited:
    """A store, and which of its recordings are in which part.

    Attributes:
      store: open store.
      parts: rows of "train", "val" and "test".
      rows: int64 [n], all of them, increasing.
      place: row -> fold of the store, of a task's split the part.
      split: where the parts come from, in words.
    """

    store: Store
    parts: dict[str, np.ndarray]
    rows: np.ndarray
    place: dict[int, int | str]
    split: str

    BY_FOLDS: ClassVar[str] = "folds of the store"

    @classmethod
    def by_folds(cls, store: Store) -> "Audited":
        """By the store's own folds, see `fold_parts`."""
        place = dict(enumerate(store.column("fold").tolist()))
        return cls(store, fold_parts(store), np.arange(len(store)), place, cls.BY_FOLDS)

    @classmethod
    def by_task(cls, store: Store, task: tasks.Task, window_s: float) -> "Audited":
        """By the split that a probe of a task uses; recordings that the task leaves out are not audited.

        Raises:
          UserError: the store cannot serve the task.
        """
        examples = choose_examples(task, store, None, round(window_s * store.rate_hz))
        parts = {"train": examples.train.rows, "val": examples.val.rows, "test": examples.test.rows}
        place = {int(row): part for part, rows in parts.items() for row in rows}
        rows = np.sort(np.concatenate(list(parts.values())))
        return cls(store, parts, rows, place, f"task {task.name}: {examples.split['rule']}")


def fold_parts(store: Store) -> dict[str, np.ndarray]:
    """Rows of "train", "val" and "test": the highest fold is test, the one below validation, all else training.

    If there are two folds and nothing else there is no validation part, with a single fold only "train". Recordings in
    negative folds, which are none, may be trained on.
    """
    folds = store.column("fold")
    held = highest_folds(folds, 2)
    rest = np.flatnonzero(~np.isin(folds, held))
    if len(held) < 2:
        return {"train": np.arange(len(store))}
    below, highest = (np.flatnonzero(folds == fold) for fold in held)
    if not len(rest):
        return {"train": below, "test": highest}
    return {"train": rest, "val": below, "test": highest}


def open_stores(paths: list[Path]) -> dict[str, Store]:
    """Name -> store; the folder's name where that is enough to tell them apart, else the path.

    Raises:
      UserError: no store, the same one twice, or stores of different rates.
    """
    if not paths:
        raise UserError("There is no store to audit; name one or more, as in `ecg-jax audit stores/ptbxl`.")
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"The store {path} is given twice (as {seen[path.resolve()]}); name it once.")
        seen[path.resolve()] = path
    stores = [Store(path) for path in paths]
    for store in stores[1:]:
        if store.rate_hz != stores[0].rate_hz:
            raise UserError(
                f"The stores {stores[0].path} and {store.path} have {stores[0].rate_hz:g} and {store.rate_hz:g} "
                "samples per second; only stores of one rate can be compared, so prepare them at one."
            )
    names = Counter(path.resolve().name for path in paths)
    return {
        path.resolve().name if names[path.resolve().name] == 1 else str(path): store
        for path, store in zip(paths, stores, strict=True)
    }


def split_stores(stores: dict[str, Store], task: str | None, window_s: float) -> dict[str, Audited]:
    """Name -> store with its parts: by its folds, or by a task's split in every store of the task's corpus.

    Raises:
      UserError: no such task, no store of its corpus, or one that cannot serve it.
    """
    if task is None:
        return {name: Audited.by_folds(store) for name, store in stores.items()}
    chosen = tasks.get_task(task)
    if all(store.corpus != chosen.corpus for store in stores.values()):
        raise UserError(
            f"--task={task} needs a store of corpus {chosen.corpus!r}, but {', '.join(map(str, stores))} "
            f"{'was' if len(stores) == 1 else 'were'} prepared from "
            f"{', '.join(sorted({repr(store.corpus) for store in stores.values()}))}."
        )
    return {
        name: Audited.by_task(store, chosen, window_s)
        if store.corpus == chosen.corpus
        else Audited.by_folds(store)
        for name, store in stores.items()
    }
