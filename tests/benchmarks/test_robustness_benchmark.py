"""What corrupting costs: recordings per second for each kind of condition, alone and beside an encoder.

    pytest tests/benchmarks/test_robustness_benchmark.py --benchmark-only

Synthetic 10 s recordings at 240 Hz, two threads. `times_clean` is the time of a condition over that of the clean
recordings, measured in turns. The encoder is a small S4 (2 layers, width 64): a larger one hides more.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.evaluation.robustness import CLEAN, Records, build_conditions, predict
from ecg_jax.training.pretrained import RestoredEncoder, encode_fn, random_twin

N_RECORDS, ROUNDS = 256, 3
MODEL = {
    "backbone": "s4", "width": 64, "state": 64, "layers": 2, "l_max": 300, "bidirectional": True,
    "trainable_ssm": False, "dropout": 0.0, "remat": "none", "conv": "auto",
}  # fmt: skip
CONDITIONS = {
    condition.family: condition
    for condition in build_conditions(
        leads=(8,),
        swaps=("RA/LA",),
        noises=("baseline_wander", "powerline_50hz", "muscle"),
        snr_db=(6.0,),
        rates_hz=(125.0,),
        durations_s=(),
        rate_hz=240.0,
        source_hz=500.0,
        window_s=2.5,
        longest_s=10.0,
        seed=0,
    )[0]
}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "store"
    store = Store(write_synthetic_store(path, N_RECORDS, distinct=32))
    return Records(store, np.arange(N_RECORDS), list(store.column("record_id")))


@pytest.fixture(scope="module")
def encoders():
    """ "free" gives back a few samples; "s4" is a real one."""
    contract = dataclasses.replace(Preprocessing(), window_s=2.5, normalisation="ptbxl_canonical")
    empty = RestoredEncoder(Path("run"), None, {"model": MODEL}, contract, {}, 0)
    return {"free": lambda crops: crops[:, 0].astype(np.float32), "s4": encode_fn(random_twin(empty, 0))}


@pytest.mark.parametrize("encoder", ["free", "s4"])
@pytest.mark.parametrize("family", list(CONDITIONS))
def test_condition(benchmark, records, encoders, family, encoder):
    def run(condition):
        begin = time.perf_counter()
        predict(encoders[encoder], lambda x: x, records, condition, window=600, batch_size=64)
        return time.perf_counter() - begin

    run(CLEAN)
    clean = [run(CLEAN) for _ in range(ROUNDS)]
    benchmark.pedantic(run, (CONDITIONS[family],), rounds=ROUNDS, warmup_rounds=1)
    clean += [run(CLEAN) for _ in range(ROUNDS)]
    benchmark.extra_info["records_per_second"] = round(N_RECORDS / benchmark.stats["median"])
    benchmark.extra_info["times_clean"] = round(benchmark.stats["median"] / float(np.median(clean)), 2)
