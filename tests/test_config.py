"""Config files and their overrides: every shipped file loads, shrinks and runs a step."""

import jax
import numpy as np
import pytest

from configs import common
from ecg_jax import cli
from ecg_jax.config_checks import check_config
from ecg_jax.config_flags import load_config, override, parse_arg, shipped_configs
from ecg_jax.errors import UserError
from ecg_jax.objectives import masking
from ecg_jax.pretrain import main as pretrain_main
from ecg_jax.pretrain import pretrain
from ecg_jax.training.metric_writers import read_log
from tiny_runs import SPECS

PRETRAINING = ["configs/cpc.py", "configs/cpc.py:data=11m,recipe=released", "configs/quickstart.py"]
# With an origin, or a matching store: tests/test_domain.py.
OF_DOMAINS = {"domain.py", "matched.py"}

MINE = "from configs import cpc\ndef get_config(arg):\n    config = cpc.get_config(arg)\n    {}\n    return config\n"


def test_every_shipped_config_is_known():
    names = {path.name for path in (shipped_configs() / "configs").glob("*.py")} - {
        "__init__.py",
        "common.py",
    }
    tested = {spec.partition(":")[0].removeprefix("configs/") for spec in [*PRETRAINING, *SPECS.values()]}
    assert names == tested | OF_DOMAINS | {"probe.py", "robustness.py", "label_efficiency.py"}
    assert load_config("configs/probe.py").mode == "linear"
    assert load_config("configs/probe.py:mode=frozen,legacy=half").bootstrap.undefined == "half"


@pytest.mark.parametrize(
    ("spec", "precision"), [*((spec, "float32") for spec in PRETRAINING), ("configs/cpc.py", "bfloat16")]
)
def test_shipped_config_runs_a_step(spec, precision, tmp_path, synthetic_store):
    config = load_config(spec)
    override(config, "precision", precision)
    changes = {
        "store": str(synthetic_store), "model.width": "16", "model.layers": "1", "batch_size": "8", "steps": "1",
        "data.max_val_crops": "8",
    }  # fmt: skip
    for name, value in changes.items():
        override(config, name, value)
    state = pretrain(config, tmp_path / "run")
    assert int(state.step) == 1
    assert np.isfinite(read_log(tmp_path / "run")[-1]["val_loss"])


def test_recipes_differ_in_the_learning_rate_groups():
    described, released = (load_config(f"configs/cpc.py:recipe={name}") for name in ("described", "released"))
    check_config(described)
    assert described.optimiser.factors.to_dict() == {"head": 1.0, "backbone": 1.0, "stem": 1.0, "ssm": 0.1}
    assert released.optimiser.factors.to_dict() == {"head": 1.0, "backbone": 0.1, "stem": 0.01, "ssm": 0.01}
    data = load_config("configs/cpc.py:data=753k,ladder=paper").data
    assert (data.rung, data.ladder, data.max_records) == ("753k", "paper", 0)
    assert load_config("configs/jepa.py:ladder=paper").data.ladder == "paper"
    assert load_config("configs/hubert.py").data.ladder == "nested"


def test_released_recipe_sets_every_switch_of_the_published_code():
    """Spec §11.1."""
    for name in ("jepa", "data2vec", "dinosr", "hubert"):
        described, released = (
            load_config(f"configs/{name}.py:recipe={r}") for r in ("described", "released")
        )
        assert described.data.normalisation == "ptbxl_canonical"
        assert released.data.normalisation == "ptbxl_misordered"
        teacher = described.objective.teacher
        assert (teacher.mode, teacher.train_mode, teacher.momentum) == ("ema", False, 0.9996)
        teacher = released.objective.teacher
        assert (teacher.mode, teacher.train_mode, teacher.batch_stats) == ("frozen_random", True, "own")
        masks = [
            (c.objective.mask.probability, c.objective.mask.min_keep, c.objective.mask.last_token)
            for c in (described, released)
        ]
        assert masks == [(0.065, 1, True), (0.0065, 64, False)]
        assert released.optimiser.factors.to_dict() == {
            "head": 1.0, "backbone": 0.1, "stem": 0.01, "ssm": 0.01,
        }  # fmt: skip
        check_config(described)
        check_config(released)
    norms = [load_config(f"configs/jepa.py:recipe={r}").objective.target_norms for r in common.RECIPES]
    assert norms == [1, 2]
    codebooks = [load_config(f"configs/dinosr.py:recipe={r}").objective for r in common.RECIPES]
    assert [(c.top_k, c.idle_logits, c.codes) for c in codebooks] == [(2, 0, 256), (1, 256, 256)]


def test_mask_strategies_of_the_configs_are_those_there_are():
    assert set(common.STRATEGIES) == set(masking.STRATEGIES)
    assert load_config("configs/jepa.py").objective.mask.strategy == "block"
    assert load_config("configs/data2vec.py:mask=time").objective.mask.strategy == "time"


def test_defaults_are_the_papers():
    config = load_config("configs/cpc.py")
    assert (config.batch_size, config.epochs, config.optimiser.learning_rate) == (64, 10, 3e-3)
    assert (config.model.width, config.model.state, config.model.layers, config.model.dropout) == (
        512,
        8,
        4,
        0.2,
    )
    assert (config.objective.steps_ahead, config.objective.negatives) == (14, 128)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("seed", "7", 7),
        ("optimiser.learning_rate", "1", 1.0),
        ("tensorboard", "false", False),
        ("store", "/some/folder", "/some/folder"),
        ("objective.temperature", "1e-1", 0.1),
    ],
)
def test_override_keeps_the_declared_type(path, text, value):
    config = load_config("configs/cpc.py")
    override(config, path, text)
    node = config
    for name in path.split("."):
        node = node[name]
    assert node == value
    assert type(node) is type(value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("configs/nothing.py", "there is no file configs/nothing.py"),
        ("configs/cpc.py:data=1k", "data='1k' is unknown; did you mean"),
        ("configs/cpc.py:ladder=papers", "ladder='papers' is unknown; did you mean 'paper'"),
        ("configs/cpc.py:dat=18k", "'dat' is unknown; did you mean 'data'"),
        ("configs/cpc.py:18k", "'18k' is not of the form key=value"),
        (
            "configs/hubert.py:variant=offline,recipe=released",
            "no code was published for HuBERT with offline",
        ),
        ("configs/jepa.py:mask=blocks", "mask='blocks' is unknown; did you mean 'block'"),
    ],
)
def test_bad_config_file_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        load_config(spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(arg:\n", "mine.py line 1 is not valid Python"),
        ("x = 1\n", "defines no get_config"),
        (
            "import nothing_like_it\n",
            "mine.py line 1: ModuleNotFoundError: No module named 'nothing_like_it'",
        ),
        ("def get_config(arg):\n    return {}\n", "returns a dict, not a ConfigDict"),
        (MINE.format("config.model.widht = 3"), 'mine.py line 4: .*Did you mean "width" instead of "widht"'),
        (MINE.format("config.learning_rate = 1e-4"), "mine.py line 4: .*learning_rate"),
        (MINE.format("config.seed = 'x'"), "mine.py line 4: TypeError: .*field 'seed'"),
    ],
)
def test_broken_config_file_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(str(path))


def test_parse_arg_takes_the_first_choice_as_default():
    arg = parse_arg("b=y", a=("1", "2"), b=("x", "y"))
    assert (arg.a, arg.b) == ("1", "y")


def test_own_config_file_may_build_on_a_shipped_one(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import cpc\n\ndef get_config(arg=''):\n    config = cpc.get_config(arg)\n"
        "    config.batch_size = 8\n    return config\n"
    )
    assert load_config(f"{path}:data=45k").data.rung == "45k"


def test_config_file_may_import_its_neighbour(tmp_path):
    (tmp_path / "base_of_mine.py").write_text(MINE.format("config.seed = 3"))
    path = tmp_path / "variant.py"
    path.write_text("import base_of_mine\n\ndef get_config(arg):\n    return base_of_mine.get_config(arg)\n")
    assert load_config(str(path)).seed == 3


def test_group_of_fields_cannot_be_overridden():
    with pytest.raises(UserError, match=r"config.model is a group of fields; set one of backbone, "):
        override(load_config("configs/cpc.py"), "model", "s4")


def test_config_of_another_command_is_refused(capsys):
    args = ["--checkpoint=x", "--store=x", "--workdir=x"]
    assert cli.main(["probe", "--config=configs/cpc.py", *args]) == 2
    err = capsys.readouterr().err
    assert "lacks the fields baseline_seeds, bootstrap.interval, " in err
    assert "is it a config for `ecg-jax probe`?" in err


def test_print_config_shows_overrides(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["pretrain", "--config=configs/cpc.py", "--workdir=x", "--config.seed", "5", "--print-config"]
        )
    assert stop.value.code == 0
    assert "seed: 5" in capsys.readouterr().out


def test_every_device_is_used():
    """The other tests rely on eight virtual devices."""
    assert jax.device_count() == 8


def test_printing_a_config_needs_no_workdir(capsys):
    with pytest.raises(SystemExit) as done:
        pretrain_main(["--config=configs/jepa.py:backbone=net1d", "--print-config"])
    assert done.value.code == 0
    assert "group_width: 16" in capsys.readouterr().out


def test_an_argument_twice_is_refused():
    with pytest.raises(UserError, match=r"'backbone' is given twice, as 's4' and 'net1d'"):
        load_config("configs/cpc.py:backbone=s4,backbone=net1d")


@pytest.mark.parametrize(
    ("field", "value"), [("width", "1000000000"), ("layers", "1000000"), ("kernel", "100000")]
)
def test_sizes_beyond_all_reason_are_refused(field, value):
    config = load_config("configs/cpc.py:backbone=net1d" if field == "kernel" else "configs/cpc.py")
    override(config, f"model.{field}", value)
    with pytest.raises(UserError, match=rf"config.model.{field}={value} must be at most"):
        check_config(config)
