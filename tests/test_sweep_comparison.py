"""Groups of runs: intervals over patients and seeds, differences, and what tables say of them."""

import re

import numpy as np
import pytest

from ecg_jax.errors import UserError
from ecg_jax.evaluation import bootstrap, metrics
from ecg_jax.studies import comparison, comparison_tables
from ecg_jax.studies.comparison import FinishedRun, hierarchical_interval, seed_deviations

N_PATIENTS, PER_PATIENT = 40, 2


def planted(group: str, noises: list[float], twin_noise: float | None = 3.0) -> list[FinishedRun]:
    """Runs of one group, a seed for each noise; a twin noise of None makes the twin the run itself."""
    n = N_PATIENTS * PER_PATIENT
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (n, 2)).astype(float)
    error, twin_error = rng.normal(size=(2, n, 2))
    runs = []
    for seed, noise in enumerate(noises):
        scores = targets + noise * error
        twin = scores if twin_noise is None else targets + twin_noise * twin_error
        values = {"macro_auroc": metrics.macro_auroc(targets, scores), "ci_low": 0.0, "ci_high": 1.0}
        results = {
            **values,
            "seed": seed,
            "task": "planted",
            "n_patients": N_PATIENTS,
            "pretraining_config": {"seed": seed, "model": {"width": 1}},
            "preprocessing": {},
            "baselines": {"random_init": values, "majority": values},
            "difference_to_random_init": values,
            "encoder_parameters": 1000,
            "bootstrap": {"resamples": 400, "level": 0.95, "undefined": "exclude", "unit": "patient"},
        }
        predictions = {
            "record_id": np.arange(n).astype(str),
            "patient_id": np.repeat(np.arange(N_PATIENTS), PER_PATIENT).astype(str),
            "targets": targets,
            "probabilities": scores,
            "probabilities_random_init_seeds": twin[None],
            "classes": np.array(["a", "b"]),
        }
        runs.append(FinishedRun(f"{group}-{seed}", group, results, predictions, [], [], None))
    return runs


def width(entry):
    return entry["ci_high"] - entry["ci_low"]


def test_interval_holds_its_point_and_widens_when_seeds_disagree():
    agree = comparison.compare(planted("agree", [1.0, 1.0, 1.0]))["groups"][0]
    disagree = comparison.compare(planted("disagree", [0.2, 1.0, 4.0]))["groups"][0]
    for group in (agree, disagree):
        assert group["ci_low"] < group["macro_auroc"] < group["ci_high"]
    assert width(disagree) > 1.5 * width(agree)


def test_seeds_that_agree_leave_the_interval_over_patients():
    """Three times the same scores are known no better and no worse than once."""
    runs = planted("group", [1.0, 1.0, 1.0])
    group = comparison.compare(runs)["groups"][0]
    codes, _ = bootstrap.units(runs[0].predictions["patient_id"].tolist(), N_PATIENTS * PER_PATIENT)
    counts = bootstrap.draw(codes, 400, seed=0)
    model = bootstrap.bootstrap_auroc(
        runs[0].predictions["targets"], runs[0].predictions["probabilities"], counts
    )
    expected = model.macro()
    assert (group["macro_auroc"], group["ci_low"], group["ci_high"]) == pytest.approx(tuple(expected))


def test_difference_is_paired():
    """A run that is its own twin differs by exactly nothing, however uncertain both are."""
    group = comparison.compare(planted("group", [0.5, 1.0, 4.0], twin_noise=None))["groups"][0]
    assert group["difference_to_random_init"] == {"macro_auroc": 0.0, "ci_low": 0.0, "ci_high": 0.0}
    better = comparison.compare(planted("group", [0.2, 0.3, 0.2], twin_noise=9.0))["groups"][0]
    assert better["difference_to_random_init"]["ci_low"] > 0


def test_interval_carries_patients_and_seeds():
    """Without patients, Student's t; with a wide spread of patients and a narrow one of seeds, that of the patients."""
    rng = np.random.default_rng(1)
    points, R = np.array([0.70, 0.74, 0.78]), 40_000
    value = hierarchical_interval(points, np.tile(points[:, None], R), seed_deviations(points, R, rng))
    error = points.std(ddof=1) / 3**0.5
    assert value.point == pytest.approx(points.mean())
    assert (value.high - value.low) / 2 == pytest.approx(4.303 * error, rel=0.05)  # t of 2 degrees at 97.5 %
    close = np.array([0.7399, 0.74, 0.7401])
    resampled = close[:, None] + 0.03 * rng.normal(size=R)
    value = hierarchical_interval(close, resampled, seed_deviations(close, R, rng))
    assert (value.high - value.low) / 2 == pytest.approx(1.96 * 0.03, rel=0.05)
    assert (seed_deviations([0.7], 5, rng) == 0).all()


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("patients", [0.0, 1.0])
def test_interval_over_few_seeds_covers_what_it_says(seeds, patients):
    """Normal seeds of spread 1 and a patient error of known size, 2000 times: without patients 95 % of the intervals
    hold 0, with them no fewer (two seeds and patients together are covered more often).
    """
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        shift = patients * rng.normal()
        points = rng.normal(size=seeds) + shift
        resampled = points[:, None] + patients * rng.normal(size=400)
        value = hierarchical_interval(points, resampled, seed_deviations(points, 400, rng))
        held += value.low <= 0 <= value.high
    assert 0.935 < held / 2000 < (0.995 if patients else 0.965)


def test_runs_tested_on_other_records_are_refused():
    first, second = planted("group", [1.0, 1.0])
    other = second.predictions | {"record_id": second.predictions["record_id"][::-1]}
    with pytest.raises(UserError, match="group-0 and group-1 were probed on other test records"):
        comparison.compare([first, second._replace(predictions=other)])
    apart = second.predictions | {"record_id": np.char.add(second.predictions["record_id"], "b")}
    with pytest.raises(UserError, match="were probed on other test records"):
        comparison.compare([first, second._replace(predictions=apart)])


def shorter(run, kept):
    """The run as if it had been tested on some of its records, in another order, at another window."""
    rows = np.flatnonzero(kept)[::-1]
    tested = {name: values[rows] for name, values in run.predictions.items() if len(values) == len(kept)}
    tested["probabilities_random_init_seeds"] = run.predictions["probabilities_random_init_seeds"][:, rows]
    config = run.results["pretraining_config"] | {"data": {"window_s": 10.0}}
    return run._replace(
        group="long",
        name=f"long-{run.seed}",
        predictions=run.predictions | tested,
        results=run.results | {"pretraining_config": config},
    )


def test_runs_of_other_windows_are_compared_on_common_records():
    """Whatever a run says of records that others cannot be tested on must not count."""
    runs = planted("short", [1.0, 2.0])
    runs = [
        run._replace(
            results=run.results
            | {"pretraining_config": run.results["pretraining_config"] | {"data": {"window_s": 2.5}}}
        )
        for run in runs
    ]
    kept = np.arange(N_PATIENTS * PER_PATIENT) >= 10 * PER_PATIENT
    both = [*runs, *(shorter(run, kept) for run in runs)]
    found = comparison.compare(both)
    assert (found["n_records"], found["n_records_of_any"], found["n_patients"]) == (60, 80, 30)
    assert [entry["groups"] for entry in found["baselines"]] == [["short", "long"]] * 2  # one encoder
    short, long = found["groups"]
    same = ("macro_auroc", "ci_low", "ci_high", "each_seed", "difference_to_random_init")
    assert {name: short[name] for name in same} == {name: long[name] for name in same}
    spoilt = [
        run._replace(
            predictions=run.predictions
            | {"probabilities": np.where(kept[:, None], run.predictions["probabilities"], 99.0)}
        )
        for run in runs
    ]
    assert comparison.compare([*spoilt, *both[2:]])["groups"] == found["groups"]
    assert [group["settings"] for group in found["groups"]] == [
        {"data.window_s": 2.5},
        {"data.window_s": 10.0},
    ]
    results = {"sweep": "s", "note": "", "missing": [], "lacking": {}, **found}
    markdown = comparison_tables.to_markdown(results)
    assert re.search(r"\| group +\| window_s \| seeds \|", markdown)
    assert "tested on up to 80 records" in markdown


def test_many_differing_settings_stand_below_the_table():
    runs = planted("group", [1.0]) + [
        run._replace(
            group="other",
            name="other-0",
            results=run.results
            | {"pretraining_config": {"seed": 0, "model": {"width": 2}, **dict.fromkeys("abcd", 1)}},
        )
        for run in planted("group", [1.0])
    ]
    first = runs[0].results["pretraining_config"]
    runs[0] = runs[0]._replace(
        results=runs[0].results | {"pretraining_config": first | dict.fromkeys("abcd", 0)}
    )
    results = {"sweep": "s", "note": "", "missing": [], "lacking": {}, **comparison.compare(runs)}
    assert "Groups differ in model.width, a, b, c, d; results_table.csv has" in comparison_tables.to_markdown(
        results
    )
    assert re.search(r"\| group +\| seeds \|", comparison_tables.to_markdown(results))


def regrouped(runs, group, *, settings=None, first_seed=0):
    """The runs as another group's, with other settings and seeds."""
    settings = {"model": {"width": 1}} if settings is None else settings
    return [
        run._replace(
            group=group,
            name=f"{group}-{run.seed + first_seed}",
            results=run.results | {"pretraining_config": {"seed": run.seed + first_seed, **settings}},
        )
        for run in runs
    ]


def test_difference_to_the_first_group_is_paired():
    """A group against itself differs by nothing; of single seeds it is the paired bootstrap of two models."""
    first = planted("first", [0.5, 1.0, 4.0])
    same = comparison.compare([*first, *regrouped(first, "same")])["groups"]
    assert same[0]["difference_to_first"] is None
    assert same[1]["difference_to_first"] == {"macro_auroc": 0.0, "ci_low": 0.0, "ci_high": 0.0}

    one, other = planted("one", [2.0]), regrouped(planted("other", [1.0]), "other")
    found = comparison.compare([*one, *other])["groups"][1]["difference_to_first"]
    codes, _ = bootstrap.units(one[0].predictions["patient_id"].tolist(), N_PATIENTS * PER_PATIENT)
    counts = bootstrap.draw(codes, 400, seed=0)
    targets = one[0].predictions["targets"]
    models = [
        bootstrap.bootstrap_auroc(targets, runs[0].predictions["probabilities"], counts)
        for runs in (other, one)
    ]
    expected = bootstrap.macro_difference(*models)
    assert tuple(found.values()) == pytest.approx(tuple(expected)[:3])
    assert found["ci_low"] > 0


def test_difference_of_groups_with_other_seeds_carries_the_seeds_of_both():
    """Seed by seed a constant distance is known exactly; of other seeds the spread of both groups counts."""
    first = planted("first", [0.5, 1.0, 2.0])
    better = [
        run._replace(
            predictions=run.predictions | {"probabilities": run.predictions["probabilities"] + other}
        )
        for run, other in zip(first, [run.predictions["targets"] for run in first], strict=True)
    ]
    paired, unpaired = (
        comparison.compare([*first, *regrouped(better, "better", first_seed=seed)])["groups"][1][
            "difference_to_first"
        ]
        for seed in (0, 7)
    )
    assert paired["macro_auroc"] == pytest.approx(unpaired["macro_auroc"])
    assert width(unpaired) > width(paired)
    points = [
        [metrics.macro_auroc(run.predictions["targets"], run.predictions["probabilities"]) for run in runs]
        for runs in (first, better)
    ]
    # Student's t of each group alone, at 2 degrees of freedom; together wider than the wider one.
    alone = max(4.303 * np.std(values, ddof=1) / 3**0.5 for values in points)
    assert width(unpaired) / 2 > alone


def test_table_has_settings_difference_and_parameters():
    """What a run began with is told by its group, not by paths that differ from seed to seed."""
    first = regrouped(planted("a", [1.0]), "a", settings={"model": {}, "init": {"checkpoint": ""}})
    begun = regrouped(planted("b", [1.0]), "b", settings={"model": {}, "init": {"checkpoint": "out/a-0/run"}})
    begun = [run._replace(init="a") for run in begun]
    results = {"sweep": "s", "note": "", "missing": [], "lacking": {"b-0": ["x", "y"]}}
    results |= comparison.compare([*first, *begun])
    header, _, row_a, row_b, *_ = comparison_tables.group_table(results)
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in (header, row_a, row_b)]
    assert cells[0][:5] == ["group", "init", "seeds", "macro AUROC", "minus a"]
    assert cells[1][1] == cells[1][4] == ""
    assert (cells[2][1], cells[2][4]) == ("a", "+0.000 (+0.000 to +0.000)")
    assert cells[1][cells[0].index("parameters")] == "1 000"
    assert "other probes still to be made: b-0 (x, y)." in comparison_tables.to_markdown(results)
    text = comparison_tables.to_csv(results).splitlines()
    column = text[0].split(",").index("difference_to_first")
    assert [line.split(",")[column] for line in text if line.startswith("group,")] == ["", "0.0"]
