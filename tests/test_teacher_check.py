"""Telling an untouched teacher from one that followed the student."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.interop.teacher_check import check_teacher
from ecg_jax.models.encoder import build_encoder


@functools.cache
def two_encoders():
    encoder = build_encoder(
        backbone="s4",
        width=64,
        state=8,
        layers=2,
        l_max=32,
        bidirectional=True,
        trainable_ssm=False,
        dropout=0.2,
    )
    init = jax.jit(lambda key: encoder.init(key, jnp.zeros((1, 64, 12)), train=False))
    return tuple(jax.device_get(init(jax.random.key(seed))) for seed in range(2))


def test_teacher_of_the_released_code():
    student, teacher = two_encoders()
    teacher = teacher | {"batch_stats": jax.tree.map(lambda v: v + 0.1, teacher["batch_stats"])}
    checked = check_teacher(student, teacher)
    assert checked.verdict == "untouched"
    assert checked.share_within_bound == 1
    assert checked.distance < checked.distance_limit
    assert abs(checked.correlation) < 0.05
    assert checked.statistics_moved
    assert "equals an untouched initialisation" in checked.sentence()
    moved = jax.tree.map(lambda v: v + 0.01, teacher["params"])
    assert check_teacher(student, teacher | {"params": moved}).verdict == "neither"
    norms = {**teacher["params"]["stem"], "norm0": {"scale": np.full(64, 1.1), "bias": np.zeros(64)}}
    trained = teacher | {"params": {**teacher["params"], "stem": norms}}
    assert check_teacher(student, trained).verdict == "untouched_weights"


def test_teacher_that_follows_the_student():
    student, other = two_encoders()
    assert check_teacher(student, student).verdict == "copy"
    rng = np.random.default_rng(0)
    trained = {
        **student,
        "params": jax.tree.map(lambda v: v + rng.normal(0, 0.02, v.shape), student["params"]),
    }
    checked = check_teacher(trained, student)
    assert checked.verdict == "follows_student"
    assert checked.correlation > 0.9
    mixed = {
        **student,
        "params": jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, student["params"], other["params"]),
    }
    assert check_teacher(student, mixed).verdict == "follows_student"
    checked = check_teacher(other, mixed)
    assert checked.verdict == "neither"
    assert 0.3 < checked.correlation < 0.5
    assert "correlates with the student by at most 0.5 (" in checked.sentence()
