"""The store: layout, reading, damage."""

import concurrent.futures
import itertools
import json
import math
import pickle
import resource
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.data import chunk_files
from ecg_jax.data.preprocessing import Preprocessing
from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.data.store import PARTIAL, Store
from ecg_jax.data.synthetic import synthetic_recording
from ecg_jax.data.writer import UnitWriter, finalise, read_sidecar, sidecar_path, unit_size
from ecg_jax.errors import UserError
from sparse_store import write_sparse_store


def build(path, lengths_s=(3.0, 5.0, 2.0, 4.0, 6.0, 3.5), per_unit=2, skip_units=()):
    """A store of several units with different lengths; units in `skip_units` hold no record."""
    (path / ".partial").mkdir(parents=True)
    preprocessing = Preprocessing()
    signals = []
    n_units = -(-len(lengths_s) // per_unit)
    for unit in range(n_units):
        with UnitWriter(path, unit, "made") as writer:
            for i in range(unit * per_unit, min((unit + 1) * per_unit, len(lengths_s))):
                if unit in skip_units:
                    continue
                recording, _ = synthetic_recording(3, i, lengths_s[i], 240.0)
                recording.fold = i % 10 + 1
                processed = preprocessing.apply(recording)
                writer.append(recording, processed, f"{i}.hea")
                signals.append(processed.signal)
            writer.finish()
    finalise(
        path,
        n_units=n_units,
        preprocessing=preprocessing,
        attributes={"corpus": "made", "source": "", "fold_source": "made"},
        label_sets=("synthetic", "rhythm"),
        classes=None,
        descriptions={},
        first_problems=[],
        drop_duplicates=False,
        strict=False,
    )
    return signals


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "made"
    return path, build(path)


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_attributes(made):
    store = Store(made[0])
    assert (store.corpus, store.leads, store.rate_hz) == ("made", CANONICAL_LEADS, 240.0)
    assert store.preprocessing == Preprocessing()
    assert len(store) == store.records.num_rows == 6
    assert len(store.fingerprint) == 64
    assert set(store.classes) == {"synthetic", "rhythm"}
    assert store.class_info["rhythm"].keys() == set(store.classes["rhythm"])
    assert sum(info["count"] for info in store.class_info["rhythm"].values()) == 6
    assert store.attributes["unit"] == "uV"
    assert store.attributes["format_version"] == 1


def test_columns(made):
    store = Store(made[0])
    for name in ("fold", "offset", "length", "missing_leads", "saturated"):
        assert store.column(name).dtype.kind == "i"
    assert store.column("record_id")[0] == "synthetic0000000"
    assert store.column("duplicate_of").tolist() == [None] * 6
    assert isinstance(store.column("labels_rhythm")[0], list)
    assert store.column("source_rate").dtype == np.float64
    assert (np.diff(store.column("offset")) > 0).all()
    with pytest.raises(UserError, match="no column 'labels_super'"):
        store.column("labels_super")


def test_records_come_back(made):
    store = Store(made[0])
    for i, signal in enumerate(made[1]):
        np.testing.assert_array_equal(store.read(i, verify=True), signal)


def test_any_zarr_reader_opens_it(made):
    path, signals = made
    store = Store(path)
    group = zarr.open_group(path, mode="r")
    by_zarr = group["signal"][:]
    by_tensorstore = (
        tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/signal/"}})
        .result()
        .read()
        .result()
    )
    np.testing.assert_array_equal(by_zarr, by_tensorstore)
    assert by_zarr.dtype == np.int16
    for offset, signal in zip(store.column("offset"), signals, strict=True):
        np.testing.assert_array_equal(by_zarr[offset : offset + len(signal)], signal)
    assert group.attrs["ecg_jax"]["leads"] == list(CANONICAL_LEADS)


def test_records_never_straddle_chunks(made):
    store = Store(made[0])
    chunk = zarr.open_group(made[0], mode="r")["signal"].chunks[0]
    offset, length = store.column("offset"), store.column("length")
    np.testing.assert_array_equal(offset // chunk, (offset + length - 1) // chunk)
    assert (offset[1:] >= (offset + length)[:-1]).all()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_read_crops_equals_slicing(made, data):
    path, signals = made
    store = Store(path)
    n = data.draw(st.integers(1, 480))
    rows = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=12))
    starts = [data.draw(st.integers(0, len(signals[row]) - n)) for row in rows]
    absolute = store.column("offset")[rows] + np.array(starts, np.int64)
    crops = store.read_crops(absolute, n)
    assert crops.shape == (len(rows), n, 12)
    for crop, row, start in zip(crops, rows, starts, strict=True):
        np.testing.assert_array_equal(crop, signals[row][start : start + n])
    out = np.full_like(crops, 7)
    assert store.read_crops(absolute, n, out) is out
    np.testing.assert_array_equal(out, crops)


def test_read_crops_refuses_what_is_not_there(made):
    store = Store(made[0])
    chunk = zarr.open_group(made[0], mode="r")["signal"].chunks[0]
    for start in (-1, chunk - 10, 3 * chunk, 10**12):
        with pytest.raises(ValueError, match="outside the store"):
            store.read_crops(np.array([0, start]), 20)
    starts = np.array([0])
    for out in (
        np.empty((1, 20, 12), np.int32),
        np.empty((2, 20, 12), np.int16),
        np.empty((1, 12, 20), np.int16).swapaxes(1, 2),
    ):
        with pytest.raises(ValueError, match="C-contiguous"):
            store.read_crops(starts, 20, out)


def test_chunks_without_records_have_no_file_and_read_as_zeros(tmp_path):
    signals = build(tmp_path / "s", skip_units=(1,))
    store = Store(tmp_path / "s")
    assert not (tmp_path / "s/signal/c/1/0").exists()
    chunk = zarr.open_group(tmp_path / "s", mode="r")["signal"].chunks[0]
    crops = store.read_crops(np.array([chunk + 5, 0]), 100)
    assert not crops[0].any()
    np.testing.assert_array_equal(crops[1], signals[0][:100])
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "s", mode="r")["signal"][:100], signals[0][:100])


def test_few_descriptors_are_enough(made, monkeypatch):
    monkeypatch.setattr(chunk_files, "MAX_OPEN_CHUNKS", 1)
    store = Store(made[0])
    for _ in range(3):
        for i, signal in enumerate(made[1]):
            np.testing.assert_array_equal(store.read(i), signal)
    assert len(store.chunk_files._fds) == 1


def test_pickle_carries_neither_descriptors_nor_table(made):
    store = Store(made[0])
    store.read(0)
    assert store.chunk_files._fds
    assert store.records.num_rows == 6
    again = pickle.loads(pickle.dumps(store))
    assert again.chunk_files._fds == {}
    assert again._records is None
    assert again.column("record_id").tolist() == store.column("record_id").tolist()
    assert again._records is None
    np.testing.assert_array_equal(again.read(5), made[1][5])
    assert again.records.equals(store.records)
    assert again.read(3, verify=True).shape == made[1][3].shape


def test_few_descriptors_of_the_process_are_enough(made):
    """With a hard limit below what the chunks need, reading goes on, and other files can still be opened."""
    code = f"""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (270, 270))
others = [os.open("/dev/null", os.O_RDONLY) for _ in range(12)]
from ecg_jax.data.store import Store
store = Store({str(made[0])!r})
for row in range(6):
    store.read(row, verify=True)
assert len(store.chunk_files._fds) < 3, store.chunk_files._fds
open({str(made[0] / "zarr.json")!r}).close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_many_chunks_raise_the_soft_limit_of_descriptors():
    code = """
import resource
from pathlib import Path
from ecg_jax.data.chunk_files import ChunkFiles
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
ChunkFiles(Path("store"), 24, frozenset(range(100)))
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1024, hard)
ChunkFiles(Path("store"), 24, frozenset(range(2686)))
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 65536), hard)
"""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4096:
        pytest.skip("the hard limit of this machine is too low")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_and_processes_share_a_store(made):
    store = Store(made[0])

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(50):
            rows = rng.integers(0, 6, 16)
            starts = np.array([rng.integers(0, len(made[1][r]) - 100) for r in rows])
            crops = store.read_crops(store.column("offset")[rows] + starts, 100)
            for crop, r, s in zip(crops, rows, starts, strict=True):
                np.testing.assert_array_equal(crop, made[1][r][s : s + 100])
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_close_and_read_again(made):
    store = Store(made[0])
    first = store.read(2)
    store.close()
    np.testing.assert_array_equal(store.read(2), first)


# ---------------------------------------------------------------- damage


def test_truncated_chunk_is_found_on_opening(copy):
    chunk = copy / "signal/c/1/0"
    size = chunk.stat().st_size
    with open(chunk, "r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(UserError, match=f"damaged: its file .*c/1/0 has {size - 1} bytes instead of {size}"):
        Store(copy)


def test_missing_chunk_is_found_on_opening(copy):
    (copy / "signal/c/2/0").unlink()
    with pytest.raises(UserError, match=r"damaged: its file .*c/2/0 is missing"):
        Store(copy)


@pytest.mark.parametrize("limit", [chunk_files.MAX_OPEN_CHUNKS, 0])
def test_chunk_truncated_while_open_is_found_on_reading(copy, limit, monkeypatch):
    monkeypatch.setattr(chunk_files, "MAX_OPEN_CHUNKS", limit)
    store = Store(copy)
    with open(copy / "signal/c/0/0", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="ends too early"):
        store.read(1)


@pytest.mark.parametrize("limit", [chunk_files.MAX_OPEN_CHUNKS, 0])
def test_chunk_removed_while_open_is_found_on_reading(copy, limit, monkeypatch):
    monkeypatch.setattr(chunk_files, "MAX_OPEN_CHUNKS", limit)
    store = Store(copy)
    (copy / "signal/c/0/0").unlink()
    with pytest.raises(UserError, match="Cannot open"):
        store.read(0)


def test_flipped_bit_is_found_by_verifying(copy):
    chunk = copy / "signal/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[123] ^= 1
    chunk.write_bytes(data)
    store = Store(copy)
    store.read(0)
    with pytest.raises(UserError, match=r"synthetic0000000 .* checksum"):
        store.read(0, verify=True)
    store.read(1, verify=True)


def test_verifying_reads_ids_and_checksums_by_row_group(copy):
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(copy / "records.parquet")
    pyarrow.parquet.write_table(table, copy / "records.parquet", row_group_size=4)
    store = Store(copy)
    assert [(first, len(part)) for first, part in store.row_groups("offset")] == [(0, 4), (4, 2)]
    for row in (5, 0, 4, 3):
        assert store.read(row, verify=True).shape == (store.column("length")[row], 12)
        assert len(store._identities[1]) == (4 if row < 4 else 2)
    assert store._records is None
    data = bytearray((copy / "signal/c/2/0").read_bytes())
    data[0] ^= 1
    (copy / "signal/c/2/0").write_bytes(data)
    with pytest.raises(UserError, match=r"synthetic0000004 .* checksum"):
        store.read(4, verify=True)
    with pytest.raises(UserError, match="not all of the columns offset, colour"):
        next(store.row_groups("offset", "colour"))


def test_a_record_outside_the_array_is_found_on_opening(copy):
    import pyarrow as pa
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(copy / "records.parquet")
    for wrong in (-5000, 10**12):
        offsets = table["offset"].to_pylist()
        offsets[3] = wrong
        changed = table.set_column(
            table.schema.get_field_index("offset"), "offset", pa.array(offsets, pa.int64())
        )
        pyarrow.parquet.write_table(changed, copy / "records.parquet")
        with pytest.raises(UserError, match="a record outside the signal array"):
            Store(copy)


@pytest.mark.parametrize("file", ["records.parquet", "signal/zarr.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_damaged_metadata(copy, file, damage):
    path = copy / file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else data[: len(data) // 2])
    with pytest.raises(UserError, match="missing or damaged"):
        Store(copy)


def test_table_of_another_store(copy, tmp_path):
    build(tmp_path / "other", lengths_s=(3.0, 3.0))
    shutil.copy(tmp_path / "other/records.parquet", copy)
    with pytest.raises(UserError, match="2 rows instead of 6"):
        Store(copy)


def test_no_store(tmp_path):
    with pytest.raises(UserError, match="no store at"):
        Store(tmp_path / "none")
    with pytest.raises(UserError, match="not a store"):
        Store(tmp_path)
    (tmp_path / ".partial").mkdir()
    with pytest.raises(UserError, match="incomplete"):
        Store(tmp_path)
    for text in ("", "{}", '{"attributes": {}}', "[1]"):
        (tmp_path / "zarr.json").write_text(text)
        with pytest.raises(UserError, match="does not describe"):
            Store(tmp_path)


def test_other_format_version(copy):
    metadata = json.loads((copy / "zarr.json").read_text())
    metadata["attributes"]["ecg_jax"]["format_version"] = 99
    (copy / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="format version 99"):
        Store(copy)


# ---------------------------------------------------------------- writing


def test_unit_size_depends_on_the_number_of_records_only():
    assert [unit_size(n) for n in (1, 2048, 2049, 21_799, 300_000, 11_000_000)] == [
        32,
        32,
        33,
        341,
        4096,
        4096,
    ]


def test_unfinished_unit_leaves_nothing(tmp_path):
    (tmp_path / ".partial").mkdir()
    recording, _ = synthetic_recording(0, 0, 3.0)
    with UnitWriter(tmp_path, 0, "made") as writer:
        writer.append(recording, Preprocessing().apply(recording), "")
    assert list((tmp_path / ".partial").iterdir()) == []
    assert not sidecar_path(tmp_path, 0).exists()


def test_importing_the_store_imports_neither_jax_nor_wfdb():
    code = (
        "import sys, ecg_jax.data.store, ecg_jax.prepare; "
        "print([m for m in ('jax', 'wfdb', 'pyarrow', 'zarr', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_values_come_back_in_order_with_nan_where_unknown(tmp_path):
    names = {"labs": {"sodium": "mmol/l", "ferritin": "ug/l"}, "vitals": {"rate": "1/min"}}
    found = [
        {"labs": {"ferritin": 3.5}},
        {"labs": {"sodium": 140.0, "ferritin": math.nan}, "vitals": {"rate": 71.0}},
        {},
    ]
    (tmp_path / PARTIAL).mkdir()
    with UnitWriter(tmp_path, 0, "test") as writer:
        for index, values in enumerate(found):
            recording, _ = synthetic_recording(0, index, 3.0, 240.0)
            recording.fold, recording.values = 1, values
            writer.append(recording, Preprocessing().apply(recording), "")
        writer.finish()
    assert read_sidecar(tmp_path, 0) is not None
    finalise(
        tmp_path, n_units=1, preprocessing=Preprocessing(), attributes={"corpus": "test", "fold_source": ""},
        label_sets=(), classes={}, descriptions={}, first_problems=[], drop_duplicates=False, strict=False,
        values=names,
    )  # fmt: skip
    store = Store(tmp_path)
    assert store.values == names
    nan = math.nan
    np.testing.assert_array_equal(store.value_matrix("labs"), [[nan, 3.5], [140.0, nan], [nan, nan]])
    np.testing.assert_array_equal(store.value_matrix("vitals"), [[nan], [71.0], [nan]])
    with pytest.raises(UserError, match=r"no value set 'height'; it has labs, vitals"):
        store.value_matrix("height")


def test_other_labels_have_another_digest_and_the_same_fingerprint(tmp_path):
    stores = []
    for name, codes in (("one", ["AF"]), ("two", ["SR"])):
        path = tmp_path / name
        (path / PARTIAL).mkdir(parents=True)
        with UnitWriter(path, 0, "test") as writer:
            recording, _ = synthetic_recording(0, 0, 3.0, 240.0)
            recording.fold, recording.labels = 1, {"dx": codes}
            writer.append(recording, Preprocessing().apply(recording), "")
            writer.finish()
        finalise(
            path, n_units=1, preprocessing=Preprocessing(), attributes={"corpus": "test", "fold_source": ""},
            label_sets=("dx",), classes=None, descriptions={}, first_problems=[], drop_duplicates=False, strict=False,
        )  # fmt: skip
        stores.append(Store(path))
    assert stores[0].fingerprint == stores[1].fingerprint
    assert stores[0].table_digest() != stores[1].table_digest()


# ---------------------------------------------------------------- many records


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return Store(write_sparse_store(tmp_path_factory.mktemp("sparse") / "s", 200_000))


def test_sparse_store_is_one_that_prepare_could_have_written(sparse):
    assert len(sparse) == sparse.records.num_rows == 200_000
    assert sparse.corpus == "heedb"
    assert not sparse.read(123_456, verify=True).any()
    folds = dict(zip(sparse.column("patient_id"), sparse.column("fold"), strict=True))
    assert [folds[p] for p in sparse.column("patient_id")] == sparse.column("fold").tolist()
    assert sorted(set(folds.values())) == list(range(1, 21))
    files = sparse.column("source_file")
    assert len({file.rsplit("/", 1)[0] for file in files}) == 34
    assert len(set(files)) == len(set(sparse.column("record_id"))) == 200_000
    duplicates = [original for original in sparse.column("duplicate_of") if original is not None]
    assert 500 < len(duplicates) < 2000
    assert set(duplicates) < set(sparse.column("record_id"))
    counts = Counter(itertools.chain.from_iterable(sparse.column("labels_dx")))
    assert counts == {code: info["count"] for code, info in sparse.class_info["dx"].items()}
    assert (sparse.path / "signal/c/0/0").stat().st_blocks < 64


def test_opening_and_pickling_do_not_grow_with_the_records(sparse):
    """NumPy and Python memory held by an open store: none of its columns, which would be 1.6 MB each here."""
    Store(sparse.path)
    tracemalloc.start()
    store = Store(sparse.path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 200_000
    assert peak < 4_000_000
    assert len(pickle.dumps(store)) < 50_000


def test_texts_of_a_column_are_shared(sparse):
    for name, different in (("corpus", 1), ("sex", 3), ("patient_id", 33_000)):
        assert len({id(text) for text in sparse.column(name)}) <= different
    assert set(sparse.column("sex")) == {"F", "M", None}
    assert sparse.column("record_id").tolist() == sparse.arrow_column("record_id").to_pylist()
