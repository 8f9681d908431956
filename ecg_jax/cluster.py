"""`ecg-jax cluster`: offline k-means targets for HuBERT-style pretraining, kept beside the store.

HuBERT (Hsu et al., arXiv 2106.07447) and HuBERT-ECG (Coppola et al., medRxiv 2024.11.14.24317328) predict, at masked
tokens, which cluster of an earlier iteration's features the token belongs to. The first iteration has no model
yet and clusters a time-frequency description of the signal (`--features=spectrum`), later ones a layer of the model
before (`--checkpoint --layer`).
"""

import argparse
import itertools
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.data.folds import highest_folds
from ecg_jax.data.selection import select_records
from ecg_jax.data.store import Store
from ecg_jax.data.targets import MAX_CODES, TargetsWriter, Windows, check_name
from ecg_jax.errors import UserError
from ecg_jax.token_features import FINAL, SPECTRUM, Features, of_checkpoint, spectrum

DESCRIPTION = """\
Clusters features of the recordings of a store by mini-batch k-means and gives every token of every record the
number of its cluster: the targets of HuBERT-style pretraining, in STORE/targets/NAME. The clusters are fitted on
recordings to train on only; all recordings are labelled.

first iteration, without a model:   ecg-jax cluster --store=STORE --name=first --codes=100 --features=spectrum
next iteration, from its model:     ecg-jax cluster --store=STORE --name=second --codes=500 \\
                                        --checkpoint=runs/first --layer=block2
"""

MOST_WINDOWS = 4096  # encoded at once; more only cost memory

_TOKENS_PER_WINDOW = 32  # that k-means is fitted on, so that they come from many recordings


def _batches(store: Store, features: Features, batch_size: int) -> Iterator[Windows]:
    """All windows of a store, at most B at a time, without a list of them all."""
    offsets, lengths = store.column("offset"), store.column("length")
    for first in range(0, len(store), 4096):
        some = features.grid.windows(offsets[first : first + 4096], lengths[first : first + 4096])
        for begin in range(0, len(some.starts), batch_size):
            yield Windows(*(column[begin : begin + batch_size] for column in some))


def _read(store: Store, starts: np.ndarray, features: Features, batch_size: int) -> np.ndarray:
    """int16 [B, T, C]: windows, filled up to B with the last one so that one program serves all batches."""
    return store.read_crops(np.pad(starts, (0, batch_size - len(starts)), mode="edge"), features.grid.window)


def sample_vectors(
    store: Store, rows: np.ndarray, features: Features, *, tokens: int, seed: int, batch_size: int
) -> np.ndarray:
    """Features of a random sample of tokens, about 32 from each of random windows of random records.

    Args:
        store: to read from.
        rows: records to draw from, each at least a window long.
        features: of the tokens.
        tokens: n, how many; fewer are returned when there are not so many.
        seed: of the draw.
        batch_size: B, windows encoded at once.

    Returns:
        float32 [n, F].

    Raises:
        UserError: features are not finite.
    """
    from tqdm import tqdm

    rng = np.random.default_rng(seed)
    offsets, lengths = store.column("offset")[rows], store.column("length")[rows]
    ends = np.cumsum(features.grid.count(lengths))
    each = min(features.grid.tokens, max(_TOKENS_PER_WINDOW, -(-tokens // int(ends[-1]))))
    n_windows = min(int(ends[-1]), -(-tokens // each))
    serial = np.sort(rng.choice(ends[-1], n_windows, replace=False))
    record = np.searchsorted(ends, serial, side="right")
    number = serial - ends[record] + features.grid.count(lengths[record])
    starts = features.grid.start(offsets[record], lengths[record], number)

    @jax.jit
    def chosen(variables, signal, index):
        return jnp.take_along_axis(features.encode(variables, signal), index[:, :, None], axis=1)

    vectors = []
    for first in tqdm(range(0, n_windows, batch_size), desc="features to cluster", unit="batch", leave=False):
        some = starts[first : first + batch_size]
        index = np.argsort(rng.random((batch_size, features.grid.tokens)), axis=1)[:, :each]
        with jax.default_matmul_precision("highest"):
            found = chosen(features.variables, _read(store, some, features, batch_size), index)
        vectors.append(np.asarray(found)[: len(some)].reshape(-1, found.shape[-1]))
    vectors = np.concatenate(vectors)[:tokens]
    if not np.isfinite(vectors).all():
        raise _not_finite(features)
    return vectors


def _not_finite(features: Features) -> UserError:
    origin = "of the spectrum" if features.source["features"] == SPECTRUM else f"of {features.source['run']}"
    return UserError(
        f"The features {origin} are not finite, so they cannot be clustered; use another checkpoint."
    )


def fit_centroids(vectors: np.ndarray, codes: int, seed: int) -> np.ndarray:
    """Mini-batch k-means (Sculley 2010), the best of three starts by k-means++.

    Args:
        vectors: float32 [n, F].
        codes: K.
        seed: of starts and batches.

    Returns:
        float32 [K, F].

    Raises:
        UserError: more codes than vectors.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    if codes > len(vectors):
        raise UserError(
            f"--codes={codes} is more than the {len(vectors)} tokens that the clusters are fitted on; choose fewer "
            "codes, or more --fit-tokens if the store has them."
        )
    kmeans = MiniBatchKMeans(
        codes,
        # Eight tokens of each code in a batch, or the centroids would follow single tokens.
        batch_size=max(1024, 8 * codes),
        max_no_improvement=50,
        n_init=3,
        random_state=seed,
        compute_labels=False,
    )
    # The hundreds of small batches gain little from threads, which on a busy machine wait for each other ten times
    # longer than they work; and with one the result does not depend on the number of cores.
    with threadpool_limits(1):
        return kmeans.fit(vectors).cluster_centers_.astype(np.float32)


def label_store(
    store: Store, features: Features, centroids: np.ndarray, labels: np.ndarray, batch_size: int
) -> None:
    """Labels every token of every record that is at least a window long with its nearest centroid.

    Args:
        store: to read from.
        features: of the tokens.
        centroids: float32 [K, F].
        labels: int16 [N] to write into, see `data.targets`; tokens without a label are left as they are.
        batch_size: B, windows encoded at once.

    Raises:
        UserError: features are not finite.
    """
    from tqdm import tqdm

    half_norms = 0.5 * np.square(centroids.astype(np.float64)).sum(axis=1).astype(np.float32)

    @jax.jit
    def nearest(variables, signal):
        vectors = features.encode(variables, signal)
        # |x - c|^2 / 2 less |x|^2 / 2, which is the same for all codes.
        distance = half_norms - jnp.einsum("bmf,kf->bmk", vectors, centroids)
        return jnp.argmin(distance, axis=-1).astype(jnp.int16), jnp.isfinite(vectors).all()

    def write(some: Windows, found: np.ndarray) -> None:
        before = features.grid.first_token(some.starts)
        for window in range(len(some.starts)):
            # Labels outside what the window describes lie at the ends of a record and take the nearest one.
            take = np.arange(some.first[window], some.last[window]) - before[window]
            labels[some.first[window] : some.last[window]] = found[
                window, np.clip(take, 0, features.grid.tokens - 1)
            ]

    total = int(features.grid.count(store.column("length")).sum())
    pending = None
    with tqdm(total=total, desc="labelling", unit="window", leave=False) as progress:
        for some in itertools.chain(_batches(store, features, batch_size), [None]):
            running = None
            if some is not None:
                with jax.default_matmul_precision("highest"):
                    running = nearest(features.variables, _read(store, some.starts, features, batch_size))
            if pending is not None:
                # Written while the device works on the next batch.
                windows, (found, finite) = pending
                if not finite:
                    raise _not_finite(features)
                write(windows, np.asarray(found))
                progress.update(len(windows.starts))
            pending = (some, running)


def _check(codes, checkpoint, layer, features, fit_tokens, seed, batch_size, val_folds, max_records) -> None:
    """Refuses options that cannot be meant, before anything is read."""
    if (checkpoint is None) == (features is None):
        raise UserError(
            "Give either --checkpoint=RUN (features of a pretrained encoder) or --features=spectrum (without a model), "
            f"{'not both' if features else 'one of them is needed'}."
        )
    if features not in (None, SPECTRUM):
        raise UserError(f"--features={features} is unknown; known: {SPECTRUM}.")
    if features is not None and layer is not None:
        raise UserError(f"--layer={layer} belongs to --checkpoint; --features={features} has no layers.")
    if not 2 <= codes <= MAX_CODES:
        raise UserError(f"--codes={codes} must be at least 2 and at most {MAX_CODES}.")
    for name, value, low in (
        ("fit-tokens", fit_tokens, 1),
        ("batch-size", batch_size, 1),
        ("val-folds", val_folds, 0),
        ("max-records", 1 if max_records is None else max_records, 1),
    ):
        if not low <= value < 2**31:
            raise UserError(f"--{name}={value} must be at least {low} and below 2^31.")
    if batch_size > MOST_WINDOWS:
        raise UserError(f"--batch-size={batch_size} must be at most {MOST_WINDOWS}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed} must be at least 0 and below 2^32.")


def cluster(
    store: str | Path,
    name: str,
    *,
    codes: int,
    checkpoint: str | None = None,
    layer: str | None = None,
    features: str | None = None,
    fit_tokens: int = 200_000,
    seed: int = 0,
    batch_size: int = 64,
    val_folds: int = 1,
    max_records: int | None = None,
) -> dict:
    """Makes a set of targets.

    Args:
        store: folder of the store.
        name: of the set; STORE/targets/NAME must not exist.
        codes: K, clusters.
        checkpoint: RUN or RUN/STEP whose features are clustered; or None, and `features` given.
        layer: of the checkpoint's encoder; None for its final tokens.
        features: "spectrum", or None.
        fit_tokens: tokens that k-means is fitted on.
        seed: of the sample and of k-means.
        batch_size: windows encoded at once.
        val_folds: so many of the highest folds are kept out of the fit, as `config.data.val_folds` does.
        max_records: recordings to fit on at most, chosen as `config.data.max_records` chooses them; None for all.

    Returns:
        What meta.json holds.

    Raises:
        UserError: see the options; nothing is left behind.
    """
    check_name(name)
    _check(codes, checkpoint, layer, features, fit_tokens, seed, batch_size, val_folds, max_records)
    opened = Store(store)
    unwritten = TargetsWriter(opened, name)
    if features is None:
        described = of_checkpoint(checkpoint, FINAL if layer is None else layer, opened)
    else:
        described = spectrum(opened.rate_hz)
    selection = select_records(
        opened,
        window_samples=described.grid.window,
        val_folds=val_folds,
        max_records=max_records or 0,
    )
    with unwritten as writer:
        vectors = sample_vectors(
            opened, selection.train, described, tokens=fit_tokens, seed=seed, batch_size=batch_size
        )
        centroids = fit_centroids(vectors, codes, seed)
        label_store(opened, described, centroids, writer.labels, batch_size)
        return writer.finish(
            centroids,
            {
                **described.source,
                "window_samples": described.grid.window,
                "seed": seed,
                "fitted_tokens": len(vectors),
                "fitted_records": len(selection.train),
                "held_out_folds": highest_folds(opened.column("fold"), val_folds).tolist(),
                "versions": {each: version(each) for each in ("ecg-jax", "jax", "scikit-learn", "numpy")},
            },
        )


def summary(path: Path, meta: dict) -> str:
    """What was made, for people."""
    share = np.array(meta["counts"]) / max(sum(meta["counts"]), 1)
    perplexity = np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())
    folds = ", ".join(str(fold) for fold in meta["held_out_folds"]) or "none"
    return "\n".join(
        [
            f"{path}: {sum(meta['counts'])} tokens labelled with {meta['codes']} codes, {meta['tokens_without_label']} "
            "without a label",
            f"  fitted on          {meta['fitted_tokens']} tokens of {meta['fitted_records']} records; folds held "
            f"out: {folds}",
            f"  codes              {int((share > 0).sum())} occur, perplexity {perplexity:.1f}, the commonest has "
            f"{share.max():.1%} of the tokens",
        ]
    )


def main(argv: list[str]) -> int:
    """`ecg-jax cluster`."""
    parser = argparse.ArgumentParser(
        prog="ecg-jax cluster",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--store", required=True, metavar="STORE", help="prepared store; the targets are written into it")
    add("--name", required=True, help="of the targets, for --config.data.targets=NAME")
    add("--codes", required=True, type=int, metavar="K", help="number of clusters")
    add("--checkpoint", metavar="RUN[/STEP]", help="pretraining run whose features are clustered")
    add("--layer", help="layer of its encoder: stem, layer0, block0, ... (default tokens: the final output)")
    add("--features", help=f"{SPECTRUM}: log power of 0.27 s windows of each lead, without a model")
    add(
        "--fit-tokens",
        type=int,
        default=200_000,
        metavar="N",
        help="tokens k-means is fitted on (default 200000)",
    )
    add(
        "--max-records",
        type=int,
        metavar="N",
        help="recordings k-means is fitted on, chosen as data.max_records of a run does (default: all to train on)",
    )
    add("--val-folds", type=int, default=1, metavar="N", help="highest folds kept out of the fit (default 1)")
    add("--seed", type=int, default=0, help="of the sample and of k-means (default 0)")
    add("--batch-size", type=int, default=64, metavar="B", help="windows encoded at once (default 64)")
    options = parser.parse_args(argv)
    meta = cluster(**vars(options))
    print(summary(Path(options.store) / "targets" / options.name, meta))
    return 0
