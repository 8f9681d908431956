"""Sweep files: which runs a sweep has, and what it refuses before anything runs."""

import difflib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from ecg_jax.config_checks import check_config
from ecg_jax.config_flags import load_config, override, parse_arg, run_file
from ecg_jax.errors import UserError, closest
from ecg_jax.evaluation.tasks import ALL, get_task
from ecg_jax.probe import check_config as check_probe_config
from ecg_jax.sweep_entry import (
    GIVEN,
    GIVEN_PROBE,
    SAMPLE_STORE,
    Study,
    check_apart,
    check_entry,
    check_studies,
    derived_name,
    synthetic_store,
)

#: What sweep files import.
__all__ = ["GIVEN", "GIVEN_PROBE", "SAMPLE_STORE", "derived_name", "parse_sweep_arg", "synthetic_store"]

_SEEDS = 2**31  # below which one seed is as good as another


@dataclass(frozen=True)
class FurtherProbe:
    """A probe of a run beside the one that the sweep compares: any mode, any task or all of them.

    Attributes:
        name: of its folder.
        config: loaded and overridden, with the seed of the run.
        store: one folder or several separated by commas; `GIVEN_PROBE` for those of the command line; None for those
            that the run is probed on. It takes those of them that its task fits.
    """

    name: str
    config: ConfigDict
    store: str | None


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
        store: that it is pretrained on, one folder or several separated by commas, `SAMPLE_STORE` and
            `synthetic_store` among them; `GIVEN` for the one of the command line; None for that one or, when none is
            given there, the sample that ships with the package.
        probe_store: that it is probed on, in the same way, the first of several by the probe that the sweep compares;
            `GIVEN_PROBE` for the one of the command line; None for that one or, when none is given there, `store`.
        further: its other probes, which follow.
        init: the run whose parameters it begins with, None for none; it waits until that one is finished.
    """

    name: str
    group: str
    declared: str
    config: ConfigDict
    probe_config: ConfigDict | None
    targets: dict[str, Any] | None
    store: str | None
    probe_store: str | None
    further: tuple[FurtherProbe, ...]
    init: "Run | None"


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file.

    Attributes:
        path: FILE[:ARGS] as given.
        runs: in the order of the file.
        note: what it says about its results, "" for nothing.
        studies: folder of the sweep -> the commands that follow its runs.
    """

    path: str
    runs: tuple[Run, ...]
    note: str
    studies: Callable[[Path], tuple[Study, ...]]

    @property
    def probes(self) -> bool:
        """Whether its runs are probed; all of them are or none is."""
        return self.runs[0].probe_config is not None


def load_sweep(path: str) -> Sweep:
    """Reads a sweep file and checks every run of it.

    The file is looked for as given and, when the path starts with `configs/`, among those that ship with the package.
    It defines `def sweep()`, or `def sweep(arg="")` if it takes arguments (see `parse_sweep_arg`), which yields a dict
    for each run. Its keys are

        config           FILE[:ARGS]
        overrides        field -> value
        probe            FILE[:ARGS] of the probe that the tables compare, or None in a sweep that only pretrains

    and, if need be,

        name, group      else made of config and overrides, see `derived_name`
        probe_overrides  field of the probe -> value
        store            see `Run`; else the one of the command line, or the sample
        probe_store      see `Run`; else the one of the command line, or `store`
        probes           name -> FILE[:ARGS] of further probes: any mode, task=all too; or, for a store or overrides of
                         its own, name -> {"probe": FILE[:ARGS], "store": ..., "overrides": {...}}
        init             name of an earlier run, whose parameters this one begins with; init.part says which
        targets          {"features", "codes"} of offline targets

    The file may have a string NOTE for the foot of the table, in which {recordings} stands for how many were trained
    on, and `def STUDIES(output)` (or `STUDIES(output, arg)`), which returns (name, [command, argument, ...]) of each
    `ecg-jax` command that follows the tables when every run is finished; what it writes belongs into
    OUTPUT/studies/NAME.

    Raises:
        UserError: names the run and what is wrong with it.
    """
    entries, note, studies = _read(path)
    runs, checked = {}, set()
    for number, entry in enumerate(entries, start=1):
        entry = check_entry(path, number, entry)
        where = f"{path}: run {entry['name']!r}"
        if entry["name"] in runs:
            raise UserError(f"{where} is there twice; give every run a name of its own")
        check_apart(f"{path}: runs", entry["name"], runs)
        try:
            runs[entry["name"]] = _load_run(entry, checked, runs)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if not runs:
        raise UserError(f"{path}: sweep() yields no run")
    _check_together(path, list(runs.values()))
    return Sweep(path, tuple(runs.values()), note, studies)


def parse_sweep_arg(arg: str, *flags: str, **choices: tuple[str, ...] | type[str]) -> SimpleNamespace:
    """The argument of a sweep file, "flag,key=value", e.g. "quick,ladder=paper,base=stores/heedb+stores/code15".

    Args:
        arg: what follows the colon of the file.
        flags: words that may be there.
        choices: key -> allowed values, the first of them the default; or `str` for any text, by default "", in which
            a plus sign stands for a comma.

    Returns:
        Whether each flag is there, and the value of each key.

    Raises:
        UserError: as in `config_flags.parse_arg`.
    """
    words = [word for word in arg.split(",") if word]
    rest = [word for word in words if word not in flags]
    for word in rest:
        key, equals, value = word.partition("=")
        if equals and key in flags:
            raise UserError(
                f"sweep argument {key!r} takes no value, and was given {value!r}; write {key} alone"
            )
        numbers = key in choices and choices[key] is not str and all(map(str.isdigit, choices[key]))
        if equals and numbers and value not in choices[key]:
            raise UserError(f"sweep argument {key}={value!r} must be {' or '.join(choices[key])}")
        if not equals:
            shown = {key: "TEXT" if values is str else "|".join(values) for key, values in choices.items()}
            known = (*flags, *(f"{key}={values}" for key, values in shown.items()))
            raise UserError(f"sweep argument {word!r} is unknown{closest(word, known)}")
    given = dict(word.partition("=")[::2] for word in rest)
    allowed = {
        key: ("", *(word.partition("=")[2] for word in rest if word.startswith(f"{key}=")))
        if values is str
        else values
        for key, values in choices.items()
    }
    try:
        values = vars(parse_arg(",".join(rest), **allowed))
    except UserError as error:
        raise UserError(f"sweep {str(error).removeprefix('--config ')}") from error
    texts = {key: given[key].replace("+", ",") for key in given if choices[key] is str}
    return SimpleNamespace(**{flag: flag in words for flag in flags}, **(values | texts))


def _read(path: str) -> tuple[list, str, Callable[[Path], tuple[Study, ...]]]:
    """What sweep() yields, NOTE, and the checked STUDIES."""
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

    def use_studies(module, output: Path):
        if not hasattr(module, "STUDIES"):
            return ()
        takes = len(inspect.signature(module.STUDIES).parameters)
        return check_studies(name, module.STUDIES(*(str(output), arg)[:takes]))

    def studies(output: Path) -> tuple[Study, ...]:
        return run_file("sweep", name, lambda module: use_studies(module, output))

    made = run_file("sweep", name, lambda module: (*use(module), use_studies(module, Path("OUTPUT"))))
    return *made[:2], studies


def _load_run(entry: dict[str, Any], checked: set[str], earlier: dict[str, Run]) -> Run:
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
    init = _find_init(entry["init"], config, earlier)
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
        probe_config=None if entry["probe"] is None else _load_compared_probe(entry, config.seed),
        targets=targets,
        store=entry["store"],
        probe_store=entry["probe_store"],
        further=tuple(
            FurtherProbe(name, _load_probe(probe["probe"], probe["overrides"], config.seed), probe["store"])
            for name, probe in entry["probes"].items()
        ),
        init=init,
    )


def _find_init(name: str | None, config: ConfigDict, earlier: dict[str, Run]) -> Run | None:
    """The run that another begins with, as far as can be told now of parameters that fit it.

    Raises:
        UserError: there is no earlier run of that name, or it cannot be begun with.
    """
    if name is None:
        return None
    if name not in earlier:
        hint = closest(name, earlier) if earlier else "; it is the first"
        raise UserError(f"init={name!r} is no earlier run of this sweep{hint}")
    if config.init.checkpoint:
        raise UserError("it has both init and config.init.checkpoint; give it one")
    there = earlier[name].config
    for field in ("normalisation", "rate_hz"):
        if there.data[field] != config.data[field]:
            raise UserError(f"init={name!r} is pretrained with another data.{field}; give both runs the same")
    if config.init.part == "all" and there.objective.name != config.objective.name:
        raise UserError(
            f"init={name!r} is pretrained with the objective {there.objective.name}, and this run with "
            f"{config.objective.name}; override init.part with 'encoder' to begin with its encoder alone"
        )
    return earlier[name]


def _load_compared_probe(entry: dict[str, Any], seed: int) -> ConfigDict:
    """The config of the probe that the tables of the sweep compare."""
    spec = entry["probe"]
    config = _load_probe(spec, entry["probe_overrides"], seed)
    if config.mode not in ("linear", "frozen"):
        raise UserError(
            f"probe={spec} has mode={config.mode}; a sweep compares with random encoders under the same probe, so it "
            "takes mode=linear or mode=frozen; other modes go into probes"
        )
    if config.task == ALL:
        raise UserError(
            f"probe={spec} has task={ALL}; a table holds one task, so name it, or put it into probes"
        )
    if get_task(config.task).metric != "macro_auroc":
        raise UserError(f"probe={spec} has no macro AUROC, which the tables compare; put it into probes")
    return config


def _load_probe(spec: str, overrides: dict[str, Any], seed: int) -> ConfigDict:
    """The config of a probe."""
    try:
        config = load_config(spec)
    except UserError as error:
        raise UserError(f"probe={spec}: {str(error).removeprefix('--config ')}") from error
    for field in ("task", "linear", "bootstrap", "seed"):
        if field not in config:
            raise UserError(f"probe={spec} is no config for `ecg-jax probe`: it has no {field}")
    for field, value in overrides.items():
        override(config, field, str(value))
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
        differ = differences(_alike(first), _alike(run))
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


def _alike(run: Run) -> dict[str, Any]:
    """What runs of a group share, but for the seed."""
    return plain(run.config) | {"store": run.store, "init": run.init and run.init.group}


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
