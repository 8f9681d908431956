"""Reading a checkpoint file of PyTorch or Lightning. The one file that imports torch, an optional extra."""

import collections
import dataclasses
import hashlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TorchCheckpoint:
    """What a Lightning checkpoint says of a model.

    Attributes:
        state_dict: name -> array in memory of its own; floating-point numbers as float32.
        global_step: optimiser updates done.
        epoch: None where the file does not say.
    """

    state_dict: dict[str, np.ndarray]
    global_step: int
    epoch: int | None


class _Ignored:
    """Stands for every class and function of a checkpoint that torch does not take for harmless: calling it makes an
    empty dict, and nothing of the file is run.
    """

    def __new__(cls, *args: Any, **kwargs: Any):
        # Of all dicts torch fills this one only with the attributes of an object.
        return collections.OrderedDict()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def read_torch_checkpoint(path: Path) -> TorchCheckpoint:
    """Reads `state_dict`, `global_step` and `epoch`, tensors and plain values only (`weights_only`).

    Raises:
        UserError: torch is not installed, or the file is no checkpoint, is damaged, or lacks one of the first two.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading {path} needs torch: pip install 'ecg_jax[torch]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of odd files is for those who write them
            content = _load(torch, path)
    # Damage surfaces as many types: pickle's, zipfile's, the system's, torch's own.
    except Exception as error:
        # torch's own text is a page of advice with the reason in the middle.
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        reason = f"{type(error).__name__}: {text}".splitlines()[0].partition(". ")[0]
        raise UserError(
            f"{path} cannot be read as a torch checkpoint ({reason}); if it is one, save it again with nothing but "
            "state_dict, global_step and epoch in it"
        ) from error
    return parse_content(path, content, to_array=_to_array)


def parse_content(path: Path, content: Any, to_array) -> TorchCheckpoint:
    """What `read_torch_checkpoint` makes of the content of a file.

    Args:
        path: for messages.
        content: what the file holds, a dict if it is a checkpoint.
        to_array: tensor -> numpy array in memory of its own; raises AttributeError or TypeError for anything else.

    Raises:
        UserError: as there.
    """
    for name in ("state_dict", "global_step"):
        if not isinstance(content, dict) or name not in content:
            raise UserError(f"{path} holds no {name}; a Lightning checkpoint does")
    step, epoch = content["global_step"], content.get("epoch")
    if type(step) is not int or not 0 <= step < 2**31:
        raise UserError(f"{path}: global_step={step!r} must be a whole number, 0 or more")
    if not isinstance(content["state_dict"], dict) or not content["state_dict"]:
        raise UserError(f"{path}: its state_dict is empty or no dict")
    arrays = {}
    for name, value in content["state_dict"].items():
        try:
            array = to_array(value)
        except (AttributeError, TypeError) as error:
            raise UserError(f"{path}: {name} of its state_dict is no tensor") from error
        arrays[str(name)] = array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array
    return TorchCheckpoint(arrays, step, epoch if type(epoch) is int else None)


def _load(torch, path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        # Lightning keeps the settings of a run as objects of other packages; they are not wanted.
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if not unknown:
            raise
        with torch.serialization.safe_globals([(_Ignored, name) for name in unknown]):
            return torch.load(path, weights_only=True, map_location="cpu")


def _to_array(tensor) -> np.ndarray:
    tensor = tensor.detach().to_dense()
    if tensor.is_floating_point():
        tensor = tensor.float()
    # Kernel buffers are expanded views with stride 0 (spec §11.4).
    return np.array(tensor.numpy(), order="C")
