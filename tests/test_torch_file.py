"""Reading checkpoint files with torch, and what is said of files that are none."""

import collections
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import GOLDEN
from ecg_jax import cli
from ecg_jax.errors import UserError
from ecg_jax.interop import torch_file


def run_command(path, workdir):
    return cli.main(["import-checkpoint", str(path), f"--workdir={workdir}"])


def test_files_that_are_no_checkpoint(tmp_path, capsys):
    assert run_command(tmp_path / "nothing.ckpt", tmp_path / "run") == 2
    assert "nothing.ckpt cannot be read: No such file or directory" in capsys.readouterr().err
    path = tmp_path / "some.ckpt"
    for content, sentence in [
        ([1], "holds no state_dict"),
        ({"state_dict": {"a": np.zeros(1)}}, "holds no global_step"),
        ({"state_dict": {"a": np.zeros(1)}, "global_step": -1}, "global_step=-1 must be a whole number"),
        ({"state_dict": {}, "global_step": 1}, "its state_dict is empty"),
        ({"state_dict": {"a": "text"}, "global_step": 1}, "a of its state_dict is no tensor"),
    ]:
        with pytest.raises(UserError, match=sentence):
            torch_file.parse_content(path, content, to_array=lambda value: value.astype(np.float32))


def test_without_torch_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run_command(GOLDEN / "ckpt_cpc_narrow.ckpt", tmp_path / "run") == 2
    assert "needs torch: pip install 'ecg_jax[torch]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_damaged_files(tmp_path, capsys):
    pytest.importorskip("torch")
    whole = (GOLDEN / "ckpt_cpc_narrow.ckpt").read_bytes()
    path = tmp_path / "file.ckpt"
    for content in (b"", b"hello\n", whole[:1000], whole[:-50_000], pickle.dumps({"state_dict": print})):
        path.write_bytes(content)
        assert run_command(path, tmp_path / "run") == 2
        error = capsys.readouterr().err
        assert f"{path} cannot be read as a torch checkpoint" in error
        assert error.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.ckpt"]


class Settings:
    """Stands for the objects of other packages that Lightning stores."""

    def __init__(self):
        self.lr = 1e-3

    def __setstate__(self, state):
        raise AssertionError("code of the file's classes was run")


def test_objects_of_other_packages_are_passed_over(tmp_path):
    torch = pytest.importorskip("torch")
    content = torch.load(GOLDEN / "ckpt_cpc_narrow.ckpt", weights_only=True)
    whole = {name: value.clone() for name, value in content["state_dict"].items()}
    ours = SimpleNamespace(a=Settings(), b=collections.defaultdict(list, {"x": [Settings()]}))
    torch.save({**content, "hyper_parameters": {"config": ours}}, tmp_path / "file.ckpt")
    read = torch_file.read_torch_checkpoint(tmp_path / "file.ckpt")
    assert read.state_dict.keys() == whole.keys()
    for name, value in read.state_dict.items():
        np.testing.assert_array_equal(value, whole[name].numpy())
        assert value.flags.c_contiguous
        assert value.flags.owndata
