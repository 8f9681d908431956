"""How long a checkpoint holds the loop up, is written and is read, against the size of the model.

    pytest tests/benchmarks/test_checkpoint_benchmark.py --benchmark-only -s

States of CPC with AdamW, filled with random numbers, since zeros would compress. The parts of one model are measured in
turn; the table at the end has their ratios.
"""

import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ecg_jax.config_flags import load_config, override
from ecg_jax.models.encoder import tokens_of
from ecg_jax.run_setup import build_objective, build_optimiser
from ecg_jax.training import parallel, train_state
from ecg_jax.training.checkpoint import Checkpoints
from ecg_jax.training.checkpoint_tree import checksums, to_host

MODELS = {
    "s4-128": ("s4", 128),
    "s4-512": ("s4", 512),
    "s4-1024": ("s4", 1024),
    "transformer": ("transformer", None),
}
ROUNDS = 3
TABLE = []


def drawn(path, leaf, rng):
    """An array as of the middle of a run."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if np.issubdtype(leaf.dtype, np.floating):
        return rng.normal(size=leaf.shape).astype(leaf.dtype)
    return np.full(leaf.shape, 7, leaf.dtype)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """Name, state on one device, and its bytes."""
    backbone, width = MODELS[request.param]
    config = load_config(f"configs/cpc.py:backbone={backbone}")
    if width:
        override(config, "model.width", str(width))
    _, tx = build_optimiser(config, steps=1)
    window = round(config.data.window_s * config.data.rate_hz)
    with pytest.MonkeyPatch.context() as patch:  # bases are not part of a checkpoint, and made of numbers
        patch.setattr(train_state, "with_bases", lambda state, **_: state)
        abstract = jax.eval_shape(
            lambda: train_state.create_train_state(
                build_objective(config, axis_name=None),
                tx,
                seed=0,
                window_samples=window,
                leads=12,
                tokens=tokens_of(window),
                l_max=config.model.l_max,
            )
        )
    rng = np.random.default_rng(0)
    state = jax.tree.map_with_path(lambda path, leaf: drawn(path, leaf, rng), abstract)
    mesh = Mesh(np.asarray(jax.devices()[:1]), (parallel.AXIS,))
    state = parallel.replicate(state, mesh)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(to_host(saved(state))))
    return request.param, state, size


def saved(state):
    return {name: getattr(state, name) for name in ("params", "opt_state", "batch_stats", "ssm")}


def opened(folder):
    meta = {"store_fingerprint": "", "config": {"store": ""}, "preprocessing": {}}
    return Checkpoints(folder, keep_latest=1, keep_best=0, meta=meta)


@pytest.mark.parametrize("part", ["save blocks", "save until written", "restore", "checksums"])
def test_parts_of_a_checkpoint(benchmark, model, tmp_path, part):
    name, state, size = model
    folders = iter(range(1000))

    def fresh():
        folder = tmp_path / str(next(folders))
        return (opened(folder),), {}

    def save(checkpoints):
        checkpoints.save(state, val_loss=None)
        if part == "save until written":
            checkpoints.finish()

    def done(checkpoints):
        checkpoints.close()

    if part.startswith("save"):
        benchmark.pedantic(save, setup=fresh, teardown=done, rounds=ROUNDS)
    elif part == "restore":
        checkpoints = opened(tmp_path / "run")
        checkpoints.save(state, val_loss=None)
        checkpoints.finish()

        def restore():
            restored = checkpoints.restore_latest(state, state.step.sharding)
            return jax.block_until_ready(restored.params)

        benchmark.pedantic(restore, rounds=ROUNDS)
        files = [path for path in (tmp_path / "run" / "checkpoints" / "7").rglob("*") if path.is_file()]
        on_disk = sum(path.stat().st_size for path in files)
        benchmark.extra_info |= {"bytes_on_disk": on_disk, "files": len(files)}
        checkpoints.close()
    else:
        benchmark.pedantic(lambda: checksums(to_host(saved(state))), rounds=ROUNDS)
    seconds = benchmark.stats["median"]
    benchmark.extra_info |= {"bytes_in_memory": size, "mb_per_s": size / 1e6 / seconds}
    TABLE.append((name, part, seconds, size, benchmark.extra_info))
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print(
        "\n| model | state, MB | on disk, MB | files | save blocks, s | until written, s | restore, s | checksums, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row[0] for row in TABLE):
        rows = {part: (seconds, size, info) for other, part, seconds, size, info in TABLE if other == name}
        info = rows["restore"][2]
        times = [
            f"{rows[part][0]:.2f}" for part in ("save blocks", "save until written", "restore", "checksums")
        ]
        sizes = [f"{rows['restore'][1] / 1e6:.0f}", f"{info['bytes_on_disk'] / 1e6:.0f}", str(info["files"])]
        print(f"| {' | '.join([name, *sizes, *times])} |")
