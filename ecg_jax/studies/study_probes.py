"""One finished probe of a study, as its files tell it, and where the probes of a run lie."""

import functools
import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.config_flags import load_config, with_argument
from ecg_jax.data.store import SYNTHETIC
from ecg_jax.errors import UserError
from ecg_jax.files import read_object
from ecg_jax.json_fields import OBJECT, TEXT, Kind, number, one_of, or_null, whole, wrong_field
from ecg_jax.run_setup import flatten
from ecg_jax.studies.report.kinds import subfolders
from ecg_jax.studies.report.read import METRICS, MODES, PREDICTIONS, RESULTS
from ecg_jax.sweep_folder import FURTHER, MADE, PROBE, read_made

_SECTIONS = ("linear", "frozen", "finetune", "supervised")
# Of a probe's config: what its task and mode are, what is compared itself (classes, rules of the bootstrap), other
# seeds, how it is computed, and what stands beside it.
_FREE = {
    "task", "mode", "name", "seed", "min_count", "batch_size", "features", "baseline_seeds", "near_duplicates",
    "linear.solver", "frozen.token_cache_gb",
}  # fmt: skip
_FIELDS: dict[str, Kind] = {
    "task": TEXT, "metric": one_of(METRICS), "mode": one_of(MODES), "n_records": whole(1),
    "checkpoint": or_null(OBJECT), "pretraining_config": or_null(OBJECT), "config": OBJECT,
    "store.fingerprint": TEXT, "store.corpus": TEXT, "test_store": or_null(OBJECT),
    "bootstrap.undefined": one_of(("exclude", "half")), "versions": OBJECT,
}  # fmt: skip
# Those of fields that may be null, where they are not.
_INNER: dict[str, dict[str, Kind]] = {
    "checkpoint": {"run": TEXT, "step": whole(0)},
    "test_store": {"fingerprint": TEXT, "corpus": TEXT},
}
_SCORE = {"macro_auroc": or_null(number(0, 1)), "mae": or_null(number(0))}
# Arrays of predictions.npz that studies read: kinds of their NumPy types, and shape for n records and K classes.
_ARRAYS = {
    "record_id": ("U", "n"), "patient_id": ("U", "n"), "classes": ("U", "K"),
    "targets": ("fiu", "nK"), "probabilities": ("fiu", "nK"),
}  # fmt: skip
_DEPTH = 3  # folders below a probe's: of stores, of tasks


@dataclass(frozen=True)
class StudyProbe:
    """A finished probe of one task.

    Attributes:
        folder: its workdir.
        name: "probe", or the path under `probes/`, or its folder's name; without the task's own folder.
        task, mode, metric: as in its results; the metric is "macro_auroc" or "mae".
        error: 1 - macro AUROC, or the mean absolute error in standard deviations; NaN where it is undefined.
        step: of the checkpoint that was probed.
        results: what results.json holds.
    """

    folder: Path
    name: str
    task: str
    mode: str
    metric: str
    error: float
    step: int | None
    results: dict[str, Any]

    def predictions(self, *names: str) -> dict[str, np.ndarray]:
        """Arrays of predictions.npz, all if none is named, read anew each time: they are large, and probes many.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.folder / PREDICTIONS
        try:
            with zipfile.ZipFile(path):
                pass  # np.load takes other files too
            with np.load(path) as file:
                names = names or tuple(file.files)
                wrong = next((f"it lacks the array {name}" for name in names if name not in file.files), "")
                arrays = {} if wrong else {name: file[name] for name in names}
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror or 'it is cut short'}; run the probe again"
            ) from error
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"{path} is damaged: it holds no arrays of numbers and text; run the probe again"
            ) from error
        if wrong := wrong or self._unfit(arrays):
            raise UserError(f"{path} is damaged: {wrong}; run the probe again")
        return arrays

    def _unfit(self, arrays: dict[str, np.ndarray]) -> str:
        """What of arrays does not fit `results`, or another one of them; "" if all do."""
        sizes = {"n": self.results["n_records"]}
        for name, (kinds, dims) in _ARRAYS.items():
            if name not in arrays:
                continue
            array = arrays[name]
            if array.dtype.kind not in kinds:
                return f"its array {name} holds {'no text' if kinds == 'U' else 'no numbers'}"
            if array.ndim == len(dims):
                expected = tuple(
                    sizes.setdefault(dim, size) for dim, size in zip(dims, array.shape, strict=True)
                )
            if array.ndim != len(dims) or array.shape != expected:
                is_for = f"for {self.results['n_records']} records, as {RESULTS} has, and the same classes"
                return f"its array {name} is {list(array.shape)}, which does not fit the others {is_for}"
        if "probabilities" in arrays and not np.isfinite(arrays["probabilities"]).all():
            return "its array probabilities holds values that are not finite"
        if "targets" in arrays:
            known = arrays["targets"][~np.isnan(arrays["targets"])]  # NaN: not labelled
            sound = np.isin(known, (0, 1)) if self.metric == "macro_auroc" else np.isfinite(known)
            if not sound.all():
                return f"its array targets holds values that are no labels of {self.metric}"
        return ""

    @property
    def trained_on(self) -> str:
        """Fingerprint of the store whose recordings its head was trained on."""
        return self.results["store"]["fingerprint"]

    @property
    def tested_on(self) -> str:
        """Fingerprint of the store whose recordings were tested on."""
        return self._test_store["fingerprint"]

    @property
    def synthetic(self) -> bool:
        """Whether those were."""
        return self._test_store["corpus"] == SYNTHETIC

    @property
    def _test_store(self) -> dict[str, Any]:
        return self.results["test_store"] or self.results["store"]

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of its config that errors compare only if they are equal; those from after its time at their defaults.

        Seeds are not among them, nor what a probe of this mode does not read.
        """
        fields = _declared(self.mode) | flatten(json.loads(json.dumps(self.results["config"])))
        other = {"bootstrap", *_SECTIONS} - {self.mode}
        return {
            name: value
            for name, value in fields.items()
            if name not in _FREE and name.split(".")[0] not in other
        }


@functools.cache
def _declared(mode: str) -> dict[str, Any]:
    config = load_config(with_argument("configs/probe.py", mode=mode))
    return flatten(json.loads(json.dumps(config.to_dict())))


def probes_of_sweep(folder: Path) -> tuple[list[StudyProbe], list[str]]:
    """Finished probes in the folder that a sweep gave a run, and sentences on those that are not of the sweep."""
    found = [(path, PROBE) for path in finished_probes(folder / PROBE)]
    remarks = []
    further = folder / FURTHER
    for inside in subfolders(further) if further.is_dir() else []:
        paths = finished_probes(inside)
        if (inside / MADE).is_file():
            made = {(inside / place).resolve() for places in read_made(inside).values() for place in places}
            remarks += [
                f"the probe {path} is left out: {inside / MADE} does not name it"
                for path in paths
                if path.resolve() not in made
            ]
            paths = [path for path in paths if path.resolve() in made]
        found += [(path, path.relative_to(further).as_posix()) for path in paths]
    return [read_probe(path, name) for path, name in found], remarks


def finished_probes(folder: Path, depth: int = 0) -> list[Path]:
    """A probe's workdir and those in it: of stores, of tasks. Below a result there may be those of later stores."""
    if not folder.is_dir():
        return []
    inside = subfolders(folder) if depth < _DEPTH else []
    own = [folder] if (folder / RESULTS).is_file() else []
    return own + [path for each in inside for path in finished_probes(each, depth + 1)]


def read_probe(folder: Path, name: str) -> StudyProbe:
    """Reads a probe.

    Args:
        folder: its workdir.
        name: the path to it, of which the task's own folder is taken off.

    Raises:
        UserError: its results.json is damaged, or of a version without a field of ours.
    """
    path = folder / RESULTS
    results = read_object(path)
    wrong = wrong_field(results, _FIELDS)
    for outer, fields in _INNER.items():
        if not wrong and results[outer] is not None:
            wrong = wrong_field(results[outer], fields, f"{outer}.")
    if wrong := wrong or wrong_field(results, {results["metric"]: _SCORE[results["metric"]]}):
        raise UserError(f"{path} is damaged: {wrong}; run its probe again with this version of ecg_jax")
    task, metric, probed = results["task"], results["metric"], results["checkpoint"]
    value, step = results[metric], None if probed is None else probed["step"]
    error = math.nan if value is None else 1 - value if metric == "macro_auroc" else value
    if folder.name == task and name != PROBE:
        name = name.removesuffix(task).rstrip("/") or folder.parent.name
    return StudyProbe(folder, name, task, results["mode"], metric, float(error), step, results)


def probed_run(probe: StudyProbe) -> Path | None:
    """Where the run that was probed lies, or lay."""
    checkpoint = probe.results["checkpoint"]
    return None if checkpoint is None else Path(checkpoint["run"])
