"""A finished linear probe, read back from its workdir together with its checkpoint and store."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation.fit_folder import DAMAGED
from ecg_jax.evaluation.linear import LinearProbe
from ecg_jax.evaluation.robustness import METRICS, Records
from ecg_jax.training.pretrained import RestoredEncoder, restore_encoder


@dataclass(frozen=True)
class FinishedProbe:
    """What a linear probe left behind, opened and checked."""

    results: dict
    encoder: RestoredEncoder
    head: LinearProbe
    records: Records
    patient_ids: np.ndarray
    targets: np.ndarray
    """[n, K]."""
    predictions: np.ndarray
    """float64 [n, K] of the clean records."""


def read_probe(
    workdir: Path, checkpoint: str | None = None, store: str | Path | None = None
) -> FinishedProbe:
    """Opens a finished linear probe with its checkpoint and store.

    Args:
        workdir: of `ecg-jax probe`.
        checkpoint: RUN or RUN/STEP when it is no longer where the probe found it.
        store: path of the store tested on, likewise.

    Raises:
        UserError: no finished linear probe, or its checkpoint or store is gone or another one.
    """
    path = workdir / "results.json"
    if not path.is_file():
        inside = sorted(each.parent.name for each in workdir.glob("*/results.json"))
        hint = f"; name one of the probes in it: {', '.join(inside)}" if inside else ""
        raise UserError(f"{workdir} holds no finished `ecg-jax probe` (no results.json){hint}")
    try:
        results = json.loads(path.read_text())
        mode, metric, used = results["mode"], results["metric"], results["checkpoint"]
        tested = results["test_store"] or results["store"]
        results["task"], results["model"], results["bootstrap"], results["seed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no result of this version of `ecg-jax probe`; run the probe again"
        ) from error
    if mode != "linear":
        raise UserError(
            f"{workdir} is a probe of mode={mode}; `ecg-jax robustness` takes mode=linear probes only"
        )
    if metric not in METRICS:
        raise UserError(f"{path} is scored by {metric!r}, which `ecg-jax robustness` does not know")
    if used is None:
        raise UserError(
            f"{workdir} is a probe without a checkpoint, so there is no encoder to predict with again"
        )
    arrays = _read_arrays(workdir / "predictions.npz")
    opened = Store(tested["path"] if store is None else store)
    rows = arrays["row"]
    if opened.fingerprint != tested["fingerprint"]:
        raise UserError(
            f"the store {opened.path} is not the one that {workdir} was tested on (another fingerprint); name that "
            "one with --store, or run the probe again"
        )
    where = (used["run"], used["step"]) if checkpoint is None else (checkpoint,)
    encoder = restore_encoder(*where)
    encoder.preprocessing.check_compatible(
        opened.preprocessing, f"checkpoint {encoder.run}", f"store {opened.path}"
    )
    return FinishedProbe(
        results=results,
        encoder=encoder,
        head=LinearProbe.load(workdir / "linear_probe.npz"),
        records=Records(opened, rows, [str(name) for name in arrays["record_id"]]),
        patient_ids=arrays["patient_id"],
        targets=arrays["targets"],
        predictions=arrays["probabilities"],
    )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            names = ("row", "record_id", "patient_id", "targets", "probabilities")
            return {name: file[name] for name in names}
    except DAMAGED as error:
        raise UserError(f"{path} is missing or damaged ({error}); run the probe again") from error
