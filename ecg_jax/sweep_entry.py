"""One entry of a sweep file: its keys, how they are spelled, and names that are derived from it."""

import hashlib
import json
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ecg_jax.cli import COMMANDS
from ecg_jax.data.targets import MAX_CODES
from ecg_jax.errors import UserError, closest
from ecg_jax.synthesize import MOST_RECORDS
from ecg_jax.token_features import SPECTRUM

STORE = "store"  # folder of the sample that ships with the package, in a sweep's
STORES = "stores"  # folder of the synthetic stores that a sweep makes
SLURM = "slurm"  # folder of what SLURM jobs print
STUDIES = "studies"  # folder of what is made of the finished runs
#: As the `store` of a run: the one given on the command line, without which the sweep does not run.
GIVEN = "--store"
#: The same of the store, or stores, of its probes.
GIVEN_PROBE = "--probe-store"
#: As a store: the PTB-XL sample that ships with the package, prepared by the sweep.
SAMPLE_STORE = "sample:"

_SYNTHETIC = re.compile(r"synthetic:records=([1-9]\d*),seed=(\d+)(,shuffle_labels)?")
_REQUIRED = ("config", "overrides", "probe")
_OPTIONAL = ("name", "group", "targets", "store", "probe_store", "probe_overrides", "probes", "init")
_OF_PROBE = ("probe", "store", "overrides")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_MOST_LETTERS = 100  # of a name
_LONGEST_NAME = 80  # characters of a derived name
_OWN_FOLDERS = (STORE, STORES, SLURM, STUDIES)
_OWN_FILES = ("results.", "results_table.", "sweep.", "collect.")


class Study(NamedTuple):
    """What is made of the finished runs: `ecg-jax *command`, in the folder studies/NAME."""

    name: str
    command: tuple[str, ...]


def synthetic_store(records: int, seed: int = 0, shuffle_labels: bool = False) -> str:
    """As a store: one of synthetic recordings, which the sweep makes before its first run (`ecg-jax synthesize`).

    Args:
        records: how many, of 10 s; half as many patients.
        seed: of everything.
        shuffle_labels: give each patient the labels of another, for a control.
    """
    text = f"synthetic:records={records},seed={seed}" + ",shuffle_labels" * shuffle_labels
    if not _SYNTHETIC.fullmatch(text):
        raise UserError(
            f"synthetic_store({records!r}, seed={seed!r}): both are whole numbers, records above 0"
        )
    _check_synthetic(text)
    return text


def synthetic_arguments(store: str) -> dict[str, Any] | None:
    """Of `synthetic_store`, whose text this is; None of any other store."""
    match = _SYNTHETIC.fullmatch(store)
    if match is None:
        return None
    return {"records": int(match[1]), "seed": int(match[2]), "shuffle_labels": bool(match[3])}


def _check_synthetic(store: str) -> None:
    """Refuses a synthetic store that cannot be made; other stores pass.

    Raises:
        UserError: it has too many recordings.
    """
    made = synthetic_arguments(store)
    if made is not None and made["records"] > MOST_RECORDS:
        raise UserError(f"the store {store!r} has too many recordings; records is from 1 to {MOST_RECORDS}")


def split_stores(text: str) -> list[str]:
    """Several stores joined by commas, one by one; the commas of a synthetic one are its own.

    Raises:
        UserError: an empty place, a synthetic or sample store that is misspelled, or one too large to be made.
    """
    found, rest = [], text
    while rest is not None:
        match = _SYNTHETIC.match(rest)
        end = match.end() if match else (rest.find(",") if "," in rest else len(rest))
        store, rest = rest[:end], rest[end:] or None
        if rest is not None:
            if rest[0] != ",":
                raise UserError(f"the store {text!r} is misspelled after {store!r}")
            rest = rest[1:]
        misspelled = store.startswith("synthetic:") and not match
        if not store or misspelled or (store.startswith(SAMPLE_STORE) and store != SAMPLE_STORE):
            raise UserError(
                f"the store {text!r} is misspelled; give a folder, several joined by commas, {SAMPLE_STORE!r}, or "
                "synthetic_store(records, seed)"
            )
        _check_synthetic(store)
        found.append(store)
    return found


def check_name(what: str, name: str) -> None:
    """Refuses what cannot name a folder.

    Args:
        what: is named so, for the message.
        name: of a folder.

    Raises:
        UserError: it is too long, or has other characters.
    """
    if len(name) > _MOST_LETTERS:
        raise UserError(
            f"{what}: the name {name[:40]!r}... has {len(name)} characters; {_MOST_LETTERS} are the most"
        )
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{what}: {name!r} cannot name a folder of the sweep; the name must be letters, digits and ._=+-, a letter "
            "or digit first"
        )


def check_apart(what: str, name: str, others: Iterable[str]) -> None:
    """Refuses a name that differs from another in upper and lower case alone.

    Raises:
        UserError: names both.
    """
    for other in others:
        if other != name and other.casefold() == name.casefold():
            raise UserError(
                f"{what}: the names {other!r} and {name!r} differ in upper and lower case alone, and are one folder on "
                "some file systems; give one another name"
            )


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


def check_entry(path: str, number: int, entry: Any) -> dict[str, Any]:
    """The entry of a run with all its keys; `probes` as name -> all three keys of a further probe.

    Args:
        path: of the sweep file, for messages.
        number: of the entry, from 1.
        entry: what the file yields.

    Raises:
        UserError: its keys, their types or their values are not those of a run.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{path}: sweep() must yield dicts; entry {number} is a {type(entry).__name__}")
    _check_keys(f"{path}: entry {number}", entry, _REQUIRED, _OPTIONAL)
    texts = ["config", *(["probe"] if entry["probe"] is not None else [])]
    for field in texts + [field for field in ("name", "group") if field in entry]:
        if not isinstance(entry[field], str):
            raise UserError(f"{path}: entry {number}: {field}={entry[field]!r} must be a string")
    if not entry["config"]:
        raise UserError(f"{path}: entry {number}: config='' names no file; give FILE[:ARGS]")
    _check_overrides(f"{path}: entry {number}: overrides", entry["overrides"])
    without_seed = {field: value for field, value in entry["overrides"].items() if field != "seed"}
    entry = {
        "name": derived_name(entry["config"], entry["overrides"]),
        "group": derived_name(entry["config"], without_seed),
        "targets": None,
        "store": None,
        "probe_store": None,
        "probe_overrides": {},
        "probes": {},
        "init": None,
    } | entry
    name = entry["name"]
    check_name(f"{path}: entry {number}: name", name)
    if name.casefold() in _OWN_FOLDERS or name.casefold().startswith(_OWN_FILES):
        own = " or ".join(map(repr, _OWN_FOLDERS))
        raise UserError(
            f"{path}: entry {number}: name={name!r} cannot name a folder of the sweep, which has its own: neither "
            f"{own} nor a beginning of {' or '.join(map(repr, _OWN_FILES))}"
        )
    where = f"{path}: run {name!r}"
    check_name(f"{where}: group", entry["group"])
    if entry["init"] is not None and not isinstance(entry["init"], str):
        raise UserError(
            f"{where}: init={entry['init']!r} must name an earlier run of this sweep, or be left out"
        )
    _check_store(where, "store", entry["store"], GIVEN)
    _check_store(where, "probe_store", entry["probe_store"], GIVEN_PROBE)
    _check_targets(where, entry["targets"])
    _check_overrides(f"{where}: probe_overrides", entry["probe_overrides"])
    if entry["probe"] is None and (
        entry["probe_overrides"] or (entry["probe_store"] and not entry["probes"])
    ):
        raise UserError(f"{where} has no probe; leave out probe_store and probe_overrides")
    return entry | {"probes": _check_probes(where, entry["probes"])}


def _check_keys(where: str, entry: dict, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    missing = [field for field in required if field not in entry]
    unknown = [str(field) for field in entry if field not in required + optional]
    if missing or unknown:
        problems = [f"lacks {', '.join(missing)}"] * bool(missing)
        problems += [f"has the unknown {', '.join(unknown)}"] * bool(unknown)
        known = f"{', '.join(required)}, and if need be {', '.join(optional)}"
        raise UserError(f"{where} {' and '.join(problems)}; keys: {known}")


def _check_overrides(what: str, overrides: Any) -> None:
    if not isinstance(overrides, dict) or not all(isinstance(field, str) for field in overrides):
        raise UserError(f"{what}={overrides!r} must be a dict from field names to values")


def _check_store(where: str, key: str, store: Any, given: str) -> None:
    if store is None or store == given:
        return
    if not (isinstance(store, str) and store):
        raise UserError(f"{where}: {key}={store!r} must be a folder, or {given!r}, or left out")
    if store in (GIVEN, GIVEN_PROBE):
        raise UserError(f"{where}: {key}={store!r} must be {given!r}, or a folder")
    try:
        split_stores(store)
    except UserError as error:
        raise UserError(f"{where}: {key}: {error}") from error


def _check_targets(where: str, targets: Any) -> None:
    if targets is None:
        return
    if not isinstance(targets, dict) or set(targets) != {"features", "codes"}:
        raise UserError(f"{where}: targets={targets!r} must be None or a dict with features and codes")
    if (
        targets["features"] != SPECTRUM
        or type(targets["codes"]) is not int
        or not 2 <= targets["codes"] <= MAX_CODES
    ):
        raise UserError(
            f"{where}: targets={targets!r} must have features={SPECTRUM!r} and 2 to {MAX_CODES} codes"
        )


def _check_probes(where: str, probes: Any) -> dict[str, dict[str, Any]]:
    """Name -> probe, store and overrides of each further probe."""
    if not isinstance(probes, dict):
        raise UserError(f"{where}: probes={probes!r} must be a dict from names to configs of probes")
    whole = {}
    for name, probe in probes.items():
        what = f"{where}: probes[{name!r}]"
        if not isinstance(name, str):
            raise UserError(f"{what}: the name must be a string")
        check_name(f"{where}: probes", name)
        check_apart(f"{where}: probes", name, whole)
        probe = {"probe": probe} if isinstance(probe, str) else probe
        if not isinstance(probe, dict):
            raise UserError(
                f"{what} must be FILE[:ARGS], or a dict with probe, and if need be store and overrides"
            )
        _check_keys(what, probe, _OF_PROBE[:1], _OF_PROBE[1:])
        probe = {"store": None, "overrides": {}} | probe
        if not isinstance(probe["probe"], str):
            raise UserError(f"{what}: probe={probe['probe']!r} must be a string")
        _check_store(what, "store", probe["store"], GIVEN_PROBE)
        _check_overrides(f"{what}: overrides", probe["overrides"])
        whole[name] = probe
    return whole


def check_studies(file: str, studies: Any) -> tuple[Study, ...]:
    """What STUDIES of a sweep file returns.

    Raises:
        UserError: it is no list of (name, [command, argument, ...]), a name is there twice, or a command unknown or
            `sweep`.
    """
    found: dict[str, Study] = {}
    for entry in studies if isinstance(studies, list | tuple) else [studies]:
        if not _is_study(entry):
            raise UserError(
                f"sweep: {file}: STUDIES(output) must return a list of (name, [command, argument, ...]), all strings; "
                f"got {reprlib.repr(entry)}"
            )
        name, command = entry
        check_name(f"sweep: {file}: STUDIES", name)
        check_apart(f"sweep: {file}: STUDIES", name, found)
        if name in found:
            raise UserError(f"sweep: {file}: the study {name!r} is there twice; give each a name of its own")
        if command[0] == "sweep":
            raise UserError(
                f"sweep: {file}: the study {name!r}: a sweep cannot be a study of a sweep, whose folder it would wait "
                "for; run it as a command of its own"
            )
        if command[0] not in COMMANDS:
            raise UserError(
                f"sweep: {file}: the study {name!r}: `ecg-jax {command[0]}` is unknown{closest(command[0], COMMANDS)}"
            )
        found[name] = Study(name, tuple(command))
    return tuple(found.values())


def _is_study(entry: Any) -> bool:
    """Whether an entry is (name, [command, argument, ...])."""
    if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], list | tuple):
        return False
    return bool(entry[1]) and all(isinstance(word, str) for word in (entry[0], *entry[1]))
