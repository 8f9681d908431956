"""Every backbone under every objective: devices, gradients, what CPC sees, refusals, and the commands end to end."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax import cli
from ecg_jax.config_checks import check_config
from ecg_jax.config_flags import override
from ecg_jax.errors import UserError
from ecg_jax.models.encoder import BACKBONES
from ecg_jax.objectives.contract import Inputs
from ecg_jax.prepare import prepare
from ecg_jax.pretrain import pretrain
from ecg_jax.quickstart import SAMPLE
from ecg_jax.run_setup import build_objective, build_teacher
from ecg_jax.training.metric_writers import read_log
from ecg_jax.training.pretrained import encode_fn, restore_encoder
from test_objectives import assert_same_run
from tiny_runs import (
    SPECS,
    TOKENS,
    batches,
    drawn_state,
    overrides,
    run_steps,
    spec_of,
    tiny_config,
)

PAIRS = [(name, backbone) for name in SPECS for backbone in ("transformer", "net1d")]
# Dropout is the backbone's and the head's own; two objectives have it, so that the others compile faster.
DROPPING = ("cpc", "dinosr")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs that run a few times are not worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def run_pair(name, backbone, devices):
    changes = {}
    if name not in DROPPING:
        changes = {"model__dropout": 0.0} if backbone == "transformer" else {}
        if "head_dropout" in tiny_config(name).objective:
            changes["objective__head_dropout"] = 0.0
    config = tiny_config(name, backbone=backbone, **changes)
    teacher = build_teacher(config, 3)
    return run_steps(config, teacher, drawn_state(config, teacher), devices)


def test_every_backbone_is_tested_here():
    assert BACKBONES.keys() == {"s4", *(backbone for _, backbone in PAIRS)}


@pytest.mark.parametrize(
    ("name", "backbone"), [pair for pair in PAIRS if pair[0] in ("cpc", "dinosr", "hubertpp")]
)
def test_one_and_eight_devices_agree(name, backbone):
    """Of negatives, codebooks and prototypes; the step and the other objectives are compared on S4."""
    one, eight = run_pair(name, backbone, 1), run_pair(name, backbone, 8)
    assert_same_run(eight.last, eight.log, one)
    losses = [entry["loss"] for entry in one.log]
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("name", "backbone"), PAIRS)
def test_every_parameter_of_the_student_gets_a_gradient(name, backbone):
    trace, _ = run_pair(name, backbone, 8).first.opt_state
    for path, leaf in jax.tree.leaves_with_path(trace.trace):
        where = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), where
        assert np.abs(leaf).max() > 1e-8, where


@pytest.mark.parametrize(("name", "backbone"), PAIRS)
def test_compiled_step_only_all_reduces(name, backbone):
    hlo = run_pair(name, backbone, 8).hlo
    assert set(re.findall(r"= \S+ (all-\w+|collective-\w+|reduce-scatter)", hlo)) == {"all-reduce"}
    assert not re.search(r"= \S+ conditional\(", hlo)


@pytest.mark.parametrize(
    ("name", "backbone", "expected"),
    [
        ("data2vec", "transformer", {"layer0", "layer1"}),
        ("dinosr", "transformer", {"block0", "block1"}),
        ("data2vec", "net1d", {"layer1", "layer2"}),
        ("dinosr", "net1d", {"block1", "block2"}),
    ],
)
def test_targets_come_from_the_last_layers_by_name(name, backbone, expected):
    """The loss changes with these features of the teacher, and with no other."""
    config = tiny_config(name, backbone=backbone)
    model = build_objective(config, None)
    state, batch = drawn_state(config, build_teacher(config, 3)), next(batches(1, size=2))
    x = jnp.asarray(batch["signal"], jnp.float32) * 1e-3
    (tokens, out), _ = jax.eval_shape(
        lambda: model.encoder.init_with_output(jax.random.key(0), x, train=False)
    )
    rng = np.random.default_rng(2)
    features = {
        key: rng.normal(size=leaf.shape).astype(np.float32) for key, leaf in {"tokens": tokens, **out}.items()
    }

    @jax.jit
    def loss(features):
        inputs = Inputs(x=x, record_index=batch["record_index"], step=state.step, teacher=features)
        losses, _ = model.apply(state.variables(), inputs, train=False, rngs={"objective": jax.random.key(3)})
        return sum((values * weights).sum() for values, weights in losses.values())

    plain = loss(features)
    changed = {key for key in features if loss(features | {key: features[key][::-1] ** 3}) != plain}
    assert changed == expected


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cpc_refuses_a_backbone_that_sees_its_target(backbone):
    check_config(tiny_config("cpc", backbone=backbone))
    config = tiny_config("cpc", backbone=backbone, model__bidirectional=True)
    with pytest.raises(UserError, match=r"bidirectional=True lets CPC see the token it predicts") as refusal:
        check_config(config)
    assert "\n" not in str(refusal.value)
    assert tiny_config("cpc", "released", backbone).model.bidirectional == (backbone == "net1d")
    check_config(tiny_config("cpc", "released", backbone))


@pytest.mark.parametrize(
    ("backbone", "recipe"), [*((backbone, "described") for backbone in BACKBONES), ("net1d", "released")]
)
def test_what_the_prediction_of_cpc_depends_on(backbone, recipe):
    """Token i is centred on sample 2 i and reads the sample after it; released Net1D reads its own target."""
    config = tiny_config("cpc", recipe, backbone)
    model, state = build_objective(config, None), drawn_state(config, None)
    signal = next(batches(1, size=2))["signal"]
    weights = np.random.default_rng(2).normal(size=16).astype(np.float32)

    @jax.jit
    @jax.grad
    def sensitivity(x, i):
        inputs = Inputs(x=x, record_index=jnp.arange(2), step=state.step)
        _, captured = model.apply(
            state.variables(),
            inputs,
            train=False,
            rngs={"objective": jax.random.key(0)},
            capture_intermediates=lambda module, _: module.name == "head",
        )
        [predicted] = captured["intermediates"]["head"]["__call__"]
        return (predicted[:, i] @ weights).sum()

    for i in (5, 20, TOKENS - 1 - config.objective.steps_ahead):
        reacts = np.abs(sensitivity(signal * np.float32(1e-3), i)).max(axis=(0, 2))
        assert reacts[2 * i + 1] > 1e-3 * reacts.max()
        later = reacts[2 * i + 2 :].max()
        if recipe == "described":
            assert later <= 1e-5 * reacts.max()  # what rounding leaves of a convolution by FFT
        else:
            target = 2 * (i + config.objective.steps_ahead)
            assert reacts[target] > 1e-5 * reacts.max()


@pytest.mark.parametrize(
    ("backbone", "field", "value"),
    [
        ("s4", "heads", 4),
        ("s4", "filters", (8, 16)),
        ("transformer", "state", 8),
        ("transformer", "trainable_ssm", False),
        ("net1d", "layers", 4),
        ("net1d", "dropout", 0.1),
    ],
)
def test_field_of_another_backbone_is_refused(backbone, field, value, tmp_path, capsys):
    config = tiny_config("jepa", backbone=backbone)
    with config.unlocked():
        config.model[field] = value
    expected = (
        rf"config\.model\.{field} is no field of the objective jepa on {backbone}, whose fields "
        rf"configs/jepa\.py:backbone={backbone} declares"
    )
    with pytest.raises(UserError, match=expected) as refusal:
        check_config(config)
    assert "\n" not in str(refusal.value)
    spec = spec_of("jepa", backbone=backbone)
    arguments = [f"--config={spec}", f"--config.model.{field}={value}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(["pretrain", *arguments]) == 2
    err = capsys.readouterr().err
    assert f"--config.model.{field}: model has no field '{field}'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("backbone", "changes", "words"),
    [
        ("s4", {"model__state": 3}, r"config\.model\.state=3 must be even"),
        ("transformer", {"model__heads": 3}, r"config\.model\.heads=3 must divide model\.width=16"),
        ("transformer", {"model__heads": 16}, r"config\.model\.heads=16 .* even number"),
        ("transformer", {"model__layers": 0}, r"config\.model\.layers=0 must be positive"),
        ("transformer", {"model__attention_dropout": 1.0}, r"config\.model\.attention_dropout=1\.0 must"),
        ("net1d", {"model__width": 32}, r"config\.model\.filters=\(8, 16, 16\) must end with model\.width=32"),
        ("net1d", {"model__filters": "(8,16,8)"}, r"must end with model\.width=16"),
        ("net1d", {"model__filters": "()"}, r"config\.model\.filters=\(\) must be "),
        ("net1d", {"model__blocks": "(1,1)"}, r"config\.model\.blocks=\(1, 1\) must have one number for each"),
        ("net1d", {"model__group_width": 3}, r"must be multiples of model\.group_width=3"),
        ("net1d", {"objective__top_k": 3}, r"config\.objective\.top_k=3 must lie between 1 and 2"),
        *(
            (backbone, {"model__remat": "all"}, r"config\.model\.remat='all' is unknown; known: none, block, dots")
            for backbone in BACKBONES
        ),
        *(
            (backbone, {"model__conv": "fast"}, r"config\.model\.conv='fast'") for backbone in BACKBONES
        ),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(backbone, changes, words):
    with pytest.raises(UserError, match=words) as refusal:
        check_config(tiny_config("data2vec", backbone=backbone, **changes))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("mode", ["block", "dots"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_rematerialisation_gives_the_same_step(backbone, mode):
    plain, recomputed = remat_run(backbone, "none"), remat_run(backbone, mode)
    assert_same_run(recomputed.last, recomputed.log, plain)
    assert recomputed.hlo != plain.hlo


@functools.cache
def remat_run(backbone, mode):
    config = tiny_config("cpc", backbone=backbone, model__remat=mode)
    return run_steps(config, None, drawn_state(config, None), devices=2, steps=1)


@pytest.mark.parametrize("backbone", ["transformer", "net1d"])
def test_accumulation_does_not_depend_on_the_devices(backbone):
    config = tiny_config("cpc", backbone=backbone, accumulate=2)
    one, two = (run_steps(config, None, drawn_state(config, None), devices, steps=1) for devices in (1, 2))
    assert_same_run(two.last, two.log, one)
    assert two.log[0]["loss"] != run_pair("cpc", backbone, 8).log[0]["loss"], (
        "each part has its own statistics"
    )


# One run of each backbone through the commands, on the PTB-XL sample that ships with the package.
RUNS = {
    "s4": ("cpc", {"data__window_s": 1.0}),  # 120 tokens on layers made for 40
    "transformer": ("cpc", {}),
    "net1d": ("jepa", {}),
}


@pytest.fixture(scope="module")
def real_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "store"
    prepare("ptbxl", SAMPLE, path, workers=1, progress=False)
    return path


def command(backbone, workdir, store):
    name, changes = RUNS[backbone]
    fields = overrides(name, backbone, store=store, steps=4, checkpoint_every=2, tensorboard=False, **changes)
    fields |= {"monitor.probe_every": "0", "data.max_val_crops": "8", "batch_size": "8"}
    spec = spec_of(name, backbone=backbone)
    return spec, [
        "pretrain", f"--config={spec}", f"--workdir={workdir}",
        *(f"--config.{field}={value}" for field, value in fields.items()),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, real_store):
    """A finished run of each backbone, made when it is first asked for."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(backbone):
        assert cli.main(command(backbone, root / backbone, real_store)[1]) == 0
        return root / backbone

    return run


def saved_checksums(run, step):
    return json.loads((run / "checkpoints" / str(step) / "meta" / "metadata").read_text())["checksums"]


@pytest.mark.parametrize("backbone", RUNS)
def test_pretrains_and_goes_on_after_a_stop(backbone, pretrained, real_store, tmp_path, capsys):
    whole, stopped = pretrained(backbone), tmp_path / "stopped"
    log = read_log(whole)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert np.isfinite([entry["loss"] for entry in log]).all()
    assert np.isfinite(log[-1]["val_loss"])
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "4")
    capsys.readouterr()
    assert cli.main(command(backbone, stopped, real_store)[1]) == 0
    out = capsys.readouterr().out
    assert "continuing at step 2 of 4" in out
    assert f"on {backbone}:" in out
    assert saved_checksums(stopped, 4) == saved_checksums(whole, 4)


@pytest.mark.parametrize("backbone", RUNS)
def test_probes_and_embeds(backbone, pretrained, real_store, tmp_path):
    run, workdir, output = pretrained(backbone), tmp_path / "probe", tmp_path / "embeddings.npz"
    arguments = [
        "--config=configs/probe.py:mode=linear,task=ptbxl_super", f"--checkpoint={run}",
        f"--store={real_store}", f"--workdir={workdir}",
        "--config.bootstrap.resamples=20", "--config.linear.l2_grid=(1.0,)",
    ]  # fmt: skip
    assert cli.main(["probe", *arguments]) == 0
    results = json.loads((workdir / "results.json").read_text())
    assert 0 < results["ci_low"] <= results["macro_auroc"] <= results["ci_high"] < 1
    assert results["macro_auroc"] != results["baselines"]["random_init"]["macro_auroc"]
    assert results["checkpoint"]["step"] == 4

    source = SAMPLE / "records100" / "00000"
    recordings = len(list(source.glob("*.hea")))
    assert cli.main(["embed", f"--checkpoint={run}", f"--input={source}", f"--output={output}"]) == 0
    embeddings = np.load(output)["embedding"]
    assert embeddings.shape == (recordings, 16)
    assert np.isfinite(embeddings).all()
    assert np.ptp(embeddings, axis=0).max() > 1e-3


@pytest.mark.parametrize("backbone", RUNS)
def test_restored_encoder_is_the_one_that_was_trained(backbone, pretrained, real_store):
    """Bit by bit: what the finished run holds in memory, and what a probe reads of its checkpoint."""
    run = pretrained(backbone)
    config = tiny_config(RUNS[backbone][0], backbone=backbone)
    for argument in command(backbone, run, real_store)[1][3:]:
        field, _, value = argument.removeprefix("--config.").partition("=")
        override(config, field, value)
    state = jax.device_get(pretrain(config, run).replace(rng=None))
    assert int(state.step) == 4
    collections = {
        "params": state.params,
        "batch_stats": state.batch_stats,
        "ssm": state.ssm,
        "basis": state.basis,
    }
    restored = restore_encoder(run)
    ours = dataclasses.replace(
        restored,
        config=config.to_dict(),
        variables={key: tree["encoder"] for key, tree in collections.items() if "encoder" in tree},
    )
    assert restored.config["model"]["backbone"] == backbone
    assert jax.tree.structure(ours.variables) == jax.tree.structure(restored.variables)
    crops = (
        200 * np.random.default_rng(0).normal(size=(4, restored.preprocessing.window_samples, 12))
    ).astype(np.int16)
    features = encode_fn(restored)(crops)
    assert features.shape == (4, 16)
    np.testing.assert_array_equal(features, encode_fn(ours)(crops))
    other = jax.tree.map(lambda leaf: leaf * np.float32(1.01), restored.variables)
    assert not np.array_equal(features, encode_fn(dataclasses.replace(restored, variables=other))(crops))


@pytest.mark.parametrize(
    ("backbone", "field", "value", "words"),
    [
        ("s4", "layers", 3, r"missing params/encoder/backbone/layer2/C, "),
        ("s4", "layers", 1, r"extra params/encoder/backbone/layer1/C, "),
        ("transformer", "layers", 3, r"missing params/encoder/backbone/layer2/attention/key/bias, "),
        ("transformer", "ff_width", 64, r"params/encoder/backbone/layer0/hidden/bias .*32.*64"),
        ("net1d", "blocks", [1, 1, 2], r"missing params/encoder/backbone/block3/conv1/bias, "),
        ("net1d", "kernel", 8, r"params/encoder/backbone/block0/conv2/kernel .*4, 4, 8.*8, 4, 8"),
        ("net1d", "bidirectional", False, r"extra params/encoder/backbone/block0/gate1/bias, "),
    ],
)  # fmt: skip
def test_parameters_that_the_config_does_not_describe_are_named(
    backbone, field, value, words, pretrained, tmp_path
):
    """The stored config is changed instead of the stored arrays."""
    run = tmp_path / "run"
    shutil.copytree(pretrained(backbone), run)
    meta = run / "checkpoints" / "4" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    content["config"]["model"][field] = value
    meta.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as refusal:
        restore_encoder(run)
    assert "\n" not in str(refusal.value)
