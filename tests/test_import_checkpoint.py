"""`ecg-jax import-checkpoint`: features, states and refusals. All but a few tests run without torch: a small reader of
torch's zip files stands in for it, and state dicts are handed over in memory.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import GOLDEN, assert_close, group, load_golden
from ecg_jax import cli, import_checkpoint
from ecg_jax.config_flags import load_config
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.interop import torch_file
from ecg_jax.interop.torch_checkpoint import BACKBONE, HEAD, STEM, TEACHER
from ecg_jax.interop.torch_names import CLUSTERING
from ecg_jax.models.encoder import build_encoder, tokens_of
from ecg_jax.models.inputs import ALL_LEADS
from ecg_jax.objectives import cpc, hubert
from ecg_jax.run_setup import build_objective, build_optimiser, build_teacher, initial_state
from ecg_jax.training import train_state
from ecg_jax.training.checkpoint import Checkpoints
from ecg_jax.training.pretrained import restore_encoder
from ecg_jax.training.train_state import train_step, with_bases
from golden_steps import FixedMask, unpacked
from reference_files import read_zip, small_sd, with_nodes

#: Of the small HuBERT++ checkpoints made here.
CODES = "--config.objective.codes=(8,12)"
OBJECTIVES = ("cpc", "jepa", "data2vec", "dinosr", "hubertpp")


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setattr(import_checkpoint, "read_torch_checkpoint", read_zip)


@pytest.fixture(params=["torch", "without torch"])
def either_reader(request, monkeypatch):
    if request.param == "torch":
        pytest.importorskip("torch")
    else:
        monkeypatch.setattr(import_checkpoint, "read_torch_checkpoint", read_zip)


def run_command(path, workdir, *options):
    return cli.main(["import-checkpoint", str(path), f"--workdir={workdir}", *options])


def import_arrays(monkeypatch, tmp_path, sd, *options, global_step=0):
    """The command on a state dict: through a file where torch is installed, handed over where it is not."""
    path, workdir = tmp_path / "file.ckpt", tmp_path / "run"
    try:
        import torch
    except ImportError:
        read = torch_file.TorchCheckpoint(dict(sd), global_step, 9)
        monkeypatch.setattr(import_checkpoint, "read_torch_checkpoint", lambda path: read)
        path.write_bytes(b"handed over")
    else:
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in sd.items()}
        torch.save({"state_dict": tensors, "global_step": global_step, "epoch": 9}, path)
    return run_command(path, workdir, *options), workdir


def golden_sd(golden):
    """The checkpoint of an `ssl_steps_*` file, and the options that say what such a file does not."""
    tokens = golden["in/x"].shape[-1] // 2
    options = ["--normalisation=none", f"--window-s={tokens / 120}"]
    codes = [len(value) for name, value in sorted(golden.items()) if name.startswith("in/prototypes")]
    if codes:
        options.append(f"--config.objective.codes={tuple(codes)}")
    return with_nodes(group(golden, "sd/"), tokens), options


@pytest.mark.parametrize("objective", ["cpc", "jepa"])
def test_features_of_the_sample_checkpoints(objective, either_reader, tmp_path, capsys):
    name = f"ckpt_{objective}_narrow"
    expected = load_golden(f"{name}_expected")
    seconds = expected["in/x"].shape[2] / 240
    options = [] if seconds == 2.5 else [f"--window-s={seconds}"]
    assert run_command(GOLDEN / f"{name}.ckpt", tmp_path / "run", *options) == 0
    out = capsys.readouterr().out
    normalisation = {"cpc": "none", "jepa": "ptbxl_misordered"}[objective]
    assert f"data.normalisation={normalisation}" in out
    assert f"data.window_s={seconds}" in out
    assert f"objective.name={objective}" in out.splitlines()[1]
    assert "Q of the S4 kernels" in out
    assert ("teacher: " in out) == (objective == "jepa")

    encoder = restore_encoder(tmp_path / "run")
    assert encoder.preprocessing.normalisation == normalisation
    assert encoder.preprocessing.window_samples == expected["in/x"].shape[2]
    module = build_encoder(**encoder.config["model"])
    x = jnp.swapaxes(jnp.asarray(expected["in/x"]), 1, 2)
    tokens, _ = jax.jit(lambda v, x: module.apply(v, x, train=False))(encoder.variables, x)
    assert_close(tokens, expected["out/features"], 1e-5, "features")
    assert_close(tokens.mean(1), expected["out/pooled_mean"], 1e-5, "pooled")

    report = json.loads((tmp_path / "run" / "import.json").read_text())
    assert report["objective"] == objective
    assert report["from_released_recipe"]["data.normalisation"] == normalisation
    assert encoder.step == report["global_step"] > 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["objective"]["name"] == objective


def test_embed_takes_the_run(no_torch, tmp_path):
    """`embed` rounds to microvolts; the same rounded input through the restored encoder gives the same features, and
    they are the reference's but for the rounding.
    """
    expected = load_golden("ckpt_jepa_narrow_expected")
    run, options = tmp_path / "new" / "run", ["--normalisation=none", "--config.model.dropout", "0.1"]
    assert run_command(GOLDEN / "ckpt_jepa_narrow.ckpt", run, *options) == 0
    x = expected["in/x"][0].T
    np.save(tmp_path / "ecg.npy", x.astype(np.float64))
    leads = "I,II,III,aVR,aVL,aVF,V1,V2,V3,V4,V5,V6"
    command = [
        "embed", f"--checkpoint={run}", f"--input={tmp_path / 'ecg.npy'}", f"--output={tmp_path / 'out.npz'}",
        "--rate=240", "--unit=mV", f"--leads={leads}",
    ]  # fmt: skip
    assert cli.main(command) == 0
    with np.load(tmp_path / "out.npz") as file:
        embedding = file["embedding"]
    encoder = restore_encoder(run)
    assert encoder.config["model"]["dropout"] == 0.1
    module = build_encoder(**encoder.config["model"])
    rounded = np.rint(1000 * x[None]).astype(np.float32) / 1000
    tokens, _ = jax.jit(lambda v, x: module.apply(v, x, train=False))(encoder.variables, rounded)
    assert_close(embedding, tokens.mean(1), 1e-5, "embedding")
    assert_close(embedding, expected["out/pooled_mean"], 2e-3, "embedding but for the rounding")


NO_DROPOUT = ("--config.model.dropout=0.0", "--config.objective.head_dropout=0.0")


def with_the_choices_of(golden, objective, model, monkeypatch):
    """The model with the random choices of the first stored step."""
    if objective == "cpc":
        idx = jnp.asarray(golden["in/negative_idx"][0].astype(np.int32))
        monkeypatch.setattr(cpc, "draw_negatives", lambda *_, **__: idx)
        return model
    tokens = golden["in/x"].shape[-1] // 2
    if objective == "jepa":
        hidden = ~unpacked(golden["in/masks_enc"][0], tokens)[:, 0]
        return model.clone(mask=FixedMask(hidden, unpacked(golden["in/masks_pred"][0], tokens).sum(axis=1)))
    if objective == "hubertpp":
        stored = {
            len(golden[f"in/prototypes{j}"]): jnp.asarray(golden[f"in/prototypes{j}"]) for j in range(2)
        }
        monkeypatch.setattr(hubert, "kmeans_plus_plus", lambda *_, codes, **__: stored[codes])
    hidden = unpacked(golden["in/mask"][0], tokens)
    return model.clone(mask=FixedMask(hidden, hidden))


def restored_state(workdir, config, monkeypatch):
    """The state that a run of this config would continue from."""
    contract = Preprocessing.from_dict(json.loads((workdir / "preprocessing.json").read_text()))
    _, tx = build_optimiser(config, 1)
    teacher = build_teacher(config, 1)
    # The tree of a run's first state, without compiling it; bases are made on the host, of numbers.
    with monkeypatch.context() as patch:
        patch.setattr(train_state, "with_bases", lambda state, **_: state)
        start = jax.eval_shape(lambda: initial_state(config, tx, contract, teacher))
    meta = {"store_fingerprint": None, "config": {}, "preprocessing": {}}
    checkpoints = Checkpoints(workdir, keep_latest=1, keep_best=0, meta=meta)
    state = checkpoints.restore_latest(start, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    checkpoints.close()
    tokens = tokens_of(contract.window_samples)
    return with_bases(state, tokens=tokens, l_max=config.model.l_max), tx, teacher


def config_of(workdir, objective):
    """The config that a workdir's config.json describes."""
    stored = json.loads((workdir / "config.json").read_text())
    spec = f"{import_checkpoint.CONFIGS[objective]}:backbone={stored['model']['backbone']},recipe=released"
    config = load_config(spec)
    assert stored.pop("store_fingerprint") is None
    with config.unlocked():
        config.update(
            jax.tree.map(
                lambda v: tuple(v) if isinstance(v, list) else v,
                stored,
                is_leaf=lambda v: isinstance(v, list),
            )
        )
    return config


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_step_of_the_reference(objective, monkeypatch, tmp_path, capsys):
    """File -> run -> restored state -> one training step: the loss of the reference."""
    golden = load_golden(f"ssl_steps_{objective}")
    sd, options = golden_sd(golden)
    no_dropout = NO_DROPOUT if HEAD + "s4.decoder.bias" in sd else NO_DROPOUT[:1]
    code, workdir = import_arrays(monkeypatch, tmp_path, sd, *options, *no_dropout)
    assert code == 0
    out = capsys.readouterr().out
    assert f"{objective} on s4" in out
    assert ("prototypes; those of the run are fresh" in out) == (objective == "hubertpp")
    config = config_of(workdir, objective)
    state, tx, teacher = restored_state(workdir, config, monkeypatch)
    assert int(state.step) == 0
    model = with_the_choices_of(golden, objective, build_objective(config, axis_name=None), monkeypatch)
    x = jnp.swapaxes(jnp.asarray(golden["in/x"][0]), 1, 2)
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        normalisation="none",
        kept_leads=ALL_LEADS,
        teacher=teacher,
        axis_name=None,
    )
    # The loss alone: without the gradients the step compiles in a third of the time.
    loss = jax.jit(lambda state, batch: step(state, batch)[1]["loss"])(
        state, {"signal": 1e3 * x, "record_index": jnp.arange(len(x))}
    )
    assert_close(loss, golden["out/step0/total"], 2e-6 if objective == "cpc" else 1e-5, "loss")
    if objective == "dinosr":
        stored = group(golden, f"sd/{CLUSTERING}0.")
        assert config.objective.top_k == 1
        assert config.objective.idle_logits == len(golden[f"sd/{HEAD}s4.decoder.bias"]) - len(
            stored["code_cnt"]
        )
        np.testing.assert_array_equal(state.objective_state["code_sum"], stored["code_sum"][None])


@pytest.mark.parametrize("backbone", ["transformer", "net1d"])
def test_tokens_of_the_other_backbones(backbone, monkeypatch, tmp_path):
    """A CPC checkpoint with the reference's backbone: causal for the Transformer, both ways for Net1D."""
    golden = load_golden(f"{backbone}_narrow")
    width = golden["in/x"].shape[-1]
    sd = {
        name: value
        for name, value in small_sd("s4", "cpc", width=width).items()
        if not name.startswith(BACKBONE)
    }
    sd |= {BACKBONE + name: value for name, value in group(golden, "sd/predictor.").items()}
    code, workdir = import_arrays(monkeypatch, tmp_path, sd, global_step=3)
    assert code == 0
    encoder = restore_encoder(workdir)
    assert encoder.step == 3
    expected = golden["causal/out/y" if backbone == "transformer" else "out/y"]
    assert encoder.config["model"]["bidirectional"] == (backbone == "net1d")
    module = build_encoder(**encoder.config["model"]).backbone
    params = {"params": encoder.variables["params"]["backbone"]}
    tokens, _ = jax.jit(lambda v, x: module.apply(v, x, train=False))(params, golden["in/x"])
    assert_close(tokens, expected, 1e-5, "tokens")
    if backbone == "transformer":
        assert encoder.config["model"]["heads"] == golden["meta/heads"]


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
@pytest.mark.parametrize("backbone", ["transformer", "net1d"])
def test_masked_objectives_on_the_other_backbones(backbone, objective, monkeypatch, tmp_path):
    sd = small_sd(backbone, objective)
    code, workdir = import_arrays(monkeypatch, tmp_path, sd, *[CODES] * (objective == "hubertpp"))
    assert code == 0
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["backbone"] == backbone
    assert config["objective"]["name"] == objective
    stem = restore_encoder(workdir).variables["params"]["stem"]
    np.testing.assert_array_equal(stem["conv0"]["kernel"], sd[STEM + "layers.0.0.weight"].transpose(2, 1, 0))


def refused(monkeypatch, tmp_path, capsys, sd, *options):
    code, _ = import_arrays(monkeypatch, tmp_path, sd, *options)
    assert code == 2
    assert not [path for path in tmp_path.iterdir() if path.name != "file.ckpt"], "nothing is written"
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def broken(change):
    sd = small_sd("s4", "dinosr")
    change(sd)
    return sd


C1, Q1 = BACKBONE + "s4_layers.1.kernel.kernel.C", BACKBONE + "s4_layers.1.kernel.kernel.Q"
SCALE = STEM + "layers.2.1.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda sd: sd.pop(SCALE), f"missing {SCALE}"),
        (lambda sd: sd.pop(STEM + "layers.0.0.weight"), f"missing {STEM}layers.0.0.weight"),
        (lambda sd: sd.pop(CLUSTERING + "1.codebook"), f"missing {CLUSTERING}1.codebook"),
        (lambda sd: sd.pop(STEM + "layers.3.1.num_batches_tracked"), "missing ts_encoder.encoder.layers.3.1.num"),
        (lambda sd: sd.update({"loss.weight": sd[SCALE], "other": sd[SCALE]}), "extra loss.weight, other"),
        (lambda sd: sd.update({f"more.{i}": sd[SCALE] for i in range(9)}), "more.3 and 5 more"),
        (lambda sd: sd.update({SCALE: sd[SCALE][:-1]}), f"shaped differently {SCALE} (stored (15,), expected (16,))"),
        (lambda sd: sd.update({C1: sd[C1][:1]}), f"shaped differently {C1}"),
        (lambda sd: sd.update({C1: sd[C1] * np.nan}), f"not finite: {C1}"),
        (lambda sd: sd.update({Q1: -sd[Q1]}), f"not the conjugate of P: {Q1}"),
        (lambda sd: sd.update({SCALE: np.arange(16)}), f"not floating-point numbers: {SCALE}"),
        (lambda sd: sd.update({C1[:-1] + "omega": sd[C1[:-1] + "omega"] * 2}), "not the FFT nodes of 300 tokens"),
        (lambda sd: sd.update(with_nodes({n: sd[n] for n in sd if HEAD in n}, 600)), f"300 tokens: {HEAD}"),
        (lambda sd: [sd.pop(name) for name in list(sd) if name.startswith(BACKBONE)], "those of no backbone"),
        (lambda sd: [sd.pop(name) for name in list(sd) if name.startswith(HEAD)], f"no key begins with {HEAD}"),
        (lambda sd: sd.pop(TEACHER + "encoder.layers.0.0.weight"), "missing ts_encoder.ema.encoder.layers.0.0.weight"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_named(change, sentence, monkeypatch, tmp_path, capsys):
    assert sentence in refused(monkeypatch, tmp_path, capsys, broken(change))


def test_options_that_contradict_the_file(monkeypatch, tmp_path, capsys):
    sd = small_sd("s4", "hubertpp")
    error = refused(monkeypatch, tmp_path, capsys, sd)
    assert "20 outputs, but config.objective.codes=(128, 256) asks for 384" in error
    codes = CODES
    error = refused(monkeypatch, tmp_path, capsys, sd, codes, "--config.model.width=32")
    assert "--config.model.width cannot be set: the file decides it (16)" in error
    error = refused(monkeypatch, tmp_path, capsys, sd, codes, "--normalisation=zscore")
    assert "config.data.normalisation='zscore' is unknown" in error
    error = refused(monkeypatch, tmp_path, capsys, sd, codes, "--objective=cpc")
    assert "it is not a cpc checkpoint as the reference writes it: extra ts_encoder.ema." in error
    assert "no field 'widow_s'" in refused(
        monkeypatch, tmp_path, capsys, sd, codes, "--config.data.widow_s=3"
    )
    assert "must be above 0 and at most 32.767" in refused(monkeypatch, tmp_path, capsys, sd, "--clip-mv=nan")
    window = "--config.data.window_s"
    assert f"{window} needs a value" in refused(monkeypatch, tmp_path, capsys, sd, window)
    assert f"{window} needs a value" in refused(monkeypatch, tmp_path, capsys, sd, window, "--clip-mv=5")


def test_objective_may_be_given(monkeypatch, tmp_path, capsys):
    """data2vec's head is JEPA's; the mask vector's name tells them apart unless the caller knows better."""
    code, workdir = import_arrays(
        monkeypatch, tmp_path, small_sd("s4", "data2vec"), "--objective=jepa", "--window-s=5"
    )
    assert code == 0
    out = capsys.readouterr().out
    assert "jepa on s4" in out
    assert "given: data.window_s=5.0" in out
    assert "made for 300 tokens (2.5 s), the window has 600" in out
    assert restore_encoder(workdir).preprocessing.window_samples == 1200


def test_workdir_must_be_free(no_torch, tmp_path, capsys):
    file, full, empty = GOLDEN / "ckpt_cpc_narrow.ckpt", tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    assert run_command(file, full) == 2
    assert f"--workdir={full} is not empty" in capsys.readouterr().err
    assert run_command(file, full / "notes.txt") == 2
    assert "is no folder to write into" in capsys.readouterr().err
    assert (full / "notes.txt").read_text() == "mine"
    assert run_command(file, full / "notes.txt" / "run") == 2
    assert "notes.txt" in capsys.readouterr().err
    empty.mkdir()
    assert run_command(file, empty) == 0
    assert restore_encoder(empty).step > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_import_leaves_nothing(error, no_torch, monkeypatch, tmp_path, capsys):
    write = import_checkpoint.write_atomic

    def fail_at_the_last(path, data):
        if path.name == "import.json":
            raise error
        write(path, data)

    monkeypatch.setattr(import_checkpoint, "write_atomic", fail_at_the_last)
    code = run_command(GOLDEN / "ckpt_cpc_narrow.ckpt", tmp_path / "new" / "runs" / "run")
    assert code == (130 if error is KeyboardInterrupt else 2)
    assert not list(tmp_path.iterdir())


def test_teacher_check_of_an_import(monkeypatch, tmp_path, capsys):
    """The reference's teacher of the stored steps has an initialiser's weights; a copy of the student is seen too."""
    sd, options = golden_sd(load_golden("ssl_steps_jepa"))
    code, workdir = import_arrays(monkeypatch, tmp_path, sd, *options)
    assert code == 0
    assert json.loads((workdir / "import.json").read_text())["teacher"]["verdict"].startswith("untouched")
    assert "of an untouched initialisation" in capsys.readouterr().out
    own = {name: sd[name.replace("ema.", "")] for name in sd if name.startswith(TEACHER)}
    (tmp_path / "copied").mkdir()
    code, workdir = import_arrays(monkeypatch, tmp_path / "copied", sd | own, *options)
    assert code == 0
    assert json.loads((workdir / "import.json").read_text())["teacher"]["verdict"] == "copy"
    assert "it is an exact copy of the student" in capsys.readouterr().out
