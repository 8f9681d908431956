"""Ratios that the S4 encoder is held to, in one run, with the machine's own roofline beside them.

    pytest tests/benchmarks/test_encoder_benchmark.py --benchmark-only -s

At width 512, batch 64 and windows of 2.5 s, forward and backward pass:
- the encoder with the algorithm that `model.conv="auto"` takes against the FFT form (aim: 1.4),
- S4 against the six-layer Transformer, windows per second (aim: 4),
- a CPC step against its encoder's forward and backward pass (aim: at most 1.15).

The programs take turns. `ECG_JAX_BENCHMARK_BATCH` changes the batch, `ECG_JAX_BENCHMARK_ROUNDS` the turns (5).
"""

import os

import jax
import pytest

from ecg_jax.config_flags import load_config, override
from ecg_jax.studies import flops
from ecg_jax.studies.efficiency_programs import build, encoder_program, step_program
from ecg_jax.studies.roofline import measure_roofline
from ecg_jax.studies.timing import time_in_turns

BATCH = int(os.environ.get("ECG_JAX_BENCHMARK_BATCH", "64"))
ROUNDS = int(os.environ.get("ECG_JAX_BENCHMARK_ROUNDS", "5"))


def config_of(spec="configs/cpc.py", **changes):
    config = load_config(spec)
    for field, value in {"batch_size": BATCH, **changes}.items():
        override(config, field.replace("__", "."), str(value))
    return config


@pytest.mark.benchmark(group="encoder")
def test_ratios(benchmark):
    configs = {
        "S4": config_of(),
        "S4 by FFT": config_of(model__conv="fft"),
        "Transformer": config_of("configs/cpc.py:backbone=transformer"),
    }
    roofline = measure_roofline()
    programs, models = {}, {name: build(config) for name, config in configs.items()}
    for name, model in models.items():
        programs[name] = encoder_program(model.config, model.encoder_variables(), gradient=True)
    programs["CPC step"] = step_program(models["S4"])
    timings = benchmark.pedantic(
        lambda: time_in_turns({name: program.run for name, program in programs.items()}, repeats=ROUNDS),
        rounds=1,
    )
    seconds = {name: timing.median for name, timing in timings.items()}
    ratios = {
        "FFT form over the best, encoder forward and backward": seconds["S4 by FFT"] / seconds["S4"],
        "Transformer over S4, encoder forward and backward": seconds["Transformer"] / seconds["S4"],
        "CPC step over its encoder": seconds["CPC step"] / seconds["S4"],
    }
    counted = {name: flops.encoder_cost(config).total for name, config in configs.items()}
    counted["CPC step"] = flops.training_flops(configs["S4"])
    print(f"\n{jax.devices()[0].device_kind}, batch {BATCH}, {roofline}")
    for name, timing in timings.items():
        ideal = roofline.seconds(
            flops=BATCH * counted[name], moved_bytes=programs[name].least_bytes, precision="float32"
        )
        print(
            f"{name}: {timing.median:.3f} s ({timing.low:.3f} to {timing.high:.3f}), "
            f"{BATCH / timing.median:.1f} windows/s, "
            f"{ideal / timing.median:.0%} of the roofline, compiled in {programs[name].compile_s:.1f} s, "
            f"peak memory {programs[name].peak_bytes / 1e9:.2f} GB"
        )
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    benchmark.extra_info.update(ratios)
