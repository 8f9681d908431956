"""One file per corpus: where its recordings and labels lie, who the patients are, which folds there are.

Every corpus module has `EXPECTS` (what SOURCE must hold), `list_records(source, rate) -> Listing` and
`read(source, entry, assume_gain) -> Recording`.
"""

from ecg_jax.data.corpora import (
    challenge,
    chapman,
    code15,
    echonext,
    heedb,
    heedb_emory,
    mimic,
    ptb,
    ptbxl,
    sph,
    wfdb,
    zzu,
)

CORPORA = {
    "ptbxl": ptbxl,
    "challenge": challenge,
    "wfdb": wfdb,
    "sph": sph,
    "code15": code15,
    "chapman": chapman,
    "ptb": ptb,
    "echonext": echonext,
    "zzu": zzu,
    "mimic": mimic,
    "heedb": heedb,
    "heedb_emory": heedb_emory,
}
