"""The README's first command, made small."""

import json

import pytest

from ecg_jax import cli
from ecg_jax.quickstart import SAMPLE


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart") / "out"
    small = {"model.width": 16, "batch_size": 16, "steps": 6, "log_every": 1, "checkpoint_every": 3}
    overrides = [f"--config.{name}={value}" for name, value in small.items()]
    return workdir, ["quickstart", f"--workdir={workdir}", *overrides]


def test_from_raw_files_to_a_probed_checkpoint(arguments, capsys):
    workdir, args = arguments
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    for picture in ("ecg.png", "loss.png", "probe/per_class_auroc.png"):
        path = workdir / picture
        assert path.stat().st_size > 10_000
        assert str(path) in out
    assert "304 records of ptbxl" in out
    assert "ecg-jax embed --checkpoint=" in out

    results = json.loads((workdir / "probe" / "results.json").read_text())
    assert results["ci_low"] <= results["macro_auroc"] <= results["ci_high"]
    assert set(results["per_class"]) == {"NORM", "MI", "STTC", "CD", "HYP"}
    assert results["baselines"]["majority"]["macro_auroc"] == 0.5
    assert 0.3 < results["baselines"]["random_init"]["macro_auroc"] < 1.0
    assert results["n_patients"] < results["n_records"] <= 40
    assert f"{results['macro_auroc']:.3f}" in out


def test_again_does_nothing_twice(arguments, capsys):
    workdir, args = arguments
    before = (workdir / "run" / "log.jsonl").read_bytes()
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert "was complete already" in out
    assert "continuing at step 6 of 6" in out
    assert (workdir / "run" / "log.jsonl").read_bytes() == before


def test_next_command_works(arguments, tmp_path):
    """The command that the quickstart names at its end."""
    run = arguments[0] / "run"
    output = tmp_path / "embeddings.npz"
    assert (
        cli.main(["embed", f"--checkpoint={run}", f"--input={SAMPLE / 'records100'}", f"--output={output}"])
        == 0
    )
    assert output.stat().st_size > 1000
