"""The points of a curve: a loss or an error of every run of a family, over what the run took."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.studies.power_law import rungs_of
from ecg_jax.studies.scaling_families import Family
from ecg_jax.studies.study_runs import StudyRun

#: Axis -> what it is called, with its unit.
AXES = {
    "recordings": "pretraining recordings",
    "windows": "training windows",
    "flops": "training compute (FLOP, by formula)",
    "device_hours": "device-hours of pretraining",
}
LOSS, BEST_LOSS, ERROR = "loss", "best_loss", "error"
#: Task of a curve that is the mean over tasks.
MEAN = "mean"


@dataclass(frozen=True)
class Curve:
    """One quantity of a family.

    Attributes:
        family: its runs, of which the curve has those below.
        quantity: "loss" (validation, the last one), "best_loss" (the lowest), or "error" (1 - macro AUROC, or MAE).
        task, mode, metric: of errors, "" of losses; task "mean" is the mean over `tasks`.
        tasks: that it is made of.
        runs: P of them.
        sources: [P], the folder that each value was read from; several separated by commas.
        values: float64 [P], positive.
        resampled: float64 [P, R], errors on R resamples of the patients, the same for all runs; None of losses.
        synthetic: whether the test records of an error are.
    """

    family: Family
    quantity: str
    task: str
    mode: str
    metric: str
    tasks: tuple[str, ...]
    runs: tuple[StudyRun, ...]
    sources: tuple[str, ...]
    values: np.ndarray
    resampled: np.ndarray | None
    synthetic: bool = False

    @property
    def recordings(self) -> np.ndarray:
        """float64 [P]."""
        return np.array([run.recordings for run in self.runs], float)

    @property
    def rungs(self) -> np.ndarray:
        """int [P], 0 for the smallest size."""
        return rungs_of(self.recordings)

    @property
    def n_rungs(self) -> int:
        """Of different sizes."""
        return int(self.rungs.max()) + 1


def axis_of(run: StudyRun, axis: str) -> float | None:
    """Where a run lies on an axis; None where it is not known."""
    return {
        "recordings": run.recordings,
        "windows": run.windows,
        "flops": run.train_flops,
        "device_hours": run.device_hours,
    }[axis]


def loss_curves(found: Sequence[Family], quantity: str, note: Callable[[str], None]) -> list[Curve]:
    """The validation losses of every family, of runs whose last one is known; what is left out is noted."""
    curves = []
    for family in found:
        runs, values = [], []
        for run in family.runs:
            if run.val_loss is None:
                note(f"{run.name} is left out of the losses: its validation loss at its end is not known")
                continue
            value = run.val_loss if quantity == LOSS else run.best_val_loss
            if value is None or not value > 0 or not np.isfinite(value):
                note(f"{run.name} is left out of the losses: its validation loss is {value}")
                continue
            runs.append(run)
            values.append(value)
        if runs:
            sources = tuple(str(run.folder) for run in runs)
            curves.append(
                Curve(family, quantity, "", "", "", (), tuple(runs), sources, np.array(values), None)
            )
    return curves


def populations(runs: Sequence[StudyRun]) -> tuple[str, ...]:
    """Sentences on what else differs between the sizes of a curve: validation recordings, stores, made-up ones."""
    said = []
    if len({run.fingerprints["validation"] for run in runs}) > 1:
        said.append(
            "the held-out recordings that losses are measured on are not the same at every size, so that a difference "
            "of populations is part of the exponent of the loss"
        )
    if len({run.fingerprints["store"] for run in runs}) > 1:
        said.append("the stores are not the same at every size: populations and sizes differ together")
    if any(run.synthetic for run in runs):
        said.append("recordings are SYNTHETIC: the numbers test the machinery and say nothing about ECGs")
    return tuple(said)
