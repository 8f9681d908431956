"""The README's run: a small causal S4 encoder, CPC on the PTB-XL sample that ships with the package.

    ecg-jax quickstart

Two CPU cores need two to three minutes. The sample (304 recordings) shows that everything works; it is far too
small to pretrain on.
"""

from configs import cpc


def get_config(arg=""):
    config = cpc.get_config(arg)
    config.model.width = 64
    config.batch_size = 32
    config.steps = 500
    config.log_every = 10
    config.checkpoint_every = 100
    return config
