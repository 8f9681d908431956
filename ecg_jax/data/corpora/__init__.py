"""One file per corpus: where its recordings and labels lie, who the patients are, which folds there are.

Every corpus module has `EXPECTS` (what SOURCE must hold), `list_records(source, rate) -> Listing` and
`read(source, entry, assume_gain) -> Recording`.
"""

from ecg_jax.data.corpora import challenge, ptbxl, wfdb

CORPORA = {"ptbxl": ptbxl, "challenge": challenge, "wfdb": wfdb}
