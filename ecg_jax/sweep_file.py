"""Sweep files: which runs a sweep has, and what it refuses before anything runs."""

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from ecg_jax.config_checks import check_config
from ecg_jax.config_flags import load_config, override, parse_arg, run_file
from ecg_jax.data.targets import MAX_CODES
from ecg_jax.errors import UserError, closest
from ecg_jax.evaluation.tasks import ALL
from ecg_jax.probe import check_config as check_probe_config
from ecg_jax.token_features import SPECTRUM

STORE = "store"  # folder of a sweep's own store
SLURM = "slurm"  # folder of what SLURM jobs print
#: As the `store` of a run: the one given on the command line, without which the sweep does not run.
GIVEN = "--store"

_REQUIRED = ("config", "overrides", "probe")
_OPTIONAL = ("name", "group", "targets", "store")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,99}")
_LONGEST_NAME = 80  # characters of a derived name
_SEEDS = 2**31  # below which one seed is as good as another
_OWN_FILES = ("results.", "results_table.", "sweep.", "collect.")


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        group: runs of a group differ in nothing but the seed.
        declared: what the sweep file says, for people.
        config, probe_config: loaded and overridden; the probe has the seed of the run, so that the randomly
            initialised encoders that runs are compared with differ from seed to seed too. probe_config is None when
            the sweep only pretrains.
        targets: None, or how `ecg_jax.cluster` makes the offline targets, {"features", "codes"}.
        store: that it is pretrained on, one folder or several separated by commas; `GIVEN` for the one of the command
            line; None for that one or, when none is given there, the sample that ships with the package.
    """

    name: str
    group: str
    declared: str
    config: ConfigDict
    probe_config: ConfigDict | None
    targets: dict[str, Any] | None
    store: str | None


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file: FILE[:ARGS] as given, its runs, and what it says about its results ("" for nothing)."""

    path: str
    runs: tuple[Run, ...]
    note: str

    @property
    def probes(self) -> bool:
        """Whether its runs are probed; all of them are or none is."""
        return self.runs[0].probe_config is not None


def load_sweep(path: str) -> Sweep:
    """Reads a sweep file and checks every run of it.

    The file is looked for as given and, when the path starts with `configs/`, among those that ship with the package.
    It defines `def sweep()`, or `def sweep(arg="")` if it takes arguments (see `parse_sweep_arg`), which yields a dict
    for each run. Its keys are config (FILE[:ARGS]), overrides (field -> value) and probe (FILE[:ARGS], or None in a
    sweep that only pretrains); and, if need be, name and group (else made of config and overrides, see `derived_name`),
    targets (else none) and store (see `Run`). The file may have a string NOTE for the foot of the table, in which
    {recordings} stands for their number.

    Raises:
        UserError: names the run and what is wrong with it.
    """
    entries, note = _read(path)
    runs, checked = [], set()
    for number, entry in enumerate(entries, start=1):
        entry = _check_entry(path, number, entry)
        where = f"{path}: run {entry['name']!r}"
        if any(run.name == entry["name"] for run in runs):
            raise UserError(f"{where} is there twice; give every run a name of its own")
        try:
            runs.append(_load_run(entry, checked))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if not runs:
        raise UserError(f"{path}: sweep() yields no run")
    _check_together(path, runs)
    return Sweep(path, tuple(runs), note)


def parse_sweep_arg(arg: str, *flags: str, **choices: tuple[str, ...]) -> SimpleNamespace:
    """The argument of a sweep file, "flag,key=value", e.g. "quick,ladder=paper".

    Args:
        arg: what follows the colon of the file.
        flags: words that may be there.
        choices: key -> allowed values, the first of them the default.

    Returns:
        Whether each flag is there, and the value of each key.

    Raises:
        UserError: as in `config_flags.parse_arg`.
    """
    words = [word for word in arg.split(",") if word]
    rest = [word for word in words if word not in flags]
    for word in rest:
        if "=" not in word:
            known = (*flags, *(f"{key}={'|'.join(values)}" for key, values in choices.items()))
            raise UserError(f"sweep argument {word!r} is unknown{closest(word, known)}")
    try:
        values = vars(parse_arg(",".join(rest), **choices))
    except UserError as error:
        raise UserError(f"sweep {str(error).removeprefix('--config ')}") from error
    return SimpleNamespace(**{flag: flag in words for flag in flags}, **values)


def derived_name(config: str, overrides: dict[str, Any]) -> str:
    """The name of a run that was given none: its config and each override, "cpc-data=18k-learning_rate=0.001-seed=1".

    It depends on nothing but the run itself, so that it stays when the sweep gains runs. Of a field there is its last
    part, unless two overrides share that; a name that would be long ends in a digest of all of it instead.
    """
    file, _, arg = config.partition(":")
    last = [field.rpartition(".")[2] for field in overrides]
    fields = [field if last.count(short) > 1 else short for field, short in zip(overrides, last, strict=True)]
    parts = [Path(file).stem, *filter(None, arg.split(","))]
    parts += [f"{field}={value}" for field, value in zip(fields, overrides.values(), strict=True)]
    whole = re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(parts)).lstrip("._=+-")
    if len(whole) <= _LONGEST_NAME:
        return whole
    digest = hashlib.sha256(json.dumps([config, {k: str(v) for k, v in overrides.items()}]).encode())
    return f"{whole[: _LONGEST_NAME - 9]}-{digest.hexdigest()[:8]}"


def _read(path: str) -> tuple[list, str]:
    """What sweep() yields, and NOTE."""
    name, _, arg = path.partition(":")

    def use(module):
        if not hasattr(module, "sweep"):
            raise UserError(f"sweep: {name} defines no sweep()")
        note = module.NOTE if hasattr(module, "NOTE") else ""
        takes = bool(inspect.signature(module.sweep).parameters)
        if arg and not takes:
            raise UserError(f"sweep: {name} takes no arguments, and was given {arg!r}; leave them out")
        made = module.sweep(arg) if takes else module.sweep()
        if not isinstance(made, Iterator | list | tuple) or not isinstance(note, str):
            raise UserError(
                f"sweep: {name}: sweep() must yield dicts, one for each run, and NOTE be a string"
            )
        return list(made), note

    return run_file("sweep", name, use)


def _check_entry(path: str, number: int, entry: Any) -> dict[str, Any]:
    """The entry of a run with all its keys; refuses one whose keys or types are not those of a run."""
    if not isinstance(entry, dict):
        raise UserError(f"{path}: sweep() must yield dicts; entry {number} is a {type(entry).__name__}")
    missing = [field for field in _REQUIRED if field not in entry]
    unknown = [str(field) for field in entry if field not in _REQUIRED + _OPTIONAL]
    if missing or unknown:
        problems = [f"lacks {', '.join(missing)}"] * bool(missing)
        problems += [f"has the unknown {', '.join(unknown)}"] * bool(unknown)
        known = f"{', '.join(_REQUIRED)}, and if need be {', '.join(_OPTIONAL)}"
        raise UserError(f"{path}: entry {number} {' and '.join(problems)}; keys: {known}")
    texts = ["config", *(["probe"] if entry["probe"] is not None else [])]
    for field in texts + [field for field in ("name", "group") if field in entry]:
        if not isinstance(entry[field], str):
            raise UserError(f"{path}: entry {number}: {field}={entry[field]!r} must be a string")
    overrides = entry["overrides"]
    if not isinstance(overrides, dict) or not all(isinstance(field, str) for field in overrides):
        raise UserError(
            f"{path}: entry {number}: overrides={overrides!r} must be a dict from field names to values"
        )
    without_seed = {field: value for field, value in overrides.items() if field != "seed"}
    entry = {
        "name": derived_name(entry["config"], overrides),
        "group": derived_name(entry["config"], without_seed),
        "targets": None,
        "store": None,
    } | entry
    name = entry["name"]
    if not _NAME.fullmatch(name) or name in (STORE, SLURM) or name.startswith(_OWN_FILES):
        raise UserError(
            f"{path}: entry {number}: name={name!r} cannot name a folder of the sweep; use letters, digits and "
            f"._=+- (and neither {STORE!r} nor {SLURM!r} nor a beginning of {' or '.join(map(repr, _OWN_FILES))})"
        )
    if not _NAME.fullmatch(entry["group"]):
        raise UserError(f"{path}: run {name!r}: group={entry['group']!r} must be letters, digits and ._=+-")
    store = entry["store"]
    if store is not None and not (isinstance(store, str) and store):
        raise UserError(f"{path}: run {name!r}: store={store!r} must be a folder, or {GIVEN!r}, or left out")
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
    return entry


def _load_run(entry: dict[str, Any], checked: set[str]) -> Run:
    """The run of a checked entry; of runs that differ in their seed alone the config is checked once.

    Raises:
        UserError: from the configs, the overrides or their checks.
    """
    config = load_config(entry["config"])
    for field in ("objective", "model", "store", "seed"):
        if field not in config:
            raise UserError(
                f"config={entry['config']} is no config for `ecg-jax pretrain`: it has no {field}"
            )
    for field, value in entry["overrides"].items():
        override(config, str(field), str(value))
    if config.store is not None:
        raise UserError("the store is no override; give it as --store, or as the store of the run")
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
    same = json.dumps(plain(config) | {"seed": config.seed if config.seed not in range(_SEEDS) else 0})
    if same not in checked:
        check_config(config)
        checked.add(same)
    return Run(
        name=entry["name"],
        group=entry["group"],
        declared=" ".join(
            [entry["config"], *(f"{key}={value}" for key, value in entry["overrides"].items())]
        ),
        config=config,
        probe_config=None if entry["probe"] is None else _load_probe(entry["probe"], config.seed),
        targets=targets,
        store=entry["store"],
    )


def _load_probe(spec: str, seed: int) -> ConfigDict:
    """The config of a run's probe."""
    config = load_config(spec)
    for field in ("task", "linear", "bootstrap", "seed"):
        if field not in config:
            raise UserError(f"probe={spec} is no config for `ecg-jax probe`: it has no {field}")
    if config.mode not in ("linear", "frozen"):
        raise UserError(
            f"probe={spec} has mode={config.mode}; a sweep compares with random encoders under the same probe, so it "
            "takes mode=linear or mode=frozen"
        )
    if config.task == ALL:
        raise UserError(f"probe={spec} has task={ALL}; a table holds one task, so name it")
    config.seed = seed
    check_probe_config(config)
    return config


def targets_name(targets: dict[str, Any]) -> str:
    return f"{targets['features']}{targets['codes']}"


def _check_together(path: str, runs: list[Run]) -> None:
    """Refuses runs that one table cannot hold: groups that differ in more than seeds, or several probes."""
    first_of: dict[str, Run] = {}
    for run in runs:
        first = first_of.setdefault(run.group, run)
        differ = differences(
            plain(first.config) | {"store": first.store}, plain(run.config) | {"store": run.store}
        )
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
        probes = [plain(each.probe_config) if each.probe_config else {} for each in (runs[0], run)]
        if differences(*probes) - {"seed"}:
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
