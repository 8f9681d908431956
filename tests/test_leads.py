"""`config.data.leads`: to the model a lead that is left out is one that the store never had, wherever it is read."""

import dataclasses
import inspect
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.config_checks import check_config
from ecg_jax.config_flags import load_config, override
from ecg_jax.data.preprocessing import Preprocessing, parse_leads
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.errors import UserError
from ecg_jax.evaluation.examples import Examples
from ecg_jax.evaluation.feature_cache import entry_key
from ecg_jax.evaluation.finetune import _programs, fit_finetune
from ecg_jax.evaluation.frozen import fit_frozen
from ecg_jax.evaluation.frozen_heads import programs
from ecg_jax.evaluation.online_probe import OnlineProbe, embed_step
from ecg_jax.evaluation.supervised import fit_supervised
from ecg_jax.models.inputs import ALL_LEADS, NORMALISATIONS, to_model_input
from ecg_jax.objectives.masking import Masking
from ecg_jax.pretrain import pretrain
from ecg_jax.probe import probe, summary
from ecg_jax.run_data import open_data
from ecg_jax.run_setup import build_masking
from ecg_jax.token_features import of_checkpoint
from ecg_jax.training.collapse import observe_step
from ecg_jax.training.metric_writers import read_log
from ecg_jax.training.pretrained import encode_fn, restore_encoder
from ecg_jax.training.train_state import eval_step, train_step
from ecg_jax.workdir import claim_workdir
from test_online_probe import as_ptbxl
from tiny_probes import MODEL, one_device, tiny_encoder, tiny_examples

KEPT = ("I", "V2")
NUMBERS = [CANONICAL_LEADS.index(lead) for lead in KEPT]
DROPPED = [number for number in range(12) if number not in NUMBERS]


def without_the_others(path, copy):
    """A copy of a store whose files hold zeros for the leads that are not kept."""
    shutil.copytree(path, copy)
    for chunk in (copy / "signal" / "c").glob("*/0"):
        samples = np.fromfile(chunk, "<i2").reshape(-1, 12)
        samples[:, DROPPED] = 0
        samples.tofile(chunk)
    return copy


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """(a store, the same without the other leads), which say they are PTB-XL so that they can be probed."""
    folder = tmp_path_factory.mktemp("leads")
    write_synthetic_store(folder / "made", n_records=96, seconds=3.0, seed=5)
    whole = as_ptbxl(folder / "made", folder / "whole")
    return whole, without_the_others(whole, folder / "few")


def tiny_config(store, leads, spec="configs/jepa.py"):
    config = load_config(spec)
    fields = {
        "store": store, "model.width": 16, "model.state": 4, "model.layers": 1, "model.l_max": 60,
        "objective.head_state": 8, "data.window_s": 0.5, "data.max_val_crops": 16, "data.leads": leads,
        "batch_size": 16, "steps": 2, "log_every": 1, "checkpoint_every": 2, "tensorboard": False,
        "monitor.probe_every": 1, "monitor.probe_records": 48, "monitor.task": "ptbxl_rhythm",
    }  # fmt: skip
    for name, value in fields.items():
        override(config, name, str(value))
    return config


@pytest.fixture(scope="module")
def runs(stores, tmp_path_factory):
    """(a run that leaves leads out, one of all leads on the store that never had them)."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain(tiny_config(stores[0], "V2,I"), folder / "leads")
    pretrain(tiny_config(stores[1], ""), folder / "all")
    return folder / "leads", folder / "all"


def test_leads_are_named_in_any_order_and_kept_in_the_canonical_one():
    assert parse_leads("") == CANONICAL_LEADS == ALL_LEADS
    assert parse_leads("V1, avr,I") == ("I", "aVR", "V1")
    config = load_config("configs/cpc.py")
    for text, message in (
        ("I,V7", r"config.data.leads='I,V7': 'V7' is no lead; "),
        ("I,", "'' is no lead; known: I, II, III"),
        ("II,I,ii", "names the lead II twice; name each lead once"),
    ):
        override(config, "data.leads", text)
        with pytest.raises(UserError, match=message):
            check_config(config)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_lead_that_is_left_out_is_zero_before_it_is_normalised(normalisation):
    signal = np.random.default_rng(0).integers(-3000, 3000, (2, 5, 12)).astype(np.int16)
    few = signal.copy()
    few[..., DROPPED] = 0
    every, kept = (
        to_model_input(of, normalisation, leads) for of, leads in ((few, ALL_LEADS), (signal, KEPT))
    )
    # Up to the last bit: the two are compiled each in its own way.
    np.testing.assert_allclose(kept, every, rtol=3e-7)
    untouched = to_model_input(signal, normalisation, ALL_LEADS)[..., NUMBERS]
    np.testing.assert_allclose(kept[..., NUMBERS], untouched, rtol=3e-7)


def test_all_leads_cost_no_operation():
    def operations(leads):
        program = jax.make_jaxpr(lambda signal: to_model_input(signal, "ptbxl_canonical", leads))
        return [str(equation.primitive) for equation in program(np.zeros((1, 4, 12), np.int16)).eqns]

    every = operations(ALL_LEADS)
    assert set(every) == {"convert_element_type", "mul", "broadcast_in_dim", "sub", "div"}
    assert len(operations(KEPT)) > len(every)


def test_the_contract_carries_the_leads_and_old_ones_have_all():
    contract = Preprocessing(window_s=2.5, kept_leads=KEPT)
    assert Preprocessing.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract
    contract.check_compatible(Preprocessing())  # a store has all leads, whatever a run looks at
    every = Preprocessing(window_s=2.5)
    # Written as it always was, so that other versions read it and keys made of it stay.
    assert list(every.to_dict()) == [
        "leads", "unit", "rate_hz", "nan_rule", "resampler", "clip_mv", "window_s", "normalisation",
    ]  # fmt: skip
    assert Preprocessing.from_dict(every.to_dict()).kept_leads == CANONICAL_LEADS


@pytest.mark.parametrize("kept", [["i"], ["I", "X"], [], ["V2", "I"], ["I", "I"], "V1"])
def test_a_contract_of_leads_that_there_are_not_is_refused(kept):
    """Else an encoder would be fed zeros, and no one told."""
    with pytest.raises(UserError, match=r"has kept_leads=\[.*\]; they must be some of I, II, III, aVR,"):
        Preprocessing.from_dict(Preprocessing().to_dict() | {"kept_leads": kept})


@pytest.mark.parametrize(
    "function",
    [to_model_input, train_step, eval_step, observe_step, embed_step, OnlineProbe, _programs, programs],
)
def test_nobody_forgets_the_leads(function):
    """As nobody forgets the normalisation: a silent choice of all leads would give wrong numbers."""
    parameters = inspect.signature(function).parameters
    assert parameters["kept_leads"].default is parameters["normalisation"].default is inspect.Parameter.empty


def test_masks_of_leads_are_drawn_among_those_that_are_kept():
    config = load_config("configs/jepa.py:mask=lead")
    assert build_masking(config) == Masking(**config.objective.mask.to_dict())
    override(config, "data.leads", "I,II,V1,V5")
    check_config(config)
    kept, shape = [0, 1, 6, 10], {"samples": 40, "leads": 12}
    others = np.setdiff1d(np.arange(12), kept)
    mask = jax.jit(lambda: build_masking(config).draw(jax.random.key(0), jnp.arange(400), **shape))()
    hidden = np.asarray(mask.signal)
    assert not hidden[..., others].any()
    assert (hidden[:, 0].sum(axis=1) == 2).all()  # half of four
    np.testing.assert_allclose(hidden[:, 0][:, kept].mean(axis=0), 0.5, atol=0.1)

    override(config, "objective.mask.strategy", "independent")
    override(config, "objective.mask.patch", "2")
    mask = jax.jit(lambda: build_masking(config).draw(jax.random.key(0), jnp.arange(400), **shape))()
    assert not np.asarray(mask.signal)[..., others].any()
    np.testing.assert_allclose(np.asarray(mask.signal)[..., kept].mean(axis=(0, 1)), 0.5, atol=0.05)
    # Predicted where at least two of four leads are hidden: 11/16 of the tokens if leads were drawn apart.
    assert np.asarray(mask.targets).mean() == pytest.approx(11 / 16, abs=0.05)

    override(config, "objective.mask.strategy", "lead")
    override(config, "data.leads", "II")
    with pytest.raises(UserError, match=r"mask.strategy='lead' needs at least two leads to hide one, not 1"):
        check_config(config)


def test_a_run_is_that_of_a_store_without_the_other_leads(runs):
    """Training, validation, features watched for a collapse, teacher and online probe."""
    logs = [read_log(run) for run in runs]
    names = {"loss", "grad_norm", "val_loss", "rankme", "feature_std", "teacher_feature_std", "probe_auroc"}
    assert names <= set(logs[0][-1])
    for few, every in zip(*logs, strict=True):
        for name in names & few.keys():
            np.testing.assert_allclose(few[name], every[name], rtol=1e-4, err_msg=name)
    contract = json.loads((runs[0] / "preprocessing.json").read_text())
    assert contract["kept_leads"] == list(KEPT)
    assert "kept_leads" not in json.loads((runs[1] / "preprocessing.json").read_text())


def test_the_encoder_of_a_checkpoint_sees_what_its_run_saw(runs, stores):
    encoder = restore_encoder(runs[0])
    assert encoder.preprocessing.kept_leads == KEPT
    store = Store(stores[0])
    crops = store.read_crops(store.column("offset")[:4], encoder.preprocessing.window_samples)
    features = encode_fn(encoder)(crops)
    for lead in range(12):
        changed = crops.copy()
        changed[..., lead] = changed[..., lead] // 2 + 300
        moved = np.abs(encode_fn(encoder)(changed) - features).max()
        assert moved > 1e-3 if lead in NUMBERS else moved == 0, CANONICAL_LEADS[lead]
    # A layer, as `ecg-jax cluster` reads it.
    layer, few = of_checkpoint(runs[0], "stem", store), crops.copy()
    few[..., DROPPED] = 0
    encode = jax.jit(layer.encode)
    np.testing.assert_array_equal(encode(layer.variables, crops), encode(layer.variables, few))
    everything = dataclasses.replace(
        encoder, preprocessing=dataclasses.replace(encoder.preprocessing, kept_leads=CANONICAL_LEADS)
    )
    assert entry_key(everything, store) != entry_key(encoder, store)  # features are kept apart


def test_a_run_from_before_there_was_a_choice_has_all_leads(runs, stores, tmp_path):
    """Its config.json and its checkpoints lack the field."""
    old = tmp_path / "old"
    shutil.copytree(runs[1], old)
    (meta,) = old.glob("checkpoints/*/meta/metadata")
    for path, names in ((old / "config.json", ["data"]), (meta, ["config", "data"])):
        content = data = json.loads(path.read_text())
        for name in names:
            data = data[name]
        assert data.pop("leads") == ""
        path.write_text(json.dumps(content))
    assert restore_encoder(old).preprocessing.kept_leads == CANONICAL_LEADS
    same, other = (tiny_config(stores[1], leads) for leads in ("", "I"))
    with claim_workdir(old, same, open_data(same, old)):
        pass
    with (
        pytest.raises(UserError, match=r"holds another run: it differs in data.leads \('' there, 'I' now\)"),
        claim_workdir(old, other, open_data(other, old)),
    ):
        pass


def test_a_linear_probe_says_which_leads_its_numbers_are_of(runs, stores, tmp_path):
    config = load_config("configs/probe.py:mode=linear,task=ptbxl_rhythm")
    fields = {
        "features": tmp_path / "kept", "baseline_seeds": 1, "near_duplicates": False, "min_count": 1,
        "bootstrap.resamples": 20, "linear.l2_grid": (0.1,), "linear.max_steps": 20,
    }  # fmt: skip
    for name, value in fields.items():
        override(config, name, str(value))
    results = probe(config, tmp_path / "probe", str(runs[0]), str(stores[0]))
    assert results["preprocessing"]["kept_leads"] == list(KEPT)
    assert "every encoder here sees the leads I, V2 alone, the simple ECG features all 12" in summary(results)


@pytest.mark.parametrize("mode", ["frozen", "finetune", "supervised"])
def test_a_trained_probe_is_that_of_a_store_without_the_other_leads(mode, synthetic_store, tmp_path):
    every = tiny_encoder()
    contract = dataclasses.replace(every.preprocessing, kept_leads=KEPT)
    few = dataclasses.replace(every, preprocessing=contract)
    missing = without_the_others(synthetic_store, tmp_path / "few")

    def fitted(encoder, store):
        examples: Examples = tiny_examples(store, sizes=(32, 16, 16))
        settings = {"epochs": 1, "batch_size": 16, "mesh": one_device()}
        if mode == "supervised":
            return fit_supervised(MODEL, encoder.preprocessing, examples, **settings).test
        if mode == "finetune":
            return fit_finetune(encoder, examples, **settings).test
        own = {"learning_rates": (1e-2,), "seeds": (0,), "weight_decay": 1e-3}
        return fit_frozen(encoder, examples, **settings, **own, attention_heads=4, token_cache_bytes=0).test

    ours = fitted(few, synthetic_store)
    np.testing.assert_allclose(ours, fitted(every, missing), rtol=1e-4, atol=1e-6)
    assert np.abs(ours - fitted(every, synthetic_store)).max() > 1e-4
