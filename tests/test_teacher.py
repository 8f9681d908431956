import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_close, group, load_golden
from ecg_jax.models.encoder import build_encoder
from ecg_jax.objectives.teacher import Teacher, ema

FOLLOWING = Teacher(
    mode="ema", momentum=0.99, momentum_end=0.99, train_mode=False, batch_stats="own", steps=10
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
    np.testing.assert_array_equal(after["batch_stats"]["mean"], 10.0)
    np.testing.assert_array_equal(after["ssm"]["log_dt"], 1.0)
    averaging = dataclasses.replace(FOLLOWING, batch_stats="ema")
    np.testing.assert_allclose(
        averaging.follow(teacher, variables(2.0), jnp.int32(0))["batch_stats"]["mean"], 10.1, rtol=1e-6
    )


def small_encoder():
    encoder = build_encoder(
        backbone="s4", width=16, state=4, layers=1, l_max=32, bidirectional=True, trainable_ssm=False, dropout=0.0
    )  # fmt: skip
    walk = np.random.default_rng(0).normal(scale=0.03, size=(8, 64, 12)).cumsum(axis=1)
    x = jnp.asarray(walk, jnp.float32)
    return encoder, encoder.init(jax.random.key(0), x, train=False), x


def test_statistics_follow_the_teachers_own_activations():
    """When the first convolution grows tenfold, its running variance goes along and the features keep their size."""
    encoder, state, x = small_encoder()
    sizes, variances = [], []
    for step in range(80):
        features, statistics = FOLLOWING.features(
            encoder, state, x, jnp.arange(8), dropout_key=jax.random.key(0)
        )
        sizes.append(float(features["stem"].std()))
        variances.append(statistics["stem"]["norm0"]["var"])
        params = state["params"]
        if step == 9:
            conv = {"conv0": jax.tree.map(lambda w: 10.0 * w, params["stem"]["conv0"])}
            params = params | {"stem": params["stem"] | conv}
        state = state | {"params": params, "batch_stats": statistics}
    np.testing.assert_allclose(sizes[:10], sizes[0], rtol=0.05)
    assert sizes[10] > 3 * sizes[0]
    np.testing.assert_allclose(sizes[-1], sizes[0], rtol=0.05)
    np.testing.assert_allclose(variances[-1], 100 * variances[9], rtol=0.01)


def test_first_targets_do_not_see_the_initial_statistics():
    """On millivolts the initial running variance of 1 would make all tokens nearly equal."""
    encoder, fresh, x = small_encoder()

    def spread(settings, variables):
        features, statistics = settings.features(
            encoder, variables, x, jnp.arange(8), dropout_key=jax.random.key(0)
        )
        return float(features["stem"].std()), statistics

    std, statistics = spread(FOLLOWING, fresh)
    assert std > 0.3
    again, _ = spread(FOLLOWING, fresh | {"batch_stats": statistics})
    assert again == pytest.approx(std, rel=0.02)
    assert spread(dataclasses.replace(FOLLOWING, batch_stats="ema"), fresh)[0] < 0.1


def test_frozen_teacher_is_random_and_never_moves():
    frozen = dataclasses.replace(FOLLOWING, mode="frozen_random", train_mode=True)
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
        ("batch_stats", "batch", "teacher.batch_stats='batch' is unknown"),
    ],
)
def test_bad_settings_are_refused(field, value, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(FOLLOWING, **{field: value})


@pytest.mark.parametrize("changes", [{"train_mode": True}, {"mode": "frozen_random"}])
def test_averaged_statistics_belong_to_a_following_teacher_in_evaluation_mode(changes):
    with pytest.raises(ValueError, match=r"teacher\.batch_stats='ema' needs"):
        dataclasses.replace(FOLLOWING, batch_stats="ema", **changes)
