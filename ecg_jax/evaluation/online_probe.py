"""A small linear probe during pretraining: are the features becoming useful, not only different?

The first crop of some labelled training recordings is encoded in evaluation mode, tokens averaged; a ridge
regression is fitted on one half of the recordings and scored on the other, whose patients are others. Both halves
are *training* recordings, none of them a duplicate. The folds with the highest numbers are what downstream probes
test on, and a number that is looked at during pretraining must not come from there: neither a choice of checkpoint
nor one of settings then leaks into a test score. The encoder has seen the scored signals (without labels), so the
number compares steps and runs with each other; what the encoder is worth, `ecg-jax probe` says.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ecg_jax.data.corpora.entries import UNLABELLED_FOLD
from ecg_jax.data.folds import highest_folds
from ecg_jax.data.store import SYNTHETIC, Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import metrics, tasks
from ecg_jax.evaluation.targets import is_labelled, target_matrix
from ecg_jax.models.inputs import to_model_input
from ecg_jax.training import parallel
from ecg_jax.training.collapse import student_tokens
from ecg_jax.training.train_state import TrainState

#: Ridge penalty, see `ridge_scores`. Fixed: a search would cost more than it gives here.
PENALTY = 0.1


@dataclasses.dataclass(frozen=True)
class Slice:
    """Labelled recordings that a probe looks at.

    Attributes:
        task: name of the task.
        rows: int64 [n] of the store, those to fit first.
        n_fit: how many to fit.
        targets: float32 [n, K] of 0 and 1, classes that both halves have positives and negatives of.
    """

    task: str
    rows: np.ndarray
    n_fit: int
    targets: np.ndarray


def _can_watch(task: tasks.Task) -> bool:
    """Whether the classes of all labelled records of a store are the task's."""
    everything = task.dataset is None and task.subset is None and task.protocol is None
    real = task.corpus != SYNTHETIC  # made-up rhythms say nothing about features
    return task.source == "labels" and task.split == "corpus_folds" and everything and real


def choose_slice(
    store: Store, train_rows: np.ndarray, *, task: str, every: int, max_records: int
) -> tuple[Slice | None, str]:
    """The recordings of a probe, the same at every step and however often a run is interrupted.

    Args:
        store: of the run.
        train_rows: rows trained on, without duplicates, each at least a window long. Those in the fold with the
            highest number, which downstream probes test on, are left out here too if they are among them.
        task: name of a task, or "auto" for the first that fits the store, or "" for none.
        every: steps between probes, 0 for none.
        max_records: at most so many, whole patients in an order given by a hash of their id.

    Returns:
        (the slice, or None where there can be none; one line for people that says which or why).

    Raises:
        UserError: there is no such task, or the store is not one of it.
    """
    if not task or not every:
        return None, "no online probe: switched off by config.monitor"
    if task == "auto":
        fitting = [t for t in tasks.fitting(store.corpus, list(store.classes), ()) if _can_watch(t)]
        if not fitting:
            return (
                None,
                f"no online probe: the store, of corpus {store.corpus!r}, has labels of no task to watch",
            )
        chosen = fitting[0]
    else:
        chosen = tasks.get_task(task)
        if not _can_watch(chosen):
            watched = ", ".join(t.name for t in tasks.TASKS.values() if _can_watch(t))
            raise UserError(
                f"config.monitor.task={task} needs numbers, a part of a corpus or folds of its own, which the online "
                f"probe does not take; use one of {watched}, or an empty name for none."
            )
        tasks.check_store(
            chosen, store.corpus, list(store.classes), list(store.values), f"the store {store.path}"
        )

    folds, labels = store.column("fold"), store.column(f"labels_{chosen.label_set}")
    highest = highest_folds(folds, 2)[1:]  # a store of one fold keeps it
    rows = train_rows[~np.isin(folds[train_rows], highest)]
    if chosen.unlabelled == "exclude":
        rows = rows[is_labelled(labels[rows])]
    else:
        # Unknown labels are no negatives.
        known = np.array([names is not None for names in labels[rows]], dtype=bool)
        rows = rows[known & (folds[rows] != UNLABELLED_FOLD)]
    patients, records = store.column("patient_id"), store.column("record_id")
    owner = {row: str(records[row] if patients[row] is None else patients[row]) for row in rows.tolist()}
    order = sorted(
        owner, key=lambda row: (hashlib.blake2b(owner[row].encode(), digest_size=8).digest(), row)
    )[:max_records]
    n_fit = len(order) // 2
    while 0 < n_fit < len(order) and owner[order[n_fit]] == owner[order[n_fit - 1]]:
        n_fit += 1
    rows = np.array(order, np.int64)
    targets = target_matrix(labels[rows], store.classes[chosen.label_set])
    known = metrics.has_both_kinds(targets[:n_fit]) & metrics.has_both_kinds(targets[n_fit:])
    if not known.any():
        return None, (
            f"no online probe: no class of {chosen.name} has positives and negatives in both halves of the "
            f"{len(rows)} labelled recordings"
        )
    line = (
        f"online probe on {chosen.name} every {every} steps: {known.sum()} classes, {n_fit} recordings to fit, "
        f"{len(rows) - n_fit} to score"
    )
    return Slice(chosen.name, rows, n_fit, targets[:, known]), line


def embed_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model,
    normalisation: str,
    kept_leads: tuple[str, ...],
    axis_name: str | None = parallel.AXIS,
) -> jax.Array:
    """Mean tokens of the student in evaluation mode, as seen by one device.

    Args:
        state, model, normalisation, kept_leads, axis_name: as in `training.train_state.train_step`.
        batch: this device's rows: `signal` int16 [B, T, C], `record_index` int32 [B], their places in the global batch.

    Returns:
        float32 [N, D], all rows of the global batch in order, the same on every device and process.
    """
    record_index = batch["record_index"]
    x = to_model_input(batch["signal"], normalisation, kept_leads)
    mean = student_tokens(state, x, record_index, model).mean(axis=1)
    if not axis_name:
        return mean[jnp.argsort(record_index)]
    rows = len(mean) * jax.lax.axis_size(axis_name)
    return jax.lax.psum(jnp.zeros((rows, mean.shape[1])).at[record_index].set(mean), axis_name)


class OnlineProbe:
    """The probe of one run."""

    def __init__(
        self,
        chosen: Slice,
        store: Store,
        mesh: Mesh,
        *,
        model,
        normalisation: str,
        kept_leads: tuple[str, ...],
        batch_size: int,
        window_samples: int,
    ):
        """Of one run.

        Args:
            chosen: what to look at.
            store: that it is of.
            mesh: all devices.
            model, normalisation, kept_leads: as in `embed_step`.
            batch_size: crops encoded at once over all processes, a multiple of the number of devices.
            window_samples: T.
        """
        self._slice, self._store, self._mesh = chosen, store, mesh
        step = functools.partial(embed_step, model=model, normalisation=normalisation, kept_leads=kept_leads)
        self._embed = parallel.map_eval_step(step, mesh)
        self._starts = store.column("offset")[chosen.rows]
        self._batch_size, self._window_samples = batch_size, window_samples

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of every batch; the last is filled up with the first crop."""
        record_index = np.arange(jax.process_index(), self._batch_size, jax.process_count(), dtype=np.int32)
        for first in range(0, len(self._starts), self._batch_size):
            number = first + record_index
            starts = self._starts[np.where(number < len(self._starts), number, 0)]
            signal = self._store.read_crops(starts, self._window_samples)
            yield {"signal": signal, "record_index": record_index}

    def embed(self, state: TrainState, batches: int | None = None) -> list[jax.Array]:
        """Starts encoding the slice, batch by batch, for `score`; with `batches` no more of it than these."""
        some = itertools.islice(self._batches(), batches)
        return [self._embed(state, parallel.shard_batch(batch, self._mesh)) for batch in some]

    def score(self, embedded: list[np.ndarray]) -> dict[str, float]:
        """`probe_auroc`, the macro AUROC of the half that was not fitted; {} if a feature is not finite."""
        features = np.concatenate(embedded)[: len(self._slice.rows)]
        if not np.isfinite(features).all():
            return {}
        targets, n = self._slice.targets, self._slice.n_fit
        scores = ridge_scores(features[:n], targets[:n], features[n:], PENALTY)
        return {"probe_auroc": metrics.macro_auroc(targets[n:], scores)}


def ridge_scores(fitted: np.ndarray, targets: np.ndarray, scored: np.ndarray, penalty: float) -> np.ndarray:
    """Ridge regression of targets on standardised features, solved among the n records: milliseconds at any width.

    With X the standardised features and K = X Xᵀ / D, the scores of new features x are
    (x Xᵀ / D) (K + penalty I)⁻¹ (y - mean of y).

    Args:
        fitted: [n, D].
        targets: [n, K].
        scored: [m, D].
        penalty: above 0; the diagonal of K is 1 on average.

    Returns:
        float64 [m, K].
    """
    fitted, scored = fitted.astype(np.float64), scored.astype(np.float64)
    mean, deviation = fitted.mean(axis=0), fitted.std(axis=0)
    # A feature that never varies says nothing, and its rounding noise must not be blown up to size 1.
    scale = np.where(deviation > 1e-6 * np.abs(mean), deviation, np.inf)
    X, x = (fitted - mean) / scale, (scored - mean) / scale
    K = X @ X.T / X.shape[1]
    dual = np.linalg.solve(K + penalty * np.eye(len(K)), targets - targets.mean(axis=0))
    return x @ (X.T @ dual) / X.shape[1]
