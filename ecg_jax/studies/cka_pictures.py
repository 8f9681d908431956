"""Pictures of a CKA study: heat maps on one colour scale, and the two estimators against each other."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ecg_jax.evaluation.drawing import add_legend, looks_of, new_figure, plain_axes
from ecg_jax.evaluation.plots import GREY, LIGHT
from ecg_jax.studies.cka_models import Study

#: Colours of equal steps for the eye, one scale for all pictures.
COLOURS = "viridis"
#: Up to so many rows a cell holds its value.
MOST_WITH_VALUES = 9
#: Up to so many layers in all, the one matrix names each.
MOST_NAMED = 32
#: Inches for the colour bar and its label. Figures are as large as their labels need for cells to be square; axes of a
#: fixed aspect would not keep clear of each other's labels.
_BAR = 0.95


def _length(labels: Iterable[str]) -> float:
    """Inches of the longest label."""
    return 0.057 * max(map(len, labels)) + 0.1


def _heat(axes, matrix: np.ndarray, colours):
    """One heat map with a value in each cell if there are few; undefined cells are grey."""
    image = axes.imshow(
        np.ma.masked_invalid(matrix), cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    if max(matrix.shape) <= MOST_WITH_VALUES:
        for (i, j), value in np.ndenumerate(matrix):
            text = "-" if math.isnan(value) else f"{value:.2f}"
            _write(axes, j, i, text, value)
    return image


def _write(axes, x: float, y: float, text: str, value: float, size: float = 6.5) -> None:
    colour = "black" if math.isnan(value) or value > 0.6 else "white"
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)


def _colours():
    import matplotlib

    return matplotlib.colormaps[COLOURS].with_extremes(bad=LIGHT)


def _bar(figure, image, axes, negative: bool) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=28, pad=0.02)
    below = " (below 0 as 0)" if negative else ""
    bar.set_label(f"debiased linear CKA{below}", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def panels_of(study: Study, panels: Sequence[tuple], title: str):
    """A grid of heat maps: (title, rows, columns, labels of both) each."""
    columns = 2 if len(panels) == 4 else min(len(panels), 3 if len(panels) <= 6 else 4)
    n_rows = -(-len(panels) // columns)
    most = max(max(len(p[3]), len(p[4])) for p in panels)
    cell = 0.36 if most <= MOST_WITH_VALUES else 0.17
    side, label = max(1.5, cell * most), _length(word for p in panels for word in (*p[3], *p[4]))
    title_height = 0.16 * (1 + panels[0][0].count("\n")) + 0.15
    figure = new_figure(
        columns * (side + label + 0.15) + _BAR, n_rows * (side + label + title_height + 0.1) + 0.3
    )
    grid = figure.subplots(n_rows, columns, squeeze=False)
    image = None
    for axes, (name, rows, cols, row_words, column_words) in zip(grid.flat, panels, strict=False):
        image = _heat(axes, study.cka.debiased[rows, cols], _colours())
        axes.set_xticks(range(len(column_words)), column_words, rotation=90)
        axes.set_yticks(range(len(row_words)), row_words)
        axes.set_title(name, fontsize=8, pad=8)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    _bar(figure, image, grid, any((study.cka.debiased[p[1], p[2]] < 0).any() for p in panels))
    figure.suptitle(title, fontsize=9)
    return figure


def whole(study: Study):
    """One matrix with a block for each pair of models."""
    n = len(study.cka.debiased)
    ends = [study.places(i) for i in range(len(study.models))]
    if n <= MOST_NAMED:
        at, labels = list(range(n)), [f"{model}: {word}" for model, word in study.layers]
    else:
        at = [(place.start + place.stop - 1) / 2 for place in ends]
        labels = [model.name for model in study.models]
    side, label = min(max(4.0, 0.19 * n), 12.0), _length(labels)
    figure = new_figure(side + label + _BAR, side + label + 0.5)
    axes = figure.subplots()
    image = _heat(axes, study.cka.debiased, _colours())
    for place in ends[:-1]:
        axes.axhline(place.stop - 0.5, color="white", linewidth=1.2)
        axes.axvline(place.stop - 0.5, color="white", linewidth=1.2)
    axes.set_xticks(at, labels, rotation=90)
    axes.set_yticks(at, labels)
    axes.set_title("CKA between all layers; in each block from the input to the output", fontsize=9)
    _bar(figure, image, axes, (study.cka.debiased < 0).any())
    return figure


def final(study: Study, last: Sequence[int], names: Sequence[str]):
    n = len(last)
    with_values = n <= MOST_WITH_VALUES
    side, label = min(max(2.1, (0.75 if with_values else 0.22) * n), 12.0), _length(names)
    figure = new_figure(side + label + _BAR, side + (label if n > 3 else 0.2) + 0.5)
    axes = figure.subplots()
    found = study.cka
    matrix = found.debiased[np.ix_(last, last)]
    image = axes.imshow(
        np.ma.masked_invalid(matrix), cmap=_colours(), vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7)
    for (i, j), value in np.ndenumerate(matrix) if with_values else ():
        if math.isnan(value):
            text = "-"
        elif i == j:
            text = "1"
        else:
            low, high = found.low[last[i], last[j]], found.high[last[i], last[j]]
            text = f"{value:.2f}\n{low:.2f} to\n{high:.2f}"
        _write(axes, j, i, text, value)
    axes.set_xticks(range(n), names, rotation=90 if n > 3 else 0)
    axes.set_yticks(range(n), names)
    axes.set_title("CKA between last layers" + (", with intervals" if with_values else ""), fontsize=9)
    _bar(figure, image, axes, (matrix < 0).any())
    return figure


def estimators(study: Study):
    """Biased over debiased CKA of every pair of layers."""
    owner = np.repeat(np.arange(len(study.models)), [len(model.layers) for model in study.models])
    i, j = np.triu_indices(len(owner), 1)
    debiased, biased = study.cka.debiased[i, j], study.cka.biased[i, j]
    figure = new_figure(5.2, 4.6)
    axes = figure.subplots()
    looks = looks_of(("layers of one model", "layers of two models")[: min(len(study.models), 2)])
    for (colour, marker), of in zip(
        looks.values(), (owner[i] == owner[j], owner[i] != owner[j]), strict=False
    ):
        axes.scatter(debiased[of], biased[of], s=16, c=colour, marker=marker, alpha=0.7, linewidths=0)
    low = min([0.0, *debiased[~np.isnan(debiased)]])
    axes.plot([low, 1], [low, 1], color=GREY, linewidth=0.8)
    axes.set(xlabel="debiased CKA", ylabel="biased CKA", xlim=(low - 0.03, 1.03), ylim=(low - 0.03, 1.03))
    plain_axes(axes)
    add_legend(figure, looks, [{"color": GREY, "linewidth": 0.8, "label": "equal"}])
    return figure
