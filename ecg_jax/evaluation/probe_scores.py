"""What results.json says about scores: every metric with its interval, per class and in all, beside the baselines.

All models of a probe are scored on one set of resamples, so every difference is paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecg_jax.evaluation import bootstrap, challenge_score, metrics
from ecg_jax.evaluation.bootstrap import Interval, Scored
from ecg_jax.evaluation.examples import Examples, Fitted
from ecg_jax.evaluation.plots import FEW_POSITIVES
from ecg_jax.evaluation.scoring import score
from ecg_jax.evaluation.tasks import TaskUnavailable

#: Metric of a task -> the name `scoring.score` knows it by.
SCORED_AS = {"macro_auroc": "auroc", "mae": "mae"}


@dataclass(frozen=True)
class Baselines:
    """Predictions for the test records of what stands beside a probe."""

    random_init: np.ndarray
    """float64 [S, n, K], one randomly initialised encoder for each seed."""
    random_mode: str
    """How those were probed: "linear" or "frozen"."""
    ecg_features: np.ndarray
    """float64 [n, K] of a linear head on rates, intervals and amplitudes."""
    majority: np.ndarray
    """float64 [n, K], a constant for each class: its share among the training records, of a regression the median."""


@dataclass(frozen=True)
class Settings:
    """How intervals are made, see `bootstrap`."""

    unit: str
    """What is drawn: "patient" where known, or "record"."""
    resamples: int
    level: float
    interval: str
    undefined: str
    seed: int


def majority_guess(examples: Examples) -> np.ndarray:
    """The constant that suits the training records best for each class: float64 [n_test, K]."""
    known = np.asarray(examples.train.targets, dtype=np.float64)
    constant = (
        np.nanmedian(known, axis=0) if examples.task.kind == "regression" else np.nanmean(known, axis=0)
    )
    return np.broadcast_to(constant, examples.test.targets.shape)


def mean_of(scored: Sequence[Scored]) -> Scored:
    """The mean of several models' scores on the same resamples, as one model's."""
    first = scored[0]
    left_out = None if first.left_out is None else np.mean([s.left_out for s in scored], axis=0)
    per_class, resampled = (
        np.mean([getattr(s, f) for s in scored], axis=0) for f in ("per_class", "resampled")
    )
    return Scored(first.metric, per_class, resampled, left_out)


def check_scorable(examples: Examples) -> None:
    """Refuses examples that leave nothing to choose or to score by.

    Raises:
        TaskUnavailable: no class has positives and negatives, or no number is known, among the validation or the test
            records.
    """
    task = examples.task
    for name, part in (("validation", examples.val), ("test", examples.test)):
        n = len(part.rows)
        if task.kind == "regression":
            if np.isnan(part.targets).all():
                raise TaskUnavailable(
                    f"No number of task {task.name} is known for the {n} {name} records; use more data."
                )
        elif not metrics.has_both_kinds(part.targets).any():
            raise TaskUnavailable(
                f"No class of task {task.name} has both positives and negatives among the {n} {name} "
                "records, so there is nothing to score; use more data."
            )


class Scores:
    """Scores of a probe and of its baselines.

    Intervals and p-values are about other patients, given these randomly initialised encoders.

    Args:
        examples: what was predicted.
        fitted: the probe.
        mode: of the probe.
        baselines: what stands beside it.
        settings: of the intervals.

    Raises:
        TaskUnavailable: see `check_scorable`.
    """

    def __init__(
        self, examples: Examples, fitted: Fitted, mode: str, baselines: Baselines, settings: Settings
    ):
        self.examples, self.fitted, self.settings = examples, fitted, settings
        self.metric = examples.task.metric
        self.targets = examples.test.targets
        check_scorable(examples)
        patients = examples.test.column("patient_id")
        self.n_patients = len({p for p in patients if p}) or None
        codes, self.unit = bootstrap.units(
            patients if settings.unit == "patient" else None, len(self.targets)
        )
        self.counts = bootstrap.draw(codes, settings.resamples, settings.seed)
        self.left_out = bootstrap.leave_one_out(codes) if settings.interval == "bca" else None
        self.ours = self._score(fitted.test)
        self.mode, self.random_mode = mode, baselines.random_mode
        self.random_seeds = [self._score(p) for p in baselines.random_init]
        self.random_init = mean_of(self.random_seeds)
        self.ecg_features, self.majority = (
            self._score(p) for p in (baselines.ecg_features, baselines.majority)
        )

    def _score(self, predictions, metric: str = "") -> Scored:
        return score(metric or SCORED_AS[self.metric], self.targets, predictions, self.counts, self.left_out)

    def _macro(self, scored: Scored) -> Interval:
        return scored.macro(self.settings.undefined, self.settings.level, self.settings.interval)

    def _per_class(self, scored: Scored) -> list[Interval]:
        return scored.class_intervals(self.settings.level, self.settings.interval)

    def _named(self, interval: Interval) -> dict[str, float]:
        return {self.metric: interval.point, "ci_low": interval.low, "ci_high": interval.high}

    def report(self) -> dict[str, Any]:
        """The part of results.json about scores; see the README for its fields."""
        details = self._regression() if self.metric == "mae" else self._classification()
        return {
            **self._named(self._macro(self.ours)),
            **details,
            "n_records": len(self.targets),
            "n_patients": self.n_patients,
            "baselines": {
                "random_init": {
                    **self._named(self._macro(self.random_init)),
                    "mode": self.random_mode,
                    "seeds": [
                        {"seed": self.settings.seed + i, self.metric: self._macro(scored).point}
                        for i, scored in enumerate(self.random_seeds)
                    ],
                },
                "ecg_features": self._named(self._macro(self.ecg_features)),
                "majority": self._named(self._macro(self.majority)),
            },
            "difference_to_random_init": self._difference(),
            "bootstrap": {
                "unit": self.unit,
                "resamples": self.settings.resamples,
                "level": self.settings.level,
                "undefined": self.settings.undefined,
                "interval": self.settings.interval,
            },
        }

    def _difference(self) -> dict[str, float] | None:
        """What pretraining adds; None where random encoders were probed in another mode, which adds something too."""
        if self.mode != self.random_mode:
            return None
        found = bootstrap.compare(
            self.ours, self.random_init, self.settings.undefined, self.settings.level, self.settings.interval
        )
        return {**self._named(found.difference), "p_value": found.p_value}

    def _classification(self) -> dict[str, Any]:
        predictions = self.fitted.test
        scored = {
            name: self._score(predictions, name)
            for name in ("average_precision", "brier", "ece", "micro_auroc", "fmax")
        }
        names = {"average_precision": "macro_auprc"}
        n_pos, n_neg = metrics.class_counts(self.targets)
        ours, random = self._per_class(self.ours), self._per_class(self.random_init)
        per_class = {
            name: {
                "auroc": ours[k].point,
                "ci_low": ours[k].low,
                "ci_high": ours[k].high,
                **{m: float(scored[m].per_class[k]) for m in ("average_precision", "brier", "ece")},
                "random_init_auroc": random[k].point,
                "n_pos": int(n_pos[k]),
                "n_neg": int(n_neg[k]),
                "description": self.examples.descriptions[name],
            }
            for k, name in enumerate(self.examples.classes)
        }
        intervals = (
            {"macro_auroc": self.ours} | {names.get(m, m): s for m, s in scored.items()} | self._challenge()
        )
        return {
            "metrics": {name: self._macro(s)._asdict() for name, s in intervals.items()},
            "per_class": per_class,
            "classes_with_few_positives": [
                name for name, n in zip(self.examples.classes, n_pos, strict=True) if 0 < n < FEW_POSITIVES
            ],
            "classes_undefined_in_test": [
                name for name, each in zip(self.examples.classes, ours, strict=True) if np.isnan(each.point)
            ],
        }

    def _challenge(self) -> dict[str, Scored]:
        """Challenge scores of a task on SNOMED codes, with thresholds tuned on the validation records."""
        if self.examples.task.corpus != "challenge":
            return {}
        found = {}
        for year in challenge_score.YEARS:
            if not challenge_score.scores_any(year, self.examples.classes):
                continue
            thresholds = challenge_score.tune_thresholds(
                year, self.examples.classes, self.examples.val.targets, self.fitted.val
            )
            outputs = challenge_score.binarise(year, self.examples.classes, self.fitted.test, thresholds)
            found[f"challenge_{year}"] = challenge_score.bootstrap_challenge_score(
                year, self.examples.classes, self.targets, outputs, self.counts, self.left_out
            )
        return found

    def _regression(self) -> dict[str, Any]:
        r2 = self._score(self.fitted.test, "r2")
        ours, random = self._per_class(self.ours), self._per_class(self.random_init)
        mean, sd = self.examples.scale
        known = (~np.isnan(self.targets)).sum(axis=0)
        return {
            "metrics": {"mae": self._macro(self.ours)._asdict(), "r2": self._macro(r2)._asdict()},
            "per_class": {
                name: {
                    "mae": ours[k].point,
                    "ci_low": ours[k].low,
                    "ci_high": ours[k].high,
                    "r2": float(r2.per_class[k]),
                    "random_init_mae": random[k].point,
                    "n": int(known[k]),
                    "mean": float(mean[k]),
                    "sd": float(sd[k]),
                    "description": self.examples.descriptions[name],
                }
                for k, name in enumerate(self.examples.classes)
            },
            "classes_undefined_in_test": [
                name for name, n in zip(self.examples.classes, known, strict=True) if not n
            ],
        }

    def picture(self) -> Mapping[str, Any]:
        """Keyword arguments of `plots.auroc_forest`."""
        how = "" if self.mode == self.random_mode else f", {self.random_mode}"
        ours = "from scratch" if self.mode == "supervised" else "pretrained"
        named = {ours: self.ours, f"random initialisation{how}": self.random_init}
        return {
            "n_pos": metrics.class_counts(self.targets)[0],
            "models": {name: np.array(self._per_class(scored)) for name, scored in named.items()},
            "macro": {name: self._macro(scored) for name, scored in named.items()},
        }
