"""The folder of a sweep for the tests of `ecg-jax report`: configs are real, losses and scores are made up.

Scores follow objective, backbone and number of recordings, so that tables have an order that a test can know.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecg_jax.config_flags import load_config
from ecg_jax.data.selection import SELECTION_NAME, Rule, Selection, Source, write_selection
from ecg_jax.evaluation.drawing import new_figure
from ecg_jax.studies.figure_folder import Figure, write_figures
from report_fixtures import write_result

OBJECTIVES = ("cpc", "jepa", "data2vec", "dinosr", "hubert")
BACKBONES = ("s4", "transformer", "net1d")
#: Rung -> recordings trained on; the larger ones are synthetic.
RUNGS = {"250": 250, "1000": 1000, "4000": 4000}
STEPS, BATCH = 40, 8
ENDED = "2026-03-01T13:00:00+00:00"


def quality_of(objective: str, backbone: str, recordings: int, seed: int = 0) -> float:
    """How much of the truth the features of a run know."""
    rank = OBJECTIVES.index(objective) + 0.4 * BACKBONES.index(backbone)
    return 1.6 - 0.15 * rank + 0.1 * float(np.log10(recordings)) + 0.02 * seed


def write_run(
    sweep: Path,
    name: str,
    *,
    objective: str = "cpc",
    backbone: str = "s4",
    recordings: int = 250,
    seed: int = 0,
    group: str | None = None,
    state: str = "finished",
    steps: int = STEPS,
    probes: dict[str, dict] | None = None,
    synthetic: bool = False,
    revision: str | None = "a" * 40,
) -> dict:
    """A run of a sweep with its probes.

    Args:
        sweep: the folder; `write_sweep_json` makes it one.
        name, objective, backbone, recordings, seed, group: of the run.
        state: "finished", "failed" half-way, or "not begun".
        steps: logged, of `STEPS`.
        probes: folder in the run -> keyword arguments of `write_result`; those in probes/ as a sweep's further ones,
            9 s each, beside 18 s of "probe".
        synthetic: whether its recordings are.
        revision: of the code; None where it was not known.

    Returns:
        Its entry of sweep.json.
    """
    config = json.loads(json.dumps(load_config(f"configs/{objective}.py:backbone={backbone}").to_dict()))
    config |= {"seed": seed, "steps": STEPS, "batch_size": BATCH, "store": str(sweep / "store")}
    config["data"] |= {"max_records": recordings}
    entry = {
        "group": group or name, "config": config, "probe": None, "targets": None, "store": None,
        "probe_store": None, "init": None, "probes": {}, "former_probes": {},
    }  # fmt: skip
    if state == "not begun":
        return entry
    folder = sweep / name
    run = folder / "run"
    run.mkdir(parents=True)
    done = steps if state == "finished" else steps // 2
    source = Source("synthetic" if synthetic else "ptbxl", "5" * 64, recordings + 50)
    rule = Rule("nested", "", recordings, 1, 600, True)
    rows = np.arange(recordings + 50)
    selection = Selection(rows[:recordings], rows[recordings:], 0, 0, 0, recordings, (source,), rule)
    stored = config | {"store_fingerprint": "5" * 64, "selection_fingerprint": selection.fingerprint}
    (run / "config.json").write_text(json.dumps(stored))
    (run / "preprocessing.json").write_text("{}")
    write_selection(run / SELECTION_NAME, selection)
    with open(run / "log.jsonl", "w") as log:
        for step in range(4, done + 1, 4):
            loss = (OBJECTIVES.index(objective) + 1) * (1 + 5 * step**-0.5) * recordings**-0.05
            line = {"step": step, "loss": loss, "windows_per_s": 100.0}
            log.write(json.dumps(line | ({"val_loss": 1.05 * loss} if step % 8 == 0 else {})) + "\n")
    versions = {"ecg-jax": "0.1", "jax": "0.10.0", "numpy": "2.1", "python": "3.12.1"}
    start = {
        "step": 0, "versions": versions, "date": "2026-03-01T12:00:00+00:00",
        "git": revision and {"revision": revision, "dirty": False}, "devices": 2, "device_kind": "cpu",
        "processes": 1, "parameters": 12345, "seconds": 36.0,
    }  # fmt: skip
    (run / "made_with.json").write_text(json.dumps({"starts": [start]}))
    status = {
        "state": state, "error": "" if state == "finished" else "the disk was full", "attempts": 1, "host": "h",
        "process": 1, "began": "2026-03-01T12:00:00+00:00", "ended": ENDED, "parameters": 12345,
        "recordings": recordings + 50, "device": "2 x cpu", "versions": versions,
    }  # fmt: skip
    (folder / "status.json").write_text(json.dumps(status))
    times, made = [{"pretrain": 36.0}], {}
    for place, arguments in ({"probe": {}} if probes is None else probes).items():
        changes = {
            "checkpoint": {"run": str(run), "step": done}, "pretraining_config": stored, "seed": seed
        } | arguments.get("changes", {})  # fmt: skip
        write_result(
            folder / place,
            **{
                "model": f"{name} {place}",
                "encoder": f"{backbone} {seed}",
                "quality": quality_of(objective, backbone, recordings, seed),
            }
            | arguments
            | {"changes": changes},
        )
        declared = json.loads(json.dumps(load_config("configs/probe.py").to_dict()))
        if place == "probe":
            entry["probe"] = declared
            times.append({"probe": 18.0})
        elif place.startswith("probes/"):  # NAME, or of several tasks NAME/TASK
            further, _, task = place.removeprefix("probes/").partition("/")
            entry["probes"][further] = {"config": declared, "store": None}
            made.setdefault(further, []).append(task or ".")
            times.append({f"probes/{further}": 9.0})
    for further, tasks in made.items():
        (folder / "probes" / further / "finished.json").write_text(json.dumps({"stores": {"store": tasks}}))
    (folder / "times.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in times))
    return entry


def write_sweep_json(sweep: Path, entries: dict[str, dict], note: str = "A note.") -> Path:
    """Makes a folder of runs a sweep's."""
    (sweep / "sweep.json").write_text(json.dumps({"sweep": "configs/sweeps/mine.py", "runs": entries}))
    (sweep / "results.json").write_text(json.dumps({"note": note}))
    (sweep / "results.csv").write_text("group,macro_auroc\ncpc,0.75\n")
    return sweep


def write_figure_folder(
    folder: Path,
    kind: str = "scaling",
    date: str = "2026-03-02T00:00:00+00:00",
    runs: Sequence[str] = ("a/run",),
) -> Path:
    """What a command of a study leaves: a figure and a table."""
    picture = new_figure(5, 3)
    axes = picture.subplots()
    axes.plot([250, 1000, 4000], [0.4, 0.35, 0.3], "o-")
    axes.set(xlabel="recordings", ylabel="1 - macro AUROC", xscale="log")
    shows = ("What the curve shows.", "What it does not show.")
    rows = [("cpc", 250, 0.4), ("cpc", 1000, 0.35), ("cpc", 4000, None)]
    figures = [
        Figure("curve", "Error over recordings", *shows, ("objective", "n", "error"), rows, picture),
        Figure("fits", "Fitted laws", *shows, ("objective", "b", "b_low"), [("cpc", 0.1894321, -0.5)]),
    ]
    about = {"command": ["ecg-jax", kind], "versions": {"jax": "0.10.0"}, "date": date, "runs": list(runs)}
    write_figures(folder, kind, figures, about | {"device": None})
    return folder
