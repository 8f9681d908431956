"""HuBERT++, whose clusters are made while it trains, against HuBERT-ECG, whose clusters are made beforehand.

    ecg-jax sweep configs/sweeps/hubert_offline.py --output=runs/hubert_offline --store=stores/heedb \\
        --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/hubert_offline.py:quick --output=runs/hubert_offline_quick

Arguments: backbone=s4|transformer|net1d, data=18k|45k|106k|753k|11m, seeds=3|1|2|5, quick. Three groups: `hubertpp`,
with 128 and 256 prototypes, and `offline-100` and `offline-500` with as many k-means clusters of spectra, which the
sweep makes beside the store before the first run that needs them, once, of all its training recordings: below the rung
that holds them all, offline clusters have seen recordings that no run is trained on. At the defaults 9 runs of 180 000
windows, 1.6 million in all, and the clusters. Offline targets lie beside one store, so that --store is one folder.

The table can tell whether clusters that follow the features do better than clusters of spectra that stay. It cannot
tell which part does it: the two also differ in the weight of visible tokens (alpha), the temperature and a teacher. And
HuBERT-ECG goes on to cluster features of its own first run, which is two more commands (`ecg-jax cluster
--features=RUN`, then configs/hubert.py:variant=offline) and is not here. val_loss counts other clusters in each group.
"""

from configs.sweeps import common

NOTE = (
    "The offline clusters were fitted on every training recording of the store, also of a run that was trained on "
    "fewer of them."
)

CODES = (100, 500)
QUICK_CODES = (8, 16)


def sweep(arg=""):
    arg = common.arguments(arg, objective=None)
    settings = common.settings(arg)
    for seed in common.seeds(arg):
        yield common.run("hubertpp", "hubertpp", seed, **settings)
    for codes in QUICK_CODES if arg.quick else CODES:
        for seed in common.seeds(arg):
            run = common.run(f"offline-{codes}", common.OFFLINE, seed, **settings, objective__codes=codes)
            yield run | {"targets": common.offline_targets(codes)}
