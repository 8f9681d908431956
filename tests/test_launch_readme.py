"""What launch/README.md says exists: files, tests, commands and their options."""

import ast
import contextlib
import functools
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ecg_jax import cli
from ecg_jax.data.ladder import SIZES

ROOT = Path(__file__).parents[1]
README = (ROOT / "launch" / "README.md").read_text()


def table(first):
    """Rows of the table whose first column is called so, without its headline."""
    lines = README.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert len({len(row) for row in rows}) == 1
    return rows[0], rows[2:]


def commands():
    """Each `ecg-jax COMMAND ...` of the page as words, from blocks and from running text."""
    text = README.replace("\\\n", " ")
    found = re.findall(r"(?<![\w/.-])ecg-jax [a-z-]+(?: +[^`\n)]*)?", text)
    return [shlex.split(words.replace("...", " ")) for words in found]


HEAD, FAULTS = table("fault")
NAMED = sorted(set(re.findall(r"(tests/\w+\.py)::(\w+)", README)))


def test_every_fault_says_what_is_lost_and_who_tested_it():
    assert HEAD == ["fault", "what happens", "what is lost", "what to do", "tested by"]
    assert len(FAULTS) >= 12
    for row in FAULTS:
        assert all(row), row
        assert "not exercised" in row[-1] or re.search(r"`tests/\w+\.py::test_\w+`", row[-1]), row[0]


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_named_tests_exist(file, name):
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_named_files_exist():
    named = set(re.findall(r"\b(?:launch|configs|tests)/[\w./-]*\.\w+", README))
    assert len(named) > 10
    for path in named:
        assert (ROOT / path).exists(), path
    for path in (ROOT / "launch").glob("**/*"):
        if path.is_file() and path.name != "README.md" and "__pycache__" not in path.parts:
            assert path.name in README, f"{path} is not explained"


def options_of(help_text):
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_text))


@functools.cache
def help_of(command):
    """The help of one of our commands."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return text.getvalue()


def test_commands_and_their_options_exist():
    shown = commands()
    assert {words[1] for words in shown} >= {"pretrain", "prepare", "sweep", "verify", "capacity"}
    for words in shown:
        assert words[1] in cli.COMMANDS, words
        given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        ours = {option for option in given if not option.startswith("--config.")}
        assert ours <= options_of(help_of(words[1])), words


def test_options_that_the_text_names_exist():
    pretrain = options_of(help_of("pretrain"))
    named = {"--init-timeout", "--heartbeat-timeout", "--coordinator", "--num-processes", "--process-id"}
    assert named <= pretrain
    render = subprocess.check_output([sys.executable, ROOT / "launch/gke/render.py", "--help"], text=True)
    shown = re.search(r"render\.py (--name=cpc-11m.*?)-- ecg-jax", README.replace("\\\n", " "), re.S)
    assert options_of(shown[1]) | {"--tpu", "--grace-s", "--max-restarts"} <= options_of(render)


def test_the_command_of_the_batch_script_has_a_config_that_loads():
    from ecg_jax.config_flags import load_config

    text = (ROOT / "launch" / "slurm" / "pretrain.sbatch").read_text()
    (spec,) = re.findall(r"--config=(\S+)", text)
    assert load_config(spec).store is None


def test_defaults_that_the_page_states():
    from ecg_jax import workdir
    from ecg_jax.config_flags import load_config
    from ecg_jax.training import distributed

    assert f"({distributed.INIT_TIMEOUT_S:g} s)" in README
    assert f"{distributed.HEARTBEAT_S:g} s of silence" in README
    assert f"waits up to {workdir.LOCK_WAIT_S:g} s" in README
    assert f"`--config.stall_timeout_s` ({load_config('configs/cpc.py').stall_timeout_s:g} s" in README
    for code in ("0", "1", "2", "75", "130"):
        assert [row for row in table("code")[1] if row[0] == code], code


def test_the_table_of_what_a_cluster_needs_is_what_the_command_prints(capsys):
    (command,) = [words for words in commands() if words[1] == "capacity" and len(words) > 2]
    assert cli.main(command[1:]) == 0
    printed = [re.split(r"\s{2,}", line)[1:] for line in capsys.readouterr().out.splitlines()]
    loads = [cells for cells in printed if len(cells) == 10 and cells[0] != "each"]
    rungs = [cells for cells in printed if len(cells) == 7 and cells[2] in SIZES]
    rows = table("windows/s of a device (not measured)")[1]
    assert len(loads) == len(rows) == 6
    for i, (row, load) in enumerate(zip(rows, loads, strict=True)):
        assert [row[0], *row[1].split(", ")] == load[:3]
        warm, _, cold, unit = row[2].split()
        for said, exact in zip((warm, cold), load[4:6], strict=True):
            megabytes = float(said) * {"MB/s": 1, "GB/s": 1000}[unit]
            assert megabytes == pytest.approx(float(exact.replace(" ", "")), rel=0.005)
        assert row[3] == load[6]
        assert [cell.split()[0] for cell in row[4:7]] == load[7:]
        for said, (*_, steps, time) in zip(row[7:], rungs[5 * i : 5 * i + 5], strict=True):
            assert said in (time, f"{steps} steps")


def test_three_places_to_change():
    text = (ROOT / "launch" / "slurm" / "pretrain.sbatch").read_text()
    assert text.count("# CHANGE") == 3
    for word in ("--ntasks-per-node", "ENVIRONMENT=", "COMMAND=("):
        assert word in README
        assert word in text


def test_nothing_names_a_real_place():
    for path in (ROOT / "launch").glob("**/*"):
        if path.is_file() and "__pycache__" not in path.parts:
            text = path.read_text()
            assert not re.search(r"/work/|/home/|/root/|@\w+\.(?:com|edu|org)", text), path
