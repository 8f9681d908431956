"""The same run with other seeds: how far apart two runs are that differ in nothing else.

    ecg-jax sweep configs/sweeps/seeds.py --output=runs/seeds --store=stores/heedb --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/seeds.py:quick --output=runs/seeds_quick

Arguments: objective=cpc|jepa|data2vec|dinosr|hubertpp, backbone=s4|transformer|net1d, data=18k|45k|106k|753k|11m,
seeds=5|10|3|2, quick. At the defaults 5 runs of 180 000 windows, 0.9 million in all. A seed draws the initial
parameters, the order of recordings and crops, masks and negatives; the recordings themselves are always the same.
"""

from configs.sweeps import common


def sweep(arg=""):
    arg = common.arguments(arg, seeds=("5", "10", "3", "2"))
    for seed in common.seeds(arg):
        yield common.run(f"{arg.objective}-{arg.backbone}", arg.objective, seed, **common.settings(arg))
