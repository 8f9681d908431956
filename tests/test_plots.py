"""Pictures: true paper scale, what is drawn where, and refusals. How they look was judged by eye."""

import json

import numpy as np
import pytest

from ecg_jax.data.recording import CANONICAL_LEADS
from ecg_jax.evaluation import plots
from ecg_jax.files import read_jsonl


def _size_mm(path, dpi):
    from matplotlib.image import imread

    height, width = imread(path).shape[:2]
    return width / dpi * 25.4, height / dpi * 25.4


def _dark_columns(path, dpi, low_mm, high_mm):
    """For each column of pixels, the height in mm of the highest dark pixel between two heights, or NaN."""
    from matplotlib.image import imread

    picture = imread(path)[..., :3].max(axis=2)
    height = picture.shape[0]
    rows = slice(round(height - high_mm / 25.4 * dpi), round(height - low_mm / 25.4 * dpi))
    dark = picture[rows] < 0.35
    top = np.where(dark.any(axis=0), dark.argmax(axis=0) + rows.start, np.nan)
    return (height - top) / dpi * 25.4


def test_one_millimetre_of_paper_is_one_millimetre(tmp_path):
    """A 1 mV step of 0.4 s in lead II at 4 s must be 10 mm high, 10 mm wide, 100 mm into the rhythm strip."""
    dpi, rate = 254, 500
    signal = np.zeros((10 * rate, 12))
    signal[4 * rate : round(4.4 * rate), CANONICAL_LEADS.index("II")] = 1.0
    plots.ecg_paper(signal, rate, CANONICAL_LEADS, tmp_path / "ecg.png", dpi=dpi)
    width, height = _size_mm(tmp_path / "ecg.png", dpi)
    assert width == pytest.approx(270, abs=0.2)
    assert height == pytest.approx(145, abs=0.2)
    # The rhythm strip is the lowest row: baseline at 25 mm, strip from 15 mm to 265 mm.
    top = _dark_columns(tmp_path / "ecg.png", dpi, 20, 36)
    x = np.arange(len(top)) / dpi * 25.4
    high = x[(top > 34.5) & (x > 30)]
    assert high.min() == pytest.approx(115, abs=0.3)
    assert high.max() == pytest.approx(125, abs=0.3)
    assert np.nanmax(top[x > 30]) == pytest.approx(35, abs=0.3)
    # The calibration pulse: 1 mV for 0.2 s.
    pulse = x[(top > 34.5) & (x < 14)]
    assert pulse.max() - pulse.min() == pytest.approx(5, abs=0.4)


def test_leads_are_found_by_name(tmp_path):
    """A reordered signal with its names gives the same picture."""
    generator = np.random.default_rng(0)
    signal = np.cumsum(generator.normal(0, 0.02, (1000, 12)), axis=0)
    order = generator.permutation(12)
    plots.ecg_paper(signal, 100, CANONICAL_LEADS, tmp_path / "a.png", dpi=60)
    plots.ecg_paper(signal[:, order], 100, [CANONICAL_LEADS[i] for i in order], tmp_path / "b.png", dpi=60)
    plots.ecg_paper(signal[:, order], 100, CANONICAL_LEADS, tmp_path / "c.png", dpi=60)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    with pytest.raises(ValueError, match="V6"):
        plots.ecg_paper(signal[:, :11], 100, CANONICAL_LEADS[:11], tmp_path / "d.png")
    with pytest.raises(ValueError, match="ends before 20"):
        plots.ecg_paper(signal, 100, CANONICAL_LEADS, tmp_path / "d.png", start_s=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_shorter_recordings_fill_less_paper(tmp_path):
    plots.ecg_paper(np.zeros((1200, 12)), 240, CANONICAL_LEADS, tmp_path / "a.png", dpi=100)
    assert _size_mm(tmp_path / "a.png", 100)[0] == pytest.approx(145, abs=0.5)


def test_loss_curve_draws_what_was_logged(tmp_path):
    log = tmp_path / "log.jsonl"
    entries = [{"step": s, "loss": 5.0 / s, "accuracy": 0.1 * s} for s in range(1, 8)]
    entries[3]["val_loss"] = 2.0
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 8, "lo')
    assert len(read_jsonl(log)) == 7
    plots.loss_curve(log, tmp_path / "both.png")
    plots.loss_curve(log, tmp_path / "loss.png", accuracies={"training": "no_such_key"})
    heights = [_size_mm(tmp_path / f"{name}.png", 130)[1] for name in ("both", "loss")]
    assert heights[0] - heights[1] == pytest.approx(2.6 * 25.4, abs=0.5)  # no empty panel
    with pytest.raises(ValueError, match="none of no_loss"):
        plots.loss_curve(log, tmp_path / "x.png", losses={"training": "no_loss"})


def test_forest_plot_draws_undefined_classes_without_failing(tmp_path):
    values = np.array([0.9, np.nan, 0.7])
    ours, macro = np.column_stack([values, values - 0.1, values + 0.05]), {"ours": (0.8, 0.7, 0.9)}
    plots.auroc_forest("abc", [50, 0, 70], {"ours": ours}, macro, tmp_path / "one.png")
    two, macros = {"ours": ours, "theirs": ours - 0.2}, {**macro, "theirs": (0.6, 0.5, 0.7)}
    plots.auroc_forest("abc", [50, 0, 70], two, macros, tmp_path / "two.png")
    plots.auroc_forest("abc", [50, 0, 7], two, macros, tmp_path / "few.png")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("one", "two", "few")]
    assert len(set(pictures)) == 3
    nothing = {"ours": np.full((2, 3), np.nan)}
    plots.auroc_forest("ab", [0, 0], nothing, {"ours": (np.nan,) * 3}, tmp_path / "none.png")
    assert (tmp_path / "none.png").exists()


def test_drawing_leaves_matplotlib_alone(tmp_path):
    """No figure stays open and no backend is chosen for the user."""
    import matplotlib
    from matplotlib import pyplot

    before = matplotlib.rcParams._get_backend_or_none()
    plots.ecg_paper(np.zeros((500, 12)), 100, CANONICAL_LEADS, tmp_path / "a.png", dpi=50)
    assert pyplot.get_fignums() == []
    assert matplotlib.rcParams._get_backend_or_none() == before
