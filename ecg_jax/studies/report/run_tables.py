"""Tables of the runs of a study: what was run, what it cost, what it was made with, and how configs differ."""

import json
from collections.abc import Sequence
from typing import Any

from ecg_jax.data.store import SYNTHETIC
from ecg_jax.run_setup import flatten
from ecg_jax.studies.report.cells import DASH, Cell, Table, number, texts
from ecg_jax.studies.report.design import anchors, in_order, made_up, run_folder, shown_path
from ecg_jax.studies.report.study import Study
from ecg_jax.studies.study_runs import StudyRun

# Of a config these are columns of the table of runs, or of the stores.
_SHOWN_ELSEWHERE = ("seed", "store", "store_fingerprint", "selection_fingerprint", "targets_fingerprint")
_DIGITS = 12  # of a fingerprint or revision


def _known(value: Any, write=str) -> str:
    return DASH if value is None else write(value)


def _short(fingerprint: str | None) -> str:
    return _known(fingerprint, lambda text: text[:_DIGITS])


def scaled(value: float | None) -> str:
    """ "1.23e15" as people write it: 1.23 P."""
    if value is None:
        return DASH
    value = float(f"{value:.3g}")  # 999.6 G are 1 T
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g}"


def runs_table(study: Study) -> Table:
    """Every run, finished or not, with its folder."""
    ids = anchors(study)
    body = []
    for run in study.runs:
        state = study.states[run.name].state
        cells = [
            Cell(run_folder(run, study.folders), anchor=ids[run.name]),
            Cell(state, mark="good" if state == "finished" else "bad"),
            run.objective or DASH, run.backbone or DASH, run.rung or DASH, run.group,
            _short(run.fingerprints["store"]), _short(run.fingerprints["selection"]),
            _revision(run), _device(run),
            f"{_known(run.recordings)} {made_up(run)}".strip(), _known(run.seed),
            f"{_known(run.step)} of {_known(run.steps)}" if run.step != run.steps else _known(run.step),
            _known(run.windows), _known(run.parameters), scaled(run.train_flops),
            number(run.seconds, 0), number(run.device_hours, 3),
            _known(run.val_loss, lambda x: f"{x:.4g}"), _known(run.best_val_loss, lambda x: f"{x:.4g}"),
            len(run.warnings),
        ]  # fmt: skip
        body.append(texts(cells))
    return Table(
        "runs",
        "Every run with its folder. Folders are written from the one given to the report on, stores and selections of "
        "recordings by the first digits of their fingerprints; training FLOPs by formula (forward and backward of the "
        "windows trained on); seconds and device-hours of pretraining alone; losses in validation, comparable within "
        "an objective on the same held-out recordings only; warnings of a collapse.",
        [
            "folder", "state", "objective", "backbone", "rung", "group", "store", "selection", "git revision",
            "devices", "training recordings", "seed", "step", "windows", "parameters", "training FLOPs", "seconds",
            "device-hours", "last validation loss", "lowest", "warnings",
        ],
        body,
        10,
    )  # fmt: skip


def _revision(run: StudyRun) -> str:
    return _short(run.revision) + (" with changes" if run.dirty else "")


def _device(run: StudyRun) -> str:
    return DASH if run.devices is None else f"{run.devices} x {run.device_kind}"


def unfinished_table(study: Study) -> Table | None:
    """Runs that are not finished, with the reason; None where all are."""
    ids = anchors(study)
    rows = []
    for run in study.runs:
        state = study.states[run.name]
        if state.state != "finished":
            folder = Cell(run_folder(run, study.folders), link=ids[run.name])
            probes = ", ".join(dict.fromkeys(probe.name for probe in run.probes)) or DASH
            rows.append(texts((folder, Cell(state.state, mark="bad"), state.error or DASH, probes)))
    if not rows:
        return None
    return Table(
        "unfinished",
        "Runs that are not finished. Probes of theirs that are finished stand in the tables below; their losses are in "
        "the curves.",
        ["folder", "state", "error", "finished probes"],
        rows,
        4,
    )


def _sum(values: Sequence[float | None]) -> tuple[float | None, int]:
    known = [value for value in values if value is not None]
    return (sum(known) if known else None), len(known)


def cost_table(study: Study) -> Table:
    """Cost by objective and backbone, and in all."""
    runs = study.runs
    keys = list(dict.fromkeys((run.objective or DASH, run.backbone or DASH) for run in runs))

    def row(name: str, backbone: str, own: Sequence[StudyRun]) -> list[Cell]:
        flops, n_flops = _sum([run.train_flops for run in own])
        seconds, _ = _sum([run.seconds for run in own])
        hours, n_hours = _sum([run.device_hours for run in own])
        probing, n_probing = _sum([study.states[run.name].probe_seconds for run in own])
        finished = sum(run in study.finished for run in own)

        def of(n: int) -> str:
            return "" if n == len(own) else f"({n} of {len(own)} runs)"

        return texts(
            (
                name, backbone, len(own), finished, _sum([run.windows for run in own])[0] or DASH,
                Cell(scaled(flops), of(n_flops)), number(None if seconds is None else seconds / 3600, 3),
                Cell(number(hours, 3), of(n_hours)),
                Cell(number(None if probing is None else probing / 3600, 3), of(n_probing)),
                sum(run.unmeasured for run in own),
            )
        )  # fmt: skip

    body = [
        row(*key, [run for run in runs if (run.objective or DASH, run.backbone or DASH) == key])
        for key in keys
    ]
    body.append(row("all", DASH, runs))
    return Table(
        "cost",
        "What the study cost. FLOPs by formula, of pretraining, without validation; hours are those of the clock, "
        "device-hours those times the devices; probing is timed by sweeps only and holds its baselines. Attempts that "
        "were killed have no measured time and are in no sum.",
        [
            "objective", "backbone", "runs", "finished", "windows", "training FLOPs", "hours of pretraining",
            "device-hours", "hours of probing", "unmeasured attempts",
        ],
        body,
        2,
        sections=[len(body) - 1],
    )  # fmt: skip


def stores_table(study: Study) -> Table:
    """Stores that runs were pretrained on and probes trained and tested on."""
    used: dict[tuple[str, str, str], dict[str, dict[str, None]]] = {}

    def note(path: str, corpus: str, fingerprint: str, what: str, by: str) -> None:
        key = shown_path(path, study.folders), corpus, fingerprint[:_DIGITS]
        used.setdefault(key, {}).setdefault(what, {})[by] = None

    corpora = {}
    for member in study.members:
        results = member.result.results
        for name, what in (("store", "probed"), ("test_store", "tested")):
            if (store := results[name]) is not None:
                corpora[store["fingerprint"]] = store["corpus"]
                note(store["path"], store["corpus"], store["fingerprint"], what, member.result.task)
    for run in study.runs:
        fingerprint = run.fingerprints["store"]
        if fingerprint is None or not run.config:
            continue
        corpus = corpora[fingerprint] if fingerprint in corpora else made_up(run) or DASH
        paths = ", ".join(shown_path(path, study.folders) for path in run.config["store"].split(","))
        note(paths, corpus, fingerprint, "pretrained", run.name)
    rows = [
        texts(
            (
                path, Cell(f"{corpus} (no ECGs)", mark="warn") if SYNTHETIC in corpus else corpus, fingerprint,
                f"{len(by['pretrained'])} runs" if "pretrained" in by else DASH,
                ", ".join(by["probed"]) if "probed" in by else DASH,
                ", ".join(by["tested"]) if "tested" in by else DASH,
            )
        )
        for (path, corpus, fingerprint), by in used.items()
    ]  # fmt: skip
    rows = rows or [texts((DASH,) * 6)]
    head = ["store", "corpus", "fingerprint", "pretrained on by", "probed for", "tested for only"]
    return Table(
        "stores",
        "Stores of recordings, with the first digits of their fingerprints; several joined by commas have one "
        "fingerprint together. A dash as corpus: no probe says it.",
        head,
        rows,
        6,
    )


def made_with_table(study: Study) -> Table:
    """Versions, revision and devices; runs that share them share a line."""
    alike: dict[tuple[str, ...], list[StudyRun]] = {}
    for run in study.runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items()) or DASH
        alike.setdefault((versions, _revision(run), _device(run)), []).append(run)
    ids = anchors(study)
    rows = []
    for key, own in alike.items():
        first = Cell(run_folder(own[0], study.folders), link=ids[own[0].name])
        rows.append(texts((first, *key, len(own))))
    return Table(
        "made_with",
        "What runs were made with: versions, the revision of the code's checkout at the last start (a dash: none "
        "known, as of an installed package), devices.",
        ["first run", "versions", "git revision", "devices", "runs"],
        rows,
        4,
    )


def config_tables(study: Study) -> list[tuple[str, list[Table]]]:
    """(heading, tables) of configs: what all runs share, then for each objective what its runs share and differ in."""
    flat = {run.name: _flat(run.config) for run in study.runs if run.config}
    if not flat:
        return []
    shared = _shared(list(flat.values()))
    parts = [("Shared by all runs", [_fields("config_shared", "Fields that all runs share.", shared)])]
    runs = [run for run in study.runs if run.name in flat]
    for objective in in_order(runs, "objective"):
        own = [run for run in runs if run.objective == objective]
        alike = _shared([flat[run.name] for run in own])
        tables = []
        if rest := {name: value for name, value in alike.items() if name not in shared}:
            caption = f"Fields that the runs of {objective} share, and not all others."
            tables.append(_fields(f"config_{objective}", caption, rest))
        names = dict.fromkeys(name for run in own for name in flat[run.name] if name not in alike)
        if names:
            tables.append(_differing(objective, list(names), own, flat, study))
        if tables:
            parts.append((f"{objective}: {len(own)} runs", tables))
    return parts


def _flat(config: dict[str, Any]) -> dict[str, str]:
    # Stores' paths and fingerprints are in tables of their own.
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in flatten(config).items()
        if name not in _SHOWN_ELSEWHERE
    }


def _shared(configs: Sequence[dict[str, str]]) -> dict[str, str]:
    return {
        name: value
        for name, value in configs[0].items()
        if all(name in config and config[name] == value for config in configs)
    }


def _fields(name: str, caption: str, fields: dict[str, str]) -> Table:
    rows = [texts((field, value or '""')) for field, value in fields.items()] or [texts((DASH, DASH))]
    return Table(name, caption, ["field", "value"], rows, 2)


def _differing(
    objective: str, names: list[str], runs: Sequence[StudyRun], flat: dict[str, dict[str, str]], study: Study
) -> Table:
    ids = anchors(study)
    rows = []
    for run in runs:
        config = flat[run.name]
        cells = [config[name] or '""' if name in config else DASH for name in names]
        rows.append(texts((Cell(run_folder(run, study.folders), link=ids[run.name]), *cells)))
    return Table(
        f"config_{objective}_differing",
        f"Fields in which the runs of {objective} differ; a dash: the config has no such field.",
        ["folder", *names],
        rows,
        1 + len(names),
    )


def sweep_table(lines: Sequence[Sequence[str]], name: str, folder: str) -> Table:
    """results.csv as the sweep wrote it."""
    head, *rows = lines
    caption = (
        f"results.csv of {folder} as the sweep wrote it, numbers rounded. Its parameters are those of the encoder "
        "alone, without what an objective adds."
    )
    return figure_rows(name, caption, head, rows)


def figure_rows(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The data of a figure folder's table, numbers with no more digits than can be read."""
    kept = [k for k, column in enumerate(columns) if any(len(row) > k and row[k] for row in rows) or column]

    def write(cell: str) -> str:
        try:
            value = float(cell)
        except ValueError:
            return cell or DASH
        if cell.lstrip("-").isdigit():
            return cell.replace("-", "\N{MINUS SIGN}")
        return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")

    numeric = [all(_is_number(row[k]) for row in rows if row[k]) for k in kept]
    first = next((i for i, yes in enumerate(numeric) if yes), len(kept))
    body = [[Cell(write(row[k])) for k in kept] for row in rows]
    return Table(name, title, [columns[k] for k in kept], body, max(1, first))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
