"""From stored microvolts to what the stem sees: millivolts of the kept leads, optionally standardised per lead."""

import jax
import jax.numpy as jnp
import numpy as np

# Mean and standard deviation of PTB-XL per lead in mV, as published with the reference (spec §1.4), by lead
# name.
_PTBXL_MEAN = {
    "I": -0.00184586, "II": -0.00130277, "V1": 0.00017031, "V2": -0.00091313, "V3": -0.00148835, "V4": -0.00174687,
    "V5": -0.00077071, "V6": -0.00207407, "III": 0.00054329, "aVR": 0.00155546, "aVL": -0.00114379, "aVF": -0.00035649,
}  # fmt: skip
_PTBXL_STD = {
    "I": 0.16401004, "II": 0.1647168, "V1": 0.23374124, "V2": 0.33767231, "V3": 0.33362807, "V4": 0.30583013,
    "V5": 0.2731171, "V6": 0.27554379, "III": 0.17128962, "aVR": 0.14030828, "aVL": 0.14606956, "aVF": 0.14656108,
}  # fmt: skip
#: The leads of a batch, in their order; `data.recording` has the same.
ALL_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

#: Name of an input normalisation -> (mean, standard deviation), float32 [12] in mV, leads in canonical order.
#: `ptbxl_misordered` divides each canonical lead by the statistics of another one, as the released code does
# (spec §1.4).
NORMALISATIONS = {
    "none": (np.zeros(12, np.float32), np.ones(12, np.float32)),
    "ptbxl_canonical": (
        np.array([_PTBXL_MEAN[lead] for lead in ALL_LEADS], np.float32),
        np.array([_PTBXL_STD[lead] for lead in ALL_LEADS], np.float32),
    ),
    "ptbxl_misordered": (
        np.array(list(_PTBXL_MEAN.values()), np.float32),
        np.array(list(_PTBXL_STD.values()), np.float32),
    ),
}


def to_model_input(signal: jax.Array, normalisation: str, kept_leads: tuple[str, ...]) -> jax.Array:
    """Stored samples to model input.

    Args:
        signal: int16 [B, T, C] in microvolts, canonical lead order.
        normalisation: a key of `NORMALISATIONS`.
        kept_leads: names of the leads to keep. The others become zero before they are normalised, which is what a store
            holds for a missing lead.

    Returns:
        float32 [B, T, C]: millivolts, standardised as (x - mean) / (std + 1e-8) unless the normalisation is
            "none".
    """
    x = signal.astype(jnp.float32) * 1e-3
    if kept_leads != ALL_LEADS:
        x = jnp.where(np.isin(ALL_LEADS, kept_leads), x, 0.0)
    if normalisation == "none":
        return x
    mean, std = NORMALISATIONS[normalisation]
    return (x - mean) / (std + 1e-8)
