"""Longer inputs: windows of 2.5, 5 and 10 s.

    ecg-jax sweep configs/sweeps/input_size.py --output=runs/input_size --store=stores/heedb --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/input_size.py:quick --output=runs/input_size_quick

Arguments: objective=cpc|jepa|data2vec|dinosr|hubertpp, backbone=s4|transformer|net1d, data=18k|45k|106k|753k|11m,
seeds=3|1|2|5, quick. At the defaults 9 runs of 180 000 windows; counted in windows of 2.5 s that is 3.8 million in all.

A window, and a batch, of 10 s has four times the tokens, so that it costs and shows four times as much in each step;
steps and recordings are the same. What counts tokens keeps its length in time: CPC still predicts 14 tokens (117 ms)
ahead, and masked spans and patches stay as long; block masks are shares of the window and grow with it. Length
corrections of S4 (model.l_max) follow the window. The probe reads a recording in windows of the run's own
length and averages its predictions, so that a 10 s recording is one window or four; a recording that is shorter than a
window is tested in no run of the table.
"""

from configs.sweeps import common

WINDOWS = (2.5, 5.0, 10.0)  # seconds
TOKENS_PER_S = 120


def sweep(arg=""):
    arg = common.arguments(arg)
    for window_s in WINDOWS:
        for seed in common.seeds(arg):
            yield common.run(
                f"{arg.objective}-{arg.backbone}-{window_s:g}s",
                arg.objective,
                seed,
                **common.settings(arg),
                data__window_s=window_s,
                model__l_max=round(TOKENS_PER_S * window_s),
            )
