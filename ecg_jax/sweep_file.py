"""Sweep files: which runs a sweep has, and what it refuses before anything runs."""

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from ecg_jax.config_checks import check_config
from ecg_jax.config_flags import load_config, override, run_file
from ecg_jax.data.targets import MAX_CODES
from ecg_jax.errors import UserError
from ecg_jax.probe import check_config as check_probe_config
from ecg_jax.token_features import SPECTRUM

STORE = "store"  # folder of a sweep's own store

_FIELDS = ("name", "group", "config", "overrides", "probe", "targets")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,99}")


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        group: runs of a group differ in nothing but the seed.
        declared: what the sweep file says, for people.
        config, probe_config: loaded and overridden; the probe has the seed of the run, so that the randomly
            initialised encoders that runs are compared with differ from seed to seed too.
        targets: None, or how `ecg_jax.cluster` makes the offline targets, {"features", "codes"}.
    """

    name: str
    group: str
    declared: str
    config: ConfigDict
    probe_config: ConfigDict
    targets: dict[str, Any] | None


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file: its path as given, its runs, and what it says about its results ("" for nothing)."""

    path: str
    runs: tuple[Run, ...]
    note: str


def load_sweep(path: str) -> Sweep:
    """Reads a sweep file and checks every run of it.

    The file is looked for as given and, when the path starts with `configs/`, among those that ship with the package.
    It defines `def sweep()`, which yields a dict with the keys name, group, config (FILE[:ARGS]), overrides
    (field -> value), probe (FILE[:ARGS]) and targets for each run; and, if it likes, a string NOTE for the foot
    of the table, in which {recordings} stands for their number.

    Raises:
        UserError: names the run and what is wrong with it.
    """
    entries, note = _read(path)
    runs = []
    for number, entry in enumerate(entries, start=1):
        _check_entry(path, number, entry)
        where = f"{path}: run {entry['name']!r}"
        if any(run.name == entry["name"] for run in runs):
            raise UserError(f"{where} is there twice; give every run a name of its own")
        try:
            runs.append(_load_run(entry))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if not runs:
        raise UserError(f"{path}: sweep() yields no run")
    _check_together(path, runs)
    return Sweep(path, tuple(runs), note)


def _read(path: str) -> tuple[list, str]:
    """What sweep() yields, and NOTE."""

    def use(module):
        if not hasattr(module, "sweep"):
            raise UserError(f"sweep: {path} defines no sweep()")
        note = module.NOTE if hasattr(module, "NOTE") else ""
        made = module.sweep()
        if not isinstance(made, Iterator | list | tuple) or not isinstance(note, str):
            raise UserError(
                f"sweep: {path}: sweep() must yield dicts, one for each run, and NOTE be a string"
            )
        return list(made), note

    return run_file("sweep", path, use)


def _check_entry(path: str, number: int, entry: Any) -> None:
    """Refuses an entry whose keys or types are not those of a run."""
    if not isinstance(entry, dict):
        raise UserError(f"{path}: sweep() must yield dicts; entry {number} is a {type(entry).__name__}")
    missing = [field for field in _FIELDS if field not in entry]
    unknown = [str(field) for field in entry if field not in _FIELDS]
    if missing or unknown:
        problems = [f"lacks {', '.join(missing)}"] * bool(missing)
        problems += [f"has the unknown {', '.join(unknown)}"] * bool(unknown)
        raise UserError(f"{path}: entry {number} {' and '.join(problems)}; keys: {', '.join(_FIELDS)}")
    for field in ("name", "group", "config", "probe"):
        if not isinstance(entry[field], str):
            raise UserError(f"{path}: entry {number}: {field}={entry[field]!r} must be a string")
    name = entry["name"]
    if not _NAME.fullmatch(name) or name == STORE or name.startswith(("results.", "sweep.")):
        raise UserError(
            f"{path}: entry {number}: name={name!r} cannot name a folder of the sweep; use letters, digits and "
            f"._=+- (and neither {STORE!r} nor a beginning of 'results.' or 'sweep.')"
        )
    if not _NAME.fullmatch(entry["group"]):
        raise UserError(f"{path}: run {name!r}: group={entry['group']!r} must be letters, digits and ._=+-")
    if not isinstance(entry["overrides"], dict):
        raise UserError(f"{path}: run {name!r}: overrides={entry['overrides']!r} must be a dict")
    targets = entry["targets"]
    if targets is not None and (not isinstance(targets, dict) or set(targets) != {"features", "codes"}):
        raise UserError(
            f"{path}: run {name!r}: targets={targets!r} must be None or a dict with features and codes"
        )
    if targets is not None and (
        targets["features"] != SPECTRUM
        or type(targets["codes"]) is not int
        or not 2 <= targets["codes"] <= MAX_CODES
    ):
        raise UserError(
            f"{path}: run {name!r}: targets={targets!r} must have features={SPECTRUM!r} and 2 to {MAX_CODES} codes"
        )


def _load_run(entry: dict[str, Any]) -> Run:
    """The run of a checked entry.

    Raises:
        UserError: from the configs, the overrides or their checks.
    """
    config, probe_config = load_config(entry["config"]), load_config(entry["probe"])
    for field in ("objective", "model", "store", "seed"):
        if field not in config:
            raise UserError(
                f"config={entry['config']} is no config for `ecg-jax pretrain`: it has no {field}"
            )
    for field in ("task", "linear", "bootstrap", "seed"):
        if field not in probe_config:
            raise UserError(f"probe={entry['probe']} is no config for `ecg-jax probe`: it has no {field}")
    if probe_config.mode not in ("linear", "frozen"):
        raise UserError(
            f"probe={entry['probe']} has mode={probe_config.mode}; a sweep compares with random encoders under "
            "the same probe, so it takes mode=linear or mode=frozen"
        )
    for field, value in entry["overrides"].items():
        override(config, str(field), str(value))
    if config.store is not None:
        raise UserError("the store belongs to the whole sweep; give it as --store and not as an override")
    targets = entry["targets"]
    if targets is not None:
        if config.objective.name != "hubert":
            raise UserError(
                f"only the objective hubert reads targets, and this run's is {config.objective.name}"
            )
        if config.objective.codes != targets["codes"]:
            raise UserError(
                f"targets have {targets['codes']} codes and objective.codes is {config.objective.codes}; "
                "they must be equal"
            )
        config.data.targets = targets_name(targets)
    check_config(config)
    probe_config.seed = config.seed
    check_probe_config(probe_config)
    return Run(
        name=entry["name"],
        group=entry["group"],
        declared=" ".join(
            [entry["config"], *(f"{key}={value}" for key, value in entry["overrides"].items())]
        ),
        config=config,
        probe_config=probe_config,
        targets=targets,
    )


def targets_name(targets: dict[str, Any]) -> str:
    return f"{targets['features']}{targets['codes']}"


def _check_together(path: str, runs: list[Run]) -> None:
    """Refuses runs that one table cannot hold: groups that differ in more than seeds, or several probes."""
    first_of: dict[str, Run] = {}
    for run in runs:
        first = first_of.setdefault(run.group, run)
        differ = differences(plain(first.config), plain(run.config))
        if run is not first and "seed" not in differ:
            raise UserError(
                f"{path}: the runs {first.name!r} and {run.name!r} of group {run.group!r} have the same seed; "
                "override seed"
            )
        if differ - {"seed"}:
            raise UserError(
                f"{path}: the runs {first.name!r} and {run.name!r} of group {run.group!r} differ in "
                f"{', '.join(sorted(differ - {'seed'}))}; runs of a group differ in nothing but the seed"
            )
        if differences(plain(runs[0].probe_config), plain(run.probe_config)) - {"seed"}:
            raise UserError(
                f"{path}: the runs {runs[0].name!r} and {run.name!r} have different probes, so that they cannot stand "
                "in one table; make a sweep of each"
            )


def plain(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config as JSON gives them back."""
    return json.loads(json.dumps(config.to_dict()))


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of the fields in which two nested dicts differ."""
    differ = set()
    for name in one.keys() | other.keys():
        pair = one.get(name), other.get(name)
        if all(isinstance(value, dict) for value in pair):
            differ |= differences(*pair, f"{prefix}{name}.")
        elif pair[0] != pair[1]:
            differ.add(prefix + name)
    return differ


def select(sweep: Sweep, only: str | None) -> list[Run]:
    """The runs that --only names, by their own names or those of their groups; all of them for None.

    Raises:
        UserError: there is no run and no group of a name.
    """
    if only is None:
        return list(sweep.runs)
    wanted = [name for name in only.split(",") if name]
    if not wanted:
        raise UserError(
            "--only names no run; give names of runs or groups, separated by commas, or leave it out"
        )
    known = {name for run in sweep.runs for name in (run.name, run.group)}
    for name in wanted:
        if name not in known:
            match = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {match[0]!r}?" if match else "--list shows them"
            raise UserError(f"--only={name}: {sweep.path} has no run and no group of that name; {hint}")
    return [run for run in sweep.runs if run.name in wanted or run.group in wanted]
