"""Recordings that a report shows: which, whose, and what was predicted for them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.data.preprocessing import MICROVOLTS_PER_MV
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation.drawing import to_svg
from ecg_jax.evaluation.plots import paper_figure
from ecg_jax.studies.figure_folder import data_csv
from ecg_jax.studies.report.cells import number
from ecg_jax.studies.report.pictures import Picture
from ecg_jax.studies.report.rows import TaskScores

_COLOURS_OF_PAPER, _PAPER_WIDTH = 24, 1170
_SHOWN_S = 10  # as `paper_figure` does
_DPI = 110

#: Which recordings a report draws: those of corpora that everybody may pass on, all, none.
RECORDINGS = ("open", "all", "none")
#: Corpora of which no recording may be passed on: who has them signed an agreement.
CLOSED = ("mimic", "echonext")


@dataclass(frozen=True)
class Example:
    """A test record with what was predicted for it."""

    picture: Picture
    heading: str
    record_id: str
    predicted: list[tuple[str, float, float]]
    """(class, true target, predicted probability), from likely to unlikely."""


def choose_examples(targets: np.ndarray, probabilities: np.ndarray) -> dict[str, tuple[int, int]]:
    """Records worth looking at: (record, class) each.

    Args:
        targets: [n, K] of 0, 1, NaN.
        probabilities: [n, K].

    Returns:
        "most confident and right": the class that is there and has the highest probability; "most confident and
        wrong": the largest difference between target and probability; "least sure": the known class closest to 0.5.
        A record is chosen once; what there is none of is left out.
    """
    known = ~np.isnan(targets)
    error = np.abs(np.where(known, targets, np.nan) - probabilities)
    rules = {
        "Most confident and right": np.where(targets == 1, probabilities, -np.inf),
        "Most confident and wrong": np.where(known & (error > 0.5), error, -np.inf),
        "Least sure": np.where(known, -np.abs(probabilities - 0.5), -np.inf),
    }
    chosen: dict[str, tuple[int, int]] = {}
    for name, worth in rules.items():
        worth = worth.copy()
        worth[[record for record, _ in chosen.values()]] = -np.inf
        record, k = np.unravel_index(np.argmax(worth), worth.shape)
        if np.isfinite(worth[record, k]):
            chosen[name] = int(record), int(k)
    return chosen


def examples(task: TaskScores, recordings: str) -> tuple[list[Example], str]:
    """Recordings that the best probe is most and least sure of, and a sentence: whose, or why there are none.

    Args:
        task: of which.
        recordings: one of `RECORDINGS`.
    """
    results = task.best_probe.result.results
    tested_on = results["store"] if results["test_store"] is None else results["test_store"]
    corpus = tested_on["corpus"]
    if recordings == "none":
        return [], "No recordings are shown: the report was made with `--recordings=none`."
    if recordings == "open" and corpus in CLOSED:
        return [], (
            f"No recordings are shown: those of {corpus} are lent under an agreement and must not be passed on; a "
            "report that stays with those who signed it shows them with `--recordings=all`."
        )
    try:
        store = Store(tested_on["path"])
    except UserError:
        return [], f"No recordings are shown: the store {tested_on['path']} cannot be opened here."
    try:
        return _examples(task, store, tested_on)
    finally:
        store.close()


def _examples(task: TaskScores, store: Store, tested_on: dict[str, str]) -> tuple[list[Example], str]:
    best = task.best_probe
    predictions = best.result.predictions
    rows = predictions["row"].astype(np.int64)
    same = rows.max(initial=0) < len(store) and np.array_equal(
        store.column("record_id")[rows].astype(str), predictions["record_id"].astype(str)
    )
    if store.fingerprint != tested_on["fingerprint"] or not same:
        return [], f"No recordings are shown: the store {tested_on['path']} has changed since the probe."
    targets = task.first.predictions["targets"].astype(np.float64)
    found = []
    for name, (i, k) in choose_examples(targets, best.predictions[0]).items():
        order = np.argsort(-best.predictions[0][i], kind="stable")
        listed = [
            (task.first.classes[c], float(targets[i, c]), float(best.predictions[0][i, c])) for c in order
        ]
        signal = store.read(int(rows[i])).astype(np.float64) / MICROVOLTS_PER_MV
        record = str(predictions["record_id"][i])
        class_name, there = task.first.classes[k], "there" if targets[i, k] == 1 else "not there"
        sentence = f"{class_name} is {there}, predicted with {number(float(best.predictions[0][i, k]))}"
        shown = signal[: round(_SHOWN_S * store.rate_hz)]
        files = _paper(shown, store.rate_hz, store.leads)
        time_s = np.arange(len(shown)) / store.rate_hz
        columns = ("time_s", *(f"{lead}_mv" for lead in store.leads))
        files[".csv"] = data_csv(columns, np.column_stack([time_s, shown]).round(4).tolist())
        found.append(
            Example(
                Picture(
                    name=f"figure_recording_{task.task}_{len(found) + 1}",
                    data=files[".png"],
                    kind="png",
                    alt=f"Twelve-lead ECG of record {record}: {sentence}.",
                    caption=f"Record {record}: {sentence}.",
                    width=_PAPER_WIDTH,
                    files=files,
                ),
                name,
                record,
                listed,
            )
        )
    return found, f"Recordings that {best.row.label}, the best probe of the task, is most and least sure of."


def _paper(signal: np.ndarray, rate_hz: float, leads: Sequence[str]) -> dict[str, bytes]:
    """An ECG on paper as SVG, and as PNG of few colours: a fifth of the size, and the eye sees no difference."""
    from PIL import Image

    figure, drawn, small = paper_figure(signal, rate_hz, leads), io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    with Image.open(drawn) as image:
        quantised = image.convert("RGB").quantize(_COLOURS_OF_PAPER, dither=Image.Dither.NONE)
        quantised.save(small, "PNG", optimize=True)
    return {".png": small.getvalue(), ".svg": to_svg(figure)}
