"""Checkpoints of the reference implementation for tests: read without torch, or made up small."""

import collections
import pickle
import zipfile

import numpy as np

from ecg_jax.interop import torch_file
from ecg_jax.interop.torch_checkpoint import BACKBONE, HEAD, MASKING, STEM, TEACHER
from ecg_jax.interop.torch_names import CLUSTERING, read_layout

NAMES = {"FloatStorage": np.float32, "LongStorage": np.int64}


class ZipReader(pickle.Unpickler):
    """Reads the tensors of a torch zip file into numpy arrays, without torch."""

    def __init__(self, path):
        self.archive = zipfile.ZipFile(path)
        (data,) = (name for name in self.archive.namelist() if name.endswith("/data.pkl"))
        self.root = data.removesuffix("data.pkl")
        super().__init__(self.archive.open(data))

    def find_class(self, module, name):
        known = {"OrderedDict": collections.OrderedDict, "_rebuild_tensor_v2": self.tensor} | NAMES
        return known[name]

    def persistent_load(self, saved_id):
        _, dtype, key, _, _ = saved_id
        return np.frombuffer(self.archive.read(f"{self.root}data/{key}"), dtype)

    @staticmethod
    def tensor(storage, offset, shape, stride, *_):
        strides = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides)


def read_zip(path):
    return torch_file.parse_content(
        path, ZipReader(path).load(), to_array=lambda view: np.array(view, order="C")
    )


def with_nodes(sd, tokens=300):
    """The state dict with the FFT nodes of its S4 layers, in float32 as the reference makes them."""
    omega = np.exp(np.complex64(-2j * np.pi / tokens)) ** np.arange(tokens // 2 + 1)
    omega = omega.astype(np.complex64)
    z = 2 * (1 - omega) / (1 + omega)
    nodes = {
        f"{name.removesuffix('C')}{node}": np.stack([value.real, value.imag], axis=-1)
        for name in sd if name.endswith(".kernel.kernel.C")
        for node, value in (("omega", omega), ("z", z))
    }  # fmt: skip
    return sd | nodes


def sizes(backbone, objective, width=16):
    """The arrays of a small checkpoint from which sizes are read, empty but for their shapes."""
    sd = {STEM + "layers.0.0.weight": (width, 12, 3)}
    sd |= {
        "s4": {"s4_layers.1.kernel.kernel.C": (2, width, 4, 2), "s4_layers.0.kernel.kernel.C": (2, width, 4, 2)},
        "transformer": {
            "pos_encoding.inv_freq": (width // 4,), "layers.1.norm1.bias": (width,),
            "layers.0.ff.linear1.weight": (2 * width, width),
        },
        "net1d": {
            "first_conv.conv.weight": (8, width, 4), "stage_list.0.block_list.0.conv1.conv.weight": (8, 8, 1),
            "stage_list.0.block_list.0.conv2.conv.weight": (8, 4, 4),
            "stage_list.1.block_list.0.conv1.conv.weight": (width, 8, 1),
            "stage_list.1.block_list.1.conv1.conv.weight": (width, width, 1),
        },
    }[backbone]  # fmt: skip
    sd = {(name if name.startswith(STEM) else BACKBONE + name): shape for name, shape in sd.items()}
    head = {
        "cpc": {"proj.0.weight": (width, width)},
        "hubertpp": {"proj.2.weight": (20, width), "proj.2.bias": (20,)},
    }
    s4_head = {"s4.s4_layers.0.kernel.kernel.C": (2, width, 8, 2)}
    sd |= {HEAD + name: shape for name, shape in head.get(objective, s4_head).items()}
    if objective != "cpc":
        sd |= {
            MASKING + ("mask_token" if objective == "jepa" else "mask_item"): (1, width),
            TEACHER + "x": (),
        }
    if objective == "dinosr":
        sd |= {f"{CLUSTERING}{i}.code_cnt": (16,) for i in range(2)}
    return with_nodes({name: np.zeros(shape, np.float32) for name, shape in sd.items()})


def small_sd(backbone, objective, **kwargs):
    """A complete random state dict of small size."""
    rng = np.random.default_rng(0)
    layout = read_layout(sizes(backbone, objective, **kwargs))
    sd = {name: rng.uniform(0.1, 0.5, shape).astype(np.float32) for name, shape in layout.expected.items()}
    for name in sd:
        if name.endswith("num_batches_tracked"):
            sd[name] = np.array(7)
        elif name.endswith(".kernel.kernel.w"):
            sd[name][..., 0] = -0.5
        elif name.endswith("kernel.kernel.log_dt"):
            sd[name] -= 4
        elif name.endswith(".kernel.kernel.Q"):
            sd[name] = sd[name.removesuffix("Q") + "P"] * np.array([1, -1], np.float32)
        elif name.endswith("inv_freq"):
            sd[name] = 10_000.0 ** (-np.arange(len(sd[name])) / len(sd[name]))
    return with_nodes(sd)
