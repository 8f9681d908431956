"""How many leads does it take? From all twelve to one, in pretraining and in the probe alike.

    ecg-jax sweep configs/sweeps/leads.py --output=runs/leads --store=stores/heedb --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/leads.py:quick --output=runs/leads_quick

Arguments: objective=cpc|jepa|data2vec|dinosr|hubertpp, backbone=s4|transformer|net1d, data=18k|45k|106k|753k|11m,
seeds=3|1|2|5, quick. Six groups:
    12    all
    8     I, II, V1-V6, of which the other four follow
    6     the limb leads, all of which follow from I and II
    3     I, II, V1
    2     I, II
    1     I, as a watch records it
At the defaults 18 runs of 180 000 windows, 3.2 million in all. A lead that is left out is zeros, as one that a store
lacks; steps cost the same.

12 and 8 hold the same information, and so do 6 and 2: what lies between those is what redundant leads do for training.
The table can tell what is lost by a run that never saw the other leads. It cannot tell what a twelve-lead encoder loses
when leads fail later (`ecg-jax robustness` does), and the recordings are those of twelve-lead machines, not of watches.
Random initialisation sees the leads of its group; the simple ECG features of a report come of all twelve everywhere.
"""

from configs.sweeps import common

#: Number of leads -> `config.data.leads`.
LEADS = {
    12: "",
    8: "I,II,V1,V2,V3,V4,V5,V6",
    6: "I,II,III,aVR,aVL,aVF",
    3: "I,II,V1",
    2: "I,II",
    1: "I",
}


def sweep(arg=""):
    arg = common.arguments(arg)
    for number, leads in LEADS.items():
        for seed in common.seeds(arg):
            yield common.run(
                f"{arg.objective}-{arg.backbone}-leads={number}",
                arg.objective,
                seed,
                **common.settings(arg),
                data__leads=leads,
            )
