"""Restoring only the encoder of a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.errors import UserError
from ecg_jax.training.checkpoint import CHECKPOINTS, read_arrays, read_meta, stored_shapes
from ecg_jax.training.checkpoint_tree import checksums, describe_mismatch, flat_shapes
from ecg_jax.training.read_faults import first_line


@dataclasses.dataclass(frozen=True)
class StoredEncoder:
    """The encoder's part of a checkpoint.

    Attributes:
        run, step: where it comes from.
        config: of the pretraining run, nested plain dict.
        preprocessing: the contract, with `window_s`, `normalisation` and `kept_leads` of the run.
        variables: `params`, `batch_stats` and, unless they were trained, `ssm` of the encoder; numpy arrays.
        store_fingerprint: of the store it was pretrained on, None if it was imported.
    """

    run: Path
    step: int
    config: dict[str, Any]
    preprocessing: Preprocessing
    variables: dict[str, Any]
    store_fingerprint: str | None


def read_encoder(run: Path, step: int, abstract_encoder) -> StoredEncoder:
    """Reads config, contract and the encoder's arrays of a checkpoint, and nothing else.

    Args:
        run, step: from `resolve_checkpoint`.
        abstract_encoder: (config, contract) -> variables of the encoder (`params`, `batch_stats`, maybe
            `ssm`) as shapes.

    Raises:
        UserError: missing, extra or differently shaped parameters, or a damaged checkpoint.
    """
    path = run / CHECKPOINTS / str(step)
    try:
        meta = read_meta(path)
        stored = stored_shapes(path)
        preprocessing = Preprocessing.from_dict(meta["preprocessing"])
    except Exception as error:
        raise UserError(
            f"checkpoint {path} is damaged ({first_line(error)}); choose another step of the run"
        ) from error
    wanted = {
        collection: {"encoder": tree}
        for collection, tree in abstract_encoder(meta["config"], preprocessing).items()
        if tree
    }
    shapes = flat_shapes(wanted)
    prefixes = ("params/encoder/", "batch_stats/encoder/", "ssm/encoder/")
    of_encoder = {name: shape for name, shape in stored.items() if name.startswith(prefixes)}
    if mismatch := describe_mismatch(of_encoder, shapes):
        raise UserError(f"checkpoint {path} does not hold the encoder its config describes: {mismatch}")
    try:
        tree = read_arrays(path, wanted)
        for name, checksum in checksums(tree).items():
            if checksum != meta["checksums"][name]:
                raise OSError(f"the checksum of {name} does not match")
    except Exception as error:
        raise UserError(
            f"checkpoint {path} is damaged ({first_line(error)}); choose another step of the run"
        ) from error
    return StoredEncoder(
        run=run,
        step=step,
        config=meta["config"],
        preprocessing=preprocessing,
        variables={collection: subtree["encoder"] for collection, subtree in tree.items()},
        store_fingerprint=meta["store_fingerprint"],
    )
