"""Collapse is seen: the numbers, the rules, and a run that is made to collapse."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ecg_jax import cli, pretrain
from ecg_jax.config_flags import load_config, override
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.errors import UserError
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.run_setup import build_objective, build_optimiser, build_teacher, initial_state
from ecg_jax.training import collapse, parallel
from ecg_jax.training.metric_writers import read_log, read_warnings
from test_pretrain import TINY, arguments, trajectory

LIMITS = collapse.Limits(min_rankme=2.0, min_feature_std=0.02, min_perplexity=2.0, max_dead_share=0.9)


def moments(tokens, axis_name=None):
    return jax.device_get(collapse.moments(jnp.asarray(tokens, jnp.float32), axis_name))


def spectrum_rank(tokens):
    """RankMe by its definition, from the singular values of all tokens."""
    sigma = np.linalg.svd(np.asarray(tokens, np.float64).reshape(-1, tokens.shape[-1]), compute_uv=False)
    p = sigma / sigma.sum()
    return np.exp(-(p * np.log(p + 1e-300)).sum())


def test_rankme_of_known_matrices():
    assert collapse.rankme(np.eye(24)) == pytest.approx(24)
    assert collapse.rankme(3e-8 * np.eye(24)) == pytest.approx(24)
    vector = np.arange(1.0, 25.0)
    assert collapse.rankme(np.outer(vector, vector)) == pytest.approx(1)
    assert collapse.rankme(np.diag([4.0, 4.0, 0, 0])) == pytest.approx(2)
    # Singular values 3 and 1: p = 3/4, 1/4.
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert collapse.rankme(np.diag([9.0, 1.0])) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_rankme_equals_a_direct_svd(scale):
    rng = np.random.default_rng(0)
    tokens = scale * (rng.normal(size=(12, 20, 16)) * np.geomspace(1, 0.02, 16) + rng.normal(size=16))
    assert collapse.rankme(moments(tokens)["second_moment"]) == pytest.approx(spectrum_rank(tokens), rel=1e-4)


def test_constant_features_have_rank_one_and_no_variation():
    """Rounding, which points everywhere, does not count as rank."""
    tokens = np.broadcast_to(np.random.default_rng(1).normal(size=64), (32, 300, 64))
    seen = moments(tokens)
    assert collapse.rankme(seen["second_moment"]) == pytest.approx(1, abs=1e-3)
    assert collapse.feature_std(seen) < 1e-5


def test_features_that_know_only_the_position_do_not_vary():
    """They span many directions, so rankme alone would not see it."""
    position = np.random.default_rng(2).normal(size=(1, 40, 16))
    seen = moments(np.repeat(position, 8, axis=0))
    assert collapse.rankme(seen["second_moment"]) > 10
    assert collapse.feature_std(seen) < 1e-5


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_feature_std_is_relative_and_does_not_depend_on_the_batch(scale):
    rng = np.random.default_rng(3)
    for records in (4, 64):
        noise = rng.normal(size=(records, 500, 16))
        assert collapse.feature_std(moments(scale * noise)) == pytest.approx(1, abs=0.02)
        assert collapse.feature_std(moments(scale * (noise + 3))) == pytest.approx(10**-0.5, abs=0.02)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, 1e30])
def test_features_that_are_zero_or_not_finite_count_as_collapsed(bad):
    scalars = collapse.describe({"student": moments(np.full((2, 3, 4), bad))})
    assert scalars == {"rankme": 0, "feature_std": 0}
    assert set(collapse.findings(scalars, LIMITS)) == {"rankme", "feature_std"}


def tiny(spec, **changes):
    config = load_config(spec)
    fields = {name: value for name, value in TINY.items() if not name.startswith("objective.")} | changes
    for name, value in fields.items():
        override(config, name.replace("__", "."), str(value))
    return config


def observed(config, devices):
    preprocessing = Preprocessing(window_s=config.data.window_s)
    _, tx = build_optimiser(config, 4)
    teacher = build_teacher(config, 4)
    mesh = Mesh(np.asarray(jax.devices()[:devices]), (parallel.AXIS,))
    state = parallel.replicate(initial_state(config, tx, preprocessing, teacher), mesh)
    step = functools.partial(
        collapse.observe_step,
        model=build_objective(config, parallel.AXIS),
        teacher=teacher,
        normalisation=config.data.normalisation,
        kept_leads=ALL_LEADS,
    )
    signal = np.random.default_rng(4).normal(size=(16, preprocessing.window_samples, 12)) * 500
    batch = {"signal": signal.astype(np.int16), "record_index": np.arange(16, dtype=np.int32)}
    return collapse.describe(
        jax.device_get(parallel.map_eval_step(step, mesh)(state, parallel.shard_batch(batch, mesh)))
    )


@pytest.mark.parametrize("spec", ["configs/cpc.py", "configs/jepa.py"])
def test_devices_do_not_matter(spec):
    config = tiny(spec)
    one, eight = observed(config, 1), observed(config, 8)
    assert ("teacher_feature_std" in one) == (spec == "configs/jepa.py")
    assert one.keys() == eight.keys()
    for name, value in one.items():
        assert eight[name] == pytest.approx(value, rel=1e-4), name
        assert value > 0.02


HEALTHY = {
    "rankme": 20.0, "feature_std": 0.5, "teacher_feature_std": 0.4, "perplexity": 30.0, "dead_codes": 0.4, "loss": 0.0,
}  # fmt: skip


def test_healthy_numbers_have_no_findings():
    assert collapse.findings(HEALTHY, LIMITS) == {}
    assert collapse.findings({"loss": 3.0}, LIMITS) == {}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rankme", 1.2, "rankme=1.2 is below config.monitor.min_rankme=2"),
        ("feature_std", 0.0012, "feature_std=0.0012 is below config.monitor.min_feature_std=0.02"),
        ("teacher_feature_std", 0.0, "teacher_feature_std=0 is below config.monitor.min_feature_std=0.02"),
        ("perplexity", 1.5, "perplexity=1.5 is below config.monitor.min_perplexity=2"),
        ("dead_codes", 0.91, "dead_codes=0.91 is above config.monitor.max_dead_share=0.9"),
    ],
)
def test_each_rule_names_number_limit_and_remedy(name, value, said):
    found = collapse.findings(HEALTHY | {name: value}, LIMITS)
    assert set(found) == {name}
    assert found[name].startswith(said)
    assert "what usually helps: " in found[name]
    off = collapse.Limits(min_rankme=0, min_feature_std=0, min_perplexity=0, max_dead_share=1)
    assert collapse.findings(HEALTHY | {name: value}, off) == {}


# A run that is healthy up to step 4 and then collapses.
PLANTED_AT = 5


def plant(monkeypatch, spoil):
    """Makes the state after step `PLANTED_AT` and later `spoil(state)`."""
    real = pretrain.train_step

    def train_step(state, batch, **kwargs):
        state, metrics = real(state, batch, **kwargs)
        spoilt = spoil(state)
        late = state.step >= PLANTED_AT
        parts = {
            name: jax.tree.map(
                lambda a, b: jnp.where(late, b, a), getattr(state, name), getattr(spoilt, name)
            )
            for name in ("params", "objective_state")
        }
        return state.replace(**parts), metrics

    monkeypatch.setattr(pretrain, "train_step", train_step)


def constant_encoder(state):
    """The last norm multiplies by zero and adds one."""
    backbone = state.params["encoder"]["backbone"]
    norm = backbone["norm1"]
    spoilt = {"scale": jnp.zeros_like(norm["scale"]), "bias": jnp.ones_like(norm["bias"])}
    encoder = state.params["encoder"] | {"backbone": backbone | {"norm1": spoilt}}
    return state.replace(params=state.params | {"encoder": encoder})


def dead_codebook(state):
    """All prototypes are the same, so the first takes all tokens."""
    return state.replace(objective_state=jax.tree.map(jnp.ones_like, state.objective_state))


def run(config, store, workdir, **changes):
    fields = {
        "store": store,
        "steps": 10,
        "log_every": 2,
        "checkpoint_every": 4,
        "tensorboard": False,
    } | changes
    for name, value in fields.items():
        override(config, name.replace("__", "."), str(value))
    return pretrain.pretrain(config, workdir)


def test_constant_encoder_is_warned_of_within_the_next_logging_interval(
    tmp_path, synthetic_store, monkeypatch, capsys
):
    plant(monkeypatch, constant_encoder)
    run(tiny("configs/cpc.py"), synthetic_store, tmp_path / "run")
    log, warnings = read_log(tmp_path / "run"), read_warnings(tmp_path / "run")
    assert [entry["step"] for entry in log] == [2, 4, 6, 8, 10]
    for entry in log:
        assert (entry["rankme"] < 2) == (entry["step"] > PLANTED_AT)
        assert (entry["feature_std"] < 0.02) == (entry["step"] > PLANTED_AT)
    assert [step for step, _ in warnings] == [6, 6, 8, 8, 10, 10], "at every logged step, for both numbers"
    assert {text.partition("=")[0] for _, text in warnings} == {"rankme", "feature_std"}
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert {"step": 6, "warning": warnings[0][1]} in [json.loads(line) for line in lines]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 2, "each once"
    assert all(line.startswith("warning: step 6: ") for line in said)


def test_dead_codebook_is_warned_of_within_the_next_logging_interval(tmp_path, synthetic_store, monkeypatch):
    plant(monkeypatch, dead_codebook)
    config = tiny("configs/hubert.py")
    config.objective.codes = (16, 24)
    run(config, synthetic_store, tmp_path / "run", steps=6)
    log = read_log(tmp_path / "run")
    # A step reports the codes it found: those of the state before it.
    assert [entry["dead_codes"] == pytest.approx(38 / 40) for entry in log] == [False, False, True]
    warnings = {(step, text.partition(" is ")[0]) for step, text in read_warnings(tmp_path / "run")}
    assert warnings == {(6, "perplexity=1"), (6, "dead_codes=0.95")}


def test_warning_is_said_again_after_it_cleared():
    monitor = collapse.Monitor(
        LIMITS, Mesh(np.asarray(jax.devices()[:1]), (parallel.AXIS,)), probe=None, probe_every=0
    )
    said = [len(monitor.judge({"rankme": value})[1]) for value in (1.0, 1.0, 5.0, 1.0)]
    assert said == [1, 0, 0, 1]


def test_stop_on_collapse_ends_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, synthetic_store, monkeypatch, capsys
):
    plant(monkeypatch, constant_encoder)
    changes = {"stop_on_collapse": True, "log_every": 2, "checkpoint_every": 2, "steps": 10}
    code = cli.main(arguments(tmp_path / "run", synthetic_store, **changes))
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    found = r"collapse at step 6: rankme=\S+ is below config.monitor.min_rankme=2: .*"
    assert re.search(found + r"the last good checkpoint is \S+/checkpoints/4\b", last)
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(kept, key=int) == "4"
    assert read_warnings(tmp_path / "run")[0][0] == 6, "the log says it too"


def test_monitoring_may_change_when_a_run_goes_on(tmp_path, synthetic_store):
    run(tiny("configs/cpc.py"), synthetic_store, tmp_path / "run", steps=2)
    changed = {"stop_on_collapse": True, "monitor__min_rankme": 1e6, "monitor__task": ""}
    with pytest.raises(
        UserError, match=r"collapse at step 4: rankme=.* is below config.monitor.min_rankme=1e"
    ):
        run(tiny("configs/cpc.py"), synthetic_store, tmp_path / "run", steps=4, **changed)


@pytest.mark.parametrize("spec", [f"configs/{n}.py" for n in ("cpc", "jepa", "data2vec", "dinosr", "hubert")])
def test_healthy_run_logs_no_warning(spec, tmp_path, synthetic_store, capsys):
    run(tiny(spec), synthetic_store, tmp_path / "run", steps=6, log_every=1)
    log = read_log(tmp_path / "run")
    assert len(log) == 6
    assert all(entry["rankme"] > 2 for entry in log)
    assert read_warnings(tmp_path / "run") == []
    assert "warning" not in capsys.readouterr().err


def test_interrupted_run_logs_the_same(tmp_path, synthetic_store, monkeypatch):
    """Every number and every warning, also when the stop falls between a collapse and its end."""
    plant(monkeypatch, constant_encoder)
    run(tiny("configs/cpc.py"), synthetic_store, tmp_path / "whole")
    run(tiny("configs/cpc.py"), synthetic_store, tmp_path / "parts", steps=8)
    run(tiny("configs/cpc.py"), synthetic_store, tmp_path / "parts")
    whole, parts = ([*trajectory(tmp_path / name)] for name in ("whole", "parts"))
    # The first part ends, and so validates, at step 8; that is a checkpoint of the whole run as well.
    assert whole == parts
    assert read_warnings(tmp_path / "whole") == read_warnings(tmp_path / "parts")
