"""The models of a label-efficiency study and their probes, from the fields of its config."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ecg_jax.evaluation import label_efficiency as study
from ecg_jax.evaluation.ecg_feature_baseline import VERSION as ECG_VERSION
from ecg_jax.evaluation.ecg_feature_baseline import ecg_feature_layers
from ecg_jax.evaluation.examples import Examples
from ecg_jax.evaluation.feature_cache import FeatureCache, entry_key
from ecg_jax.evaluation.fit_folder import examples_key
from ecg_jax.evaluation.label_efficiency import Curve, FitStore
from ecg_jax.evaluation.linear import LayerFeatures, cached_features
from ecg_jax.training.pretrained import RestoredEncoder, random_twin

RANDOM, ECG_FEATURES = "random_init", "ecg_features"


def probe_models(
    config,
    workdir: Path,
    folder: Path,
    encoders: dict[str, RestoredEncoder],
    examples: Examples,
    subsets,
    counts,
) -> tuple[dict[str, Curve], dict[str, list]]:
    """Probes all models on all subsets.

    Args:
        config: from configs/label_efficiency.py.
        workdir: of the study; finished fits are in its folder "fits".
        folder: where features are kept.
        encoders: by their name.
        examples: of the task.
        subsets: [seed][size] -> int, indices into `examples.train.rows`.
        counts: [n_test, R], resamples of the test records.

    Returns:
        (the curve of each model, what was chosen at each size and seed of it).

    Raises:
        UserError: features cannot be computed or kept.
    """
    cache = FeatureCache(folder)
    linear = config.linear.to_dict()
    how = linear | {"l2_grid": tuple(linear["l2_grid"])}
    solved_alike = {key: value for key, value in how.items() if key != "solver"}
    fits = FitStore(workdir / "fits", {"linear": solved_alike, "examples": examples_key(examples)})
    sizes = np.array([[len(chosen) for chosen in of_seed] for of_seed in subsets]).T
    ecg = _Probes(
        f"{ECG_FEATURES} {ECG_VERSION}",
        lambda: _ecg_features(examples, folder),
        examples,
        fits,
        how | {"layers": "last"},
    )

    def of_encoder(encoder: RestoredEncoder, name: str) -> _Probes:
        key = entry_key(encoder, examples.train.store)
        return _Probes(
            key,
            lambda: _encoder_features(cache, encoder, examples, how["layers"], config.batch_size, name),
            examples,
            fits,
            how,
        )

    curves, reports = {}, {}
    models = _with_twins(encoders, config.seed, config.seeds)
    for name in (*models, ECG_FEATURES):
        predictions: list[list[np.ndarray]] = [[] for _ in sizes]
        reports[name] = [[] for _ in sizes]
        known: dict[tuple[str, bytes], tuple[np.ndarray, dict]] = {}
        probes = None
        for i, of_seed in enumerate(subsets):
            if name == ECG_FEATURES:
                probes = ecg
            elif probes is None or len(models[name]) > 1:
                probes = of_encoder(models[name][i], name)
            for s, chosen in enumerate(of_seed):
                # All records are the same subset for every seed.
                key = probes.key, chosen.tobytes()
                if key not in known:
                    known[key] = probes.fit(chosen)
                test, report = known[key]
                predictions[s].append(test)
                reports[name][s].append(report)
        curves[name] = study.score_fits(examples, predictions, sizes, counts)
    return curves, reports


def _with_twins(
    encoders: dict[str, RestoredEncoder], seed: int, n_twins: int
) -> dict[str, list[RestoredEncoder]]:
    """Every encoder alone, then the random twins of every architecture among them, one for each draw of the subsets."""
    models, seen = {name: [encoder] for name, encoder in encoders.items()}, []
    for name, encoder in encoders.items():
        architecture = (encoder.config["model"], encoder.preprocessing)
        if architecture not in seen:
            twins = [random_twin(encoder, seed + i) for i in range(n_twins)]
            models[f"{RANDOM} as {name}" if seen else RANDOM] = twins
            seen.append(architecture)
    return models


class _Probes:
    """Linear probes of one model on subsets of the training records, kept under `key`."""

    def __init__(
        self, key: str, features: Callable[[], LayerFeatures], examples: Examples, fits: FitStore, how
    ):
        self.key = key
        self._compute, self._examples, self._fits, self._how = features, examples, fits, how
        self._features: LayerFeatures | None = None

    def fit(self, chosen: np.ndarray) -> tuple[np.ndarray, dict]:
        """(test predictions [n, K], report), kept from an earlier run if it got that far."""
        if found := self._fits.read(self.key, chosen):
            return found
        if self._features is None:
            self._features = self._compute()
        fitted = study.fit_subset(self._features, self._examples, chosen, **self._how)
        self._fits.write(self.key, chosen, fitted)
        return fitted.test, fitted.report


def _encoder_features(
    cache: FeatureCache,
    encoder: RestoredEncoder,
    examples: Examples,
    layers: str,
    batch_size: int,
    label: str,
) -> LayerFeatures:
    """Features with those of the validation and test records in memory: every fit needs them."""
    features = cached_features(cache, encoder, examples, layers, batch_size, label)
    kept = {
        (part.rows.tobytes(), layer): features.of(part, layer)
        for part in (examples.val, examples.test)
        for layer in features.layers
    }

    def of(part, layer):
        key = (part.rows.tobytes(), layer)
        return kept[key] if key in kept else features.of(part, layer)

    return LayerFeatures(features.layers, of)


def _ecg_features(examples: Examples, folder: Path) -> LayerFeatures:
    """Simple ECG features of any of a task's records; undefined ones are filled in from all training records."""
    whole = ecg_feature_layers(examples, folder)
    parts = (examples.train, examples.val, examples.test)
    place = {int(row): i for i, row in enumerate(np.concatenate([part.rows for part in parts]))}
    table = np.concatenate([whole.of(part, whole.layers[0])[0] for part in parts])

    def of(part, layer):
        return table[[place[int(row)] for row in part.rows]], np.arange(len(part.rows))

    return LayerFeatures(whole.layers, of)
