"""`ecg-jax cluster`: clusters that mean something, labels where they belong, and everything it refuses."""

import hashlib
import multiprocessing
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax import cli
from ecg_jax import cluster as cluster_module
from ecg_jax.cluster import cluster, label_store, sample_vectors
from ecg_jax.config_flags import load_config
from ecg_jax.data.pipeline import train_batches, val_batches
from ecg_jax.data.selection import select_records
from ecg_jax.data.store import Store
from ecg_jax.data.synthetic import write_synthetic_store
from ecg_jax.data.targets import NO_LABEL, Grid, Targets, TargetsWriter, label_range
from ecg_jax.errors import UserError
from ecg_jax.models.encoder import build_encoder, tokens_of
from ecg_jax.models.inputs import ALL_LEADS, to_model_input
from ecg_jax.token_features import Features, of_checkpoint, spectrum
from ecg_jax.training.pretrained import restore_encoder
from test_targets import LENGTHS, numbered, write_store

SMALL = {"codes": 8, "fit_tokens": 2000, "batch_size": 16}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of synthetic recordings to write targets into."""
    path = tmp_path_factory.mktemp("cluster") / "store"
    return Store(write_synthetic_store(path, n_records=24, seconds=4.0, seed=0))


@pytest.fixture(scope="module")
def run(tmp_path_factory, synthetic_store):
    """A pretraining run of two steps."""
    from ecg_jax.pretrain import pretrain

    config = load_config("configs/cpc.py")
    config.store = str(synthetic_store)
    config.data.normalisation = "ptbxl_canonical"
    config.model.width, config.model.layers = 16, 2
    config.steps, config.batch_size, config.data.max_val_crops = 2, 8, 8
    config.objective.negatives = 4
    config.tensorboard = False
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    pretrain(config, workdir)
    return workdir


def odd_store(path, window, seed=0):
    """Records of odd and even lengths that begin at odd and even samples; some shorter than the window."""
    rng = np.random.default_rng(seed)
    lengths = [2 * window + 61, window, window - 1, 3 * window + 1, window + 7, 2 * window, 4 * window - 1]
    return Store(write_store(path, [rng.integers(-500, 500, (n, 12), np.int16) for n in lengths]))


def nearest(centroids, vectors):
    """What scikit-learn predicts: k-means fitted on the centroids themselves has these centroids."""
    from sklearn.cluster import KMeans

    centroids = centroids.astype(np.float64)
    kmeans = KMeans(len(centroids), init=centroids, n_init=1, max_iter=1).fit(centroids)
    np.testing.assert_allclose(kmeans.cluster_centers_, centroids, atol=1e-12)
    return kmeans.predict(np.ascontiguousarray(vectors, np.float64))


def assert_nearest(labels, centroids, vectors):
    """Labels are those of scikit-learn, but where two centroids are as near as rounding can tell."""
    expected = nearest(centroids, vectors)
    distance = np.square(vectors[:, None].astype(np.float64) - centroids.astype(np.float64)).sum(-1)
    tokens = np.arange(len(labels))
    scale = np.square(vectors).sum(-1).max()
    assert (np.abs(distance[tokens, labels] - distance[tokens, expected]) <= 1e-5 * scale).all()
    assert (labels == expected).mean() > 0.99


def position_features(window, skipped=0):
    """Describes each token by record and position of its centre, in a store of `numbered` signals."""
    tokens = tokens_of(window) - 2 * skipped
    stride = window if not skipped else 2 * tokens

    def encode(_, x):
        # A token's centre is sample 2i of the window, as in the encoder's stem.
        centres = x[:, 2 * skipped :: 2, :1][:, :tokens]
        return jnp.concatenate([centres // 2000, centres % 2000], axis=2).astype(jnp.float32)

    grid = Grid(window=window, stride=stride, skipped=skipped, tokens=tokens)
    return Features(grid=grid, encode=encode, variables=None, source={"features": "position"})


@pytest.mark.parametrize("window", [60, 61, 76, 77])
@pytest.mark.parametrize("skipped", [0, 7])
def test_labels_lie_at_their_samples_whatever_the_offset(tmp_path, window, skipped):
    """The signal tells record and position, the label is the signal: so it is seen where each label came from."""
    store = Store(write_store(tmp_path / "s", [numbered(i, n) for i, n in enumerate(LENGTHS)]))
    centroids = np.stack(np.divmod(np.arange(2000 * len(LENGTHS)), 2000), axis=1).astype(np.float32)
    with TargetsWriter(store, "positions") as writer:
        label_store(store, position_features(window, skipped), centroids, writer.labels, batch_size=2)
        writer.finish(centroids, {})
    targets, offset, length = Targets(store, "positions"), store.column("offset"), store.column("length")
    parities = set()
    for row in range(len(store)):
        short = length[row] < window
        for start in range(length[row] - 30 + 1):
            found = targets.read(offset[row : row + 1] + start, 15)[0].astype(int)
            parities.add((offset[row] + start) % 2)
            if short:
                assert (found == NO_LABEL).all()
                continue
            assert (found // 2000 == row).all(), "labels of this record only"
            position = found - 2000 * row
            if skipped and (start < 2 * skipped or start + 30 > length[row] - 2 * skipped - 2):
                assert (np.diff(position) >= 0).all()  # the ends take the nearest described token
                assert np.abs(position - (start + 2 * np.arange(15))).max() <= 2 * skipped + 1
            else:
                # Two samples share a label; a window may begin at the other one than the crop.
                assert np.abs(position - (start + 2 * np.arange(15))).max() <= 1
    assert parities == {0, 1}


def test_every_owned_token_is_labelled_and_short_records_are_not(tmp_path):
    store = odd_store(tmp_path / "s", 240)
    cluster(store.path, "first", features="spectrum", **SMALL)
    labels = np.load(store.path / "targets" / "first" / "labels.npy")
    owned = np.zeros(len(labels), bool)
    length = store.column("length")
    for first, last, n in zip(*label_range(store.column("offset"), length), length, strict=True):
        assert (labels[first:last] >= 0).all() == (n >= 240)
        assert n >= 240 or (labels[first:last] == -1).all()
        owned[first:last] = True
    assert (labels[~owned] == -1).all()
    assert (length < 240).any()
    assert (~owned).any()


def spectra(x, begins):
    """Log power of Hann-weighted frames of 64 samples of x [T, 12] in microvolts, 3.75 to 45 Hz."""
    taper = np.sin(np.pi * (np.arange(64) + 0.5) / 64) ** 2
    out = []
    for begin in begins:
        frame = x[begin : begin + 64].astype(np.float64) / 1000
        amplitude = 2 * np.abs(np.fft.rfft((frame - frame.mean(0)) * taper[:, None], axis=0)) / taper.sum()
        out.append(np.log(amplitude[1:13].T ** 2 + 0.01**2).ravel())
    return np.array(out)


def test_spectrum_labels_are_those_of_scikit_learn(tmp_path):
    store = odd_store(tmp_path / "s", 240)
    cluster(store.path, "first", features="spectrum", **SMALL)
    targets = Targets(store, "first")
    for row in np.flatnonzero(store.column("length") >= 240):
        offset, x = int(store.column("offset")[row]), store.read(int(row))
        found = targets.read([offset], (offset + len(x)) // 2 - offset // 2)[0]
        # Windows of 240 samples step by 178; the last one ends with the record, at any parity. A frame is
        # centred on its token, or as near to that as the record allows.
        regular = (len(x) - 241) // 178 * 89 + 105 if len(x) > 240 else 0
        begins = np.clip(2 * np.arange(regular) - 32, 0, None)
        vectors = np.concatenate([spectra(x, begins).reshape(-1, 144), spectra(x, [len(x) - 64] * 16)])
        labels = np.concatenate([found[:regular], found[-16:]])
        assert_nearest(labels, targets.centroids, vectors)
    assert sum(count > 0 for count in targets.meta["counts"]) > 2, "so that agreeing means something"


def test_spectrum_measures_amplitude_and_frequency():
    features = spectrum(240.0)
    time = np.arange(features.grid.window) / 240
    x = np.zeros((1, features.grid.window, 12), np.int16)
    x[0, :, 3] = np.round(500 * np.sin(2 * np.pi * 15 * time)) + 3000  # 0.5 mV at 15 Hz on a constant 3 mV
    found = np.asarray(features.encode(None, x)).reshape(-1, 12, 12)
    assert found.shape[0] == features.grid.tokens
    np.testing.assert_allclose(found[:, 3, 3], np.log(0.5**2 + 0.01**2), atol=0.01)
    assert (found[:, 3].argmax(axis=-1) == 3).all()
    assert (found[:, 3, 6:] < np.log(0.5**2) - 5).all()
    np.testing.assert_allclose(np.delete(found, 3, axis=1), np.log(0.01**2), atol=1e-4)


@pytest.mark.parametrize("layer", [None, "stem", "block0", "layer1"])
def test_checkpoint_labels_are_those_of_scikit_learn(run, tmp_path, layer):
    store = odd_store(tmp_path / "s", 600)
    cluster(store.path, "second", checkpoint=str(run), layer=layer, **SMALL)
    encoder, targets = restore_encoder(run), Targets(store, "second")
    apply = jax.jit(build_encoder(**encoder.config["model"]).apply, static_argnames="train")
    for row in np.flatnonzero(store.column("length") >= 600):
        offset, x = int(store.column("offset")[row]), store.read(int(row))
        n_whole = len(x) // 600
        windows = x[: n_whole * 600].reshape(n_whole, 600, 12)
        owned = (offset + len(x)) // 2 - offset // 2
        rest = owned - 300 * n_whole  # tokens of the last window that no other one holds
        windows = np.concatenate([windows, x[None, len(x) - 600 :]])
        with jax.default_matmul_precision("highest"):
            tokens, out = apply(
                encoder.variables, to_model_input(windows, "ptbxl_canonical", ALL_LEADS), train=False
            )
        vectors = np.asarray(tokens if layer is None else out[layer])
        vectors = np.concatenate([*vectors[:-1], vectors[-1][300 - rest :]])
        assert_nearest(targets.read([offset], len(vectors))[0], targets.centroids, vectors)
    assert sum(count > 0 for count in targets.meta["counts"]) > 2, "so that agreeing means something"
    assert targets.meta["layer"] == (layer or "tokens")
    assert targets.meta["step"] == 2
    assert targets.meta["run"] == str(run.resolve())


def test_last_block_is_the_output(run, tmp_path):
    store = odd_store(tmp_path / "s", 600)
    for name, layer in (("a", None), ("b", "block1"), ("c", "block0")):
        cluster(store.path, name, checkpoint=f"{run}/2", layer=layer, **SMALL)
    a, b, c = (Targets(store, name).fingerprint for name in "abc")
    assert a == b != c


def test_planted_kinds_of_waves_are_found(tmp_path):
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(1)
    signals, kinds = [], []
    for _ in range(12):
        pieces, kind = [], []
        for _ in range(3):
            which, n = rng.integers(2), int(rng.integers(1100, 1500))
            hertz = (rng.uniform(4, 6), rng.uniform(18, 24))[which]
            wave = np.sin(2 * np.pi * (hertz * np.arange(n) / 240 + rng.uniform()))
            pieces.append(wave[:, None] * rng.uniform(250, 350, 12) + rng.normal(0, 15, (n, 12)))
            kind += [which] * n
        signals.append(np.concatenate(pieces).astype(np.int16))
        kinds += kind
    store = Store(write_store(tmp_path / "s", signals, per_unit=12))
    cluster(store.path, "waves", codes=2, features="spectrum")
    labels = np.load(store.path / "targets" / "waves" / "labels.npy")
    truth = np.array(kinds)[::2][: len(labels)]
    assert (labels >= 0).mean() > 0.99
    assert normalized_mutual_info_score(truth[labels >= 0], labels[labels >= 0]) > 0.8
    shuffled = rng.permutation(labels[labels >= 0])
    assert normalized_mutual_info_score(truth[labels >= 0], shuffled) < 0.1


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["spectrum", "checkpoint"])
def test_same_seed_same_bytes(store, run, kind):
    source = {"features": "spectrum"} if kind == "spectrum" else {"checkpoint": str(run), "layer": "block0"}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        cluster(store.path, f"{kind}-{name}", seed=seed, **source, **SMALL)
    a, b, c = (contents(store.path / "targets" / f"{kind}-{name}") for name in "abc")
    assert a == b
    assert a.keys() == c.keys() == {"labels.npy", "centroids.npy", "meta.json"}
    assert all(a[name] != c[name] for name in a)


def test_fitted_on_training_records_only(store, monkeypatch):
    used = []

    def spy(store, rows, features, **options):
        used.append(rows)
        return sample_vectors(store, rows, features, **options)

    monkeypatch.setattr(cluster_module, "sample_vectors", spy)
    meta = cluster(store.path, "folds", features="spectrum", val_folds=2, **SMALL)
    folds = store.column("fold")
    assert meta["held_out_folds"] == np.unique(folds)[-2:].tolist()
    expected = select_records(store, window_samples=240, val_folds=2, max_records=10**9).train
    np.testing.assert_array_equal(used[0], expected)
    assert not set(folds[used[0]]) & set(meta["held_out_folds"])
    assert meta["fitted_records"] == len(expected)
    assert (np.load(store.path / "targets" / "folds" / "labels.npy") >= 0).all(), "all records are labelled"
    meta = cluster(store.path, "few", features="spectrum", max_records=3, **SMALL)
    rung = select_records(store, window_samples=240, val_folds=1, max_records=3).train
    np.testing.assert_array_equal(used[1], rung)
    assert meta["fitted_records"] == len(rung) <= 3


@pytest.mark.parametrize(("wanted", "got"), [(10, 10), (1000, 1000), (10**6, None)])
def test_sample_is_of_distinct_tokens_of_the_given_records(tmp_path, wanted, got):
    store = Store(write_store(tmp_path / "s", [numbered(i, n) for i, n in enumerate(LENGTHS)]))
    rows, features = np.array([0, 3, 5]), position_features(60)
    vectors = sample_vectors(store, rows, features, tokens=wanted, seed=0, batch_size=4)
    found = set(vectors[:, 0].astype(int))
    assert found == set(rows) if wanted > 10 else found <= set(rows)
    all_tokens = 30 * features.grid.count(store.column("length")[rows]).sum()
    assert len(vectors) == (got or all_tokens)
    # The last window of a record may repeat some tokens of the one before.
    assert len(np.unique(vectors, axis=0)) >= 0.9 * len(vectors)
    again = sample_vectors(store, rows, features, tokens=wanted, seed=0, batch_size=7)
    np.testing.assert_array_equal(again, vectors)


def test_batch_size_does_not_change_the_labels(store, run):
    found = []
    for size in (7, 32):
        cluster(store.path, f"size{size}", codes=8, fit_tokens=2000, batch_size=size, checkpoint=str(run))
        found.append(np.load(store.path / "targets" / f"size{size}" / "labels.npy"))
    assert (found[0] == found[1]).mean() > 0.99  # but for rounding


def test_interrupted_leaves_nothing(store, monkeypatch, capsys):
    calls = []
    read = cluster_module._read

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(cluster_module, "_read", interrupted)
    command = [
        f"--store={store.path}",
        "--name=stopped",
        "--codes=8",
        "--features=spectrum",
        "--batch-size=16",
    ]
    assert cli.main(["cluster", "--fit-tokens=2000", *command]) == 130
    assert len(calls) == 10, "in the middle of labelling"
    assert not [path for path in (store.path / "targets").iterdir() if "stopped" in path.name]


def _killed(path):
    read, calls = cluster_module._read, []

    def kill(*arguments):
        calls.append(1)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*arguments)

    cluster_module._read = kill
    cluster(path, "killed", features="spectrum", **SMALL)


def test_killed_midway_the_next_call_starts_afresh(store):
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(store.path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = store.path / "targets"
    assert (folder / ".killed.partial").is_dir()
    assert not (folder / "killed").exists()
    with pytest.raises(UserError, match="has no targets 'killed'"):
        Targets(store, "killed")
    for name in ("killed", "whole"):
        cluster(store.path, name, features="spectrum", **SMALL)
    assert contents(folder / "killed") == contents(folder / "whole")
    assert not (folder / ".killed.partial").exists()


def test_command(store, run, capsys):
    command = ["cluster", f"--store={store.path}", "--codes=8", "--fit-tokens=2000", "--batch-size=16"]
    assert cli.main([*command, "--name=second", f"--checkpoint={run}", "--layer=block0"]) == 0
    out = capsys.readouterr().out
    assert "tokens labelled with 8 codes, 0 without a label" in out
    assert f"folds held out: {store.column('fold').max()}" in out
    targets = Targets(store, "second")
    rows = select_records(store, window_samples=600, val_folds=1, max_records=10**9)
    batches = train_batches(
        store, rows.train, batch_size=8, window_samples=600, seed=0, targets=targets, threads=0
    )
    labels = next(batches)["labels"]
    batches.close()
    assert labels.shape == (8, 300)
    assert 0 <= labels.min() < labels.max() < 8
    val = next(val_batches(store, rows.val, batch_size=8, window_samples=600, max_crops=8, targets=targets))
    assert val["labels"].shape == (8, 300)
    assert cli.main([*command, "--name=second", "--features=spectrum"]) == 2
    assert "second exists; choose another --name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--name=x --codes=8", "one of them is needed"),
        ("--name=x --codes=8 --features=spectrum --checkpoint=RUN", "not both"),
        ("--name=x --codes=8 --features=wavelets", "unknown; known: spectrum"),
        ("--name=x --codes=8 --features=spectrum --layer=block0", "has no layers"),
        ("--name=x --codes=1 --features=spectrum", "--codes=1 must be at least 2"),
        ("--name=x --codes=-5 --features=spectrum", "--codes=-5 must be at least 2"),
        ("--name=x --codes=32769 --features=spectrum", "at most 32768"),
        ("--name=x --codes=50 --fit-tokens=49 --features=spectrum", "more than the 49 tokens"),
        ("--name=x --codes=8 --fit-tokens=-1 --features=spectrum", "--fit-tokens=-1 must be at least 1"),
        ("--name=x --codes=8 --batch-size=0 --features=spectrum", "--batch-size=0 must be at least 1"),
        ("--name=x --codes=8 --val-folds=-1 --features=spectrum", "--val-folds=-1 must be at least 0"),
        ("--name=x --codes=8 --val-folds=99 --features=spectrum", "leaves no recording to train on"),
        ("--name=x --codes=8 --seed=-1 --features=spectrum", "--seed=-1 must be at least 0"),
        ("--name=a/b --codes=8 --features=spectrum", "cannot name a set of targets"),
        ("--name=x --codes=8 --checkpoint=RUN/77", "no checkpoint at step 77"),
        ("--name=x --codes=8 --checkpoint=nowhere", "there is no run at nowhere"),
        (
            "--name=x --codes=8 --checkpoint=RUN --layer=block7",
            "block0, block1, layer0, layer1, stem, tokens",
        ),
    ],
)
def test_mistakes_are_one_sentence(store, run, capsys, options, sentence):
    before = set((store.path / "targets").iterdir()) if (store.path / "targets").exists() else set()
    arguments = [f"--store={store.path}", *options.replace("RUN", str(run)).split()]
    assert cli.main(["cluster", *arguments]) == 2
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert sentence in error
    after = set((store.path / "targets").iterdir()) if (store.path / "targets").exists() else set()
    assert after == before


def test_no_store_is_one_sentence(tmp_path, capsys):
    command = ["cluster", "--name=x", "--codes=8", "--features=spectrum", f"--store={tmp_path / 'none'}"]
    assert cli.main(command) == 2
    assert "There is no store at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("attribute", "value", "sentence"),
    [
        ("rate_hz", 500.0, "has 500 samples per second"),
        ("leads", ("II",), "has the leads II, the checkpoint"),
    ],
)
def test_store_must_fit_the_checkpoint(store, run, attribute, value, sentence):
    other = Store(store.path)
    setattr(other, attribute, value)
    with pytest.raises(UserError, match=sentence):
        of_checkpoint(run, "tokens", other)


def test_features_that_are_not_finite_are_refused(store, monkeypatch):
    broken = spectrum(240.0)
    encode = broken.encode

    def with_nan(variables, signal):
        return encode(variables, signal) + np.float32(np.nan)

    monkeypatch.setattr(
        cluster_module, "spectrum", lambda rate: Features(broken.grid, with_nan, None, broken.source)
    )
    with pytest.raises(UserError, match="not finite"):
        cluster(store.path, "nan", features="spectrum", **SMALL)
    assert not (store.path / "targets" / "nan").exists()
    labels = np.full(10**6, -1, np.int16)
    with pytest.raises(UserError, match="not finite"):
        label_store(store, cluster_module.spectrum(240.0), np.zeros((2, 144), np.float32), labels, 16)
    assert (labels == -1).all()


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["cluster", "--help"])
    assert exit_.value.code == 0
    assert "the targets of HuBERT-style pretraining" in capsys.readouterr().out
