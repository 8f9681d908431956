"""What results say of where they come from, whether they are there already, and what leaked into them."""

import datetime
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.data.mixture import StoreSet
from ecg_jax.data.selection import SELECTION_NAME, select_as_configured, use_selection
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import leakage
from ecg_jax.evaluation.examples import Examples
from ecg_jax.files import cache_folder
from ecg_jax.run_origin import describe_run
from ecg_jax.training.pretrained import RestoredEncoder

#: Fields of a config that do not change results.
FREE_FIELDS = ("features", "batch_size")


def features_folder(config) -> Path:
    """Where features and signatures are kept."""
    return Path(config.features).expanduser() if config.features else cache_folder() / "features"


def config_identity(config) -> dict[str, Any]:
    """The fields of a config that results depend on."""
    return {name: value for name, value in config.to_dict().items() if name not in FREE_FIELDS}


def store_identity(store: Store) -> dict[str, str]:
    """Which store, which signals, and which labels, folds and patients."""
    return {
        "path": str(store.path.resolve()),
        "corpus": store.corpus,
        "fingerprint": store.fingerprint,
        "table": store.table_digest(),
    }


def checkpoint_identity(encoder: RestoredEncoder) -> dict[str, Any]:
    """Which checkpoint."""
    return {"run": str(encoder.run.resolve()), "step": encoder.step}


def made_with(packages: Sequence[str]) -> dict[str, Any]:
    """Versions of these packages and of Python, and the time."""
    return {
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def make_folder(folder: Path, workdir: Path) -> None:
    """Makes a folder in (or that is) the workdir before the long part, so that one not writable costs nothing.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write into --workdir={workdir}: {error.strerror}; name another folder."
        ) from error


def finished(path: Path, identity: dict[str, Any], what: str) -> dict[str, Any] | None:
    """The results in a file if they have this identity, None if there is no such file or it is cut short.

    Args:
        path: of results.json or its like, in the workdir.
        identity: field -> value, as they stand in the file.
        what: "probe", "study", ..., for the message.

    Raises:
        UserError: the file holds other results, or cannot be read.
    """
    try:
        before = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        differing = [key for key, value in identity.items() if before[key] != value]
    except (KeyError, TypeError):
        differing = ["kind"]
    if differing:
        raise UserError(
            f"--workdir={path.parent} holds results of another {what} (other {', '.join(differing)}); "
            "choose another folder."
        )
    return before


def leakage_verdict(
    encoder: RestoredEncoder | None, examples: Examples, near: bool, folder: Path
) -> dict[str, Any]:
    """What of the test records was trained on, or pretrained on if all those stores are still there.

    Args:
        encoder: that was pretrained; None if there was no pretraining.
        examples: of the task.
        near: look for near-identical recordings too.
        folder: keeps signatures of recordings that were compared.

    Returns:
        `leakage.verdict`, with "pretraining_problem": why the pretraining recordings were not examined, or None.
    """
    pretraining, problem = [], None
    if encoder is not None:
        try:
            pretraining = pretrained_on(encoder)
        except UserError as error:
            problem = str(error)
    verdict = leakage.verdict(
        examples.train.store,
        examples.test.rows,
        np.concatenate([examples.train.rows, examples.val.rows]),
        pretraining,
        near,
        test_store=examples.test.store,
        pretrained=encoder is not None,
        cache=folder,
    )
    return verdict | {"pretraining_problem": problem}


def pretrained_on(encoder: RestoredEncoder) -> list[tuple[Store, np.ndarray]]:
    """The stores that an encoder was pretrained on and the rows of each that were trained on, of its own run and of all
    runs that this one began with.

    Raises:
        UserError: one of them is not known, not there any more, or holds something else now.
    """
    seen, run = [], describe_run(encoder.run, encoder.step)
    while run is not None:
        seen += _trained_on(run)
        run = run["origin"]
    return seen


def _trained_on(run: dict[str, Any]) -> list[tuple[Store, np.ndarray]]:
    """Stores and rows of a run, see `run_origin.describe_run`."""
    if run["store_fingerprint"] is None or run["store"] is None:
        raise UserError("an imported checkpoint does not say which recordings it was pretrained on.")
    stores = StoreSet([Store(path) for path in run["store"].split(",")])
    if stores.fingerprint != run["store_fingerprint"]:
        one = len(stores.stores) == 1
        raise UserError(
            f"the store{'' if one else 's'} {stores} {'is' if one else 'are'} not what {run['run']} was pretrained on "
            "any more."
        )
    path = Path(run["run"]) / SELECTION_NAME
    if path.exists():
        selection = use_selection(path, stores, run["window_samples"])
    else:
        selection = select_as_configured(stores, run["data"], run["window_samples"])
    if run["selection_fingerprint"] not in (None, selection.fingerprint):
        raise UserError(
            f"{run['run']} was pretrained on other recordings than {path} tells; put its own file there."
        )
    return [
        (store, selection.rows_of(number)[0])
        for number, store in enumerate(stores.stores)
        if len(selection.rows_of(number)[0])
    ]
