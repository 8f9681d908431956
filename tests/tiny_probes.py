"""A tiny encoder and tiny labelled examples, shared by the tests of probes that are trained."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.store import Store
from ecg_jax.evaluation.examples import Examples, Part
from ecg_jax.evaluation.tasks import get_task
from ecg_jax.training.parallel import AXIS
from ecg_jax.training.pretrained import RestoredEncoder, random_twin

WINDOW_S = 1.0
MODEL = {
    "backbone": "s4",
    "width": 16,
    "state": 4,
    "layers": 1,
    "l_max": 120,
    "bidirectional": True,
    "trainable_ssm": False,
    "dropout": 0.2,
    "remat": "none",
    "conv": "fft",
}
CLASSES = ["brady", "irregular", "sinus", "tachy"]


def one_device():
    return Mesh(np.asarray(jax.devices()[:1]), (AXIS,))


@functools.cache
def tiny_encoder(seed=0):
    """Random weights; the contract of the synthetic store with windows of one second."""
    contract = dataclasses.replace(Preprocessing(), window_s=WINDOW_S, normalisation="ptbxl_canonical")
    empty = RestoredEncoder(Path("runs/tiny"), 3, {"model": MODEL}, contract, {}, 0)
    return random_twin(empty, seed)


def tiny_examples(path, sizes=(48, 24, 24), targets=None, task="synthetic_rhythm"):
    """Parts of consecutive records of a synthetic store: of their rhythm unless targets [n, K] are given."""
    store = Store(path)
    if targets is None:
        rhythm = store.column("labels_rhythm")
        targets = np.array([[name in labels for name in CLASSES] for labels in rhythm], np.float32)
    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    parts = [Part(store, part, targets[part]) for part in rows]
    classes = [*CLASSES, *map(str, range(10))][: targets.shape[1]]
    return Examples(
        *parts, task=get_task(task), classes=classes, descriptions=dict.fromkeys(classes, ""),
        classes_dropped={}, split={}, excluded={}, scale=None,
    )  # fmt: skip


def with_parts(examples, **parts):
    return dataclasses.replace(examples, **parts)
