"""Do state matrices and step sizes of S4 help when they are trained? The reference keeps them as HiPPO has them.

    ecg-jax sweep configs/sweeps/trainable_ssm.py --output=runs/trainable_ssm --store=stores/heedb \\
        --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/trainable_ssm.py:quick --output=runs/trainable_ssm_quick

Arguments: objective=cpc|jepa|data2vec|dinosr|hubertpp, data=18k|45k|106k|753k|11m, seeds=3|1|2|5, quick. Three groups:
`fixed`; `trained-slowly`, at a tenth of the learning rate, as S4's authors have it and as this package does; and
`trained`, at the full rate. At the defaults 9 runs of 180 000 windows, 1.6 million in all. A step that trains the
matrices makes its kernels anew and cannot use the chunked convolution, so that it takes longer.

Backbones alone: the S4 heads of objectives keep their matrices in every group. The table can tell whether training them
pays at one width and one number of states. It cannot tell whether more states, or another initialisation, would.
"""

from configs.sweeps import common

#: Group -> fields.
GROUPS = {
    "fixed": {"model__trainable_ssm": False},
    "trained-slowly": {"model__trainable_ssm": True, "optimiser__factors__ssm": 0.1},
    "trained": {"model__trainable_ssm": True, "optimiser__factors__ssm": 1.0},
}


def sweep(arg=""):
    arg = common.arguments(arg, backbone=None)
    for group, fields in GROUPS.items():
        for seed in common.seeds(arg):
            yield common.run(
                f"{arg.objective}-{group}", arg.objective, seed, **common.settings(arg), **fields
            )
