"""Sweep files: arguments, names that are derived, and stores."""

import re

import pytest

from ecg_jax import cli
from ecg_jax.errors import UserError
from ecg_jax.sweep_entry import Study, split_stores, synthetic_arguments
from ecg_jax.sweep_file import (
    GIVEN,
    SAMPLE_STORE,
    derived_name,
    load_sweep,
    parse_sweep_arg,
    synthetic_store,
)
from ecg_jax.sweep_stores import StoreChoice, check_choice, check_stores
from ecg_jax.synthesize import MOST_RECORDS
from tiny_sweep import write_studies, write_sweep


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
        ("quick=1", "sweep argument 'quick' takes no value, and was given '1'; write quick alone"),
        ("seeds=0", "sweep argument seeds='0' must be 5 or 10 or 3"),
    ):
        with pytest.raises(UserError, match=message):
            parse_sweep_arg(text, "quick", ladder=("nested", "paper"), seeds=("5", "10", "3"))
    path = write_sweep(tmp_path, 'run("a")')
    with pytest.raises(UserError, match="takes no arguments, and was given 'quick'"):
        load_sweep(f"{path}:quick")


def test_free_text_of_a_sweep_argument():
    arg = parse_sweep_arg("base=stores/a+stores/b=1,quick", "quick", base=str, more=str)
    assert (arg.quick, arg.base, arg.more) == (True, "stores/a,stores/b=1", "")
    for text, message in (
        ("bas=x", "sweep argument 'bas' is unknown; did you mean 'base'"),
        ("base=x,base=y", "'base' is given twice, as 'x' and 'y'"),
        ("base", "'base' is unknown; did you mean 'base=TEXT'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_sweep_arg(text, "quick", base=str)


def test_stores_that_a_sweep_makes(tmp_path):
    """Their commas are their own among several that are joined by commas."""
    plain, shuffled = synthetic_store(4096), synthetic_store(96, seed=1, shuffle_labels=True)
    assert plain == "synthetic:records=4096,seed=0"
    together = ["stores/a", plain, shuffled, SAMPLE_STORE, "b"]
    assert split_stores(",".join(together)) == together
    assert synthetic_arguments(shuffled) == {"records": 96, "seed": 1, "shuffle_labels": True}
    assert synthetic_arguments("stores/a") is None
    for text in ("a,", ",a", "synthetic:records=0,seed=1", "synthetic:records=8,seed=1x", "sample:x"):
        with pytest.raises(UserError, match="is misspelled"):
            split_stores(text)
    with pytest.raises(UserError, match="records above 0"):
        synthetic_store(0)
    assert synthetic_store(MOST_RECORDS)
    for large in (MOST_RECORDS + 1, 10**20 - 1):
        with pytest.raises(UserError, match="has too many recordings; records is from 1 to 1000000000"):
            synthetic_store(large)
    run = load_sweep(str(write_sweep(tmp_path, f'run("a", store={f"{plain},sample:"!r})'))).runs[0]
    made = StoreChoice(None, None).pretraining(run, tmp_path)
    assert made == f"{tmp_path}/stores/synthetic-4096-0,{tmp_path}/store"
    assert StoreChoice(shuffled, None).texts(load_sweep(str(write_sweep(tmp_path, 'run("a")'))).runs[0]) == [
        shuffled
    ]


def test_probes_and_their_stores(tmp_path):
    further = """{"a": "configs/probe.py:mode=finetune,task=all", "b": {"probe": "configs/probe.py", "store": "x,y",
        "overrides": {"linear.layers": "all", "baseline_seeds": 1}}, "c": {"probe": "configs/probe.py",
        "store": "--probe-store"}}"""
    text = f'run("r", seed=3, probe="configs/probe.py", probes={further}) | ' + (
        '{"probe_store": "p,q", "probe_overrides": {"linear.l2_grid": (1.0,)}}'
    )
    run = load_sweep(str(write_sweep(tmp_path, text))).runs[0]
    assert [(probe.name, probe.config.mode, probe.config.task) for probe in run.further] == [
        ("a", "finetune", "all"),
        ("b", "linear", "ptbxl_super"),
        ("c", "linear", "ptbxl_super"),
    ]
    assert {probe.config.seed for probe in run.further} == {run.probe_config.seed} == {3}
    assert (run.further[1].config.linear.layers, run.further[1].config.baseline_seeds) == ("all", 1)
    assert run.probe_config.linear.l2_grid == (1.0,)
    choice = StoreChoice("s", "g,h")
    assert choice.probing(run, tmp_path) == "p"
    assert [choice.further(run, probe, tmp_path) for probe in run.further] == [
        ["p", "q"],
        ["x", "y"],
        ["g", "h"],
    ]
    with pytest.raises(UserError, match="needs a store to probe on; give it as --probe-store"):
        StoreChoice("s", None).further(run, run.further[2], tmp_path)
    check_choice(choice, [run])
    own = load_sweep(str(write_sweep(tmp_path, text.replace('"--probe-store"', '"z"')))).runs[0]
    with pytest.raises(UserError, match="names its own store to probe on, p,q; leave out --probe-store"):
        check_choice(choice, [own])


def test_studies_of_a_sweep_file(tmp_path):
    path = write_sweep(tmp_path, 'run("a")')
    assert load_sweep(str(path)).studies(tmp_path) == ()
    write_studies(path, [("one", ["scaling", "--runs={output}"])])
    assert load_sweep(str(path)).studies(tmp_path) == (Study("one", ("scaling", f"--runs={tmp_path}")),)
    for studies, message in (
        ([("one", ["scalling"])], "`ecg-jax scalling` is unknown; did you mean 'scaling'"),
        ([("one", ["tasks"]), ("one", ["tasks"])], "the study 'one' is there twice"),
        ([("a/b", ["tasks"])], "the name must be letters, digits"),
        ([("one", [])], "must return a list of"),
        ([("one", ["sweep", "x.py"])], "the study 'one': a sweep cannot be a study of a sweep"),
        ([("one", ["tasks"]), ("One", ["tasks"])], "'one' and 'One' differ in upper and lower case alone"),
    ):
        write_studies(path, studies)
        with pytest.raises(UserError, match=message):
            load_sweep(str(path))
    for returned in (5, {"one": ["tasks"]}, "one", [5], ["ab"]):
        path.write_text(
            path.read_text().split("def STUDIES")[0] + f"def STUDIES(output):\n    return {returned!r}\n"
        )
        shown = returned[0] if isinstance(returned, list) else returned
        with pytest.raises(UserError, match=re.escape(f"all strings; got {shown!r}")):
            load_sweep(str(path))


def test_runs_that_begin_with_others_are_checked(tmp_path):
    """A group's runs begin with runs of one group; a run cannot begin with itself, or with what does not fit it."""
    runs = [f'run("base{seed}", seed={seed}) | {{"group": "base"}}' for seed in (0, 1)]
    runs += [f'run("next{seed}", seed={seed}, init="base{seed}") | {{"group": "next"}}' for seed in (0, 1)]
    loaded = load_sweep(str(write_sweep(tmp_path, *runs))).runs
    assert [run.init and run.init.name for run in loaded] == [None, None, "base0", "base1"]
    for changed, message in (
        ('run("x", init="base0")', "init='base0' is no earlier run of this sweep"),
        (f'{runs[0]}\n    yield run("x", init="base")', "did you mean 'base0'"),
        (f'{runs[0]}\n    yield run("x", init="base0", init__checkpoint="y")', "both init and config.init"),
        (
            f'{runs[0]}\n    yield run("x", init="base0", data__normalisation="ptbxl_canonical")',
            "another data.normalisation",
        ),
        (
            f'{runs[0]}\n    yield run("next2", seed=2) | {{"group": "next"}}\n    yield {runs[2]}',
            "differ in init",
        ),
        (
            f'{runs[0]}\n    yield {{"config": "configs/jepa.py", "overrides": {{"data.normalisation": "none"}}, '
            '"probe": None, "init": "base0"}',
            "with the objective cpc, and this run with jepa; override init.part",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load_sweep(str(write_sweep(tmp_path, changed)))


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


def test_runs_with_offline_targets_need_one_store(tmp_path):
    runs = [run for run in load_sweep("configs/sweeps/hubert_offline.py:quick,seeds=1").runs if run.targets]
    with pytest.raises(
        UserError, match="reads offline targets, which lie beside one store; give it one inst"
    ):
        check_stores(StoreChoice("a,b", "c"), runs, tmp_path)


def test_store_that_cannot_be_made_is_refused_before_anything_is_written(tmp_path):
    """Whoever declared a run with it would have a folder that no mended file fits."""
    large = "synthetic:records=99999999999999999999,seed=0"
    for field, run in (
        ("store", f'run("a") | {{"store": "b,{large}"}}'),
        ("probe_store", f'run("a", probe="configs/probe.py") | {{"probe_store": {large!r}}}'),
        ("store", f'run("a", probes={{"p": {{"probe": "configs/probe.py", "store": {large!r}}}}})'),
    ):
        with pytest.raises(UserError, match=f"run 'a'.*: {field}: the store .* has too many recordings"):
            load_sweep(str(write_sweep(tmp_path, run)))
    args = [
        "sweep",
        str(write_sweep(tmp_path, 'run("a")')),
        f"--output={tmp_path / 'out'}",
        f"--store={large}",
    ]
    for what in ([], ["--dry-run"], ["--list"]):
        assert cli.main([*args, *what]) == 2
    assert not (tmp_path / "out").exists()


def test_names_that_differ_in_case_alone_are_refused(tmp_path):
    """They would be one folder on the file systems of some laptops, and two runs would share it."""
    path = write_sweep(tmp_path, 'run("cpc-a")', 'run("CPC-a", seed=1)')
    with pytest.raises(UserError, match="the names 'cpc-a' and 'CPC-a' differ in upper and lower case alone"):
        load_sweep(str(path))


@pytest.mark.parametrize("option", ["--store", "--probe-store"])
def test_store_of_the_command_line_is_looked_at_whatever_is_asked(tmp_path, capsys, option):
    path = write_sweep(tmp_path, 'run("a", probe="configs/probe.py:mode=linear")')
    args = ["sweep", str(path), f"--output={tmp_path / 'out'}"]
    for what in ("--list", "--collect", "--dry-run"):
        assert cli.main([*args, what, f"{option}="]) == 2
        assert f"{option}= names no store; give a folder, or leave it out" in capsys.readouterr().err
    assert cli.main([*args, "--list", f"{option}={tmp_path},sample:,{tmp_path}/none"]) == 2
    assert capsys.readouterr().err.endswith(f": there is no folder {tmp_path}/none\n")
    assert cli.main([*args, "--list", f"{option}={tmp_path},sample:"]) == 0


def test_bad_keys_are_refused(tmp_path):
    for change, message in (
        ('{"store": ""}', "store='' must be a folder"),
        ('{"overrides": {3: 4}}', "must be a dict from field names to values"),
        ('{"probe": 3}', "probe=3 must be a string"),
        ('{"probe": "configs/probe.py:task=all"}', "a table holds one task"),
        ('{"probe": "configs/probe.py:task=mimic_age"}', "has no macro AUROC, which the tables compare"),
        ('{"probe": "configs/probe.py", "probe_overrides": {"widht": 1}}', "has no field 'widht'"),
        ('{"probe_overrides": {"seed": 1}}', "has no probe; leave out"),
        ('{"probes": ["configs/probe.py"]}', "must be a dict from names to configs of probes"),
        ('{"probes": {"a": {"probes": "x"}}}', "lacks probe and has the unknown probes"),
        ('{"probes": {"a/b": "configs/probe.py"}}', "the name must be letters, digits"),
        ('{"probes": {"a": "configs/probe.py:task=nothing"}}', "'nothing' is unknown"),
        ('{"store": "--probe-store"}', "must be '--store', or a folder"),
        ('{"probe_store": "a,"}', "probe_store: the store 'a,' is misspelled"),
        ('{"name": "studies"}', "cannot name a folder of the sweep"),
        ('{"name": "slurm"}', "cannot name a folder of the sweep"),
        ('{"name": "Studies"}', "cannot name a folder of the sweep"),
        ('{"name": "x" * 101}', "has 101 characters; 100 are the most"),
        ('{"group": "a b"}', "run 'a': group: 'a b' cannot name a folder"),
        ('{"config": ""}', r"config='' names no file; give FILE\[:ARGS\]"),
        (
            '{"probe": "configs/probe.py:task=nothing"}',
            "probe=configs/probe.py:task=nothing: argument task='nothing'",
        ),
        (
            '{"probes": {"a": "configs/probe.py", "A": "configs/probe.py"}}',
            "'a' and 'A' differ in upper and lower",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load_sweep(str(write_sweep(tmp_path, f'run("a") | {change}')))
    with pytest.raises(UserError, match="have different probes"):
        load_sweep(
            str(write_sweep(tmp_path, 'run("a")', 'run("b") | {"probe": "configs/probe.py:mode=linear"}'))
        )
