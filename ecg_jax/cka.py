"""`ecg-jax cka`: how alike the layers of models represent the same recordings."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.probe_output import plain
from ecg_jax.probe_provenance import checkpoint_identity, made_with, store_identity
from ecg_jax.studies.cka import MIN_EXAMPLES, Cka, HsicSums, batches_of, groups_of
from ecg_jax.studies.cka_figures import draw_all, summary
from ecg_jax.studies.cka_models import Model, Study, choose_rows, default_folds, features_of, open_models
from ecg_jax.studies.figure_folder import check_folder, open_folder, write_figures

DESCRIPTION = """\
Compares layers within models and between models by linear centred kernel alignment (CKA) on the same recordings, one of
each patient of the test fold: the debiased estimator with jackknife intervals, and the biased one beside it. Features
of a recording are the mean over the tokens of its first window. Models of different windows or normalisations see the
same recordings, each under its own contract. Writes cka.json, heat maps and their values into --output.

  ecg-jax cka --checkpoints=runs/cpc,runs/jepa --store=stores/ptbxl --random --output=runs/cka
"""
KIND, RESULTS = "cka", "cka.json"
LEVEL = 0.95
#: Up to so many recordings are compared with each other at once; more of them in mini-batches.
MOST_AT_ONCE = 2048
#: Recordings in a mini-batch when there are more.
MINIBATCH = 512
#: Windows encoded at once: more fit no device.
LARGEST_BATCH = 2**16


def cka(
    checkpoints: Sequence[str],
    store: str | Path,
    output: str | Path,
    *,
    random: bool = False,
    names: Sequence[str] = (),
    layers: Sequence[str] = (),
    folds: Sequence[int] | str = "test",
    records: int | None = None,
    minibatch: int | None = None,
    tokens: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    command: Sequence[str] = (),
) -> Study:
    """Compares models and writes the study.

    Args:
        checkpoints: RUN or RUN/STEP of one or several pretraining runs.
        store: recordings to compare on; labels are not needed.
        output: folder to write.
        random: add a random twin of each architecture.
        names: of the models in figures; empty for those of their folders.
        layers: as `training.pretrained.layer_names`; empty for all.
        folds: of the recordings; "test" for the highest, on which probes test; "all" for recordings of no fold too.
        records: at most so many recordings; None for all of those folds.
        minibatch: recordings in a mini-batch; None for all at once up to 2048, else 512.
        tokens: compare one token of each recording instead of the mean over tokens.
        seed: of recordings, tokens and random twins.
        batch_size: windows encoded at once.
        command: that this is, for the record.

    Returns:
        What was written.

    Raises:
        UserError: anything in the arguments, checkpoints, store or folder that does not fit.
    """
    from tqdm import tqdm

    output, store = Path(output), Store(store)
    _check(output, records, minibatch, seed, batch_size)
    models = open_models(checkpoints, store, names, layers, seed if random else None)
    window = max(model.encoder.preprocessing.window_samples for model in models)
    chosen = (
        {"test": default_folds, "all": lambda store: None}[folds](store)
        if folds in ("test", "all")
        else folds
    )
    rows, how = choose_rows(store, window, chosen, records, seed)
    if minibatch is None:
        minibatch = len(rows) if len(rows) <= MOST_AT_ONCE else MINIBATCH
    pieces, groups = batches_of(len(rows), min(minibatch, len(rows))), groups_of(len(rows))
    open_folder(output, KIND)

    sums, largest = HsicSums(int(groups.max()) + 1), len(pieces[0])
    with tqdm(total=len(rows) * len(models), desc="encoding", unit="window", leave=False) as bar:
        every = features_of(
            models, store, rows, pieces, tokens=tokens, seed=seed, batch_size=batch_size, advance=bar.update
        )
        for piece, features in zip(pieces, every, strict=True):
            missing = largest - len(piece)
            padded = [np.pad(x, ((0, missing), (0, 0))) for x in features]
            sums.add(padded, groups[piece], missing)
    study = Study(
        models=tuple(models),
        cka=sums.result(LEVEL),
        level=LEVEL,
        groups=sums.groups,
        recordings=how,
        tokens=tokens,
        synthetic=store.synthetic,
    )
    ids = store.arrow_column("record_id").take(rows).to_pylist()
    about = made_with(("ecg_jax", "jax", "jaxlib", "numpy", "flax")) | {
        "command": list(command),
        "runs": list(dict.fromkeys(str(model.encoder.run) for model in models if not model.random)),
        "device": jax.devices()[0].device_kind,
    }
    _write(output, study, store, ids, about, {"folds": chosen, "seed": seed})
    return study


def _check(output: Path, records: int | None, minibatch: int | None, seed: int, batch_size: int) -> None:
    least = MIN_EXAMPLES + 1
    for name, value in (("records", records), ("minibatch", minibatch)):
        if value is not None and value < least:
            raise UserError(
                f"--{name}={value} must be at least {least}: unbiased HSIC needs {MIN_EXAMPLES} recordings, and the "
                "interval leaves some out."
            )
    if not 1 <= batch_size <= LARGEST_BATCH:
        raise UserError(f"--batch-size={batch_size} must be at least 1 and at most {LARGEST_BATCH}.")
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed={seed} must be at least 0 and below 2**31.")
    check_folder(output, KIND)


def _write(output: Path, study: Study, store: Store, ids: Sequence[str], about: dict, choice: dict) -> None:
    """Everything of a study."""
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    results = {
        "models": [_model_entry(model) for model in study.models],
        "store": store_identity(store),
        "synthetic": store.synthetic,
        "recordings": {
            "n": study.cka.n_examples,
            "how": study.recordings,
            **choice,
            "record_ids_sha256": digest,
        },
        "features": "one token of each recording" if study.tokens else "mean over tokens",
        "estimator": {
            "kernel": "linear",
            "hsic": "unbiased (Song et al. 2012), averaged over mini-batches (Nguyen et al. 2021)",
            "minibatches": study.cka.n_batches,
        },
        "interval": {
            "level": study.level,
            "method": "delete-a-group jackknife of arctanh(CKA), Student's t",
            "groups": study.groups,
        },
        **_matrices(study.cka),
        **about,
    }
    content = (json.dumps(plain(results), indent=1, allow_nan=False) + "\n").encode()
    write_figures(output, KIND, draw_all(study), plain(about), {RESULTS: content})


def _model_entry(model: Model) -> dict[str, Any]:
    config, contract = model.encoder.config, model.encoder.preprocessing
    return {
        "name": model.name,
        "random": model.random,
        **checkpoint_identity(model.encoder),
        "objective": config["objective"]["name"],
        "backbone": config["model"]["backbone"],
        "window_s": contract.window_s,
        "normalisation": contract.normalisation,
        "layers": list(model.layers),
        "layers_in_words": list(model.words),
        "widths": list(model.widths),
    }


def _matrices(found: Cka) -> dict[str, Any]:
    """Rows and columns are the layers of the models, one after the other."""
    named = {"cka": found.debiased, "low": found.low, "high": found.high, "biased": found.biased}
    return {name: matrix.tolist() for name, matrix in named.items()} | {
        "effective_dimensions": found.effective_dimensions.tolist(),
        "largest_share": found.largest_share.tolist(),
    }


def _listed(option: str, text: str | None) -> list[str]:
    """What an option names; [] where it was not given.

    Raises:
        UserError: it was, and names nothing.
    """
    words = [] if text is None else [word.strip() for word in text.split(",") if word.strip()]
    if text is not None and not words:
        raise UserError(f"--{option} names nothing; name at least one, or leave it out.")
    return words


def _folds(text: str) -> list[int] | str:
    if text in ("test", "all"):
        return text
    try:
        return sorted({int(word) for word in _listed("folds", text)})
    except ValueError as error:
        raise UserError(f"--folds={text} must be numbers separated by commas, test or all.") from error


def main(argv: list[str]) -> int:
    """`ecg-jax cka`."""
    parser = argparse.ArgumentParser(
        prog="ecg-jax cka",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoints", required=True, metavar="RUN[/STEP],...", help="pretraining runs")
    parser.add_argument("--store", required=True, help="recordings to compare on; labels are not needed")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--random", action="store_true", help="add a random twin of each architecture")
    parser.add_argument(
        "--names", metavar="A,B", help="names of the models in figures (default: their folders)"
    )
    parser.add_argument(
        "--layers",
        metavar="A,B",
        help="of stem, block0, block1, ..., tokens (the final output); default: all",
    )
    parser.add_argument(
        "--folds",
        metavar="N,M|all",
        default="test",
        help="folds of the recordings (default: test, the highest, on which probes test)",
    )
    parser.add_argument("--records", type=int, metavar="N", help="at most so many recordings (default: all)")
    parser.add_argument(
        "--minibatch",
        type=int,
        metavar="N",
        help=f"recordings compared at once (default: all up to {MOST_AT_ONCE}, else {MINIBATCH})",
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="compare one token of each recording, at a random time; more would not be independent",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of recordings, tokens, random twins (default: 0)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="windows encoded at once (default: 64)")
    options = parser.parse_args(argv)
    study = cka(
        _listed("checkpoints", options.checkpoints),
        options.store,
        options.output,
        random=options.random,
        names=_listed("names", options.names),
        layers=_listed("layers", options.layers),
        folds=_folds(options.folds),
        records=options.records,
        minibatch=options.minibatch,
        tokens=options.tokens,
        seed=options.seed,
        batch_size=options.batch_size,
        command=["ecg-jax", "cka", *argv],
    )
    print(summary(study))
    print(f"  written to {options.output}")
    return 0
