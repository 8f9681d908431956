"""`ecg-jax embed`: batching, lead orders and units, refusals, outputs."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ecg_jax
from ecg_jax import cli
from ecg_jax.config_flags import load_config
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import CANONICAL_LEADS, Problem, Recording
from ecg_jax.embed import embed, embed_all, windows
from ecg_jax.errors import UserError

SAMPLE = Path(ecg_jax.__file__).parent / "assets" / "ptbxl_sample"
# MIMIC-IV-ECG's order: aVF stands before aVL.
MIMIC_LEADS = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")


def _recording(name, n):
    return Recording(name, np.zeros((n, 12)), 240.0, CANONICAL_LEADS)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 7), st.integers(0, 1000))
def test_batches_span_recordings_and_keep_their_order(sizes, batch_size, seed):
    generator = np.random.default_rng(seed)
    crops = [generator.integers(-99, 99, (n, 5, 12), dtype=np.int16) for n in sizes]
    shapes = []

    def encode(batch):
        shapes.append(batch.shape)
        return batch.mean(axis=1)[:, :3].astype(np.float32)

    cut = [(_recording(str(i), 5), own) for i, own in enumerate(crops)]
    rows = list(embed_all(cut, encode, batch_size))
    assert [row.record_id for row in rows] == [str(i) for i in range(len(sizes))]
    assert [row.n_crops for row in rows] == sizes
    for row, own in zip(rows, crops, strict=True):
        np.testing.assert_allclose(row.embedding, own.mean(axis=(0, 1))[:3], atol=1e-4)
    assert shapes == [(batch_size, 5, 12)] * -(-sum(sizes) // batch_size)


def test_windows_are_consecutive_and_short_recordings_reported():
    generator = np.random.default_rng(0)
    long = Recording("long", generator.normal(0, 0.5, (1900, 12)), 240.0, CANONICAL_LEADS)
    short = Recording("short", generator.normal(0, 0.5, (599, 12)), 240.0, CANONICAL_LEADS)
    broken = Problem("broken", "truncated_signal", "refused", "cut.")
    silent = Recording("silent", np.zeros((1200, 12)), 240.0, CANONICAL_LEADS)
    contract, reported = Preprocessing(window_s=2.5), []
    [(recording, crops)] = windows([short, broken, long, silent], contract, reported.append)
    assert recording is long
    np.testing.assert_array_equal(crops.reshape(1800, 12), contract.apply(long).signal[:1800])
    assert [(problem.record, problem.kind) for problem in reported] == [
        ("short", "short"),
        ("broken", "truncated_signal"),
        ("silent", "no_signal"),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory, synthetic_store):
    """A pretraining run of one step."""
    from ecg_jax.pretrain import pretrain

    config = load_config("configs/cpc.py")
    config.store = str(synthetic_store)
    config.model.width, config.model.layers = 16, 1
    config.steps, config.batch_size, config.data.max_val_crops = 1, 8, 8
    config.objective.negatives = 4
    config.tensorboard = False
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    pretrain(config, workdir)
    return workdir


def _write(folder: Path, name: str, microvolts: np.ndarray, leads, unit: str):
    """A WFDB record at 500 Hz of integer microvolts, declared in uV or mV."""
    import wfdb

    folder.mkdir(exist_ok=True)
    gain = {"uV": 1.0, "mV": 1000.0}[unit]
    wfdb.wrsamp(
        name,
        fs=500,
        units=[unit] * 12,
        sig_name=list(leads),
        d_signal=microvolts.astype(np.int64),
        fmt=["16"] * 12,
        adc_gain=[gain] * 12,
        baseline=[0] * 12,
        write_dir=str(folder),
    )


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A real recording at 500 Hz, canonical in mV; and its twin in uV with MIMIC-IV-ECG's lead order."""
    import wfdb
    from scipy.signal import resample

    original = wfdb.rdrecord(str(SAMPLE / "records100" / "00000" / "00001_lr"))
    canonical = np.round(1000 * resample(original.p_signal, 5000, axis=0))
    order = [CANONICAL_LEADS.index(name) for name in MIMIC_LEADS]
    folder = tmp_path_factory.mktemp("recordings")
    _write(folder / "mv", "a", canonical, CANONICAL_LEADS, "mV")
    _write(folder / "uv", "a", canonical[:, order], MIMIC_LEADS, "uV")
    _write(folder / "wrong", "a", canonical[:, order], CANONICAL_LEADS, "mV")
    return folder


def test_lead_order_and_unit_do_not_matter(run, recordings, tmp_path):
    found = {}
    for name in ("mv", "uv", "wrong"):
        embed(str(run), recordings / name / "a.hea", tmp_path / f"{name}.npz")
        found[name] = np.load(tmp_path / f"{name}.npz")["embedding"]
    assert found["mv"].shape == (1, 16)
    assert found["mv"].dtype == np.float32
    scale = np.abs(found["mv"]).max()
    np.testing.assert_allclose(found["uv"], found["mv"], atol=1e-6 * scale)
    # The same numbers under the wrong names are another ECG: the test above can fail.
    assert np.abs(found["wrong"] - found["mv"]).max() > 1e-4 * scale


def test_equals_the_features_of_the_prepared_store(run, tmp_path):
    from ecg_jax.data.store import Store
    from ecg_jax.evaluation.feature_cache import FeatureCache
    from ecg_jax.evaluation.features import mean_per_record
    from ecg_jax.prepare import prepare
    from ecg_jax.training.pretrained import restore_encoder

    source = SAMPLE / "records100"
    prepare("wfdb", source, tmp_path / "store", workers=1, progress=False)
    store, encoder = Store(tmp_path / "store"), restore_encoder(run)
    crops, record = FeatureCache(tmp_path / "features").pooled(encoder, store).of(np.arange(len(store)))
    expected = mean_per_record(crops, record, len(store))
    n_rows, problems = embed(str(run), source, tmp_path / "e.npz", batch_size=50)
    assert (n_rows, problems) == (len(store), [])
    found = np.load(tmp_path / "e.npz")
    position = {Path(name).name: i for i, name in enumerate(found["record_id"])}
    rows = [position[Path(name).name] for name in store.column("record_id")]
    np.testing.assert_allclose(found["embedding"][rows], expected, atol=1e-5 * np.abs(expected).max())
    assert (found["n_crops"][rows] == np.bincount(record)).all()


def test_unreadable_recordings_are_reported_and_the_rest_written(run, recordings, tmp_path, capsys):
    folder = tmp_path / "mixed"
    for name in ("a.hea", "a.dat"):
        (folder / "good").mkdir(parents=True, exist_ok=True)
        (folder / "good" / name).write_bytes((recordings / "uv" / name).read_bytes())
    (folder / "gone.hea").write_text((recordings / "uv" / "a.hea").read_text())
    generator = np.random.default_rng(0)
    _write(folder / "short", "s", generator.normal(0, 300, (1000, 12)).round(), CANONICAL_LEADS, "uV")
    output = tmp_path / "e.parquet"
    assert cli.main(["embed", f"--checkpoint={run}", f"--input={folder}", f"--output={output}"]) == 0
    streams = capsys.readouterr()
    assert "1 recordings embedded" in streams.out
    assert "2 left out" in streams.out
    assert "gone: missing_signal" in streams.err
    assert "short/s: short: it lasts 2.00 s" in streams.err

    import pyarrow.parquet

    table = pyarrow.parquet.read_table(output)
    assert table.column("record_id").to_pylist() == ["good/a"]
    assert table.column("patient_id").to_pylist() == [None]
    assert table.column("n_crops").to_pylist() == [4]
    assert len(table.column("embedding").to_pylist()[0]) == 16
    metadata = json.loads(table.schema.metadata[b"ecg_jax"])
    assert {problem["record"] for problem in metadata["not_embedded"]} == {"gone", "short/s"}
    assert metadata["checkpoint"]["step"] == 1
    assert metadata["preprocessing"]["window_s"] == 2.5
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["e.parquet"]


def test_parquet_and_npz_hold_the_same(run, recordings, tmp_path):
    import pyarrow.parquet

    embed(str(run), recordings, tmp_path / "e.npz")
    embed(str(run), recordings, tmp_path / "e.parquet")
    npz, parquet = np.load(tmp_path / "e.npz"), pyarrow.parquet.read_table(tmp_path / "e.parquet")
    assert npz["record_id"].tolist() == parquet.column("record_id").to_pylist() == ["mv/a", "uv/a", "wrong/a"]
    np.testing.assert_array_equal(npz["embedding"], np.stack(parquet.column("embedding").to_pylist()))
    assert json.loads(str(npz["metadata"])) == json.loads(parquet.schema.metadata[b"ecg_jax"])


def test_tables_need_rate_unit_and_leads(run, recordings, tmp_path):
    import wfdb

    record = wfdb.rdrecord(str(recordings / "uv" / "a"))
    np.save(tmp_path / "a.npy", record.p_signal)
    with pytest.raises(UserError, match="neither rate nor unit"):
        embed(str(run), tmp_path / "a.npy", tmp_path / "t.npz")
    arguments = ["--rate=500", "--unit=uV", f"--leads={','.join(MIMIC_LEADS)}"]
    paths = [f"--checkpoint={run}", f"--input={tmp_path / 'a.npy'}", f"--output={tmp_path / 't.npz'}"]
    assert cli.main(["embed", *paths, *arguments]) == 0
    embed(str(run), recordings / "uv" / "a.hea", tmp_path / "w.npz")
    table, record = np.load(tmp_path / "t.npz")["embedding"], np.load(tmp_path / "w.npz")["embedding"]
    np.testing.assert_allclose(table, record, atol=1e-6 * np.abs(record).max())


def test_outputs_that_are_refused(run, recordings, tmp_path):
    source = recordings / "mv"
    with pytest.raises(UserError, match=r"\.npz or \.parquet"):
        embed(str(run), source, tmp_path / "e.csv")
    with pytest.raises(UserError, match="folder must exist"):
        embed(str(run), source, tmp_path / "nowhere" / "e.npz")
    (tmp_path / "e.npz").write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        embed(str(run), source, tmp_path / "e.npz")
    assert (tmp_path / "e.npz").read_text() == "precious"
    assert embed(str(run), source, tmp_path / "e.npz", overwrite=True)[0] == 1
    assert np.load(tmp_path / "e.npz")["n_crops"].tolist() == [4]
    with pytest.raises(UserError, match="batch-size"):
        embed(str(run), source, tmp_path / "f.npz", batch_size=0)


def test_nothing_to_embed_is_an_error(run, recordings, tmp_path, capsys):
    header = (recordings / "uv" / "a.hea").read_text()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "gone.hea").write_text(header)
    paths = [f"--checkpoint={run}", f"--output={tmp_path / 'e.npz'}"]
    assert cli.main(["embed", *paths, f"--input={tmp_path / 'bad'}"]) == 2
    assert "None of the 1 recordings" in capsys.readouterr().err
    assert cli.main(["embed", *paths, f"--input={tmp_path / 'nowhere'}"]) == 2
    assert cli.main(["embed", f"--checkpoint={tmp_path}", paths[1], f"--input={recordings}"]) == 2
    assert not (tmp_path / "e.npz").exists()


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["embed", "--help"])
    assert exit_.value.code == 0
    assert "one row per recording" in capsys.readouterr().out
