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
from ecg_jax.run_setup import flatten
from ecg_jax.studies.report.kinds import subfolders
from ecg_jax.studies.report.read import PREDICTIONS, RESULTS
from ecg_jax.sweep_folder import FURTHER, MADE, PROBE, read_made

_SECTIONS = ("linear", "frozen", "finetune", "supervised")
# Of a probe's config: what its task and mode are, what is compared itself (classes, rules of the bootstrap), other
# seeds, how it is computed, and what stands beside it.
_FREE = {
    "task", "mode", "name", "seed", "min_count", "batch_size", "features", "baseline_seeds", "near_duplicates",
    "linear.solver", "frozen.token_cache_gb",
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
            with np.load(path) as file:
                return {name: file[name] for name in names or file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is missing or damaged ({error}); run the probe again") from error

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
    try:
        task, metric = results["task"], results["metric"]
        value = results[metric]
        probed = results["checkpoint"]
        for store in (results["store"], results["test_store"] or results["store"]):
            store["fingerprint"], store["corpus"]
        results["bootstrap"]["undefined"], results["config"].items()
        error = math.nan if value is None else 1 - value if metric == "macro_auroc" else value
        step = None if probed is None else probed["step"]
        mode = results["mode"]
        if folder.name == task and name != PROBE:
            name = name.removesuffix(task).rstrip("/") or folder.parent.name
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} lacks the field {error}; run its probe again with this version of ecg_jax"
        ) from error
    return StudyProbe(folder, name, task, mode, metric, float(error), step, results)


def probed_run(probe: StudyProbe) -> Path | None:
    """Where the run that was probed lies, or lay."""
    checkpoint = probe.results["checkpoint"]
    return None if checkpoint is None else Path(checkpoint["run"])
