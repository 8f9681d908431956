"""The models and recordings of a CKA study: names, layers in words, and features of the same recordings."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.data.folds import highest_folds
from ecg_jax.data.store import Store
from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap
from ecg_jax.models.encoder import tokens_of
from ecg_jax.studies.cka import MIN_EXAMPLES, Cka
from ecg_jax.training.pretrained import (
    FINAL,
    RestoredEncoder,
    layer_names,
    layer_outputs,
    layer_shapes,
    random_twin,
    restore_encoder,
)

#: Backbones in words; of these two the last layer is the final output, and the Transformer's is normalised once more.
_WORDS = {"s4": "S4 layer", "transformer": "Transformer layer", "net1d": "Net1D block"}
_LAST_IS_FINAL = ("s4", "net1d")


@dataclass(frozen=True)
class Model:
    """A model of the study.

    Attributes:
        name: in figures.
        encoder: its weights and contract.
        layers: names as in `training.pretrained.layer_names`, from the input on.
        random: whether it is a random twin.
    """

    name: str
    encoder: RestoredEncoder
    layers: tuple[str, ...]
    random: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """The layers in plain words: stem, S4 layer 1, ..., final."""
        return tuple(_in_words(layer, self.encoder.config["model"]["backbone"]) for layer in self.layers)

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each layer."""
        shapes = layer_shapes(self.encoder)
        return tuple(shapes[layer][1] for layer in self.layers)


@dataclass(frozen=True)
class Study:
    """A finished comparison.

    Attributes:
        models: in order; the M layers of `cka` are theirs, one model after the other.
        cka: between all layers.
        level, groups: of its intervals.
        recordings: which, in words.
        tokens: one token of each recording instead of the mean over tokens.
        synthetic: whether the recordings were made up.
    """

    models: tuple[Model, ...]
    cka: Cka
    level: float
    groups: int
    recordings: str
    tokens: bool
    synthetic: bool

    def places(self, model: int) -> slice:
        """Which rows of the matrices are a model's."""
        ends = np.cumsum([0, *(len(each.layers) for each in self.models)])
        return slice(int(ends[model]), int(ends[model + 1]))

    @property
    def layers(self) -> list[tuple[str, str]]:
        """(model, layer in words) of each row of the matrices."""
        return [(model.name, word) for model in self.models for word in model.words]

    def last(self, model: int) -> int:
        """The row of a model's last layer."""
        return self.places(model).stop - 1


def _in_words(layer: str, backbone: str) -> str:
    if layer == FINAL:
        return "final"
    return (
        f"{_WORDS[backbone]} {int(layer.removeprefix('block')) + 1}" if layer.startswith("block") else layer
    )


def open_models(
    checkpoints: Sequence[str],
    store: Store,
    names: Sequence[str] = (),
    layers: Sequence[str] = (),
    random_seed: int | None = None,
) -> list[Model]:
    """Restores the models of a study.

    Args:
        checkpoints: RUN or RUN/STEP of each.
        store: they will be compared on.
        names: one for each checkpoint; empty for the names of their folders.
        layers: names as in `layer_names`; empty for all. A last layer that is the final output is not listed twice.
        random_seed: adds a random twin of every architecture, initialised with this seed; None adds none.

    Raises:
        UserError: a checkpoint cannot be restored, is given twice or does not fit the store; names that do not fit; an
            unknown layer.
    """
    encoders: list[RestoredEncoder] = []
    for checkpoint in checkpoints:
        encoder = restore_encoder(checkpoint)
        where = f"checkpoint {encoder.run}"
        encoder.preprocessing.check_compatible(store.preprocessing, where, f"store {store.path}")
        if any((encoder.run, encoder.step) == (each.run, each.step) for each in encoders):
            raise UserError(f"--checkpoints names {checkpoint} twice; name each step of a run once.")
        encoders.append(encoder)
    if names and len(names) != len(encoders):
        raise UserError(f"--names has {len(names)} names for {len(encoders)} checkpoints.")
    names = list(names) or _names_of(encoders)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--names: two models are called {repeated[0]}; give each its own name with --names.")
    models = [Model(name, each, _layers_of(each, layers)) for name, each in zip(names, encoders, strict=True)]
    if random_seed is not None:
        models += _random_twins(models, random_seed)
    return models


def _names_of(encoders: Sequence[RestoredEncoder]) -> list[str]:
    """The shortest ends of the runs' paths that tell them apart, without a last "run" (runs of a sweep), and with the
    step where a run occurs several times.
    """
    runs = [each.run.resolve() for each in encoders]
    tails = [run.parts[1:-1] if run.name == "run" and len(run.parts) > 2 else run.parts[1:] for run in runs]
    deepest = max(len(parts) for parts in tails)
    short = ["/".join(parts) for parts in tails]
    for depth in range(1, deepest + 1):
        short = ["/".join(parts[-depth:]) for parts in tails]
        if len(set(short)) == len(set(runs)):
            break
    return [
        f"{name}/{each.step}" if runs.count(run) > 1 else name
        for name, each, run in zip(short, encoders, runs, strict=True)
    ]


def _layers_of(encoder: RestoredEncoder, wanted: Sequence[str]) -> tuple[str, ...]:
    known = layer_names(encoder)
    if not wanted:
        *before, final = known
        return (*(before[:-1] if encoder.config["model"]["backbone"] in _LAST_IS_FINAL else before), final)
    if unknown := [layer for layer in wanted if layer not in known]:
        raise UserError(
            f"--layers={','.join(wanted)}: {encoder.run} has no layer {unknown[0]}; it has {', '.join(known)}."
        )
    return tuple(layer for layer in known if layer in wanted)


def _random_twins(models: Sequence[Model], seed: int) -> list[Model]:
    """One for each architecture and contract, named after the models it is the twin of if there are several."""
    of: list[list[Model]] = []
    for model in models:
        for alike in of:
            first = alike[0].encoder
            if (first.config["model"], first.preprocessing) == (
                model.encoder.config["model"],
                model.encoder.preprocessing,
            ):
                alike.append(model)
                break
        else:
            of.append([model])
    backbones = [alike[0].encoder.config["model"]["backbone"] for alike in of]
    twins = []
    for alike, backbone in zip(of, backbones, strict=True):
        name = "random" if len(of) == 1 else f"random {backbone}"
        if backbones.count(backbone) > 1:
            name = f"random as {alike[0].name}"
        if any(model.name == name for model in models):
            raise UserError(f"--names: {name} is the name of a random twin; give that model another one.")
        twins.append(Model(name, random_twin(alike[0].encoder, seed), alike[0].layers, random=True))
    return twins


def choose_rows(
    store: Store, window: int, folds: Sequence[int] | None, records: int | None, seed: int
) -> tuple[np.ndarray, str]:
    """One recording of each patient of some folds, in random order.

    Args:
        store: to choose from.
        window: shorter recordings are left out.
        folds: their numbers; None for all recordings, without a fold too.
        records: at most so many; None for all.
        seed: of the choice; with the same seed, fewer records are the first of more.

    Returns:
        (rows int64 [n], how they were chosen).

    Raises:
        UserError: no such fold, or too few recordings.
    """
    usable = store.column("length") >= window
    where = "all folds"
    if folds is not None:
        of = np.array([-1 if fold is None else fold for fold in store.column("fold")], np.int64)
        if missing := sorted(set(folds) - set(of[of >= 0].tolist())):
            known = ", ".join(map(str, highest_folds(of, len(of)))) or "none"
            raise UserError(
                f"--folds: the store {store.path} has no fold {missing[0]}; its folds are {known}."
            )
        usable &= np.isin(of, folds)
        where = f"fold {', '.join(map(str, folds))}"
    rows = np.flatnonzero(usable)
    patients = store.arrow_column("patient_id").take(rows).to_pylist() if len(rows) else []
    unit, kind = bootstrap.units(patients, len(rows))
    order = np.random.default_rng(seed).permutation(len(rows))
    _, first = np.unique(unit[order], return_index=True)
    rows = rows[order[np.sort(first)]][:records]
    if len(rows) <= MIN_EXAMPLES:
        raise UserError(
            f"The store {store.path} has {len(rows)} usable recordings of different patients in {where}; CKA with an "
            f"interval needs {MIN_EXAMPLES + 1}. Use a larger store, more --records or --folds=all."
        )
    how = "one recording of each patient" if kind != "record" else "all recordings, for no patient is known"
    if kind not in ("patient", "record"):
        how += " where known, else every recording"
    cut = "" if records is None else f", at most {records}"
    return rows, f"{where} of {store.corpus}: {how}{cut}, seed {seed}"


def default_folds(store: Store) -> list[int]:
    """The highest-numbered fold, on which probes test.

    Raises:
        UserError: the store has no folds.
    """
    highest = highest_folds(store.column("fold"), 1).tolist()
    if not highest:
        raise UserError(f"The store {store.path} has no folds; --folds=all takes all of its recordings.")
    return highest


def features_of(
    models: Sequence[Model],
    store: Store,
    rows: np.ndarray,
    pieces: Sequence[np.ndarray],
    *,
    tokens: bool,
    seed: int,
    batch_size: int,
    advance: Callable[[int], None],
) -> Iterator[list[np.ndarray]]:
    """Features of all layers of all models, mini-batch by mini-batch.

    Every model sees the window of its own contract from the recording's first sample on.

    Args:
        models: to encode with.
        store: of the recordings.
        rows: [n], at least a window long for every model.
        pieces: the mini-batches, indices into `rows`.
        tokens: one token of each recording, drawn with `seed` from those that all models have, the same point in time
            for each; otherwise the mean over tokens.
        seed: of the tokens.
        batch_size: windows encoded at once.
        advance: called with the number of windows encoded.

    Yields:
        For each piece, float32 [len(piece), D] of each layer of each model.

    Raises:
        UserError: features that are not finite.
    """
    offsets = store.column("offset")[rows]
    length = min(tokens_of(model.encoder.preprocessing.window_samples) for model in models)
    token = np.random.default_rng(seed).integers(0, length, len(rows))
    programs = _programs(models, tokens)
    for piece in pieces:
        found: list[np.ndarray] = []
        for model, program in zip(models, programs, strict=True):
            parts = []
            for first in range(0, len(piece), batch_size):
                some = piece[first : first + batch_size]
                padded = np.concatenate([some, np.repeat(some[:1], batch_size - len(some))])
                signal = store.read_crops(offsets[padded], model.encoder.preprocessing.window_samples)
                encoded = program(signal, token[padded])
                parts.append([np.asarray(x)[: len(some)] for x in encoded])
                advance(len(some))
            features = [np.concatenate(layer) for layer in zip(*parts, strict=True)]
            _check_finite(model, features, store.path)
            found += features
        yield found


def _programs(models: Sequence[Model], tokens: bool) -> list[Callable]:
    """(int16 [B, T, C], int [B]) -> float32 [B, D] of each layer, for each model; an architecture compiles once."""
    compiled: dict[str, Callable] = {}

    def of(model: Model) -> Callable:
        encoder = model.encoder
        contract = [encoder.config["model"], encoder.preprocessing.to_dict(), model.layers]
        key = json.dumps(contract, sort_keys=True)
        if key not in compiled:
            compiled[key] = jax.jit(_features(layer_outputs(encoder), model.layers, tokens))
        variables = jax.device_put(encoder.variables)

        def features(signal: np.ndarray, token: np.ndarray) -> tuple[jax.Array, ...]:
            with jax.default_matmul_precision("highest"):
                return compiled[key](variables, signal, token)

        return features

    return [of(model) for model in models]


def _features(outputs: Callable, layers: Sequence[str], tokens: bool) -> Callable:
    def features(variables, signal, token):
        every = outputs(variables, signal)
        chosen = [every[layer].astype(jnp.float32) for layer in layers]
        if tokens:
            return tuple(x[jnp.arange(len(x)), token] for x in chosen)
        return tuple(x.mean(axis=1) for x in chosen)

    return features


def _check_finite(model: Model, features: Sequence[np.ndarray], store: Path) -> None:
    for layer, values in zip(model.layers, features, strict=True):
        if bad := int((~np.isfinite(values)).any(axis=1).sum()):
            raise UserError(
                f"Checkpoint {model.encoder.run}: layer {layer} is not finite for {bad} of {len(values)} recordings of "
                f"{store}; use an earlier step, before it diverged."
            )
