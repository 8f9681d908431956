"""What is a corpus worth, number for number? The same run on several stores, with equal recordings and updates.

    ecg-jax sweep configs/sweeps/matched_stores.py:stores=stores/mimic+stores/heedb,probe=stores/ptbxl \\
        --output=runs/matched_stores
    ecg-jax sweep configs/sweeps/matched_stores.py:quick --output=runs/matched_stores_quick

Arguments: stores=A+B+..., probe=STORE (labelled), task=TASK (else ptbxl_super), records=N (else 700000),
objective=cpc|jepa|data2vec|dinosr|hubertpp, backbone=s4|transformer|net1d, seeds=3|1|2|5, quick. A group for each
store, named after its folder. --store is not needed.

Each run takes N recordings, whole patients drawn at random of the store, which may be less than one patient short, and
ten times N / 64 updates. N must be no more than the smallest store has outside its held-out fold; a run on fewer says
so at its start, and selection.json what it took. At the defaults, and two stores, 6 runs of 7 million windows, 42
million in all.

The table can tell which store gave better features for one task of one labelled store. It cannot tell why: patients,
machines, preprocessing and recordings of a patient differ together, and a store like the probed one has an advantage.
Recordings are drawn from all sites and years; the single partition of HEEDB that the paper seems to have matched to
MIMIC-IV-ECG (spec §6) is configs/matched.py's.
"""

from pathlib import Path

from configs.sweeps import common
from ecg_jax.errors import UserError
from ecg_jax.sweep_file import SAMPLE_STORE, synthetic_store

RECORDS = 700_000  # see configs/matched.py
EPOCHS, BATCH = 10, 64
QUICK_RECORDS, QUICK_STEPS = 128, 12


def sweep(arg=""):
    arg = common.arguments(
        arg, in_full=("stores", "probe"), data=None, stores=str, probe=str, task=str, records=str
    )
    records = common.number(arg, "records", QUICK_RECORDS if arg.quick else RECORDS)
    if arg.quick:
        groups = {"sample": SAMPLE_STORE, "synthetic": synthetic_store(256)}
        probed, steps = SAMPLE_STORE, QUICK_STEPS
    else:
        stores = common.given(arg, "stores", "two or more, joined by +").split(",")
        groups = {Path(store).name: store for store in stores}
        if len(groups) < len(stores) or len(stores) < 2:
            raise UserError(
                f"sweep argument stores={'+'.join(stores)} must be two or more folders of different names"
            )
        probed, steps = common.given(arg, "probe", "the labelled store"), -(-EPOCHS * records // BATCH)
    for group, store in groups.items():
        for seed in common.seeds(arg):
            run = common.run(
                group,
                arg.objective,
                seed,
                **common.settings(arg),
                data="11m",
                data__max_records=records,
                steps=steps,
            )
            yield run | {
                "store": store,
                "probe_store": probed,
                "probe": common.linear_probe(arg.task),
            }
