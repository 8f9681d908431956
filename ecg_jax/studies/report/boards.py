"""Groups of runs against each other: means over seeds, intervals over test patients and seeds, ranks, mean places.

A board is one task in one mode. All its rows are scored on the same resamples of the same test records; a row of
several seeds carries their scatter too, as Student's t with S - 1 degrees of freedom (`bootstrap.seed_deviations`).
Groups of the same seeds deviate together, seed by seed, on this task and on others, so that their differences are
paired in seeds as in records; other groups, and baselines, deviate by themselves.
"""

import collections
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ecg_jax.evaluation import bootstrap
from ecg_jax.evaluation.bootstrap import Interval, Scored
from ecg_jax.evaluation.probe_scores import SCORED_AS, mean_of
from ecg_jax.evaluation.ranking import correct, rank_models
from ecg_jax.evaluation.scoring import score
from ecg_jax.run_setup import flatten
from ecg_jax.studies.report.load import Result
from ecg_jax.studies.report.read import MODES
from ecg_jax.studies.report.rows import (
    ECG_FEATURES,
    MAJORITY,
    RANDOM_INIT,
    SUPERVISED,
    Entry,
    Row,
    TaskScores,
    check_score,
)
from ecg_jax.studies.report.study import Member, Study

_PERCENTILE = "percentile"
# Fields of config.data that an encoder's input depends on.
_INPUTS = ("window_s", "rate_hz", "normalisation", "leads")


@dataclass
class Board:
    """One task in one mode.

    Attributes:
        task: name of its table.
        mode: of the probes; "supervised" where there are no others.
        scores: a row for each group of runs, and the baselines.
        members: the runs of each row; a baseline has none but an encoder trained from scratch.
        twins: the runs that each random initialisation stands beside.
        runs: a row for each run, ranked among themselves; the baselines are not in it.
        resampled: label of a row of `scores` -> float64 [R] of its macro score, seeds included.
        gains: label -> the group minus the random initialisations of its own encoders, paired.
    """

    task: str
    mode: str
    scores: TaskScores
    members: dict[Row, list[Member]]
    twins: dict[Row, list[Member]]
    runs: TaskScores
    resampled: dict[str, np.ndarray]
    gains: dict[str, Interval]

    @property
    def name(self) -> str:
        """Of its tables and figures."""
        return f"{self.task}_{self.mode}"

    @property
    def variants(self) -> bool:
        """Whether runs have several probes here, so that a row is one of those of its group."""
        return any(member.variant for own in self.members.values() for member in own)

    def members_of(self, row: Row) -> list[Member]:
        """Runs of a row; [] of a baseline that came with the probes."""
        if row in self.members:
            return self.members[row]
        return []

    @property
    def regression(self) -> bool:
        """Whether lower is better."""
        return self.scores.first.regression


def make_boards(study: Study, say: Callable[[str], None] = lambda line: None) -> list[Board]:
    """All boards of a study, tasks in the order of the benchmark, modes in theirs.

    Args:
        study: with its members.
        say: told what is going on, a line for each task.

    Raises:
        UserError: a score in results.json is not that of predictions.npz.
    """
    boards = []
    for task in study.collection.tasks:
        say(task)
        members = [member for member in study.members if member.result.task == task]
        modes = [m for m in MODES if any(member.result.mode == m for member in members)]
        scorer = _Scorer(members[0].result)
        for mode in [m for m in modes if m != "supervised"] or modes:
            boards.append(_board(task, mode, members, scorer))
    # All comparisons of the page are one family of tests.
    ranks = {board.name: board.scores.ranks for board in boards}
    for name, ranked in correct(ranks).items():
        (board,) = (board for board in boards if board.name == name)
        of_label = {entry.row.label: entry for entry in board.scores.entries.values()}
        for rank in ranked:
            of_label[rank.model].rank = rank
    return boards


class _Scorer:
    """Scores predictions of one table on its resamples, each set of them once."""

    def __init__(self, first: Result):
        self.settings = first.results["bootstrap"]
        self._metric = SCORED_AS[first.metric]
        self._targets = first.predictions["targets"].astype(np.float64)
        codes, _ = bootstrap.units(first.predictions["patient_id"].tolist(), len(self._targets))
        # The draws of the sweep's own tables.
        self._counts = bootstrap.draw(codes, self.settings["resamples"], seed=0)
        self._known: dict[bytes, Scored] = {}

    def __call__(self, predictions: np.ndarray) -> Scored:
        key = np.ascontiguousarray(predictions).tobytes()
        if key not in self._known:
            array = np.asarray(predictions, dtype=np.float64)
            self._known[key] = score(self._metric, self._targets, array, self._counts)
        return self._known[key]

    def of_probe(self, result: Result) -> Scored:
        """A probe's score, checked against what it says of itself."""
        scored = self(result.predictions["probabilities"])
        check_score(result, scored, self.settings["undefined"])
        return scored

    def twins_of(self, result: Result) -> list[Scored]:
        """Scores of the randomly initialised encoders beside a probe; [] where there are none."""
        name = "probabilities_random_init_seeds"
        if result.mode == "supervised" or name not in result.predictions:
            return []
        return [self(array) for array in result.predictions[name]]

    def over_seeds(
        self, macros: Sequence[tuple[float, np.ndarray]], state: int | Sequence[int] = 1
    ) -> tuple[Interval, np.ndarray]:
        """Mean over seeds with its interval, and its resampled values [R], seeds included.

        Args:
            macros: a seed's score, on the sample and on the resamples [R], each, in the order of their seeds.
            state: of the generator of the seeds' deviations; rows of the same state deviate together.
        """
        points, resampled = zip(*macros, strict=True)
        over_patients = np.mean(resampled, axis=0)

        def with_seeds(state: int | Sequence[int]) -> np.ndarray:
            rng = np.random.default_rng(state)
            return over_patients + bootstrap.seed_deviations(points, self.settings["resamples"], rng)

        # The same draws for every row's own interval: it does not depend on its company.
        interval = bootstrap.interval(np.mean(points), with_seeds(1), self.settings["level"])
        return interval, with_seeds(state)

    def macro(self, scored: Scored) -> tuple[float, np.ndarray]:
        """Of one model, on the sample and the resamples [R]."""
        return scored.macros(self.settings["undefined"])[:2]


def _board(task: str, mode: str, members: Sequence[Member], scorer: _Scorer) -> Board:
    probed = [member for member in members if member.result.mode == mode]
    scratch = [m for m in members if m.result.mode == "supervised"] if mode != "supervised" else []
    rows: dict[Row, list[Member]] = {}
    for member in probed:
        supervised = mode == "supervised"
        row = Row(member.row, "from scratch", SUPERVISED) if supervised else Row(member.row, mode)
        rows.setdefault(row, []).append(member)
    for name, own in _by_encoder(scratch, SUPERVISED):
        rows[Row(name, "from scratch", SUPERVISED)] = own
    rows = {row: sorted(own, key=_seed_of) for row, own in rows.items()}
    states = _states(rows)
    twins: dict[Row, list[Member]] = {}
    entries: dict[Row, Entry] = {}
    resampled: dict[str, np.ndarray] = {}
    gains: dict[str, Interval] = {}
    for row, own in rows.items():
        entry, values = _group_entry(row, own, scorer, states[row])
        entries[row], resampled[row.label] = entry, values
        differences = [
            (a[0] - b[0], a[1] - b[1])
            for member in own
            if (random := scorer.twins_of(member.result))
            for a, b in [(scorer.macro(scorer.of_probe(member.result)), scorer.macro(mean_of(random)))]
        ]
        if len(differences) == len(own):
            gains[row.label] = scorer.over_seeds(differences)[0]
    for row, beside, scored, seeds, results in _baselines(probed, scorer):
        value, values = scorer.over_seeds([scorer.macro(each) for each in scored], _own_state(row))
        if row.baseline == RANDOM_INIT:
            twins[row] = beside
        arrays = [np.asarray(array, dtype=np.float64) for array in results]
        entry = Entry(row, value.point, value.low, value.high, arrays, None, seeds)
        entry.scored = mean_of(scored)
        entries[row], resampled[row.label] = entry, values
    scores = TaskScores(f"{task}_{mode}", [member.result for own in rows.values() for member in own], entries)
    metric, level = SCORED_AS[scores.first.metric], scorer.settings["level"]
    as_one = {
        entry.row.label: Scored(metric, np.array([entry.point]), resampled[entry.row.label][:, None])
        for entry in entries.values()
    }
    of_label = {entry.row.label: entry for entry in entries.values()}
    for rank in rank_models(as_one, "exclude", level, _PERCENTILE):
        of_label[rank.model].rank = rank
    runs = scores if all(len(own) == 1 for own in rows.values()) else _run_scores(scores.task, rows, scorer)
    return Board(task, mode, scores, rows, twins, runs, resampled, gains)


def _seed_of(member: Member) -> int:
    """Of pretraining, or of the training from scratch."""
    pretrained = member.result.mode != "supervised" and member.run.seed is not None
    return member.run.seed if pretrained else member.result.results["seed"]


def _states(rows: dict[Row, list[Member]]) -> dict[Row, int | list[int]]:
    """State of the generator from which the seeds of each row deviate: groups of the same seeds share one.

    Most groups have that of the sweep's own tables, whatever the order of rows.
    """
    seeds = {row: tuple(map(_seed_of, own)) for row, own in rows.items() if not row.baseline}
    number = collections.Counter(seeds.values())
    first = min(number, key=lambda each: (-number[each], each), default=())
    return {
        row: _own_state(row) if row.baseline else 1 if seeds[row] == first else [2, *seeds[row]]
        for row in rows
    }


def _own_state(row: Row) -> list[int]:
    """State of a row whose seeds have nothing to do with those of others."""
    return [3, *hashlib.sha256(row.label.encode()).digest()]


def _group_entry(
    row: Row, members: Sequence[Member], scorer: _Scorer, state: int | Sequence[int]
) -> tuple[Entry, np.ndarray]:
    """A group's row, and its resampled macro scores [R]."""
    scored = [scorer.of_probe(member.result) for member in members]
    value, values = scorer.over_seeds([scorer.macro(each) for each in scored], state)
    results = members[0].result.results
    metric = members[0].result.metric
    if len(members) == 1:
        # As the probe wrote it, so that it can be found there.
        value = Interval(results[metric], results["ci_low"], results["ci_high"])
    merged = mean_of(scored)
    own = replace(members[0].result, model=row.model)
    if len(members) > 1:
        own = replace(own, results=results | _mean_fields(members, merged, value, scorer.settings))
    arrays = [member.result.predictions["probabilities"].astype(np.float64) for member in members]
    seeds = len(members) if len(members) > 1 else None
    return Entry(row, value.point, value.low, value.high, arrays, own, seeds, merged), values


def _mean_fields(
    members: Sequence[Member], merged: Scored, value: Interval, settings: dict[str, Any]
) -> dict[str, Any]:
    """Fields of results.json of a group of seeds: the score, and each class's mean with an interval over patients."""
    first = members[0].result
    of_class = merged.class_intervals(settings["level"])
    name = "mae" if first.regression else "auroc"
    means = ("r2",) if first.regression else ("average_precision", "brier", "ece")
    per_class = {}
    for (label, about), interval in zip(first.results["per_class"].items(), of_class, strict=True):
        every = [member.result.results["per_class"][label] for member in members]
        per_class[label] = about | {name: interval.point, "ci_low": interval.low, "ci_high": interval.high}
        for field in means:
            known = [entry[field] for entry in every if entry[field] is not None]
            per_class[label][field] = float(np.mean(known)) if known else None
    return {
        first.metric: value.point, "ci_low": value.low, "ci_high": value.high, "per_class": per_class,
        "metrics": {},
    }  # fmt: skip


def _run_scores(name: str, rows: dict[Row, list[Member]], scorer: _Scorer) -> TaskScores:
    """Every run as a row of its own, ranked among the runs."""
    entries: dict[Row, Entry] = {}
    for row, members in rows.items():
        for member in members:
            result = member.result
            own = Row(result.model, row.mode, row.baseline)
            arrays = [result.predictions["probabilities"].astype(np.float64)]
            triple = (result.results[name] for name in (result.metric, "ci_low", "ci_high"))
            entries[own] = Entry(own, *triple, arrays, result, None, scorer.of_probe(result))
    scored = {entry.row.label: entry.scored for entry in entries.values()}
    of_label = {entry.row.label: entry for entry in entries.values()}
    settings = scorer.settings
    for rank in rank_models(scored, settings["undefined"], settings["level"], _PERCENTILE):
        of_label[rank.model].rank = rank
    return TaskScores(name, [m.result for members in rows.values() for m in members], entries)


def _encoder_of(member: Member) -> dict[str, Any]:
    """What a randomly initialised encoder depends on beside its seed."""
    config = member.run.config
    if not config:
        return {"model": member.run.name}
    model = {name: value for name, value in flatten(config["model"]).items() if name not in ("conv", "remat")}
    return model | {name: value for name, value in config["data"].items() if name in _INPUTS}


def _by_encoder(members: Sequence[Member], what: str) -> list[tuple[str, list[Member]]]:
    """Members by the encoder they are of, with a name that tells the encoders apart."""
    of_encoder: dict[str, list[Member]] = {}
    for member in members:
        of_encoder.setdefault(json.dumps(_encoder_of(member), sort_keys=True), []).append(member)
    clusters: list[list[Member]] = []
    for own in of_encoder.values():
        # Fields that change nothing of an encoder that is not trained, as dropout.
        same = next((cluster for cluster in clusters if _same_twins(cluster, own)), None)
        if same is None:
            clusters.append(own)
        else:
            same += own
    if len(clusters) == 1 and what == RANDOM_INIT:
        return [(what, clusters[0])]
    named = []
    for own in clusters:
        backbone = own[0].run.backbone or own[0].row
        alike = [c for c in clusters if (c[0].run.backbone or c[0].row) == backbone]
        configs = [_encoder_of(cluster[0]) for cluster in alike]
        names = dict.fromkeys(name for config in configs for name in config)
        differ = [
            name
            for name in names
            if len({json.dumps(config[name]) if name in config else None for config in configs}) > 1
        ]
        config = _encoder_of(own[0])
        # Only leads may be empty, which are all.
        shown = {name: "all" if config[name] == "" else config[name] for name in differ if name in config}
        told = ", ".join(f"{name}={value}" for name, value in shown.items())
        if len(alike) > 1 and (not told or len(differ) > 2):
            told = f"as in {own[0].row}"
        named.append((f"{what} of {backbone}" + (f" ({told})" if told else ""), own))
    return named


def _twins_by_seed(member: Member) -> dict[int, np.ndarray]:
    """Seed -> predictions [n, K] of the random initialisations beside a probe."""
    name = "probabilities_random_init_seeds"
    if member.result.mode == "supervised" or name not in member.result.predictions:
        return {}
    about = member.result.results["baselines"]["random_init"]
    return dict(
        zip([entry["seed"] for entry in about["seeds"]], member.result.predictions[name], strict=True)
    )


def _same_twins(first: Sequence[Member], second: Sequence[Member]) -> bool:
    """Whether two encoders' random initialisations of a seed say the same."""
    ours, theirs = ({k: v for m in own for k, v in _twins_by_seed(m).items()} for own in (first, second))
    common = [seed for seed in ours if seed in theirs]
    return bool(common) and all(np.allclose(ours[k], theirs[k], rtol=0, atol=1e-6) for k in common)


def _baselines(members: Sequence[Member], scorer: _Scorer):
    """(row, members beside it, scores of each seed, number of seeds or None, predictions) of random initialisations,
    ECG features and the majority guess, where the probes have them."""
    with_twins = [member for member in members if scorer.twins_of(member.result)]
    for name, own in _by_encoder(with_twins, RANDOM_INIT):
        seeds = {seed: array for member in own for seed, array in _twins_by_seed(member).items()}
        mode = own[0].result.results["baselines"]["random_init"]["mode"]
        arrays = list(seeds.values())
        yield Row(name, mode, RANDOM_INIT), own, [scorer(array) for array in arrays], len(seeds), arrays
    first = members[0].result.predictions
    for name, mode, array in (
        (ECG_FEATURES, "linear", "probabilities_ecg_features"),
        (MAJORITY, "", "probabilities_majority"),
    ):
        if array in first:
            yield Row(name, mode, name), members, [scorer(first[array])], None, [first[array]]
