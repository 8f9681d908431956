"""The sweeps that ship with the package: each loads whatever its arguments, and is what its docstring says."""

import ast
import copy
import functools
import json
import re

import numpy as np
import pytest

from configs.sweeps import common, recipe
from ecg_jax import sweep_file
from ecg_jax.config_checks import check_config
from ecg_jax.config_flags import load_config, shipped_configs
from ecg_jax.data import ladder
from ecg_jax.data.preprocessing import parse_leads
from ecg_jax.data.recording import CANONICAL_LEADS, LIMB
from ecg_jax.errors import UserError
from ecg_jax.objectives.masking import STRATEGIES
from ecg_jax.sweep_file import GIVEN, SAMPLE_STORE, differences, load_sweep, plain
from ecg_jax.sweep_file import parse_sweep_arg as parse

FOLDER = shipped_configs() / "configs" / "sweeps"
#: Files with a test of their own: one makes no table of settings, the other takes no argument.
OTHERS = {"common", "mini_study", "objectives_quick"}
FILES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py") if path.stem not in OTHERS)
#: What a file cannot do without.
NEEDED = {
    "domain_pretraining": "base=stores/a+stores/b,domain=stores/c",
    "matched_stores": "stores=stores/a+other/b,probe=stores/c",
}
#: A value of each argument that is free text.
TEXTS = {"probe": "stores/d", "task": "ptbxl_rhythm", "steps": "7", "records": "7"}
#: What groups of a file may differ in; everything else is the same, and each group differs from each other.
ABOUT = {
    "backbone_objective": {"model", "objective", "data.normalisation"},
    "data_ladder": {"data.rung"},
    "domain_pretraining": {"steps", "optimiser.learning_rate"},
    "hubert_offline": {"objective", "data.targets", "data.normalisation"},
    "input_size": {"data.window_s", "model.l_max"},
    "leads": {"data.leads"},
    "learning_rate": {"optimiser.learning_rate"},
    "masks": {"objective.mask.strategy", "objective.mask.probability"},
    "matched_stores": set(),  # their stores
    "objective_modes": {"model.bidirectional", "objective", "data.normalisation"},
    "recipe": {"model", "objective", "data.normalisation", "optimiser.factors"},
    "s4_width": {"model.width"},
    "seeds": set(),  # one group
    "trainable_ssm": {"model.trainable_ssm", "optimiser.factors.ssm"},
}


@functools.cache
def loaded(name, *arguments):
    """The sweep of a file, with what it needs unless it is quick."""
    if name in NEEDED and "quick" not in arguments:
        arguments = (NEEDED[name], *arguments)
    return load_sweep(f"configs/sweeps/{name}.py" + (":" + ",".join(arguments) if arguments else ""))


@functools.cache
def docstring(name):
    return " ".join(ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())).split())


@functools.cache
def shipped(spec):
    return load_config(spec)


@pytest.fixture
def unchecked(monkeypatch):
    """Reads each config file once, and leaves out the check of each config, which traces its encoder:
    `test_every_config_is_one_that_runs` makes it.
    """
    monkeypatch.setattr(sweep_file, "check_config", lambda config: None)
    monkeypatch.setattr(sweep_file, "load_config", lambda spec: copy.deepcopy(shipped(spec)))


SEEN = set()


@pytest.fixture
def checked_once(monkeypatch):
    """Checks what configs share once: all but the learning rates, lengths and recordings is traced in the check."""

    def check(config):
        rest = plain(config)
        traced = [rest[name] for name in ("model", "objective", "batch_size", "precision")]
        key = json.dumps([traced, config.data.window_s, config.data.leads, config.data.normalisation])
        if key not in SEEN:
            check_config(config)
        SEEN.add(key)

    monkeypatch.setattr(sweep_file, "check_config", check)


def shown(sweep):
    """What a sweep would run."""
    return [
        (
            run.name,
            run.group,
            run.store,
            run.probe_store,
            run.further,
            plain(run.config),
            plain(run.probe_config),
        )
        for run in sweep.runs
    ]


def updates(config):
    return config.steps or config.epochs * ladder.SIZES[config.data.rung] / config.batch_size


def test_every_file_has_a_test_of_what_it_is_about():
    assert set(FILES) == set(ABOUT)


@pytest.mark.parametrize("name", FILES)
def test_every_config_is_one_that_runs(name, checked_once):
    """Of every group, in full and quick; the full one asks for its stores, the quick one has the sample."""
    few = () if name == "seeds" else ("seeds=1",)
    full, quick = loaded(name, *few), loaded(name, "quick", *few)
    assert full.probes
    assert quick.probes
    for run in full.runs:
        assert run.store == GIVEN if name not in NEEDED else run.store.split("/")[0] in ("stores", "other")
    for run in quick.runs:
        assert run.store is None or run.store == SAMPLE_STORE or run.store.startswith("synthetic:")
        assert run.config.steps <= 12
        assert run.config.batch_size == 16
        assert run.config.model.width <= 64


@pytest.mark.parametrize("name", FILES)
def test_every_argument_does_something(name, unchecked, monkeypatch):
    taken = {}

    def spy(arg, *flags, **choices):
        taken.update(flags=flags, choices=choices)
        return parse(arg, *flags, **choices)

    def runs(*arguments):
        few = (
            "seeds=1" if name != "seeds" and not any(word.startswith("seeds=") for word in arguments) else ""
        )
        needed = None if "quick" in arguments else NEEDED.get(name)  # quick has stores of its own
        words = [word for word in (needed, few, *arguments) if word]
        return shown(load_sweep(f"configs/sweeps/{name}.py" + (":" + ",".join(words) if words else "")))

    with monkeypatch.context() as patch:
        for module in (sweep_file, common):
            patch.setattr(module, "parse_sweep_arg", spy)
        default = runs()
    text = docstring(name)
    for flag in taken["flags"]:
        assert re.search(rf"\b{flag}\b", text)
        assert runs(flag) != default
    for key, values in taken["choices"].items():
        if values is str:
            assert re.search(rf"\b{key}=[A-Z]", text), key
            if f"{key}=" not in NEEDED[name]:
                assert runs(f"{key}={TEXTS[key]}") != default, key
            continue
        assert f"{key}={'|'.join(values)}" in text
        for value in {*values[1:]} - ({"1"} if key == "seeds" else set()):  # the default here is one seed
            assert runs(f"{key}={value}") != default, (key, value)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("domain_pretraining", "base=stores/a"),
        ("domain_pretraining", "domain=stores/a"),
        ("matched_stores", "stores=stores/a+stores/b"),
        ("matched_stores", "probe=stores/a"),
        ("learning_rate", "width=128"),
        ("data_ladder", "ladder=paper"),
        ("data_ladder", "top=45k"),
    ],
)
def test_what_says_nothing_of_a_quick_sweep_is_refused_beside_it(name, word, unchecked):
    with pytest.raises(
        UserError, match=re.escape(f"sweep argument {word!r} says nothing of the quick variant")
    ):
        load_sweep(f"configs/sweeps/{name}.py:{word},quick")


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_says_what_it_is_and_costs(name, unchecked):
    text, runs = docstring(name), loaded(name).runs
    assert f"ecg-jax sweep configs/sweeps/{name}.py" in text
    assert f"configs/sweeps/{name}.py:quick --output" in text
    assert f" {len(runs)} runs" in text
    windows = sum(updates(r.config) * r.config.batch_size * r.config.data.window_s / 2.5 for r in runs) / 1e6
    said = [float(number) for number in re.findall(r"([\d.]+) million(?: windows)? in all", text)]
    assert said == [pytest.approx(windows, rel=0.05)]
    if name not in ("data_ladder", "input_size", "learning_rate", "s4_width", "seeds"):
        assert "can tell" in text
        assert "cannot tell" in text


@pytest.mark.parametrize("name", FILES)
def test_groups_differ_in_what_the_sweep_is_about_alone(name, unchecked):
    first = {}
    for run in loaded(name, *(["switches"] if name == "recipe" else [])).runs:
        first.setdefault(run.group, run)
    assert len(first) == 1 if name == "seeds" else len(first) > 1
    groups = [(plain(run.config), run.store, run.init and run.init.group) for run in first.values()]
    assert len({json.dumps(group, sort_keys=True) for group in groups}) == len(groups)
    for config, *_ in groups[1:]:
        for field in differences(groups[0][0], config):
            assert any(field == about or field.startswith(f"{about}.") for about in ABOUT[name]), field


def configs(name, *arguments):
    """Group -> config of its first run."""
    return {run.group: run.config for run in reversed(loaded(name, *arguments).runs)}


def test_the_grids_are_those_of_the_study(unchecked):
    both = configs("backbone_objective")
    assert not both["cpc-net1d"].model.bidirectional
    assert {(c.model.backbone, c.objective.name) for c in both.values()} == {
        (backbone, objective)
        for backbone in ("s4", "transformer", "net1d")
        for objective in ("cpc", "jepa", "data2vec", "dinosr", "hubertpp")
    }
    assert {(c.data.rung, c.data.ladder) for c in configs("data_ladder").values()} == {
        (rung, "nested") for rung in ("18k", "45k", "106k", "753k", "11m")
    }
    assert [(c.data.rung, c.data.ladder) for c in configs("data_ladder", "top=45k,ladder=paper").values()] == [
        ("45k", "paper"), ("18k", "paper"),
    ]  # fmt: skip
    assert {c.model.width for c in configs("s4_width").values()} == {128, 256, 384, 512, 768, 1024}
    assert {
        (c.data.window_s, c.model.l_max, c.objective.steps_ahead) for c in configs("input_size").values()
    } == {(2.5, 300, 14), (5.0, 600, 14), (10.0, 1200, 14)}
    assert len({c.optimiser.learning_rate for c in configs("learning_rate").values()}) == 5
    assert [run.config.seed for run in loaded("seeds").runs] == [0, 1, 2, 3, 4]
    masks = configs("masks").values()
    assert {c.objective.mask.strategy for c in masks} == set(STRATEGIES)
    assert {c.objective.mask.probability for c in masks if c.objective.mask.strategy == "span"} == {
        0.065,
        0.0065,
    }


@pytest.mark.parametrize("objective", common.OBJECTIVES)
def test_the_switches_together_are_the_released_recipe(objective, unchecked):
    groups = configs("recipe", f"objective={objective}", "switches")
    described, released = (groups[f"{objective}-{recipe}"] for recipe in ("described", "released"))
    missing = differences(plain(described), plain(released))
    if objective == "cpc":
        # What is not refused differs in no number of a run on S4; the rest is the learning rates of groups.
        assert missing - {"objective.require_causal"} == {
            f"optimiser.factors.{group}" for group in ("backbone", "stem", "ssm")
        }
        return
    for group, config in groups.items():
        if group in (f"{objective}-described", f"{objective}-released", f"{objective}-raw"):
            continue
        turned = differences(plain(described), plain(config))
        assert turned
        assert not turned & differences(plain(config), plain(released)), group  # as the released code has it
        missing -= turned
    # Standardised twice is standardised once (spec §5.6).
    assert missing == ({"objective.target_norms"} if objective == "jepa" else set())
    assert set(recipe.switches(objective)) == {group.removeprefix(f"{objective}-") for group in groups} - {
        "described", "released",
    }  # fmt: skip


def test_leads_that_follow_from_others_are_told_from_those_that_do_not(unchecked):
    """Each group's leads as combinations of I, II and V1-V6: their rank is the information in them."""
    everything = np.block([[LIMB, np.zeros((6, 6))], [np.zeros((6, 2)), np.eye(6)]])
    ranks = {}
    for group, config in configs("leads").items():
        kept = [CANONICAL_LEADS.index(lead) for lead in parse_leads(config.data.leads)]
        assert group.endswith(f"leads={len(kept)}")
        ranks[len(kept)] = np.linalg.matrix_rank(everything[kept])
    assert ranks == {12: 8, 8: 8, 6: 2, 3: 3, 2: 2, 1: 1}


def test_the_second_half_of_domain_pretraining_begins_with_the_first(unchecked):
    runs = {run.name: run for run in loaded("domain_pretraining", "steps=101").runs}
    for seed in range(3):
        base, domain, half, then = (
            runs[f"{group}-seed={seed}"] for group in ("base", "domain", "base-half", "base-then-domain")
        )
        assert (base.store, half.store) == ("stores/a,stores/b",) * 2
        assert (domain.store, then.store) == ("stores/c",) * 2
        assert then.init is half
        assert half.init is base.init is domain.init is None
        assert (base.config.steps, domain.config.steps) == (101, 101)
        assert half.config.steps + then.config.steps == 101
        of_domains = load_config("configs/domain.py:objective=cpc").optimiser.learning_rate
        assert then.config.optimiser.learning_rate == pytest.approx(of_domains)
    assert {run.probe_store for run in runs.values()} == {"stores/c"}
    assert {run.config.data.rung for run in runs.values()} == {"11m"}


def test_matched_stores_have_equal_recordings_and_updates(unchecked):
    runs = loaded("matched_stores", "records=1000").runs
    assert {(run.group, run.store) for run in runs} == {("a", "stores/a"), ("b", "other/b")}
    assert {(r.config.data.max_records, r.config.steps, r.probe_store) for r in runs} == {
        (1000, 157, "stores/c")
    }
    for arg, message in (
        ("", "stores is not given"),
        (":stores=a+b", "probe is not given"),
        (":stores=a,probe=c", "must be two or more folders of different names"),
        (":stores=x/a+y/a,probe=c", "must be two or more folders of different names"),
        (":stores=a+b,probe=c,records=1e6", "records='1e6' must be a whole number, at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            load_sweep(f"configs/sweeps/matched_stores.py{arg}")
    with pytest.raises(
        UserError, match=r"sweep argument domain is not given: domain=\.\.\., the store of the"
    ):
        load_sweep("configs/sweeps/domain_pretraining.py:base=a")
    with pytest.raises(UserError, match="steps='1' must be a whole number, at least 2"):
        loaded("domain_pretraining", "steps=1")  # of whose second half nothing is left


def test_offline_targets_are_those_of_the_head(unchecked):
    runs = loaded("hubert_offline").runs
    assert [run.targets for run in runs[::3]] == [
        None, {"features": "spectrum", "codes": 100}, {"features": "spectrum", "codes": 500},
    ]  # fmt: skip
    assert [run.config.objective.name for run in runs[::3]] == ["hubertpp", "hubert", "hubert"]


@pytest.mark.parametrize(
    ("name", "argument"), [("objective_modes", "backbone=all"), ("backbone_objective", "probes=modes")]
)
def test_every_run_is_probed_in_three_modes_and_each_backbone_once_from_scratch(name, argument, unchecked):
    runs = loaded(name, argument).runs
    assert len(runs) == 45
    for run in runs:
        assert [probe.name for probe in run.further][:3] == ["linear", "frozen", "finetune"]
        assert {probe.config.task for probe in run.further} == {"all"}
        assert all(probe.config.mode == probe.name for probe in run.further)
        assert all(
            probe.config[mode].epochs == 100 for probe in run.further for mode in ("frozen", "finetune")
        )
    scratch = [run for run in runs if len(run.further) == 4]
    assert {run.config.model.backbone for run in scratch} == set(common.BACKBONES)
    assert len(scratch) == 3
    assert all(run.config.model.bidirectional for run in scratch)  # CPC's are not
    for run in loaded(name, argument, "quick", "seeds=1").runs:
        for probe in run.further:
            assert probe.config.task == "ptbxl_super"
            assert probe.config[probe.name].epochs == 2
