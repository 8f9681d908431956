"""The linear probe of a task: a convex head on pooled features, its penalty and its layer chosen on validation records.

Classes are probed by L2-regularised logistic regression (`heads.py`), numbers by ridge regression (`ridge.py`). The
predictions of a record are the mean over its crops.
"""

import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.evaluation import heads, metrics
from ecg_jax.evaluation.examples import Examples, Fitted, Part
from ecg_jax.evaluation.feature_cache import FeatureCache, PooledFeatures
from ecg_jax.evaluation.features import mean_per_record
from ecg_jax.evaluation.fit_together import faster_solver, path_together
from ecg_jax.evaluation.layers import Mixture
from ecg_jax.evaluation.ridge import RidgeProblem
from ecg_jax.files import write_atomic
from ecg_jax.training.pretrained import FINAL, RestoredEncoder, layer_names, layer_shapes

#: What `layers` may say beside the name of one layer.
LAST, ALL, MIXTURE = "last", "all", "mixture"

#: Of classes: "auto" takes the faster one, see `fit_together.faster_solver`.
SOLVERS = ("auto", "lbfgs", "vmap")


@dataclass(frozen=True)
class LayerFeatures:
    """Pooled features of the records of a task, by layer.

    Attributes:
        layers: names, from the input on; the last one is what `layers="last"` probes.
        of: (part, layer) -> (features float32 [n_crops, D], record int64 [n_crops], index into `part.rows`).
    """

    layers: tuple[str, ...]
    of: Callable[[Part, str], tuple[np.ndarray, np.ndarray]]


def cached_features(
    cache: FeatureCache,
    encoder: RestoredEncoder,
    examples: Examples,
    layers: str = LAST,
    batch_size: int = 64,
    label: str = "",
) -> LayerFeatures:
    """Features of the records of a task, from the cache or computed into it.

    Args:
        cache: where they are kept.
        encoder: whose features.
        examples: of the task; the test part may be of another store.
        layers: "last", "all", "mixture", or the name of a layer.
        batch_size, label: as in `FeatureCache.pooled`.

    Raises:
        UserError: no such layer, or as in `FeatureCache.pooled`.
    """
    names = layers_to_compute(encoder, layers)
    rows: dict = {}
    for part in (examples.train, examples.val, examples.test):
        rows.setdefault(part.store.path, (part.store, []))[1].append(part.rows)
    pooled = {
        path: cache.pooled(encoder, store, names, batch_size, label, np.concatenate(of_store))
        for path, (store, of_store) in rows.items()
    }
    return LayerFeatures(names, lambda part, layer: pooled[part.store.path].of(part.rows, layer))


def layers_to_compute(encoder: RestoredEncoder, chosen: str) -> tuple[str, ...]:
    """The layers whose features a choice of `fit_linear` needs.

    Raises:
        UserError: the encoder has no such layer.
    """
    if chosen == LAST:
        return (FINAL,)
    known = layer_shapes(encoder)
    if chosen == ALL:
        return layer_names(encoder)
    if chosen == MIXTURE:
        # Weights of a mixture add vectors of one width: of Net1D, the layers as wide as its output.
        return tuple(name for name in layer_names(encoder) if known[name][1] == known[FINAL][1])
    if chosen not in known:
        raise UserError(
            f"There is no layer {chosen!r} in the encoder of {encoder.run}; choose last, all, mixture or one of "
            f"{', '.join(known)}."
        )
    return (chosen,)


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear probe: logits or z-scores Σ_l x_l W_l + b of the pooled features x_l of one or several layers.

    Attributes:
        weights: layer -> float64 [D, K].
        bias: float64 [K].
        kind: of the task; "regression" predicts z-scores, the others probabilities.
        classes: K names.
        scale: of a regression (mean [K], standard deviation [K]) of the training targets, else None.
    """

    weights: dict[str, np.ndarray]
    bias: np.ndarray
    kind: str
    classes: tuple[str, ...]
    scale: tuple[np.ndarray, np.ndarray] | None

    def predict(self, features: dict[str, np.ndarray]) -> np.ndarray:
        """float64 [n, K] from features [n, D] of each layer: probabilities, of a regression z-scores.

        Raises:
            KeyError: a layer is missing.
        """
        logits = sum(
            heads.LinearHead(weight, 0.0).logits(features[name]) for name, weight in self.weights.items()
        )
        return _activation(self.kind)(logits + self.bias)

    def save(self, path: str | Path) -> None:
        """Writes the probe as .npz.

        Raises:
            UserError: the file cannot be written.
        """
        buffer = io.BytesIO()
        arrays = {f"weight/{name}": weight for name, weight in self.weights.items()}
        if self.scale is not None:
            arrays |= {"target_mean": self.scale[0], "target_sd": self.scale[1]}
        classes = np.array(self.classes, dtype=str)
        np.savez(buffer, bias=self.bias, kind=np.array(self.kind), classes=classes, **arrays)
        write_atomic(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "LinearProbe":
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file, or it holds no linear probe.
        """
        try:
            with np.load(path) as file:
                arrays = dict(file)
            scale = (arrays["target_mean"], arrays["target_sd"]) if "target_mean" in arrays else None
            weights = {
                name.removeprefix("weight/"): array
                for name, array in arrays.items()
                if name.startswith("weight/")
            }
            return cls(weights, arrays["bias"], str(arrays["kind"]), tuple(arrays["classes"].tolist()), scale)
        except FileNotFoundError as error:
            raise UserError(f"There is no linear probe {path}.") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is not a linear probe of ecg_jax: {error}") from error


def _activation(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    from scipy.special import expit

    return (lambda values: values) if kind == "regression" else expit


@dataclass(frozen=True)
class FittedLinear(Fitted):
    """Predictions of a linear probe, and the probe."""

    probe: LinearProbe


def fit_linear(
    features: LayerFeatures | PooledFeatures,
    examples: Examples,
    *,
    l2_grid: Sequence[float],
    layers: str = LAST,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
    solver: str = "auto",
) -> FittedLinear:
    """Fits a head on the training records for every penalty (and layer) and keeps what is best on validation records.

    Args:
        features: from `cached_features`, or the features of one store that holds all parts.
        examples: targets of the three parts.
        l2_grid: penalties, relative to the mean loss of a class on standardised features.
        layers: "last", the last one; "all", each for itself, the best one kept; "mixture", a learned weighted mean of
            all standardised layers (Peters et al., NAACL 2018, equation 1), weights by softmax and fitted together with
            the head; or the name of one layer.
        tolerance, max_steps: as in `heads.LogisticProblem.solve`; a regression has a closed form.
        solver: "lbfgs", one penalty after the other; "vmap", all at once (`fit_together`); "auto".

    Returns:
        Predictions for validation and test, and the probe. `report` holds `metric`, `validation_score`, `l2`,
        `at_edge`, `converged`, `grid` (one entry for each l2), `solver`, and `layers`: None, or {"chosen": name,
        "validation": {layer: score}} and, of a mixture, "weights": {layer: weight} and "converged", whether those did.
        `converged` says whether head and mixture did.

    Raises:
        UserError: no class or target can be scored on the validation records.
        ValueError: a class cannot be trained, or an argument is none of those above.
    """
    if isinstance(features, PooledFeatures):
        features = LayerFeatures(
            features.layers, lambda part, layer, pooled=features: pooled.of(part.rows, layer)
        )
    kind = examples.task.kind
    regression = kind == "regression"
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} must be one of {', '.join(SOLVERS)}")
    if layers not in (LAST, ALL, MIXTURE, *features.layers):
        raise ValueError(
            f"layers={layers!r} must be last, all, mixture or one of {', '.join(features.layers)}"
        )
    _check_validation(examples)

    activation, n_val = _activation(kind), len(examples.val.rows)

    def score(predictions: np.ndarray, record: np.ndarray) -> float:
        averaged = mean_per_record(predictions, record, n_val)
        if not regression:
            return metrics.macro_auroc(examples.val.targets, averaged)
        return float(np.nanmean(metrics.mean_absolute_error(examples.val.targets, averaged)[0]))

    def fit(name: str) -> tuple[heads.Selection, str]:
        """The best head on one layer, and how it was solved."""
        train, train_record = features.of(examples.train, name)
        targets, weights = examples.train.targets, heads.crop_weights(train_record)
        used = solver
        if regression:
            used, solutions = "closed form", RidgeProblem(train, targets[train_record], weights).path(l2_grid)
        elif solver == "auto":
            used = faster_solver(*train.shape, targets.shape[1], len(l2_grid))
        if used == "vmap":
            solutions = path_together(
                train, targets, weights, l2_grid, tolerance, max_steps, record=train_record
            )
        elif used == "lbfgs":
            problem = heads.LogisticProblem(train, targets, weights, record=train_record)
            solutions = problem.path(l2_grid, tolerance, max_steps)
        val, val_record = features.of(examples.val, name)
        selection = heads.select(
            solutions,
            lambda head: score(activation(head.logits(val)), val_record),
            lower_is_better=regression,
        )
        return selection, used

    if layers == MIXTURE:
        weights, bias, selection, about = _fit_mixture(
            features, examples, score, l2_grid, tolerance, max_steps
        )
        used = "closed form" if regression else "lbfgs"
    else:
        names = {LAST: features.layers[-1:], ALL: features.layers}.get(layers, (layers,))
        by_layer = {name: fit(name) for name in names}
        scores = {name: each.chosen.validation_score for name, (each, _) in by_layer.items()}
        # Of equal ones the deeper.
        chosen = max(reversed(names), key=lambda name: -scores[name] if regression else scores[name])
        selection, used = by_layer[chosen]
        weights, bias = {chosen: selection.head.weight}, selection.head.bias
        about = None if layers == LAST else {"chosen": chosen, "validation": scores}

    probe = LinearProbe(weights, bias, kind, tuple(examples.classes), examples.scale)
    report = {
        "metric": "mae" if regression else "macro_auroc",
        "validation_score": selection.chosen.validation_score,
        "l2": selection.l2,
        "at_edge": selection.at_edge,
        "converged": selection.converged and (layers != MIXTURE or about["converged"]),
        "grid": [asdict(candidate) for candidate in selection.candidates],
        "solver": used,
        "layers": about,
    }
    predictions = {}
    for name, part in (("val", examples.val), ("test", examples.test)):
        inputs = {layer: features.of(part, layer) for layer in weights}
        record = next(iter(inputs.values()))[1]
        crops = probe.predict({layer: array for layer, (array, _) in inputs.items()})
        predictions[name] = mean_per_record(crops, record, len(part.rows))
    return FittedLinear(predictions["val"], predictions["test"], report, probe)


def _check_validation(examples: Examples) -> None:
    """Raises UserError where nothing can be chosen."""
    targets, n = examples.val.targets, len(examples.val.rows)
    if examples.task.kind == "regression":
        if np.isnan(targets).all():
            raise UserError(
                f"Task {examples.task.name}: no target is known for any of the {n} validation records, so nothing "
                "can be chosen on them; use more data."
            )
    elif not metrics.has_both_kinds(targets).any():
        raise UserError(
            f"Task {examples.task.name}: no class has both positives and negatives among the {n} validation "
            "records, so l2 cannot be chosen; use more data."
        )


def _fit_mixture(features: LayerFeatures, examples: Examples, score, l2_grid, tolerance, max_steps):
    """(weights by layer, bias, selection, what to report) of a learned mixture of layers."""
    regression = examples.task.kind == "regression"
    record = features.of(examples.train, features.layers[0])[1]
    mixture = Mixture(
        # Not kept here: the mixture has its own standardised copy.
        {name: features.of(examples.train, name)[0] for name in features.layers},
        examples.train.targets[record],
        heads.crop_weights(record),
        regression,
    )
    val = {name: features.of(examples.val, name) for name in features.layers}
    val_record = next(iter(val.values()))[1]
    fits = {}

    def solutions():
        for fit in mixture.path(l2_grid, tolerance, max_steps):
            fits[fit.solution.l2] = fit
            yield fit.solution

    def mixed_score(head: heads.LinearHead) -> float:
        # The last fit is the one that this head is of.
        fit = next(reversed(fits.values()))
        logits = sum(
            heads.LinearHead(weight, 0.0).logits(val[name][0]) for name, weight in fit.weights.items()
        )
        return score(_activation(examples.task.kind)(logits + fit.bias), val_record)

    selection = heads.select(solutions(), mixed_score, lower_is_better=regression)
    best = fits[selection.l2]
    about = {
        "chosen": MIXTURE,
        "validation": {MIXTURE: selection.chosen.validation_score},
        "weights": best.mixture,
        "converged": best.converged,
    }
    return best.weights, best.bias, selection, about
