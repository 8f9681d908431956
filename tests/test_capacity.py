"""`ecg-jax capacity`: its arithmetic, on figures worked out by hand, and what it refuses."""

import json

import pytest

from ecg_jax import cli
from ecg_jax.capacity import Source, read_sources, work_out
from ecg_jax.data.ladder import SIZES
from ecg_jax.errors import UserError
from ecg_jax.studies.capacity import Cluster, _duration, load, rungs

GIVEN = ["--windows-per-s=1000", "--parameters=1000000", "--batch=50"]


def test_load_of_a_cluster():
    found = load(rate=1000.0, cluster=Cluster(8, 2), batch=50, parameters=10**6, window_samples=600)
    assert found.windows == 8000
    assert found.read_bytes == 8000 * 600 * 24
    assert found.reads == 4000, "of each of the two hosts"
    assert found.step_s == pytest.approx(0.05)
    # Seven eighths of four million bytes, there and back.
    assert found.gradient_bytes == pytest.approx(7e6)
    assert found.network_rate(0.1) == pytest.approx(7e6 / 0.005)


def test_cold_reads_take_whole_pages():
    """A crop of one byte touches one page, of two bytes at 1 of 4096 places two; 14 400 bytes touch 4 or 5."""
    crop = 600 * 24
    touched = [(start + crop - 1) // 4096 + 1 for start in range(4096)]
    found = load(rate=1.0, cluster=Cluster(1, 1), batch=1, parameters=1, window_samples=600)
    assert found.cold_bytes == pytest.approx(4096 * sum(touched) / 4096)
    assert set(touched) == {4, 5}


def test_one_device_sums_no_gradients():
    found = load(rate=1.0, cluster=Cluster(1, 1), batch=1, parameters=10**6, window_samples=600)
    assert found.gradient_bytes == 0


@pytest.mark.parametrize("name", ["rate", "batch", "parameters", "window_samples"])
def test_nothing_may_be_zero(name):
    fields = {"rate": 1.0, "batch": 1, "parameters": 1, "window_samples": 1} | {name: 0}
    with pytest.raises(ValueError, match="positive"):
        load(cluster=Cluster(1, 1), **fields)


def test_time_of_a_rung():
    (rung,) = rungs({"x": 7200}, epochs=10.0, rate=1000.0, cluster=Cluster(2, 1), batch=50, rate_hz=240.0)
    assert rung.steps == 720, "72 000 windows, 100 a step"
    assert rung.seconds == pytest.approx(36)
    assert rung.store_bytes == 7200 * 10 * 240 * 24


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.123, "0.12 s"),
        (42.4, "42 s"),
        (59.99, "60 s"),
        (90, "2 min"),
        (3599, "1 h 0 min"),
        (200_000, "2 d 8 h"),
    ],
)
def test_durations_are_readable(seconds, text):
    assert _duration(seconds) == text


def test_every_rung_on_every_cluster():
    source = Source("s4 cpc float32", 1000.0, 64, 3_194_880, 2.5)
    result = work_out([source], [Cluster(1, 1), Cluster(8, 1)], None)
    assert len(result["loads"]) == 2
    assert [row["name"] for row in result["rungs"]] == 2 * list(SIZES)
    alone, eight = (
        {row["name"]: row["seconds"] for row in result["rungs"] if row["devices"] == n} for n in (1, 8)
    )
    assert alone["11m"] == pytest.approx(11_000_000 * 10 / 1000, rel=1e-5)
    assert eight["11m"] == pytest.approx(alone["11m"] / 8, rel=1e-4)


def test_command_prints_and_writes(tmp_path, capsys):
    assert cli.main(["capacity", *GIVEN, "--clusters=8x2", f"--output={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "11m" in out
    result = json.loads((tmp_path / "out" / "capacity.json").read_text())
    assert result["loads"][0]["gradient_bytes"] == pytest.approx(7e6)
    assert "| as given | 1 000 | 8 | 2 | 8 000 |" in (tmp_path / "out" / "capacity.md").read_text()


def efficiency_json(path, **changes):
    row = {
        "backbone": "s4",
        "objective": "cpc",
        "precision": "float32",
        "batch": 8,
        "parameters": 100,
        "programs": {"step": {"windows_per_s": 16.0}},
    }
    failed = {name: row[name] for name in ("backbone", "objective", "precision", "batch")}
    value = {"window_s": 2.5, "rows": [row, failed | {"failed": "out of memory"}]} | changes
    path.write_text(json.dumps(value))
    return path


def test_rates_of_a_measurement(tmp_path):
    path = efficiency_json(tmp_path / "efficiency.json")
    assert read_sources(path) == [Source("s4 cpc float32", 16.0, 8, 100, 2.5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the efficiency.json"),
        (["--windows-per-s=5"], "give the efficiency.json"),
        ([*GIVEN, "--windows-per-s=fast"], "--windows-per-s=fast must be a positive number"),
        ([*GIVEN, "--windows-per-s=nan"], "--windows-per-s=nan must be a positive number"),
        ([*GIVEN, "--parameters=0"], "--parameters=0 must be from 1 to 1e+12"),
        ([*GIVEN, "--clusters=8"], "--clusters: '8' is not devices x hosts"),
        ([*GIVEN, "--clusters=8x3"], "8 devices do not divide over 3 hosts"),
        ([*GIVEN, "--epochs=0"], "--epochs=0 must be a positive number"),
        ([*GIVEN, "--epochs=nan"], "--epochs=nan must be a positive number"),
        ([*GIVEN, "--epochs=1e305"], "--epochs=1e+305 must be a positive number, from 1e-12 to 1e+12"),
        ([*GIVEN, "--windows-per-s=1e308"], "--windows-per-s=1e308 must be a positive number"),
        ([*GIVEN, "--windows-per-s=1e-320"], "--windows-per-s=1e-320 must be a positive number"),
        ([*GIVEN, f"--batch={10**400}"], "must be from 1 to 1e+12"),
        (["nowhere.json"], "cannot read nowhere.json"),
        (["nowhere.json", "--batch=3"], "--batch and nowhere.json both say"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert cli.main(["capacity", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_least_and_the_most_can_be_worked_out(capsys):
    for few, many in (("1e-12", 10**12), ("1e12", 1)):
        arguments = [f"--windows-per-s={few}", f"--parameters={many}", f"--batch={many}", f"--epochs={many}"]
        assert cli.main(["capacity", *arguments, "--clusters=1x1,9999999x1"]) == 0
    assert cli.main(["capacity", *GIVEN, "--epochs=1e-12"]) == 0


def test_a_rate_that_cannot_be_is_none_of_efficiency(tmp_path):
    rows = json.loads(efficiency_json(tmp_path / "efficiency.json").read_text())["rows"]
    for rate in (0.0, float("nan"), float("inf"), 10**400):
        rows[0]["programs"]["step"]["windows_per_s"] = rate
        with pytest.raises(UserError, match="is not what"):
            read_sources(efficiency_json(tmp_path / "efficiency.json", rows=rows))


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": 3}', '{"window_s": 2.5, "rows": []}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "efficiency.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"efficiency\.json"):
        read_sources(path)
