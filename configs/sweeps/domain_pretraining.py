"""Does it pay to pretrain once more on the recordings at hand? Base, base and then domain, and domain alone.

    ecg-jax sweep configs/sweeps/domain_pretraining.py:base=stores/heedb,domain=stores/ptbxl,objective=cpc \\
        --output=runs/domain_pretraining
    ecg-jax sweep configs/sweeps/domain_pretraining.py:quick --output=runs/domain_pretraining_quick

Arguments: base=STORE, domain=STORE (A+B for several that are mixed), probe=STORE (labelled; else the domain's),
task=TASK (else ptbxl_super), objective=cpc|jepa|data2vec|dinosr|hubertpp, backbone=s4|transformer|net1d, steps=N (else
5600), seeds=3|1|2|5, quick. Every store is used whole, but for its held-out fold. --store is not needed.

Three groups of N updates: `base`, `domain`, and `base-then-domain`, whose second half, counted as its run, begins with
the parameters of the fourth group, `base-half`, and goes on with the domain at a tenth of the learning rate, as
configs/domain.py does. At the defaults 12 runs, 3.2 million windows in all; ten epochs of a base of 11 million
recordings are steps=1700000. N is 2 at least.

The table can tell whether N updates are better spent on one store or on both. It cannot tell whether the domain helps
by its patients or by its machines, nor what another share than half would do; and where the domain's store is the one
that is probed, its gain is that of recordings like the tested ones, not of better features anywhere. val_loss is that
of the store a run ended on. The tested fold is in no group's pretraining.
"""

from configs.sweeps import common
from ecg_jax.sweep_file import SAMPLE_STORE, synthetic_store

STEPS = 5600
QUICK_STEPS = 12
RATE = 3e-4  # a tenth of the usual one: see configs/domain.py


def sweep(arg=""):
    arg = common.arguments(
        arg, in_full=("base", "domain"), data=None, base=str, domain=str, probe=str, task=str, steps=str
    )
    if arg.quick:
        base, domain = synthetic_store(256), SAMPLE_STORE
    else:
        base = common.given(arg, "base", "the store to begin with")
        domain = common.given(arg, "domain", "the store of the domain")
    steps = common.number(arg, "steps", QUICK_STEPS if arg.quick else STEPS, least=2)
    half = -(-steps // 2)
    probed = {"probe_store": arg.probe or domain, "probe": common.linear_probe(arg.task)}
    groups = {
        "base": ({"steps": steps}, {"store": base}),
        "domain": ({"steps": steps}, {"store": domain}),
        "base-half": ({"steps": half}, {"store": base}),
        "base-then-domain": (
            {"steps": steps - half, "optimiser__learning_rate": RATE},
            {"store": domain, "init": "base-half"},
        ),
    }
    for group, (fields, keys) in groups.items():
        for seed in common.seeds(arg):
            run = common.run(
                group,
                arg.objective,
                seed,
                **common.settings(arg),
                data="11m",
                **fields,
            )
            begins = {"init": f"{keys['init']}-seed={seed}"} if "init" in keys else {}
            yield run | probed | keys | begins
