import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_close, group, load_golden
from ecg_jax.objectives.teacher import Teacher, ema

FOLLOWING = Teacher(
    mode="ema", momentum=0.99, momentum_end=0.99, train_mode=False, batch_stats="student", steps=10
)


@pytest.mark.parametrize("momentum", ["0.9996", "0.99"])
def test_ema_parity(momentum):
    """Three updates; the integer counter of the reference, which we do not have, is left out."""
    golden = group(load_golden("ema_update"), f"m{momentum}/")

    def tree(prefix):
        return {n: v for n, v in group(golden, prefix).items() if not n.endswith("num_batches_tracked")}

    teacher = {name: jnp.asarray(value) for name, value in tree("in/teacher/").items()}
    settings = dataclasses.replace(FOLLOWING, momentum=float(momentum), momentum_end=float(momentum))
    for step in range(3):
        teacher = ema(teacher, tree(f"in/student{step}/"), settings.rate_at(jnp.int32(step)))
        for name, expected in tree(f"out/teacher{step}/").items():
            assert_close(teacher[name], expected, 1e-6, name)


def test_momentum_rises_along_half_a_cosine():
    settings = dataclasses.replace(FOLLOWING, momentum=0.996, momentum_end=1.0, steps=101)
    rates = np.array([settings.rate_at(jnp.int32(step)) for step in (0, 50, 100, 500)])
    np.testing.assert_allclose(rates, [0.004, 0.002, 0.0, 0.0], atol=1e-9)


def variables(value):
    return {
        "params": {"w": jnp.full(3, value)},
        "batch_stats": {"mean": jnp.full(3, 10.0 * value)},
        "ssm": {"log_dt": jnp.full(3, value)},
    }


def test_following_teacher_begins_as_the_student_and_lags_behind():
    student = variables(1.0)
    teacher = FOLLOWING.initial(student, variables(5.0))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, teacher, student))
    assert teacher["params"]["w"] is not student["params"]["w"]  # a step donates its state
    after = FOLLOWING.follow(teacher, variables(2.0), jnp.int32(0))
    np.testing.assert_allclose(after["params"]["w"], 1.01, rtol=1e-6)
    np.testing.assert_array_equal(after["batch_stats"]["mean"], 20.0)
    np.testing.assert_array_equal(after["ssm"]["log_dt"], 1.0)
    averaged = dataclasses.replace(FOLLOWING, batch_stats="ema").follow(teacher, variables(2.0), jnp.int32(0))
    np.testing.assert_allclose(averaged["batch_stats"]["mean"], 10.1, rtol=1e-6)


def test_frozen_teacher_is_random_and_never_moves():
    frozen = dataclasses.replace(FOLLOWING, mode="frozen_random", train_mode=True, batch_stats="own")
    teacher = frozen.initial(variables(1.0), variables(5.0))
    np.testing.assert_array_equal(teacher["params"]["w"], 5.0)
    after = frozen.follow(teacher, variables(2.0), jnp.int32(0))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, teacher, after))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("mode", "mean", "teacher.mode='mean' is unknown"),
        ("momentum", 0.0, "teacher without momentum"),
        ("momentum_end", 1.5, "teacher.momentum_end=1.5"),
        ("batch_stats", "own", "belong together"),
        ("batch_stats", "batch", "teacher.batch_stats='batch' is unknown"),
    ],
)
def test_bad_settings_are_refused(field, value, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(FOLLOWING, **{field: value})
