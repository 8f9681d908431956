"""What holds for every objective: the same numbers on any number of devices, exact resume, and clear
refusals.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax import cli
from ecg_jax.cluster import cluster
from ecg_jax.config_checks import check_config
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.objectives.contract import Inputs
from ecg_jax.pretrain import pretrain
from ecg_jax.run_setup import OBJECTIVES, build_objective, build_teacher
from ecg_jax.training import parallel
from ecg_jax.training.train_state import eval_step
from tiny_runs import (
    MASKED,
    SPECS,
    WITH_TEACHER,
    batches,
    bound_step,
    first_state,
    overrides,
    plain,
    run_mapped,
    small_blocks,
    tiny_config,
)


@pytest.fixture(scope="module")
def labelled_store(synthetic_store):
    """The synthetic store with offline targets."""
    if "spectrum10" not in [p.name for p in (synthetic_store / "targets").glob("*")]:
        cluster(synthetic_store, "spectrum10", codes=10, features="spectrum", fit_tokens=2000)
    return synthetic_store


def assert_same_run(state, log, reference):
    """Metrics of every step, and the whole last state, agree up to the order of float32 sums."""
    for entry, expected in zip(log, reference.log, strict=True):
        assert entry.keys() == expected.keys()
        for name in entry:
            np.testing.assert_allclose(entry[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for field in ("params", "batch_stats", "objective_state", "teacher"):
        ours, theirs = getattr(state, field), getattr(reference.last, field)
        for (path, leaf), expected in zip(
            jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
        ):
            np.testing.assert_allclose(
                leaf, expected, rtol=1e-4, atol=5e-6, err_msg=field + jax.tree_util.keystr(path)
            )


def test_every_objective_is_tested_here():
    assert SPECS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize(
    ("name", "recipe"),
    [*((name, "described") for name in SPECS), *((name, "released") for name in WITH_TEACHER)],
)
def test_one_and_eight_devices_agree(name, recipe):
    one, eight = run_mapped(name, recipe, 1), run_mapped(name, recipe, 8)
    assert_same_run(eight.last, eight.log, one)
    losses = [entry["loss"] for entry in one.log]
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", SPECS)
def test_pmap_of_the_same_step_agrees(name):
    config = tiny_config(name)
    teacher = build_teacher(config, 3)
    step = bound_step(config, teacher)
    step_fn = jax.pmap(step, axis_name=parallel.AXIS, in_axes=(None, 0), out_axes=(None, 0))
    state, log = first_state(config, teacher), []
    for batch in batches(3):
        split = {field: rows.reshape(8, -1, *rows.shape[1:]) for field, rows in batch.items()}
        state, metrics = step_fn(state, split)
        log.append({key: value[0] for key, value in jax.device_get(metrics).items()})
    assert_same_run(plain(state), log, run_mapped(name, "described", 8))


@pytest.mark.parametrize("name", SPECS)
def test_compiled_step_only_all_reduces(name):
    """No device ever gathers the batch of the others."""
    hlo = run_mapped(name, "described", 8).hlo
    assert set(re.findall(r"= \S+ (all-\w+|collective-\w+|reduce-scatter)", hlo)) == {"all-reduce"}
    # Sums inside a conditional crash XLA on several CPU devices (jaxlib 0.10), though not at this width.
    assert not re.search(r"= \S+ conditional\(", hlo)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_teacher_of_the_described_recipe_follows_the_student(name):
    run = run_mapped(name, "described", 1)
    before, after = run.start.params["encoder"], run.first.params["encoder"]
    assert jax.tree.all(jax.tree.map(np.array_equal, run.start.teacher["params"], before))
    expected = jax.tree.map(lambda start, end: 0.9 * start + 0.1 * end, before, after)
    for (path, leaf), value in zip(
        jax.tree.leaves_with_path(run.first.teacher["params"]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, value, rtol=1e-5, atol=1e-7, err_msg=jax.tree_util.keystr(path))
    # The student's first batch is the teacher's, and so far their weights are the same: so are the statistics of the
    # first norm. The teacher goes on with the unbiased variance, hence nearly the same ones further on.
    before, after = (state.batch_stats["encoder"]["stem"] for state in (run.start, run.first))
    for norm, measured in run.first.teacher["batch_stats"]["stem"].items():
        for name, value in measured.items():
            expected = before[norm][name] + (after[norm][name] - before[norm][name]) / 0.1
            tolerance = 1e-4 if norm == "norm0" else 0.02
            np.testing.assert_allclose(
                value,
                expected,
                rtol=tolerance,
                atol=tolerance * np.abs(expected).max(),
                err_msg=f"{norm} {name}",
            )


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_teacher_of_the_released_recipe_is_random_and_only_its_statistics_move(name):
    run = run_mapped(name, "released", 1)
    before, after = run.start.teacher, run.first.teacher
    conv = before["params"]["stem"]["conv0"]["kernel"]
    assert not np.array_equal(conv, run.start.params["encoder"]["stem"]["conv0"]["kernel"])
    assert jax.tree.all(jax.tree.map(np.array_equal, before["params"], after["params"]))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before["batch_stats"], after["batch_stats"])
    assert jax.tree.all(moved)


@pytest.mark.parametrize("name", MASKED)
def test_student_does_not_see_what_is_hidden(name):
    """With the teacher's features held fixed, the loss reacts to the samples that are not hidden, and to no
    other.
    """
    config = tiny_config(name, objective__mask__strategy="time", objective__mask__patch=4)
    model, teacher = build_objective(config, None), build_teacher(config, 1)
    state, batch = first_state(config, teacher), next(batches(1))
    x = jnp.asarray(batch["signal"], jnp.float32) * 1e-3
    features = None
    if teacher:
        features = teacher.eval_features(model.encoder, state.teacher_variables(), x)
    inputs = Inputs(
        x=x, record_index=batch["record_index"], step=state.step, teacher=features, labels=batch["labels"]
    )

    @jax.jit
    def total(x):
        losses, _ = model.apply(
            state.variables(), inputs.replace(x=x), train=False, rngs={"objective": jax.random.key(3)}
        )
        return sum((values * weights).sum() for values, weights in losses.values())

    reacts = np.asarray(jnp.abs(jax.grad(total)(x)).max(axis=-1) > 0)
    assert 0.4 < reacts.mean() < 0.6  # half of the samples are hidden, in all leads at once


@pytest.mark.parametrize("name", SPECS)
def test_bfloat16_keeps_state_and_loss_in_float32(name):
    config = tiny_config(name, precision="bfloat16")
    teacher, batch = build_teacher(config, 1), next(batches(1))
    state = first_state(config, teacher)
    after, metrics = jax.eval_shape(bound_step(config, teacher, axis_name=None), state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}
    for field in ("params", "batch_stats", "objective_state", "teacher"):
        for before, leaf in zip(
            jax.tree.leaves(getattr(state, field)), jax.tree.leaves(getattr(after, field)), strict=True
        ):
            assert leaf.dtype == before.dtype == jnp.float32


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_validation_uses_a_teacher_in_evaluation_mode(name):
    """The same batch twice gives the same numbers, and nothing of the state is touched."""
    config = small_blocks(name, "released")
    teacher = build_teacher(config, 1)
    state, batch = first_state(config, teacher), next(batches(1)) | {"weight": np.ones(16, np.float32)}
    evaluate = jax.jit(
        functools.partial(
            eval_step,
            model=build_objective(config, None),
            normalisation="none",
            kept_leads=ALL_LEADS,
            teacher=teacher,
            axis_name=None,
        )
    )
    first, second = jax.device_get([evaluate(state, batch), evaluate(state, batch)])
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    other = {"record_index": batch["record_index"][::-1].copy()}
    swapped = jax.device_get(evaluate(state, batch | other))
    assert swapped["losses"] != first["losses"]  # masks belong to the record's number


def command(name, workdir, store, **changes):
    fields = overrides(name, store=store, **changes)
    return [
        "pretrain", f"--config={SPECS[name]}", f"--workdir={workdir}",
        *(f"--config.{field}={value}" for field, value in fields.items()),
    ]  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_killed_run_continues_bit_for_bit(name, tmp_path, labelled_store):
    """SIGKILL right after the checkpoint of step 3 is complete; teacher, codebooks, prototypes and schedules
    go on.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = tiny_config(name, store=labelled_store)
    expected = pretrain(config, whole)
    code = (
        "import os, signal, ecg_jax.pretrain as p\n"
        "save = p.Checkpoints.save\n"
        "def saving(self, state, **kw):\n"
        "    save(self, state, **kw); self._manager.wait_until_finished(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "p.Checkpoints.save = saving\n"
        "from ecg_jax.cli import entry_point; entry_point()"
    )
    arguments = command(name, killed, labelled_store)
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [p.name for p in (killed / "checkpoints").iterdir()] == ["3"]
    resumed = pretrain(tiny_config(name, store=labelled_store), killed)
    assert int(resumed.step) == 6
    for field in ("params", "opt_state", "batch_stats", "ssm", "objective_state", "teacher"):
        ours, theirs = getattr(resumed, field), getattr(expected, field)
        for (path, leaf), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(leaf, other, err_msg=field + jax.tree_util.keystr(path))


def test_steps_may_not_change_while_the_momentum_moves(tmp_path, labelled_store):
    moving = {"objective__teacher__momentum": 0.9, "objective__teacher__momentum_end": 1.0}
    pretrain(tiny_config("jepa", store=labelled_store, steps=3, **moving), tmp_path)
    with pytest.raises(UserError, match="holds another run: it differs in steps"):
        pretrain(tiny_config("jepa", store=labelled_store, steps=6, **moving), tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("data2vec", {"objective__mask__span": 500}, "objective.mask.span=500 must lie between 1 and 40"),
        ("jepa", {"objective__mask__min_keep": 64}, "objective.mask.min_keep=64 must lie between 1 and 39"),
        ("hubertpp", {"objective__mask__strategy": "holes"}, "objective.mask.strategy='holes' is unknown"),
        ("dinosr", {"objective__codes": 1000}, "more codes than the 640 tokens that pass"),
        ("hubertpp", {"objective__codes": "(8,1000)"}, "more codes than the 640 tokens that pass"),
        ("hubertpp", {"objective__codes": "(8,1)"}, "objective.codes=.* at least 2"),
        ("data2vec", {"objective__top_k": 3}, "objective.top_k=3 must lie between 1 and 2: the targets"),
        ("dinosr", {"objective__top_k": 0}, "objective.top_k=0 must"),
        ("jepa", {"objective__teacher__momentum": 0.0}, "objective.teacher.momentum=0.0 .* without momentum"),
        ("jepa", {"objective__teacher__mode": "none"}, "objective.teacher.mode='none' is unknown"),
        ("jepa", {"objective__head_state": 3}, "objective.head_state=3 must be even"),
        ("data2vec", {"objective__head_dropout": 1.0}, "objective.head_dropout=1.0"),
        ("data2vec", {"objective__beta": -1.0}, "objective.beta=-1.0 must not be negative"),
        ("jepa", {"objective__target_norms": 5}, "objective.target_norms=5"),
        ("hubertpp", {"objective__teacher_temperature": 0.0}, "objective.teacher_temperature=0.0 must be positive"),
        ("hubertpp", {"objective__codes": "(8,'x')"}, "objective.codes=.* must be a tuple of one item or more"),
        ("hubertpp", {"objective__codes": "(8.5,16)"}, "objective.codes=.* must be a tuple of one item or more"),
        ("hubertpp", {"objective__codes": "None"}, "objective.codes=.* must be a tuple"),
        ("hubertpp", {"objective__sinkhorn_rounds": 10**9}, "objective.sinkhorn_rounds=1000000000 must lie between"),
        ("hubertpp", {"objective__entropy_weight": -1.0}, "objective.entropy_weight=-1.0 must not be negative"),
        ("hubert", {"objective__alpha": 0.0}, "objective.alpha=0.0 must be above 0"),
        ("dinosr", {"objective__idle_logits": 10**20}, "objective.idle_logits=1.* must be below 2.31"),
        ("jepa", {"objective__mask__blocks": 10**6}, "objective.mask.blocks=1000000 must lie between 1 and 40"),
        ("jepa", {"objective__name": "cpc"}, "is missing; configs/cpc.py:backbone=s4 declares it"),
        ("data2vec", {"objective__mask__probability": 1e-9}, "probability=1e-09 with mask.span=10 hides .* on average"),
        ("jepa", {"data__window_s": 1e-9}, "makes a window of 0 samples"),
        ("data2vec", {"data__window_s": 1e9}, "makes a window of 2.4e.11 samples"),
        ("cpc", {"objective__negatives": 0}, "objective.negatives=0 must be positive"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_sentence_before_anything_compiles(name, changes, words):
    config = tiny_config(name, **changes)
    with pytest.raises(UserError, match=words) as refusal:
        check_config(config)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("del c.objective['beta']", "config.objective.beta is missing; configs/jepa.py:backbone=s4 declares it"),
        ("del c.objective.mask['strategy']", "config.objective.mask.strategy is missing"),
        ("del c.objective['teacher']", "config.objective.teacher.[a-z_]+ is missing"),
        ("c.objective.betta = 1.0", "config.objective.betta is no field of the objective jepa.*; did you mean"),
        ("c.objective.width = 16", "config.objective.width is no field"),
        ("c.monitor.foo = 1", "config.monitor.foo is no field"),
        ("c.foo = 1", "config.foo is no field"),
        ("c.objective = 'jepa'", "config.objective.name=None is unknown"),
        ("c.objective.mask = None", "config.objective.mask.[a-z_]+ is missing"),
        ("c.objective.teacher.train_mode = 'no'", "config.objective.teacher.train_mode='no' must be True or False"),
        ("c.objective.mask.last_token = 2", "config.objective.mask.last_token=2 must be True or False"),
        ("c.monitor.probe_every = 2.5", "config.monitor.probe_every=2.5 must be a whole number"),
        ("c.objective.mask.blocks = (1, 2)", "config.objective.mask.blocks=.* must be a whole number"),
    ],
)  # fmt: skip
def test_config_of_ones_own_has_the_fields_of_its_objective(tmp_path, labelled_store, capsys, change, words):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\nfrom configs import jepa\n\n\ndef get_config(arg=''):\n"
        "    c = ConfigDict(jepa.get_config(arg).to_dict(), type_safe=False)\n"
        f"    {change}\n    return c\n"
    )
    arguments = [f"--config={path}", f"--workdir={tmp_path / 'run'}", f"--config.store={labelled_store}"]
    assert cli.main(["pretrain", *arguments]) == 2
    err = capsys.readouterr().err
    assert re.search(words, err), err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_targets_with_other_labels_are_refused(tmp_path, synthetic_store):
    store = tmp_path / "store"
    shutil.copytree(synthetic_store, store, ignore=shutil.ignore_patterns("targets"))
    cluster(store, "spectrum10", codes=10, features="spectrum", fit_tokens=2000)
    labels = np.load(store / "targets" / "spectrum10" / "labels.npy", mmap_mode="r+")
    labels[5] = (labels[5] + 1) % 10
    labels.flush()
    with pytest.raises(UserError, match="is not what was written"):
        pretrain(tiny_config("hubert", store=store), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_targets_that_do_not_fit_are_refused(tmp_path, labelled_store, capsys):
    assert cli.main(command("hubert", tmp_path / "a", labelled_store, objective__codes=11)) == 2
    assert "objective.codes=11, but the targets" in capsys.readouterr().err
    assert cli.main(command("hubert", tmp_path / "b", labelled_store, data__targets="")) == 2
    assert "config.data.targets is not set" in capsys.readouterr().err
    assert cli.main(command("cpc", tmp_path / "b", labelled_store, data__targets="spectrum10")) == 2
    assert "is read by the objective hubert only" in capsys.readouterr().err
    assert cli.main(command("hubert", tmp_path / "b", labelled_store, data__targets="missing")) == 2
    assert "has no targets 'missing'" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def real_store(tmp_path_factory):
    """The PTB-XL sample that ships with the package."""
    from ecg_jax.prepare import prepare
    from ecg_jax.quickstart import SAMPLE

    path = tmp_path_factory.mktemp("real") / "store"
    prepare("ptbxl", SAMPLE, path)
    cluster(path, "spectrum10", codes=10, features="spectrum", fit_tokens=2000)
    return path


@pytest.mark.parametrize("name", SPECS)
def test_smoke_run_on_real_recordings(name, tmp_path, real_store):
    """Through the command line, at the paper's window: losses are finite and the checkpoint can be probed."""
    changes = {"data__window_s": 2.5, "model__l_max": 300, "steps": 4, "checkpoint_every": 4}
    assert cli.main(command(name, tmp_path / "run", real_store, **changes)) == 0
    from ecg_jax.training.metric_writers import read_log
    from ecg_jax.training.pretrained import encode_fn, restore_encoder

    log = [entry for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert len(log) == 4
    assert np.isfinite([entry["loss"] for entry in log]).all()
    assert np.isfinite(log[-1]["val_loss"])
    encoder = restore_encoder(tmp_path / "run")
    expected = "none" if name == "cpc" else "ptbxl_canonical"
    assert encoder.preprocessing.normalisation == expected
    store = Store(real_store)
    crops = store.read_crops(store.column("offset")[:2], encoder.preprocessing.window_samples)
    assert np.isfinite(encode_fn(encoder)(crops)).all()
