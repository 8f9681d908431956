"""More recordings: the pretraining ladder from 18 thousand to 11 million.

    ecg-jax sweep configs/sweeps/data_ladder.py --output=runs/data_ladder \\
        --store=stores/heedb,stores/heedb_emory,stores/code15 --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/data_ladder.py:quick --output=runs/data_ladder_quick

Arguments: ladder=nested|paper, objective=cpc|jepa|data2vec|dinosr|hubertpp, backbone=s4|transformer|net1d,
seeds=3|1|2|5, top=11m|753k|106k|45k (the largest rung), quick. On ladder=nested each rung holds the one below it, drawn
from all sites and years; on ladder=paper a rung is the partition that the paper took, so that size goes with site and
year.

Ten epochs each, so that more recordings mean more updates too. At the defaults 15 runs of 0.18, 0.45, 1.06, 7.53 and
110 million windows, 358 million in all, of which the last rung is 92 %; up to top=753k 28 million. The quick variant
takes 70, 140 and all recordings of the sample's training folds.
"""

from configs.sweeps import common

QUICK_RECORDS = (70, 140, 0)  # 0: all


def sweep(arg=""):
    arg = common.arguments(
        arg, in_full=("ladder", "top"), data=None, ladder=("nested", "paper"), top=common.RUNGS[:0:-1]
    )
    rungs = common.RUNGS[: common.RUNGS.index(arg.top) + 1]
    sizes = [(rung, {"data": rung, "ladder": arg.ladder}) for rung in rungs]
    if arg.quick:
        sizes = [(f"{n}records" if n else "all", {"data__max_records": n}) for n in QUICK_RECORDS]
    for size, fields in sizes:
        for seed in common.seeds(arg):
            yield common.run(
                f"{arg.objective}-{arg.backbone}-{size}",
                arg.objective,
                seed,
                quick=arg.quick,
                backbone=arg.backbone,
                **fields,
            )
