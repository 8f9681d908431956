"""Robustness suite of a finished linear probe.

    ecg-jax robustness probes/cpc_super --output=robustness/cpc_super

An empty tuple leaves conditions out, e.g. --config.conditions.swaps="()".
"""

from ml_collections import ConfigDict

from ecg_jax.config_flags import parse_arg


def get_config(arg=""):
    parse_arg(arg)
    config = ConfigDict()
    config.seed = 0  # of the noise
    config.batch_size = 64  # crops encoded at once
    config.threads = 2  # that read and corrupt records while the device computes

    config.conditions = ConfigDict()
    # Leads a device records; limb leads that two others determine are derived. 12 is the clean recording again.
    # 1: I; 2: I, II; 3: I, II, V2; 6: limb leads; 8: I, II, V1-V6.
    config.conditions.leads = (12, 8, 6, 3, 2, 1)
    config.conditions.swaps = ("RA/LA", "RA/LL", "LA/LL", "RA/RL", "V1/V2")
    config.conditions.noises = ("baseline_wander", "powerline_50hz", "powerline_60hz", "muscle")
    config.conditions.snr_db = (24.0, 18.0, 12.0, 6.0, 0.0)  # levels of each noise
    config.conditions.rates_hz = (200.0, 125.0, 100.0, 62.5, 50.0)  # of other devices
    config.conditions.durations_s = (5.0, 2.5, 1.25)  # recordings cut to their first seconds
    return config
