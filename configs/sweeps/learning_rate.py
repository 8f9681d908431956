"""The learning rate, in steps of about three around the default of 0.003.

    ecg-jax sweep configs/sweeps/learning_rate.py:objective=jepa --output=runs/learning_rate --store=stores/heedb \\
        --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/learning_rate.py:quick --output=runs/learning_rate_quick

Arguments: objective=cpc|jepa|data2vec|dinosr|hubertpp, backbone=s4|transformer|net1d,
width=512|128|256|384|768|1024 (of S4 and Transformer), data=18k|45k|106k|753k|11m, seeds=3|1|2|5, quick. At the
defaults 15 runs of 180 000 windows, 2.7 million in all. A rate that is far too high shows as a run that
fails: its loss is not finite. The probe is tested on the test fold: choose a rate by val_loss in results_table, or on
another store.
"""

from configs.sweeps import common

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def sweep(arg=""):
    arg = common.arguments(arg, in_full=("width",), width=("512", "128", "256", "384", "768", "1024"))
    fields = common.settings(arg)
    if not arg.quick and arg.backbone != "net1d":  # whose width is that of its last stage
        fields["model__width"] = int(arg.width)
    for rate in RATES:
        for seed in common.seeds(arg):
            yield common.run(
                f"{arg.objective}-{arg.backbone}-lr={rate:g}",
                arg.objective,
                seed,
                optimiser__learning_rate=rate,
                **fields,
            )
