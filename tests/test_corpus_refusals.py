"""What the labelled corpora refuse: missing tables, columns and arrays, and cells that cannot be right."""

import shutil

import h5py
import numpy as np
import pytest

import corpus_replicas as replicas
from ecg_jax.data.corpora import CORPORA, chapman, code15, echonext, sph, zzu
from ecg_jax.data.recording import BadRecording
from ecg_jax.errors import UserError
from ecg_jax.prepare import prepare

WRITE = {
    "sph": lambda folder: replicas.write_sph(folder, 3, seconds=3.0, unlisted=False),
    "code15": lambda folder: replicas.write_code15(folder, 4, unlisted=False),
    "chapman": lambda folder: replicas.write_chapman(folder, 2, seconds=3.0, xlsx=False),
    "ptb": lambda folder: replicas.write_ptb(folder, 2, seconds=3.0),
    "echonext": lambda folder: replicas.write_echonext(folder, 6, no_split=1),
    "zzu": lambda folder: replicas.write_zzu(folder, 2),
}
TABLE = {
    "sph": "metadata.csv",
    "code15": "exams.csv",
    "chapman": "Diagnostics.csv",
    "echonext": "echonext_metadata_100k.csv",
    "zzu": "AttributesDictionary.csv",
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """corpus -> the folder of its replica, written once."""
    folder = tmp_path_factory.mktemp("published")
    for corpus, write in WRITE.items():
        write(folder / corpus)
    return folder


@pytest.fixture
def source(published, tmp_path):
    """A copy of a replica that a test may damage: source("sph")."""

    def copy(corpus):
        return shutil.copytree(published / corpus, tmp_path / corpus)

    return copy


def listing(corpus, folder):
    return CORPORA[corpus].list_records(folder, None)


def edit(folder, corpus, column, value, row=0):
    """Sets one cell of a corpus' table; value None removes the column."""
    path = folder / TABLE[corpus]
    rows = replicas.read_csv(path)
    if value is None:
        rows = [{name: cell for name, cell in row.items() if name != column} for row in rows]
    else:
        rows[row][column] = value
    replicas.write_csv(path, rows)


@pytest.mark.parametrize("corpus", WRITE)
def test_an_empty_folder_is_told_what_is_expected(tmp_path, corpus):
    with pytest.raises(UserError, match="expected") as refusal:
        listing(corpus, tmp_path)
    assert CORPORA[corpus].EXPECTS in str(refusal.value)


@pytest.mark.parametrize("corpus", WRITE)
def test_source_rate_is_refused(published, corpus):
    with pytest.raises(UserError, match="--source-rate"):
        CORPORA[corpus].list_records(published / corpus, 100)


@pytest.mark.parametrize("corpus", TABLE)
def test_missing_table_is_named(source, corpus):
    folder = source(corpus)
    (folder / TABLE[corpus]).unlink()
    with pytest.raises(UserError, match=rf"{TABLE[corpus]}.* \(expected"):
        listing(corpus, folder)


@pytest.mark.parametrize(
    ("corpus", "column"),
    [
        ("sph", "AHA_Code"),
        ("sph", "Patient_ID"),
        ("code15", "1dAVb"),
        ("code15", "trace_file"),
        ("chapman", "Beat"),
        ("chapman", "FileName"),
        ("echonext", "patient_key"),
        ("echonext", "shd_moderate_or_greater_flag"),
        ("zzu", "AHA_code"),
        ("zzu", "Lead"),
    ],
)
def test_missing_column_is_named_with_those_found(source, corpus, column):
    folder = source(corpus)
    edit(folder, corpus, column, None)
    others = ", ".join(replicas.read_csv(folder / TABLE[corpus])[0])
    with pytest.raises(UserError) as refusal:
        listing(corpus, folder)
    message = str(refusal.value)
    assert message.startswith(f"{folder / TABLE[corpus]} has no column {column} (found: {others})")


@pytest.mark.parametrize(
    ("corpus", "column", "value"),
    [
        ("sph", "AHA_Code", ""),
        ("sph", "AHA_Code", "normal"),
        ("sph", "Patient_ID", ""),
        ("sph", "Age", "old"),
        ("sph", "Sex", "x"),
        ("code15", "exam_id", "a"),
        ("code15", "AF", "maybe"),
        ("code15", "is_male", ""),
        ("code15", "patient_id", ""),
        ("chapman", "Rhythm", ""),
        ("chapman", "PatientAge", "-1"),
        ("echonext", "split", "valid"),
        ("echonext", "lvef_lte_45_flag", ""),
        ("echonext", "patient_key", ""),
        ("zzu", "Age", "12y"),
        ("zzu", "Lead", "8"),
        ("zzu", "Gender", "'unknown'"),
        ("zzu", "Filename", ""),
    ],
)
def test_cells_that_cannot_be_right_are_named(source, corpus, column, value):
    folder = source(corpus)
    edit(folder, corpus, column, value)
    with pytest.raises(
        UserError, match=rf"has {value!r} in column {column}, which must be .*; correct that row"
    ):
        listing(corpus, folder)


@pytest.mark.parametrize(
    ("corpus", "path", "message"),
    [
        ("sph", "records", r"No \.h5 file"),
        ("chapman", "ECGData", "no folder ECGData or ECGDataDenoised"),
        ("echonext", "EchoNext_val_waveforms.npy", r"EchoNext_val_waveforms\.npy is missing"),
        ("zzu", "ECGCode.csv", r"ECGCode\.csv is missing"),
        ("zzu", "Child_ecg", "no folder Child_ecg"),
    ],
)
def test_missing_signals_are_named(source, corpus, path, message):
    folder = source(corpus)
    if (folder / path).is_dir():
        shutil.rmtree(folder / path)
    else:
        (folder / path).unlink()
    with pytest.raises(UserError, match=message):
        listing(corpus, folder)


@pytest.mark.parametrize("corpus", ["sph", "chapman", "echonext", "zzu"])
def test_a_recording_listed_twice_is_read_once(source, corpus):
    folder = source(corpus)
    rows = replicas.read_csv(folder / TABLE[corpus])
    if corpus == "echonext":  # as many rows as the arrays have, two of them with one key
        rows[1]["ecg_key"] = rows[0]["ecg_key"]
    else:
        rows.append(rows[0])
    replicas.write_csv(folder / TABLE[corpus], rows)
    found = listing(corpus, folder)
    assert [p.kind for p in found.problems].count("duplicate_id") == 1


def test_code15_exam_in_two_rows_counts_once_or_is_unknown_if_they_differ(source):
    folder = source("code15")
    expected = listing("code15", folder)
    rows = replicas.read_csv(folder / "exams.csv")
    replicas.write_csv(folder / "exams.csv", [*rows, rows[0]])
    assert listing("code15", folder).digest() == expected.digest()
    other = {**rows[0], "AF": str(rows[0]["AF"] != "True")}
    replicas.write_csv(folder / "exams.csv", [*rows, other, rows[0]])
    found = {entry.record_id: entry for entry in listing("code15", folder).entries}
    doubtful = found.pop(rows[0]["exam_id"])
    assert (doubtful.labels, doubtful.patient_id, doubtful.fold) == (None, None, -1)
    assert "contradict each other" in doubtful.problems[0].detail
    assert list(found.values()) == [e for e in expected.entries if e.record_id in found]


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("tracings", np.zeros((3, 4096, 8)), r"\(3, 4096, 8\) in tracings, not numbers \[N, 4096, 12\]"),
        ("tracings", np.zeros((3, 12)), r"\(3, 12\) in tracings"),
        ("tracings", None, r"has no dataset tracings \(found: exam_id\)"),
        ("exam_id", np.arange(5), "3 tracings and exam_id"),
        ("exam_id", None, r"has no dataset exam_id \(found: tracings\)"),
    ],
)
def test_code15_refuses_a_part_of_another_shape(source, name, array, message):
    folder = source("code15")
    with h5py.File(folder / "exams_part0.hdf5", "a") as file:
        del file[name]
        if array is not None:
            file[name] = array
    with pytest.raises(UserError, match=message):
        listing("code15", folder)


def test_code15_refuses_a_part_that_is_no_hdf5(source):
    folder = source("code15")
    (folder / "exams_part1.hdf5").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"exams_part1\.hdf5 is no HDF5 file"):
        listing("code15", folder)


@pytest.mark.parametrize("units_per_mv", [0.1, 1000.0])
def test_code15_does_not_guess_a_unit(tmp_path, units_per_mv):
    replicas.write_code15(tmp_path / "source", 2, parts=1, units_per_mv=units_per_mv, unlisted=False)
    with pytest.raises(
        UserError, match=r"unit of CODE-15 .* cannot be told.*exams_part0\.hdf5.*--assume-gain"
    ):
        prepare("code15", tmp_path / "source", tmp_path / "store", workers=1, progress=False)


@pytest.fixture
def parts(tmp_path):
    """CODE-15 in three parts, the signals of the second multiplied."""

    def make(factor):
        replicas.write_code15(tmp_path / "source", 6, parts=3, unlisted=False)
        with h5py.File(tmp_path / "source" / "exams_part1.hdf5", "a") as file:
            file["tracings"][...] *= factor
        return tmp_path / "source"

    return make


def test_code15_takes_the_unit_of_a_part_from_the_others(parts):
    folder = parts(0.02)  # no ECG in either unit
    found = listing("code15", folder)
    units = [(p.record, p.action) for p in found.problems if p.kind == "unit_detected"]
    assert units == [(f"exams_part{i}.hdf5", "millivolts") for i in range(3)]
    for entry in found.entries:
        file, row = entry.file.split("#")
        with h5py.File(folder / file) as part:
            tracing = part["tracings"][int(row)]
        assert np.abs(code15.read(folder, entry, None).signal).max() == np.abs(tracing).max()


def test_code15_whose_parts_differ_in_unit_is_refused(parts):
    folder = parts(10.0)
    found = listing("code15", folder)
    assert "unit_detected" not in [p.kind for p in found.problems]
    for forgotten in (False, True):  # by a process that listed the parts, and by another
        if forgotten:
            code15._looked_at.clear()
        with pytest.raises(
            UserError, match=r"differs.*part0\.hdf5 \S+ \(millivolts\).*part1\.hdf5 \S+ \(1e-4 V\)"
        ):
            code15.read(folder, found.entries[0], None)
    assert code15.read(folder, found.entries[0], 10.0).record_id == found.entries[0].record_id
    with pytest.raises(UserError, match="differs between its parts"):
        prepare("code15", folder, folder / ".." / "store", workers=2, progress=False)


def test_code15_row_of_zeros_is_refused(source):
    folder = source("code15")
    with h5py.File(folder / "exams_part0.hdf5", "a") as file:
        file["tracings"][0] = 0
    entry = listing("code15", folder).entries[0]
    with pytest.raises(BadRecording) as refusal:
        code15.read(folder, entry, None)
    assert refusal.value.problem.kind == "no_signal"


@pytest.mark.parametrize(
    "damage",
    [
        lambda array: array[:-1],
        lambda array: array[:, 0],
        lambda array: array[..., :8],
        lambda array: np.concatenate([array, array], axis=2),
    ],
)
def test_echonext_refuses_an_array_of_another_shape(source, damage):
    folder = source("echonext")
    path = folder / "EchoNext_train_waveforms.npy"
    np.save(path, damage(np.load(path)))
    with pytest.raises(
        UserError, match=r"EchoNext_train_waveforms\.npy holds an array .* rows of split train"
    ):
        listing("echonext", folder)


def test_echonext_refuses_a_truncated_array(source):
    folder = source("echonext")
    path = folder / "EchoNext_test_waveforms.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"no complete \.npy array"):
        listing("echonext", folder)


def test_echonext_reads_the_name_of_the_readme_too(source):
    folder = source("echonext")
    expected = listing("echonext", folder).digest()
    (folder / "echonext_metadata_100k.csv").rename(folder / "EchoNext_metadata_100k.csv")
    assert listing("echonext", folder).digest() == expected


def refusal_of(module, folder, entry):
    with pytest.raises(BadRecording) as refusal:
        module.read(folder, entry, None)
    return refusal.value.problem.kind, refusal.value.problem.detail


def test_sph_refuses_damaged_recordings_one_by_one(source, tmp_path):
    folder = source("sph")
    _, two, three = listing("sph", folder).entries
    with h5py.File(folder / two.file, "w") as file:
        file["ecg"] = np.zeros((5000, 12), np.float16)
    (folder / three.file).write_bytes(b"not HDF5")
    assert refusal_of(sph, folder, two) == (
        "array_refused",
        "A00002.h5 holds an array (5000, 12), not [12, T].",
    )
    kind, detail = refusal_of(sph, folder, three)
    assert kind == "array_refused"
    assert "no HDF5 file" in detail
    with h5py.File(folder / two.file, "w") as file:
        file["signal"] = np.zeros((12, 5000))
    assert refusal_of(sph, folder, two)[1] == "A00002.h5 has no dataset 'ecg' (found: signal)."
    (folder / two.file).unlink()
    assert refusal_of(sph, folder, two)[0] == "missing_signal"
    summary = prepare("sph", folder, tmp_path / "store", workers=1, progress=False)
    assert (summary.written, summary.refused) == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("I,II\n1,2\n", "not"),
        ("1,2,3\n4,5,6\n", "not"),
        ("a,b\n1,2\n", "no table of numbers"),
        ("1,2\n3\n", "no table of numbers"),
    ],
)
def test_chapman_refuses_tables_of_another_shape(source, text, message):
    folder = source("chapman")
    entry = listing("chapman", folder).entries[0]
    (folder / entry.file).write_text(text)
    kind, detail = refusal_of(chapman, folder, entry)
    assert kind == "table_refused"
    assert message in detail
    (folder / entry.file).unlink()
    assert refusal_of(chapman, folder, entry)[0] == "missing_signal"


def test_zzu_record_that_is_missing(source):
    folder = source("zzu")
    entry = listing("zzu", folder).entries[0]
    (folder / entry.file).with_suffix(".dat").unlink()
    assert refusal_of(zzu, folder, entry)[0] == "missing_signal"


def test_ptb_needs_folders_of_patients(source, tmp_path):
    folder = source("ptb")
    shutil.copytree(folder / "patient001", tmp_path / "flat")
    with pytest.raises(UserError, match="No folder patientNNN"):
        listing("ptb", tmp_path / "flat")


def test_unknown_splits_and_folds_of_echonext_are_not_invented(source):
    folder = source("echonext")
    edit(folder, "echonext", "split", "no_split", row=0)
    with pytest.raises(UserError, match="rows of split"):
        listing("echonext", folder)
    assert set(echonext._FOLDS.values()) == {8, 9}
