"""What `ecg-jax prepare` tells while it goes on."""

import re
import sys

import numpy as np

from ecg_jax.data import progress
from ecg_jax.prepare import main
from prepare_source import write_source


def test_the_listing_is_told_before_it_begins(tmp_path, monkeypatch, capsys):
    """It is the longest time without anything else: minutes to an hour for eleven million files."""
    from ecg_jax.data.corpora import wfdb

    source = write_source(tmp_path / "source")
    original, before = wfdb.list_records, []

    def list_records(*arguments):
        before.append(capsys.readouterr().err)
        return original(*arguments)

    monkeypatch.setattr(wfdb, "list_records", list_records)
    assert main(["wfdb", str(source), str(tmp_path / "s"), "--workers=1"]) == 0
    assert before == [f"prepare wfdb: listing {source}\n"]
    assert re.match(r"prepare wfdb: 100 recordings listed in [\d.]+ s\n", capsys.readouterr().err)


def test_a_log_gets_a_line_a_minute(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress("prepare heedb, shard 3/64", 171_875, 40_000) as bar:
        for now in np.arange(0.0, 200.0):
            bar.update(int(412 * now))
    assert capsys.readouterr().err.splitlines() == [
        "prepare heedb, shard 3/64: 171 875 recordings, 40 000 recordings done before",
        "prepare heedb, shard 3/64: 64 720 of 171 875 recordings, 412/s, 4 min 20 s left",
        "prepare heedb, shard 3/64: 89 440 of 171 875 recordings, 412/s, 3 min 20 s left",
        "prepare heedb, shard 3/64: 114 160 of 171 875 recordings, 412/s, 2 min 20 s left",
        "prepare heedb, shard 3/64: 81 988 recordings in 3 min 19 s, 412/s",
    ]
    with progress.Progress("verify s", 634_000_000_000, of_bytes=True) as bar:
        now = 1000.0
        bar.update(0)
        now = 1100.0
        bar.update(120_500_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "verify s: 0.0 MB of 634.0 GB, 0.0 MB/s, no end known"
    assert lines[2].startswith("verify s: 120.5 GB of 634.0 GB, 133.")
    with progress.Progress("quiet", 5, show=False) as bar:
        now = 9999.0
        bar.update(5)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress("prepare heedb", 100, 40) as bar:
        bar.update(60)
    text = capsys.readouterr().err
    assert "\r" in text
    assert "100/100" in text


def test_durations():
    texts = {0: "0.0 s", 9.94: "9.9 s", 59: "59 s", 61: "1 min 1 s", 7500: "2 h 5 min", 100_000: "1 d 3 h"}
    assert {seconds: progress.duration_text(seconds) for seconds in texts} == texts
