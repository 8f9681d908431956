"""`sweep.json`: which sweep a folder belongs to."""

import json
from pathlib import Path
from typing import Any

from ecg_jax.config_flags import load_config, with_argument
from ecg_jax.errors import UserError
from ecg_jax.files import write_atomic
from ecg_jax.run_setup import CONFIGS, flatten
from ecg_jax.sweep_entry import SLURM, STORE
from ecg_jax.sweep_file import Sweep, plain
from ecg_jax.sweep_folder import FURTHER, read_shared
from ecg_jax.sweep_locks import LOCK, held_shortly

_DECLARATION = "sweep.json"


def declare(sweep: Sweep, output: Path) -> None:
    """Makes the folder this sweep's, or refuses it.

    A sweep may gain runs later; runs that are there already must not have changed.

    Raises:
        UserError: the folder holds something else; runs that differ, or are missing now, are named.
    """
    check_folder(sweep, output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into --output={output}: {error.strerror}") from error
    with held_shortly(output):
        check_folder(sweep, output)  # as it is now that nobody else writes it
        path = output / _DECLARATION
        runs = _declared(sweep)
        before = json.loads(read_shared(path))["runs"] if path.exists() else {}
        for name, run in runs.items():
            there = _all_probes(before[name]) if name in before else {}
            run["former_probes"] = {
                probe: declared
                for probe, declared in there.items()
                if probe not in run["probes"] and (output / name / FURTHER / probe).exists()
            }
        text = (json.dumps({"sweep": sweep.path, "runs": runs}, indent=1) + "\n").encode()
        if not path.exists() or path.read_bytes() != text:
            write_atomic(path, text)


def check_folder(sweep: Sweep, output: Path) -> None:
    """Refuses a folder that is not this sweep's, see `declare`; writes nothing."""
    path = output / _DECLARATION
    # Listed before it is looked for: whatever else a sweep writes comes after its declaration.
    try:
        entries = [entry.name for entry in output.iterdir()] if output.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read --output={output}: {error.strerror}") from error
    if not path.exists():
        if any(n not in (STORE, LOCK, SLURM) and not n.startswith(f".{_DECLARATION}.") for n in entries):
            raise UserError(f"{output} holds something else than a sweep; choose another --output")
        return
    runs = _declared(sweep)
    try:
        before = json.loads(read_shared(path))["runs"]
        gone = [name for name in before if name not in runs]
        changed = {
            run.name: _changes(before[run.name], runs[run.name]) for run in sweep.runs if run.name in before
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; choose another --output") from error
    if gone:
        raise UserError(
            f"{output} belongs to another sweep: it has the runs {', '.join(gone[:5])}, which {sweep.path} has "
            "not; choose another --output"
        )
    for name, differ in changed.items():
        if differ:
            probes = all(field.startswith("probes.") for field in differ)
            raise UserError(
                f"{output} belongs to another sweep: its run {name} differs in {', '.join(sorted(differ)[:5])}; "
                f"choose another --output, or give the {'probe' if probes else 'run'} another name"
            )


def _declared(sweep: Sweep) -> dict[str, Any]:
    return {
        run.name: {
            "group": run.group,
            "config": plain(run.config),
            "probe": run.probe_config and plain(run.probe_config),
            "targets": run.targets,
            "store": run.store,
            "probe_store": run.probe_store,
            "init": run.init and run.init.name,
            "probes": {
                further.name: {"config": plain(further.config), "store": further.store}
                for further in run.further
            },
        }
        for run in sweep.runs
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Dotted names of what has changed of a run since it was declared.

    Further probes may come and go, but what was made under a name is no other probe's; and a run declared before a
    field was there had its default.
    """
    before = {"probe_store": None, "init": None} | before | {"probes": _all_probes(before)}
    before.pop("former_probes", None)
    both = before["probes"].keys() & now["probes"].keys()
    there, here = (
        flatten(each | {"probes": {name: each["probes"][name] for name in both}}) for each in (before, now)
    )
    # Defaults of what is there on both sides: a probe that was added is no new field.
    shipped = {"config": _shipped_config(now["config"])}
    probes = {"probe": (before["probe"], now["probe"])}
    probes |= {f"probes.{name}.config": (before["probes"][name], now["probes"][name]) for name in both}
    shipped |= {prefix: "configs/probe.py" for prefix, pair in probes.items() if None not in pair}
    new = {name for name in here if name not in there}
    for prefix, spec in shipped.items() if new else ():
        defaults = flatten({prefix: plain(load_config(spec))})
        there |= {name: value for name, value in defaults.items() if name in new}
    names = there.keys() | here.keys()
    return {name for name in names if (name in there, there.get(name)) != (name in here, here.get(name))}


def _all_probes(declared: dict[str, Any]) -> dict[str, Any]:
    """The further probes of a declared run, with those that its file has left out since and whose folder is there."""
    return {**({"former_probes": {}} | declared)["former_probes"], **({"probes": {}} | declared)["probes"]}


def _shipped_config(config: dict[str, Any]) -> str:
    """FILE[:ARGS] of the shipped config of an objective and backbone."""
    return with_argument(CONFIGS[config["objective"]["name"]], backbone=config["model"]["backbone"])
