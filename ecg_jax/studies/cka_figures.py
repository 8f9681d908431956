"""The figures of a CKA study with what they show in words."""

import itertools
import math

import numpy as np

from ecg_jax.studies import cka_pictures
from ecg_jax.studies.cka_models import Study
from ecg_jax.studies.figure_folder import Figure

#: Up to so many models every pair has a panel, beyond them one matrix has a block for each.
MOST_PANELS = 4

_COLUMNS = ("model_a", "layer_a", "model_b", "layer_b", "cka", "low", "high", "biased_cka")
_LIMITS = (
    "CKA says how alike two layers place these recordings relative to each other, not whether either is useful for "
    "any task, and nothing about other recordings. It does not change under rotation, translation or one scale for all "
    "features, but it does under other invertible linear maps: two layers from which a linear probe reads the same may "
    "have a low CKA. Directions of large variance and unusual recordings dominate it (the table of layers has both "
    "numbers). The intervals are over the draw of recordings; another seed of pretraining is not in them."
)


def draw_all(study: Study) -> list[Figure]:
    """Every figure and table of a study."""
    figures = [_within(study)]
    if len(study.models) > 1:
        figures += [_final(study)]
        figures += [_between(study) if len(study.models) <= MOST_PANELS else _all_layers(study)]
    return [*figures, _estimators(study), _layers(study)]


def summary(study: Study) -> str:
    """A few lines for the console."""
    found, names = study.cka, [model.name for model in study.models]
    lines = [f"{_made_of(study)} {_noise(study)}"]
    width = max(map(len, names))
    for i, name in enumerate(names):
        last = [study.last(j) for j in range(len(names))]
        cells = "".join(f"{found.debiased[last[i], j]:8.3f}" for j in last[: i + 1])
        lines.append(f"  {name:<{width}}{cells}")
    return "\n".join([lines[0], "  last layers, one row and column for each model:", *lines[1:]])


def _paragraph(*sentences: str) -> str:
    """Sentences in a row, without those that have nothing to say."""
    return " ".join(filter(None, sentences))


def _made_of(study: Study) -> str:
    """What was compared, for the beginning of every paragraph."""
    found = study.cka
    what = "one token of each, at a random time" if study.tokens else "the mean over tokens of each"
    form = "all at once" if found.n_batches == 1 else f"in {found.n_batches} mini-batches"
    made_up = "synthetic " if study.synthetic else ""
    text = (
        f"Debiased linear CKA on {found.n_examples} {made_up}recordings ({study.recordings}), {what}, {form}."
    )
    contracts = [model.encoder.preprocessing for model in study.models]
    fields = {"windows": "window_s", "leads": "kept_leads", "normalisations": "normalisation"}
    differing = [
        word
        for word, field in fields.items()
        if len({getattr(contract, field) for contract in contracts}) > 1
    ]
    if differing:
        text += (
            f" The models have different {' and '.join(differing)}: each saw the same recordings from their first "
            "sample on, under its own."
        )
    return text


def _noise(study: Study, pairs=None) -> str:
    """How wide the intervals are: of some pairs (i, j), by default all; not of a layer with itself."""
    if pairs is None:
        pairs = itertools.combinations(range(len(study.cka.debiased)), 2)
    half = np.array([study.cka.high[i, j] - study.cka.low[i, j] for i, j in pairs if i != j]) / 2
    half = half[~np.isnan(half)]
    if not len(half):
        return "No pair of layers has an interval."
    return (
        f"The {100 * study.level:g} % intervals (jackknife over {study.groups} groups of recordings) are "
        f"{_number(np.median(half))} wide to each side in the median cell and {_number(half.max())} in the widest."
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _interval(study: Study, i: int, j: int) -> str:
    found = study.cka
    if math.isnan(found.debiased[i, j]):
        return "undefined"
    return f"{found.debiased[i, j]:.2f} ({found.low[i, j]:.2f} to {found.high[i, j]:.2f})"


def _rows(study: Study, pairs) -> list[tuple]:
    """Rows of a CSV for pairs (i, j) of layers; undefined numbers are empty."""
    names, found = study.layers, study.cka

    def number(value: float) -> float | None:
        return None if math.isnan(value) else float(value)

    return [
        (
            *names[i],
            *names[j],
            *(number(m[i, j]) for m in (found.debiased, found.low, found.high, found.biased)),
        )
        for i, j in pairs
    ]


def _block(study: Study, a: int, b: int) -> list[tuple[int, int]]:
    rows, columns = study.places(a), study.places(b)
    return list(itertools.product(range(rows.start, rows.stop), range(columns.start, columns.stop)))


def _within(study: Study) -> Figure:
    models = range(len(study.models))
    panels = [
        (model.name, study.places(i), study.places(i), model.words, model.words)
        for i, model in enumerate(study.models)
    ]
    cells = [pair for i in models for pair in _block(study, i, i)]
    told = [_depth_in_words(study, i) for i in models] if len(study.models) <= MOST_PANELS else []
    many = "" if told else "A bright square along the diagonal is a run of layers that change little."
    return Figure(
        "within_models",
        "Layers within each model",
        _paragraph(_made_of(study), *told, many, _noise(study, cells)),
        f"{_LIMITS} Layers that are alike are not thereby redundant: a small change may be the one that matters.",
        _COLUMNS,
        _rows(study, cells),
        cka_pictures.panels_of(study, panels, "CKA between layers of one model"),
    )


def _depth_in_words(study: Study, i: int) -> str:
    """How a model's layers change from the input to the output."""
    model, places = study.models[i], study.places(i)
    if len(model.layers) < 2:
        return f"{model.name} has one layer here."
    first, last = places.start, places.stop - 1
    steps = np.array([study.cka.debiased[k, k + 1] for k in range(first, last)])
    text = f"In {model.name}, {model.words[0]} and {model.words[-1]} have {_interval(study, first, last)}"
    if len(steps) > 1 and not np.isnan(steps).any():
        k = int(steps.argmin())
        text += f", and of neighbours {model.words[k]} and {model.words[k + 1]} differ most ({steps[k]:.2f})"
    return f"{text}."


def _between(study: Study) -> Figure:
    pairs = list(itertools.combinations(range(len(study.models)), 2))
    models = study.models
    panels = [
        (
            f"{models[a].name} (rows)\n{models[b].name} (columns)",
            study.places(a),
            study.places(b),
            models[a].words,
            models[b].words,
        )
        for a, b in pairs
    ]
    cells = [pair for a, b in pairs for pair in _block(study, a, b)]
    told = " ".join(_most_alike(study, a, b) for a, b in pairs)
    return Figure(
        "between_models",
        "Layers of each pair of models",
        _paragraph(_made_of(study), told, _floor(study), _noise(study, cells)),
        f"{_LIMITS} A bright cell is no sign that the two models found the same by training: {_no_floor(study)}",
        _COLUMNS,
        _rows(study, cells),
        cka_pictures.panels_of(study, panels, "CKA between layers of two models"),
    )


def _most_alike(study: Study, a: int, b: int) -> str:
    block = study.cka.debiased[study.places(a), study.places(b)]
    one, two = study.models[a], study.models[b]
    text = f"{one.name} and {two.name}: last layers {_interval(study, study.last(a), study.last(b))}"
    if np.isnan(block).all():
        return f"{text}."
    i, j = np.unravel_index(np.nanargmax(block), block.shape)
    return f"{text}, most alike {one.words[i]} and {two.words[j]} ({block[i, j]:.2f})."


def _floor(study: Study) -> str:
    """What random twins reach."""
    trained = [i for i, model in enumerate(study.models) if not model.random]
    twins = [i for i, model in enumerate(study.models) if model.random]
    if not twins:
        return ""
    cells = [study.cka.debiased[study.last(i), study.last(j)] for i in trained for j in twins]
    if np.isnan(cells).all():
        return ""
    return (
        f"Between last layers of pretrained models and of networks that were never trained it is "
        f"{np.nanmin(cells):.2f} to {np.nanmax(cells):.2f}: that much comes of architecture and input alone."
    )


def _no_floor(study: Study) -> str:
    if any(model.random for model in study.models):
        return (
            "networks that were never trained are not at 0, since architecture and input alone make layers alike; "
            "read each cell beside those of the random twins, of which one initialisation was drawn each."
        )
    return (
        "networks that were never trained are not at 0, since architecture and input alone make layers alike; "
        "--random adds them."
    )


def _all_layers(study: Study) -> Figure:
    n = len(study.cka.debiased)
    return Figure(
        "all_layers",
        "All layers of all models",
        _paragraph(
            _made_of(study),
            "One block for each pair of models, within it the layers from the input to the output.",
            _floor(study),
            _noise(study),
        ),
        f"{_LIMITS} A bright block is no sign that the two models found the same by training: {_no_floor(study)}",
        _COLUMNS,
        _rows(study, [(i, j) for i in range(n) for j in range(i, n)]),
        cka_pictures.whole(study),
    )


def _final(study: Study) -> Figure:
    last = [study.last(i) for i in range(len(study.models))]
    pairs = list(itertools.combinations(range(len(last)), 2))
    cells = [(last[i], last[j]) for i in range(len(last)) for j in range(i, len(last))]
    values = np.array([study.cka.debiased[last[i], last[j]] for i, j in pairs])
    names = [model.name for model in study.models]
    words = {model.words[-1] for model in study.models}
    which = (
        "final layers"
        if words == {"final"}
        else f"last layers that were asked for ({', '.join(sorted(words))})"
    )
    told = ""
    if len(pairs) == 1:
        told = f"The {which} of {names[0]} and {names[1]} have {_interval(study, last[0], last[1])}."
    elif not np.isnan(values).all():
        (a, b), (c, d) = pairs[int(np.nanargmax(values))], pairs[int(np.nanargmin(values))]
        told = (
            f"Of the {which}, those of {names[a]} and {names[b]} are most alike, {_interval(study, last[a], last[b])}, "
            f"and those of {names[c]} and {names[d]} least, {_interval(study, last[c], last[d])}."
        )
    return Figure(
        "final_layers",
        "Last layers of the models",
        _paragraph(_made_of(study), told, _floor(study), _noise(study, cells)),
        f"{_LIMITS} {_no_floor(study).capitalize()}",
        _COLUMNS,
        _rows(study, cells),
        cka_pictures.final(study, last, names),
    )


def _estimators(study: Study) -> Figure:
    n = len(study.cka.debiased)
    i, j = np.triu_indices(n, 1)
    debiased, biased = study.cka.debiased[i, j], study.cka.biased[i, j]
    known = ~np.isnan(debiased)
    gap = (biased - debiased)[known]
    told = "No pair of layers has a value."
    if len(gap):
        told = (
            f"Biased minus debiased CKA is {gap.mean():.3f} on average, {gap.min():.3f} to {gap.max():.3f}, over "
            f"{len(gap)} pairs of layers."
        )
    size = study.cka.n_examples / study.cka.n_batches
    return Figure(
        "estimators",
        "Biased beside debiased CKA",
        f"{_made_of(study)} {told} With {size:.0f} recordings compared at once, the biased estimator counts each "
        "recording's kernel with itself: that lifts it where variance is spread over many directions, and can lower it "
        "where a few recordings have most of the variance of one layer.",
        "Which estimator is nearer to the truth in a cell: the biased one tends to it as recordings are added, the "
        "debiased one is right on average up to the quotient but scatters (its interval says how much), and may fall "
        "below 0.",
        _COLUMNS,
        _rows(study, zip(i.tolist(), j.tolist(), strict=True)),
        cka_pictures.estimators(study),
    )


def _layers(study: Study) -> Figure:
    """Table of what CKA looks at in each layer."""
    found, rows, row = study.cka, [], 0
    for model in study.models:
        for word, width in zip(model.words, model.widths, strict=True):
            numbers = (found.effective_dimensions[row], found.largest_share[row])
            rows.append((model.name, word, width, *(None if math.isnan(x) else float(x) for x in numbers)))
            row += 1
    dimensions = found.effective_dimensions[~np.isnan(found.effective_dimensions)]
    told = ""
    if len(dimensions):
        told = (
            f"Effective dimensions run from {dimensions.min():.1f} to {dimensions.max():.1f}; one recording has up to "
            f"{100 * np.nanmax(found.largest_share):.1f} % of a layer's variance."
        )
    return Figure(
        "layers",
        "What CKA looks at in each layer",
        f"Effective dimensions, (tr S)^2 / tr S^2 of a layer's covariance S over {found.n_examples} recordings, are "
        f"over how many directions its variance is spread. {told} Where they are few, CKA compares those few.",
        "How many dimensions carry information: directions of small variance may, and CKA hardly sees them. A layer "
        "without numbers is the same for all recordings.",
        ("model", "layer", "width", "effective_dimensions", "largest_share_of_a_recording"),
        rows,
    )
