"""Runs on several stores, runs that begin with another run's parameters, and runs begun before there were either."""

import json
import shutil

import jax
import numpy as np
import pytest

from ecg_jax.config_flags import load_config, override
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.selection import SELECTION_NAME, read_selection
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.errors import UserError
from ecg_jax.pretrain import pretrain
from ecg_jax.probe_provenance import pretrained_on
from ecg_jax.run_origin import begin_with, describe_run, find_origin
from ecg_jax.run_setup import build_optimiser, build_teacher, initial_state
from ecg_jax.training.checkpoint import CHECKPOINTS, read_arrays, read_meta
from ecg_jax.training.metric_writers import read_log
from ecg_jax.training.pretrained import restore_encoder
from tiny_runs import overrides, tiny_config

CLOCK = ("windows_per_s", "data_wait", "save_seconds", "peak_memory_gib")


def shrunk(spec, name="cpc", **changes):
    """A shipped config, small."""
    config = load_config(spec)
    for field, value in overrides(name, **{"steps": 3, "tensorboard": False, **changes}).items():
        override(config, field, value)
    return config


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return [
        write_synthetic_store(folder / str(i), n_records=n, seconds=2.0, seed=i)
        for i, n in ((0, 60), (1, 40))
    ]


@pytest.fixture(scope="module")
def first(tmp_path_factory, stores):
    workdir = tmp_path_factory.mktemp("runs") / "first"
    pretrain(shrunk("configs/cpc.py", store=stores[0]), workdir)
    return workdir


@pytest.fixture(scope="module")
def second(tmp_path_factory, first, stores):
    """Begun with the first on another store; at a rate so small that it stays there."""
    workdir = tmp_path_factory.mktemp("runs") / "second"
    changes = {"init__checkpoint": first, "store": stores[1], "optimiser__learning_rate": 1e-20}
    pretrain(shrunk("configs/domain.py", **changes), workdir)
    return workdir


def saved(run, step, *names):
    meta = read_meta(run / CHECKPOINTS / str(step))
    return {path: crc for path, crc in meta["checksums"].items() if path.startswith(names)}


def test_domain_config_is_an_objectives_at_a_tenth_of_its_rate():
    config, own = (
        load_config("configs/domain.py:objective=jepa,data=45k"),
        load_config("configs/jepa.py:data=45k"),
    )
    assert config.optimiser.learning_rate == pytest.approx(own.optimiser.learning_rate / 10)
    assert (config.objective, config.data) == (own.objective, own.data)
    config = load_config("configs/domain.py:objective=jepa,ladder=paper")
    assert (config.data.rung, config.data.ladder) == ("11m", "paper")
    with pytest.raises(UserError, match="objective='jepaa' is unknown; did you mean"):
        load_config("configs/domain.py:objective=jepaa")


def test_domain_run_needs_a_checkpoint(tmp_path, stores):
    with pytest.raises(UserError, match=r"config.init.checkpoint is not set"):
        pretrain(shrunk("configs/domain.py", store=stores[1]), tmp_path / "run")
    with pytest.raises(UserError, match=r"config.init.checkpoint: .*there is no run at nowhere"):
        pretrain(shrunk("configs/domain.py", store=stores[1], init__checkpoint="nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_domain_run_begins_with_the_parameters_of_the_first(first, second):
    assert saved(second, 3, "params", "ssm") == saved(first, 3, "params", "ssm")
    assert saved(second, 3, "batch_stats") != saved(first, 3, "batch_stats"), "they follow the new store"
    assert [entry["step"] for entry in read_log(second)] == [1, 2, 3]


def test_domain_run_says_where_it_comes_from(first, second, stores):
    for stored in (json.loads((second / "config.json").read_text()), read_meta(second / CHECKPOINTS / "3")):
        origin = stored["origin"]
        assert (origin["run"], origin["step"], origin["origin"]) == (str(first.resolve()), 3, None)
        assert origin["store_fingerprint"] == Store(stores[0]).fingerprint
        assert origin["selection_fingerprint"] == read_selection(first / SELECTION_NAME).fingerprint
        assert stored["selection_fingerprint"] == read_selection(second / SELECTION_NAME).fingerprint
        assert stored["store_fingerprint"] == Store(stores[1]).fingerprint


def test_everything_an_encoder_has_seen_is_known(first, second, stores, tmp_path):
    seen = pretrained_on(restore_encoder(second))
    assert [store.path for store, _ in seen] == [stores[1], stores[0].resolve()]
    for (_, rows), run in zip(seen, (second, first), strict=True):
        np.testing.assert_array_equal(rows, read_selection(run / SELECTION_NAME).train)
    # Without the first run its recordings are chosen again, and have to be the same.
    alone = tmp_path / "alone"
    shutil.copytree(second, alone)
    config = alone / "checkpoints" / "3" / "meta" / "metadata"
    meta = json.loads(config.read_text())
    meta["origin"]["run"] = str(tmp_path / "gone")
    config.write_text(json.dumps(meta))
    again = pretrained_on(restore_encoder(alone))
    np.testing.assert_array_equal(again[1][1], seen[1][1])
    meta["origin"]["data"]["max_records"] = 9
    config.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="was pretrained on other recordings"):
        pretrained_on(restore_encoder(alone))
    meta["origin"]["store_fingerprint"] = "0" * 64
    config.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=f"{stores[0]} is not what .* was pretrained on any more"):
        pretrained_on(restore_encoder(alone))


def test_domain_run_continues_without_the_first(tmp_path, first, second, stores):
    gone, workdir = tmp_path / "gone", tmp_path / "run"
    shutil.copytree(first, gone)
    config = shrunk("configs/domain.py", init__checkpoint=gone, store=stores[1])
    pretrain(config, workdir)
    shutil.rmtree(gone)
    config.steps = 4
    assert int(pretrain(config, workdir).step) == 4
    config.init.checkpoint = str(second)
    with pytest.raises(UserError, match=r"it differs in init.checkpoint"):
        pretrain(config, workdir)


def fresh(config):
    contract = Preprocessing(window_s=config.data.window_s, normalisation=config.data.normalisation)
    teacher = build_teacher(config, 3)
    return contract, teacher, initial_state(config, build_optimiser(config, 3)[1], contract, teacher)


def assert_equal_trees(a, b):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_an_encoder_goes_into_student_and_teacher_of_another_objective(first, tmp_path):
    changes = {"init__checkpoint": first, "model__bidirectional": False, "data__normalisation": "none"}
    config = tiny_config("jepa", init__part="encoder", seed=5, **changes)
    contract, teacher, state = fresh(config)
    origin = find_origin(config, tmp_path, contract)
    begun = begin_with(state, origin, config, contract, teacher)
    wanted = {"params": {"encoder": state.params["encoder"]}}
    encoder = read_arrays(first / CHECKPOINTS / "3", wanted)["params"]["encoder"]
    assert_equal_trees(begun.params["encoder"], encoder)
    assert_equal_trees(begun.teacher["params"], encoder)
    head = {name: tree for name, tree in begun.params.items() if name != "encoder"}
    assert head
    assert_equal_trees(head, {name: state.params[name] for name in head})
    assert_equal_trees(begun.opt_state, state.opt_state)
    assert begun.ssm.keys() == state.ssm.keys(), "the head's own stay"
    basis = jax.tree.leaves((begun.basis, state.basis))
    assert not all(
        np.array_equal(a, b) for a, b in zip(basis[: len(basis) // 2], basis[len(basis) // 2 :], strict=True)
    )
    config.init.part = "all"
    with pytest.raises(UserError, match=r"with the objective cpc, and this run has jepa; set .*part=encoder"):
        find_origin(config, tmp_path, contract)


def test_parameters_that_do_not_fit_are_listed_in_one_error(first, tmp_path):
    config = shrunk("configs/domain.py", init__checkpoint=first, model__width=32, model__layers=1)
    contract, teacher, state = fresh(config)
    with pytest.raises(UserError, match=r"does not fit this run: .*extra .*; shaped differently .*expected"):
        begin_with(state, find_origin(config, tmp_path, contract), config, contract, teacher)


def test_other_inputs_are_refused(first, tmp_path):
    config = shrunk("configs/domain.py", init__checkpoint=first, data__normalisation="ptbxl_canonical")
    contract = Preprocessing(window_s=config.data.window_s, normalisation="ptbxl_canonical")
    with pytest.raises(UserError, match=r"data.normalisation='none', and this run has 'ptbxl_canonical'"):
        find_origin(config, tmp_path, contract)


def mixed(stores, **changes):
    return shrunk("configs/cpc.py", store=f"{stores[0]},{stores[1]}", data__weights="1,3", **changes)


def test_run_on_two_stores(tmp_path, stores, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    pretrain(mixed(stores, steps=4), whole)
    out = capsys.readouterr().out
    assert f"{stores[0]}: " in out
    assert "75.0% of the crops" in out
    trained = [
        len(rows) for rows in map(lambda n: read_selection(whole / SELECTION_NAME).rows_of(n)[0], (0, 1))
    ]
    times = [sum(trained) * share / n for share, n in zip((0.25, 0.75), trained, strict=True)]
    for each in times:
        assert f"each recording {each:.3g} times in an epoch of {sum(trained)} crops" in out
    pretrain(mixed(stores, steps=2), halves)
    config = mixed(stores, steps=4)
    config.data.weights, config.store = "0.25, 0.75", f" {stores[0]}, {stores[1]}"
    pretrain(config, halves)
    logs = [
        [{k: v for k, v in e.items() if k not in CLOCK} for e in read_log(run)] for run in (whole, halves)
    ]
    assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]]
    selection = read_selection(whole / SELECTION_NAME)
    assert [source.fingerprint for source in selection.sources] == [
        Store(path).fingerprint for path in stores
    ]
    seen = pretrained_on(restore_encoder(whole))
    assert [store.path for store, _ in seen] == stores
    config.data.weights = "1,1"
    with pytest.raises(UserError, match=r"differs in data.weights \('1,3' there, '1,1' now\)"):
        pretrain(config, halves)
    config.data.weights, config.store = "1,3", f"{stores[1]},{stores[0]}"
    with pytest.raises(UserError, match="differs in store_fingerprint"):
        pretrain(config, halves)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": "{0},{0}"}, "several different ones separated by commas"),
        ({"store": "{0},"}, "several different ones separated by commas"),
        ({"store": "{0},{1}", "data__weights": "1,2,3"}, "has 3 numbers, but config.store names 2 stores"),
        ({"store": "{0},{1}", "data__weights": "1,0"}, "must be positive numbers"),
        ({"store": "{0}", "data__ladder": "papers"}, "config.data.ladder='papers' is unknown"),
        ({"store": "{0}", "data__rung": "18"}, "config.data.rung='18' is unknown; known: 18k, 45k"),
        ({"store": "{0}", "data__ladder": "paper"}, "rung 18k is made of S0001-1987"),
        ({"store": "{0}", "init__part": "head"}, "config.init.part='head' is unknown"),
        ({"store": "{0}", "data__max_records": -1}, "config.data.max_records=-1 must not be negative"),
        ({"store": "{0}", "stall_timeout_s": -1}, "config.stall_timeout_s=-1.0 must not be negative"),
        ({"store": "{0}", "data__selection": "nowhere.json"}, "cannot read the selection nowhere.json"),
        (
            {"store": "{0}", "data__selection": "x", "data__max_records": 9},
            "data.max_records=9 would cut .*data.sel",
        ),
    ],
)
def test_bad_sources_are_refused(tmp_path, stores, changes, message):
    store = changes["store"].format(*stores)
    with pytest.raises(UserError, match=message):
        pretrain(shrunk("configs/cpc.py", **changes | {"store": store}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stores_prepared_otherwise_are_refused(tmp_path, stores):
    other = tmp_path / "clipped"
    shutil.copytree(stores[1], other)
    metadata = json.loads((other / "zarr.json").read_text())
    metadata["attributes"]["ecg_jax"]["preprocessing"]["clip_mv"] = 3.0
    (other / "zarr.json").write_text(json.dumps(metadata))
    message = (
        r"clip_mv is None in the store .*0 but 3.0 in the store .*clipped.* alike, with the same --clip-mv"
    )
    with pytest.raises(UserError, match=message):
        pretrain(shrunk("configs/cpc.py", store=f"{stores[0]},{other}"), tmp_path / "run")


def test_offline_targets_of_several_stores_are_refused(tmp_path, stores):
    config = tiny_config("hubert", store=f"{stores[0]},{stores[1]}")
    with pytest.raises(UserError, match=r"offline targets lie beside one store, but config.store names 2"):
        pretrain(config, tmp_path / "run")


def test_another_selection_is_refused_by_name(tmp_path, first, stores):
    workdir = tmp_path / "run"
    shutil.copytree(first, workdir)
    config = shrunk("configs/cpc.py", store=stores[0], data__max_records=20)
    with pytest.raises(
        UserError, match=r"its selection of recordings differs in .*max_records \(18000 there, 20 now\)"
    ):
        pretrain(config, workdir)
    config = shrunk("configs/cpc.py:data=45k", store=stores[0])
    assert int(pretrain(config, workdir).step) == 3, "the same recordings by another name"
    (workdir / SELECTION_NAME).unlink()
    with pytest.raises(UserError, match="cannot read the selection"):
        pretrain(config, workdir)


def before(workdir, **data):
    """Turns a run into one from before there were ladders, mixtures, origins and watchdogs."""
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    for name in ("ladder", "rung", "selection", "weights"):
        del config["data"][name]
    for name in ("init", "stall_timeout_s", "selection_fingerprint"):
        del config[name]
    config["data"] |= {"max_records": 18_000, **data}
    path.write_text(json.dumps(config))
    (workdir / SELECTION_NAME).unlink()


def test_run_begun_before_continues(tmp_path, first, stores):
    workdir = tmp_path / "run"
    shutil.copytree(first, workdir)
    before(workdir)
    config = shrunk("configs/cpc.py", store=stores[0], steps=4)
    assert int(pretrain(config, workdir).step) == 4
    selection = read_selection(workdir / SELECTION_NAME)
    assert not selection.rule.whole_patients
    np.testing.assert_array_equal(selection.train, read_selection(first / SELECTION_NAME).train)
    assert int(pretrain(config, workdir).step) == 4, "and again, now with a selection"
    for change, message in (
        ({"data__weights": "1"}, r"differs in data.weights \('' there, '1' now\)"),
        ({"init__checkpoint": str(first)}, "differs in init.checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain(shrunk("configs/cpc.py", store=stores[0], steps=4, **change), workdir)


def test_run_begun_before_keeps_its_cut(tmp_path, first, stores):
    workdir = tmp_path / "run"
    shutil.copytree(first, workdir)
    before(workdir, max_records=10)
    config = shrunk("configs/cpc.py", store=stores[0], data__max_records=10)
    pretrain(config, workdir)
    assert len(read_selection(workdir / SELECTION_NAME).train) == 10
    (workdir / SELECTION_NAME).unlink()
    config.data.max_records = 11
    with pytest.raises(UserError, match=r"differs in data.max_records \(10 there, 11 now\)"):
        pretrain(config, workdir)


def test_runs_of_before_still_say_what_they_have_seen(tmp_path, first, stores):
    run = tmp_path / "run"
    shutil.copytree(first, run)
    before(run)
    path = run / "checkpoints" / "3" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["config"] = json.loads((run / "config.json").read_text())
    del meta["selection_fingerprint"]
    path.write_text(json.dumps(meta))
    assert describe_run(run, 3)["selection_fingerprint"] is None
    [(store, rows)] = pretrained_on(restore_encoder(run))
    assert store.path == stores[0]
    np.testing.assert_array_equal(rows, read_selection(first / SELECTION_NAME).train)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Stores called MIMIC and HEEDB; of the latter half is S0001-2007."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("corpora")
    stores = {}
    for seed, (name, corpus) in enumerate((("mimic", "mimic-iv-ecg"), ("heedb", "heedb"))):
        path = write_synthetic_store(folder / name, n_records=80, seconds=1.0, seed=10 + seed)
        metadata = json.loads((path / "zarr.json").read_text())
        metadata["attributes"]["ecg_jax"]["corpus"] = corpus
        (path / "zarr.json").write_text(json.dumps(metadata))
        table = pq.read_table(path / "records.parquet")
        files = [f"WFDB/S0001/{2007 if i % 2 else 1987}/01/de_{i}.hea" for i in range(len(table))]
        where = table.column_names.index("source_file")
        pq.write_table(table.set_column(where, "source_file", pa.array(files)), path / "records.parquet")
        stores[name] = path
    return stores


def test_matched_runs_take_equally_many_recordings_and_epochs(tmp_path, corpora, capsys):
    configs = {name: load_config(f"configs/matched.py:corpus={name}") for name in corpora}
    assert {(config.steps, config.epochs) for config in configs.values()} == {(0, 10.0)}
    assert {config.data.max_records for config in configs.values()} == {700_000}
    sizes = {}
    for name, path in corpora.items():
        config = shrunk(f"configs/matched.py:corpus={name}", store=path, data__max_records=20, steps=1)
        pretrain(config, tmp_path / name)
        selection = read_selection(tmp_path / name / SELECTION_NAME)
        sizes[name] = len(selection.train)
        if name == "heedb":
            assert (selection.train % 2 == 1).all(), "of S0001-2007 only"
            assert (selection.val % 2 == 1).all()
    patient = max(
        np.unique(Store(path).column("patient_id"), return_counts=True)[1].max() for path in corpora.values()
    )
    assert all(20 - patient < size <= 20 for size in sizes.values()), sizes
    assert "warning: up to" not in capsys.readouterr().out
    pretrain(shrunk("configs/matched.py", store=corpora["mimic"], steps=1), tmp_path / "smaller")
    assert "warning: up to 700000 recordings were asked for; there are " in capsys.readouterr().out
    pretrain(shrunk("configs/cpc.py", store=corpora["mimic"], steps=1), tmp_path / "rung")
    assert "\nup to 18000 recordings were asked for" in capsys.readouterr().out
    with pytest.raises(UserError, match="leave data and ladder out"):
        load_config("configs/matched.py:corpus=mimic,data=45k")
