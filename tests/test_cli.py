import os
import subprocess
import sys

import pytest

import ecg_jax
from ecg_jax import cli
from ecg_jax.errors import UserError


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: ecg-jax {command}" in out
    assert len(out) > 500


def test_usage_lists_all_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert ecg_jax.__version__ in capsys.readouterr().out


def test_unknown_command(capsys):
    assert cli.main(["pretain"]) == 2
    assert "unknown command 'pretain'" in capsys.readouterr().err


def test_user_error_is_one_line_and_code_2(monkeypatch, capsys):
    from ecg_jax import embed

    def refuse(argv):
        raise UserError("the file x is empty; give another")

    monkeypatch.setattr(embed, "main", refuse)
    assert cli.main(["embed"]) == 2
    assert capsys.readouterr().err == "ecg-jax embed: error: the file x is empty; give another\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "ecg-jax embed: error: /x/y: Permission denied\n"),
        (OSError(36, "File name too long", "zzz"), "ecg-jax embed: error: zzz: File name too long\n"),
        (OSError("a bug"), None),
        (BrokenPipeError(32, "Broken pipe"), None),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(monkeypatch, capsys, error, said):
    from ecg_jax import embed

    def fail(argv):
        raise error

    monkeypatch.setattr(embed, "main", fail)
    if said is None:
        with pytest.raises(type(error)):
            cli.main(["embed"])
    else:
        assert cli.main(["embed"]) == 2
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("command", ["report", "embed"])
def test_an_argument_that_is_not_utf8_is_refused(command, capsys):
    assert cli.main([command, os.fsdecode(b"--output=\xe9.html")]) == 2
    assert capsys.readouterr().err == (
        r"ecg-jax: error: the argument '--output=\udce9.html' is not UTF-8; rename what it names" + "\n"
    )


@pytest.mark.parametrize("module", ["ecg_jax", "ecg_jax.cli"])
def test_modules_run_as_the_script_does(module):
    done = subprocess.run([sys.executable, "-m", module, "pretain"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown command 'pretain'" in done.stderr


def test_importing_the_package_is_light():
    code = (
        "import sys, ecg_jax, ecg_jax.cli; heavy = {'jax', 'flax', 'numpy', 'wfdb', 'pandas', 'sklearn', 'matplotlib'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layers_import_downwards_only():
    """`data`, `models` and `objectives` stand on their own (see the package docstrings)."""
    forbidden = {
        "ecg_jax.data.store": {"jax", "flax", "ecg_jax.models", "ecg_jax.training"},
        "ecg_jax.data.pipeline": {"jax", "ecg_jax.models", "ecg_jax.training"},
        "ecg_jax.models.encoder": {"orbax", "grain", "ml_collections", "ecg_jax.data", "ecg_jax.training"},
        "ecg_jax.objectives.cpc": {"orbax", "grain", "ml_collections", "ecg_jax.data", "ecg_jax.training"},
        "ecg_jax.evaluation.heads": {"jax", "flax", "ecg_jax.models", "ecg_jax.training", "ecg_jax.data"},
        "ecg_jax.prepare": {"jax", "flax", "orbax"},
    }
    for module, names in forbidden.items():
        code = f"import sys, {module}; sys.exit(', '.join(set({sorted(names)}) & set(sys.modules)) or 0)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, f"{module} imports {done.stderr}"
