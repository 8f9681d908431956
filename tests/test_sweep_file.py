"""Sweep files: arguments, names that are derived, stores, and the sweeps that ship with the package."""

import functools

import pytest

from ecg_jax.config_flags import shipped_configs
from ecg_jax.errors import UserError
from ecg_jax.sweep_file import GIVEN, derived_name, load_sweep, parse_sweep_arg
from ecg_jax.sweep_stores import StoreChoice, check_choice
from tiny_sweep import write_sweep

loaded = functools.cache(load_sweep)
#: Those that need no argument of their own; tests/test_sweep_files.py has the others.
QUICK = ("backbone_objective", "data_ladder", "input_size", "learning_rate", "s4_width", "seeds")


def test_derived_name_says_config_and_overrides():
    assert derived_name("configs/cpc.py", {}) == "cpc"
    overrides = {"optimiser.learning_rate": 1e-3, "seed": 1}
    assert derived_name("configs/cpc.py:data=18k,recipe=released", overrides) == (
        "cpc-data=18k-recipe=released-learning_rate=0.001-seed=1"
    )
    # A last part that two share does not say which field it is.
    both = {"objective.teacher.momentum": 0.9, "other.momentum": 0.5}
    assert derived_name("cpc.py", both) == "cpc-objective.teacher.momentum=0.9-other.momentum=0.5"
    assert derived_name("my cpc.py", {"model.filters": (8, 16)}) == "my_cpc-filters=_8_16_"


def test_long_derived_names_are_short_and_differ():
    fields = {f"objective.field_number_{i}": i for i in range(9)}
    one, other = (derived_name("configs/cpc.py", fields | {"seed": seed}) for seed in (0, 1))
    assert len(one) == len(other) == 80
    assert one[:-9] == other[:-9]
    assert one != other
    # Of the run alone, and the same tomorrow.
    assert one == "cpc-field_number_0=0-field_number_1=1-field_number_2=2-field_number_3=3-eb4fc076"


def test_names_and_groups_may_be_left_out(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def sweep():\n"
        "    for seed in (0, 1):\n"
        "        for rate in (1e-3, 3e-3):\n"
        "            yield {'config': 'configs/cpc.py', 'probe': None,\n"
        "                   'overrides': {'optimiser.learning_rate': rate, 'seed': seed}}\n"
    )
    runs = load_sweep(str(path)).runs
    assert [run.name for run in runs[:2]] == [
        "cpc-learning_rate=0.001-seed=0",
        "cpc-learning_rate=0.003-seed=0",
    ]
    assert {run.group for run in runs} == {"cpc-learning_rate=0.001", "cpc-learning_rate=0.003"}
    assert runs[0].probe_config is None
    # Names that would collide are refused: the folders of two configs of one stem.
    path.write_text(path.read_text().replace("rate in (1e-3, 3e-3)", "rate in (1e-3, 0.001)"))
    with pytest.raises(UserError, match=r"run 'cpc-learning_rate=0\.001-seed=0' is there twice"):
        load_sweep(str(path))


def test_arguments_of_a_sweep_file(tmp_path):
    arg = parse_sweep_arg("ladder=paper,quick", "quick", ladder=("nested", "paper"), seeds=("3", "1"))
    assert (arg.quick, arg.ladder, arg.seeds) == (True, "paper", "3")
    assert parse_sweep_arg("", "quick").quick is False
    for text, message in (
        ("quik", "sweep argument 'quik' is unknown; did you mean 'quick'"),
        ("lader=paper", "sweep argument 'lader' is unknown; did you mean 'ladder'"),
        ("ladder=papers", "sweep argument ladder='papers' is unknown; did you mean 'paper'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_sweep_arg(text, "quick", ladder=("nested", "paper"))
    path = write_sweep(tmp_path, 'run("a")')
    with pytest.raises(UserError, match="takes no arguments, and was given 'quick'"):
        load_sweep(f"{path}:quick")


def test_stores_of_runs(tmp_path):
    own, given, sample = load_sweep(
        str(write_sweep(tmp_path, 'run("a") | {"store": "x,y"}', 'run("b")', 'run("c") | {"store": None}'))
    ).runs
    assert given.store == GIVEN
    nothing, one = StoreChoice(None, None), StoreChoice("s", None)
    assert nothing.pretraining(own, tmp_path) == "x,y"
    assert nothing.pretraining(sample, tmp_path) == str(tmp_path / "store")
    assert one.pretraining(given, tmp_path) == one.pretraining(sample, tmp_path) == "s"
    with pytest.raises(UserError, match="the run b needs a store; give it as --store=STORE"):
        nothing.pretraining(given, tmp_path)
    assert one.pretraining(own, tmp_path) == "x,y"
    check_choice(one, [own, given])
    with pytest.raises(UserError, match="the run a names its own store, x,y; leave out --store"):
        check_choice(one, [own])
    assert nothing.probing(own, tmp_path) is None  # it has no probe


def test_several_stores_need_one_to_probe_on(tmp_path):
    run = load_sweep("configs/sweeps/seeds.py:seeds=2").runs[0]
    assert StoreChoice("a", None).probing(run, tmp_path) == "a"
    assert StoreChoice("a,b", "c").probing(run, tmp_path) == "c"
    with pytest.raises(UserError, match="several stores; name the labelled one to probe on as --probe-store"):
        StoreChoice("a,b", None).probing(run, tmp_path)


def test_bad_keys_are_refused(tmp_path):
    for change, message in (
        ('{"store": ""}', "store='' must be a folder"),
        ('{"overrides": {3: 4}}', "must be a dict from field names to values"),
        ('{"probe": 3}', "probe=3 must be a string"),
        ('{"probe": "configs/probe.py:task=all"}', "a table holds one task"),
        ('{"name": "slurm"}', "cannot name a folder of the sweep"),
    ):
        with pytest.raises(UserError, match=message):
            load_sweep(str(write_sweep(tmp_path, f'run("a") | {change}')))
    with pytest.raises(UserError, match="have different probes"):
        load_sweep(
            str(write_sweep(tmp_path, 'run("a")', 'run("b") | {"probe": "configs/probe.py:mode=linear"}'))
        )


@pytest.mark.parametrize("name", QUICK)
def test_shipped_sweep_passes_its_checks(name):
    """In full and quick: every config of every run; the full one asks for a store, the quick one has the sample."""
    few = "" if name == "seeds" else ":seeds=1"
    for argument, store in ((few, GIVEN), (":quick", None)):
        sweep = loaded(f"configs/sweeps/{name}.py{argument}")
        assert {run.store for run in sweep.runs} == {store}
        assert sweep.probes
    text = (shipped_configs() / "configs" / "sweeps" / f"{name}.py").read_text()
    assert f"ecg-jax sweep configs/sweeps/{name}.py" in text
    assert f"{name}.py:quick --output" in text
    assert "million" in text  # what it costs


def groups(spec):
    """Group -> config of its first run."""
    return {run.group: run.config for run in reversed(loaded(f"configs/sweeps/{spec}").runs)}


def test_shipped_sweeps_are_what_they_say():
    both = groups("backbone_objective.py:seeds=1")
    assert {(c.model.backbone, c.objective.name) for c in both.values()} == {
        (backbone, objective)
        for backbone in ("s4", "transformer", "net1d")
        for objective in ("cpc", "jepa", "data2vec", "dinosr", "hubertpp")
    }
    assert not both["cpc-net1d"].model.bidirectional
    ladder = groups("data_ladder.py:seeds=1").values()
    assert {(c.data.rung, c.data.ladder) for c in ladder} == {
        (rung, "nested") for rung in ("18k", "45k", "106k", "753k", "11m")
    }
    paper = groups("data_ladder.py:top=45k,ladder=paper,seeds=1").values()
    assert {(c.data.rung, c.data.ladder) for c in paper} == {("18k", "paper"), ("45k", "paper")}
    widths = {c.model.width for c in groups("s4_width.py:seeds=1").values()}
    assert widths == {128, 256, 384, 512, 768, 1024}
    windows = groups("input_size.py:seeds=1").values()
    assert {(c.data.window_s, c.model.l_max, c.objective.steps_ahead) for c in windows} == {
        (2.5, 300, 14),
        (5.0, 600, 14),
        (10.0, 1200, 14),
    }
    assert len({c.optimiser.learning_rate for c in groups("learning_rate.py:seeds=1").values()}) == 5
    assert [run.config.seed for run in loaded("configs/sweeps/seeds.py").runs] == [0, 1, 2, 3, 4]
