"""Wider S4: 128 to 1024 channels, everything else as it is.

    ecg-jax sweep configs/sweeps/s4_width.py --output=runs/s4_width --store=stores/heedb --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/s4_width.py:quick --output=runs/s4_width_quick

Arguments: objective=cpc|jepa|data2vec|dinosr|hubertpp, data=18k|45k|106k|753k|11m, seeds=3|1|2|5, quick. At the
defaults 18 runs of 180 000 windows, 3.2 million in all; a window of width 1024 costs about four times as
much as one of 512, the default width. One learning rate serves all widths: before a width is called worse, run
learning_rate.py at it. The quick variant has widths 16, 32 and 64.
"""

from configs.sweeps import common

WIDTHS = (128, 256, 384, 512, 768, 1024)
QUICK_WIDTHS = (16, 32, 64)


def sweep(arg=""):
    arg = common.arguments(arg, backbone=None)
    for width in QUICK_WIDTHS if arg.quick else WIDTHS:
        for seed in common.seeds(arg):
            yield common.run(
                f"{arg.objective}-width={width}",
                arg.objective,
                seed,
                **common.settings(arg),
                model__width=width,
            )
