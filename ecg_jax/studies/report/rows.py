"""The rows of a report: probes and baselines, each scored on the same resamples of the same test records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap
from ecg_jax.evaluation.bootstrap import Scored
from ecg_jax.evaluation.probe_scores import SCORED_AS, mean_of
from ecg_jax.evaluation.ranking import Rank, correct, rank_models
from ecg_jax.evaluation.scoring import score
from ecg_jax.studies.report.load import Collection, Result
from ecg_jax.studies.report.read import MODES, RESULTS

SUPERVISED = "supervised from scratch"
RANDOM_INIT = "random initialisation"
ECG_FEATURES = "simple ECG features"
MAJORITY = "majority guess"
# ECG features are probed linearly, whatever the mode of the probe they stand beside.
_FEATURES_MODE = "linear"
_BASELINES = (SUPERVISED, RANDOM_INIT, ECG_FEATURES, MAJORITY)

#: Largest difference between a score in results.json and the same computed from predictions.npz: predictions are
# stored as float32, which can join or part neighbours in a ranking.
SAME_SCORE = 1e-4


@dataclass(frozen=True)
class Row:
    """What a line of the tables is about."""

    model: str
    mode: str
    """Of the probe; "from scratch" for supervised encoders, "" for the majority guess."""
    baseline: str | None = None
    """One of the baselines' names; None for a pretrained model."""

    @property
    def label(self) -> str:
        """Model and mode in one."""
        return f"{self.model}, {self.mode}" if self.mode else self.model


@dataclass(eq=False)
class Entry:
    """A row of one task."""

    row: Row
    point: float
    low: float | None
    high: float | None
    predictions: list[np.ndarray]
    """[n, K] each: one for a probe, several seeds of a random initialisation."""
    result: Result | None
    """The probe; None for baselines that come with one."""
    seeds: int | None = None
    scored: Scored | None = None
    """On the report's own resamples; of several seeds the mean."""
    rank: Rank | None = None

    @property
    def best(self) -> bool:
        """Whether it is the best of its task."""
        return self.rank.to_best is None

    @property
    def mark(self) -> str:
        """Of its cell: "best", "tied" for those not told from the best, or ""."""
        return "best" if self.best else "tied" if self.rank.rank == 1 else ""


@dataclass
class TaskScores:
    """All rows of one task."""

    task: str
    results: list[Result]
    entries: dict[Row, Entry]

    @property
    def first(self) -> Result:
        """Any of the results: for what they have in common."""
        return self.results[0]

    @property
    def ranked(self) -> list[Entry]:
        """Entries from best to worst."""
        sign = 1 if self.first.regression else -1
        return sorted(self.entries.values(), key=lambda entry: (entry.rank.rank, sign * entry.point))

    @property
    def ranks(self) -> list[Rank]:
        """Of all entries, best first."""
        return [entry.rank for entry in self.ranked]

    @property
    def probes(self) -> list[Entry]:
        """Entries of probes, supervised ones included."""
        return [entry for entry in self.entries.values() if entry.result is not None]

    @property
    def best_probe(self) -> Entry:
        """The best entry that is a probe."""
        return next(entry for entry in self.ranked if entry.result is not None)


_ARRAY_OF = {
    "random_init": "probabilities_random_init_seeds",
    "ecg_features": "probabilities_ecg_features",
    "majority": "probabilities_majority",
}


def disagreement(field: str, said: float | None, computed: float) -> str:
    """What is wrong with a score of results.json that is not that of the predictions beside it; "" if nothing is.

    Args:
        field: of results.json.
        said: its value; None, or NaN, for an undefined score.
        computed: the score of the predictions, NaN where it is undefined.
    """
    value = np.nan if said is None else said
    if np.isclose(computed, value, rtol=0, atol=SAME_SCORE, equal_nan=True):
        return ""
    shown = "null" if said is None else f"{said:.4f}"
    return f"the field {field} is {shown}, but the predictions beside it score {computed:.4f}"


def check_score(result: Result, scored: Scored, undefined: str) -> None:
    """Refuses a probe whose results.json says another score than its predictions have.

    Raises:
        UserError: of all classes together or of one.
    """
    metric = SCORED_AS[result.metric]
    said = {result.metric: result.results[result.metric]}
    said |= {f"per_class.{name}.{metric}": of[metric] for name, of in result.results["per_class"].items()}
    computed = (scored.macros(undefined)[0], *scored.per_class)
    for (field, value), own in zip(said.items(), computed, strict=True):
        if wrong := disagreement(field, value, own):
            raise UserError(f"{result.folder / RESULTS}: {wrong}; run its `ecg-jax probe` command again.")


def check_baselines(collection: Collection) -> None:
    """Refuses a report without the baselines of every task.

    Raises:
        UserError: names the task, the baseline and the command that makes it.
    """
    for task in collection.tasks:
        results = collection.of_task(task)
        store = results[0].results["store"]["path"]
        if not any(result.mode == "supervised" for result in results):
            raise UserError(
                f"Task {task} has no encoder trained from scratch to be compared with; run `ecg-jax probe "
                f"--config=configs/probe.py:mode=supervised,task={task} --checkpoint=RUN --store={store} "
                "--workdir=DIR` and name DIR beside the other folders."
            )
        for result in results:
            needed = ["ecg_features", "majority"]
            if result.mode != "supervised":
                needed.insert(0, "random_init")
            for name in needed:
                baselines = result.results["baselines"]
                in_file = _ARRAY_OF[name] in result.predictions
                if name not in baselines or baselines[name] is None or not in_file:
                    raise UserError(
                        f"{result.folder / RESULTS} has no baseline {name} for task {task}; run `ecg-jax probe "
                        f"--config=configs/probe.py:mode={result.mode},task={task} --checkpoint=RUN --store={store} "
                        "--workdir=DIR` with this version of ecg_jax and name DIR instead."
                    )


def score_tasks(
    collection: Collection, say: Callable[[str], None] = lambda line: None
) -> dict[str, TaskScores]:
    """Rows of every task with their ranks.

    Args:
        collection: checked by `check_baselines`.
        say: told what is going on, a line for each task.

    Returns:
        task -> its rows, in the order of the tables.

    Raises:
        UserError: a score in results.json is not that of predictions.npz.
    """
    twins = _twin_rows(collection)
    scores, ranks = {}, {}
    for task in collection.tasks:
        say(task)
        results = collection.of_task(task)
        entries = {entry.row: entry for entry in _entries(results, twins)}
        ranks[task] = _score(results, list(entries.values()))
        scores[task] = TaskScores(task, results, entries)
    # All comparisons of the report are one family of tests.
    for task, ranked in correct(ranks).items():
        of_label = {entry.row.label: entry for entry in scores[task].entries.values()}
        for rank in ranked:
            of_label[rank.model].rank = rank
    return scores


def all_rows(scores: dict[str, TaskScores]) -> list[Row]:
    """Rows of all tasks: models in order of appearance, mode by mode, then baselines."""
    rows = list(dict.fromkeys(row for task in scores.values() for row in task.entries))
    models = list(dict.fromkeys(row.model for row in rows))

    def place(row: Row):
        mode = MODES.index(row.mode) if row.mode in MODES else 0
        kind = _BASELINES.index(row.baseline) + 1 if row.baseline else 0
        return kind, models.index(row.model), mode

    return sorted(rows, key=place)


@dataclass
class _Twins:
    """Randomly initialised encoders that are the same for several probes, in one mode."""

    mode: str
    models: dict[str, None]
    """Models they stand beside, in order."""
    of_task: dict[str, list[np.ndarray]]
    """Predictions [n, K] of the first seed that were taken for the same."""
    results: list[Result]

    def include(self, result: Result) -> bool:
        """Whether a probe's twins are these: alike on a task known to both, or of a model known on other tasks."""
        if result.task in self.of_task:
            ours = _first_twin(result)
            return any(
                other.shape == ours.shape and np.allclose(other, ours, rtol=0, atol=1e-6)
                for other in self.of_task[result.task]
            )
        return result.model in self.models


def _first_twin(result: Result) -> np.ndarray:
    """Predictions [n, K] of the first randomly initialised encoder beside a probe."""
    return result.predictions["probabilities_random_init_seeds"][0]


def _twin_mode(result: Result) -> str:
    """How the randomly initialised encoders beside a probe were probed."""
    return result.results["baselines"]["random_init"]["mode"]


def _twin_rows(collection: Collection) -> dict[int, Row]:
    """Row of the random initialisation of each result (by id): one row for results that share the same.

    Checkpoints with the same encoder and input have the same randomly initialised twins; those of different encoders,
    and those probed in another mode, are rows of their own.
    """
    clusters: list[_Twins] = []
    for result in collection.results:
        if result.mode == "supervised":
            continue
        mode = _twin_mode(result)
        found = next((twins for twins in clusters if twins.mode == mode and twins.include(result)), None)
        if found is None:
            found = _Twins(mode, {}, {}, [])
            clusters.append(found)
        found.models[result.model] = None
        found.of_task.setdefault(result.task, []).append(_first_twin(result))
        found.results.append(result)
    rows: dict[int, Row] = {}
    taken: set[Row] = set()
    for twins in clusters:
        alone = sum(other.mode == twins.mode for other in clusters) == 1
        row = Row(
            RANDOM_INIT if alone else f"{RANDOM_INIT} of {', '.join(twins.models)}", twins.mode, RANDOM_INIT
        )
        if row in taken:
            # The same models, differing between their probes' modes: those tell them apart.
            modes = ", ".join(dict.fromkeys(result.mode for result in twins.results))
            row = Row(f"{row.model} beside {modes}", twins.mode, RANDOM_INIT)
        taken.add(row)
        rows |= {id(result): row for result in twins.results}
    return rows


def _entries(results: Sequence[Result], twins: dict[int, Row]) -> list[Entry]:
    metric = results[0].metric

    def entry(row, figures, arrays, result=None, seeds=None):
        # A copy in float64: sums over resamples should not depend on how predictions were stored.
        arrays = [np.asarray(array, dtype=np.float64) for array in arrays]
        return Entry(row, figures[metric], figures["ci_low"], figures["ci_high"], arrays, result, seeds)

    entries: dict[Row, Entry] = {}
    for result in results:
        supervised = result.mode == "supervised"
        mode, baseline = ("from scratch", SUPERVISED) if supervised else (result.mode, None)
        row = Row(result.model, mode, baseline)
        entries[row] = entry(row, result.results, [result.predictions["probabilities"]], result)
    for result in results:
        if result.mode == "supervised":
            continue
        row, arrays = twins[id(result)], result.predictions
        if row not in entries:
            figures = result.results["baselines"]["random_init"]
            seeds = list(arrays["probabilities_random_init_seeds"])
            entries[row] = entry(row, figures, seeds, seeds=len(seeds))
        elif not np.allclose(entries[row].predictions[0], _first_twin(result), rtol=0, atol=1e-5):
            raise ValueError(f"{result.folder}: its random initialisation is not that of the row {row.label}")
    for name, baseline in ((ECG_FEATURES, "ecg_features"), (MAJORITY, "majority")):
        array = results[0].predictions[f"probabilities_{baseline}"]
        row = Row(name, "" if name == MAJORITY else _FEATURES_MODE, name)
        entries[row] = entry(row, results[0].results["baselines"][baseline], [array])
    return list(entries.values())


def _score(results: Sequence[Result], entries: Sequence[Entry]) -> list[Rank]:
    """Fills `scored` of all entries of a task, on the same resamples, and ranks them."""
    first = results[0]
    settings = first.results["bootstrap"]
    targets = first.predictions["targets"].astype(np.float64)
    codes, _ = bootstrap.units(first.predictions["patient_id"].tolist(), len(targets))
    counts = bootstrap.draw(codes, settings["resamples"], first.results["seed"])
    left_out = bootstrap.leave_one_out(codes) if settings["interval"] == "bca" else None
    for entry in entries:
        entry.scored = mean_of(
            [score(SCORED_AS[first.metric], targets, array, counts, left_out) for array in entry.predictions]
        )
        if entry.result is not None:
            check_score(entry.result, entry.scored, settings["undefined"])
    scored = {entry.row.label: entry.scored for entry in entries}
    return rank_models(scored, settings["undefined"], settings["level"], settings["interval"])
