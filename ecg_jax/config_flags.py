"""Config files on the command line: `--config=FILE[:args] --config.a.b=value`, with errors a person can act
on.

A config file is Python with `get_config(arg="")` that returns an `ml_collections.ConfigDict`. Every field of
a run is declared there; the command line can only change declared fields, to values of the declared type.
"""

import argparse
import ast
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from ecg_jax.errors import UserError, closest

CONFIG_HELP = """\
config:
  --config=FILE[:ARGS]  ARGS go to the file's get_config, e.g. configs/cpc.py:data=18k,recipe=released
  --config.a.b=VALUE    changes one declared field, e.g. --config.optimiser.learning_rate=1e-3
  --print-config        prints the resulting config and exits
"""


def shipped_configs() -> Path:
    """Folder that holds the package `configs`: the repository's top level, or the copy inside an installed
    wheel.
    """
    package = Path(__file__).parent
    in_wheel = package / "shipped"
    return in_wheel if in_wheel.is_dir() else package.parent


def parse_arg(arg: str, **choices: tuple[str, ...]) -> SimpleNamespace:
    """The argument of a config file, "key=value,key=value".

    Args:
        arg: what follows the colon of --config.
        choices: key -> allowed values, the first of them the default.

    Raises:
        UserError: unknown key or value, a key twice, or not of the form key=value.
    """
    values, given = {key: allowed[0] for key, allowed in choices.items()}, set()
    for item in filter(None, arg.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(
                f"--config argument {item!r} is not of the form key=value; keys: {', '.join(choices)}"
            )
        if key not in choices:
            raise UserError(f"--config argument {key!r} is unknown{closest(key, choices)}")
        if value not in choices[key]:
            raise UserError(
                f"--config argument {key}={value!r} is unknown{closest(value, dict.fromkeys(choices[key]))}"
            )
        if key in given:
            raise UserError(f"--config argument {key!r} is given twice, as {values[key]!r} and {value!r}")
        given.add(key)
        values[key] = value
    return SimpleNamespace(**values)


def run_file(prefix: str, name: str, use: Callable[[ModuleType], Any]) -> Any:
    """What `use` makes of a Python file that belongs to the user.

    The file is looked for as given and, when it starts with `configs/`, among those that ship with the package. It may
    import `configs` and its neighbours.

    Args:
        prefix: how errors begin.
        name: of the file.
        use: called with the file as a module; what it raises is the file's fault.

    Raises:
        UserError: there is no such file, it is not Python, or it or `use` failed; names the line.
    """
    path = Path(name)
    root = shipped_configs()
    if not path.is_file():
        path = root / name
    if not path.is_file():
        raise UserError(f"{prefix}: there is no file {name}")
    for folder in (root, path.parent.absolute()):  # for `from configs import common`, and for its neighbours
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    module_spec = importlib.util.spec_from_file_location(f"config_file_{path.stem}", path)
    if module_spec is None:
        raise UserError(f"{prefix}: {name} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return use(module)
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(f"{prefix}: {name} calls sys.exit; a config file must return its config") from error
    except SyntaxError as error:
        line = f" line {error.lineno}" if error.lineno else ""
        raise UserError(
            f"{prefix}: {error.filename or name}{line} is not valid Python: {error.msg}"
        ) from error
    except Exception as error:  # whatever the file does: a misspelt field, a missing import, a bug
        where = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in where if frame.filename == module_spec.origin]
        line = f" line {lines[-1]}" if lines else ""
        text = " ".join(str(error).split())
        raise UserError(f"{prefix}: {name}{line}: {type(error).__name__}: {text}") from error


def with_argument(spec: str, **arguments: str) -> str:
    """`FILE[:ARGS]` with more arguments for the file's get_config, "key=value" each; they follow those it has."""
    added = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{spec}{',' if ':' in spec else ':'}{added}"


def load_config(spec: str) -> ConfigDict:
    """The config of `FILE[:ARGS]`, see `run_file`.

    Raises:
        UserError: no such file, no get_config in it, or it refuses its argument.
    """
    name, _, arg = spec.partition(":")

    def use(module):
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={spec}: {name} defines no get_config(arg)")
        return module.get_config(arg)

    config = run_file(f"--config={spec}", name, use)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={spec}: get_config of {name} returns a {type(config).__name__}, not a ConfigDict"
        )
    return config.lock()


def _parse_value(path: str, text: str, current: Any, kind: type) -> Any:
    """`text` as a value of the type the field was declared with."""
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if kind in (tuple, list):
            value = ast.literal_eval(text)
            return kind(value) if isinstance(value, tuple | list) else kind([value])
        return text
    except (KeyError, ValueError, SyntaxError):
        raise UserError(
            f"--config.{path}={text!r} is not a value of type {kind.__name__} (the field is {current!r})"
        ) from None


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets the field `path` ("a.b.c") of a config from command-line text.

    Raises:
        UserError: the field is not declared, or the text is not of its type.
    """
    node = config
    *parents, last = path.split(".")
    for depth, name in enumerate([*parents, last]):
        if not isinstance(node, ConfigDict) or name not in node:
            where = ".".join(path.split(".")[:depth]) or "the config"
            known = sorted(node.keys()) if isinstance(node, ConfigDict) else []
            raise UserError(f"--config.{path}: {where} has no field {name!r}{closest(name, known)}")
        if depth < len(parents):
            node = node[name]
    if isinstance(node[last], ConfigDict):
        raise UserError(
            f"--config.{path} is a group of fields; set one of {', '.join(sorted(node[last].keys()))}"
        )
    try:
        kind = node.get_ref(last).get_type()
    except ValueError:  # None that was not declared as a placeholder: text
        kind = str
    node[last] = _parse_value(path, text, node[last], kind)


def split_overrides(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Takes `--config.a.b=VALUE` and `--config.a.b VALUE` out of a command line.

    Returns:
        ("a.b", "VALUE") of each, in order, and all other words.

    Raises:
        UserError: a field without a value.
    """
    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        path, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"--config.{path} needs a value: --config.{path}=VALUE")
        overrides.append((path, value))
    return overrides, rest


def _field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all fields; of the groups `objective` and `model`, whose fields differ from one to the other, the
    name alone.
    """
    names = []
    for name, value in config.items():
        if not isinstance(value, ConfigDict) or name in ("objective", "model"):
            names.append(prefix + name)
        else:
            names += _field_names(value, f"{prefix}{name}.")
    return names


def parse_command(
    name: str,
    description: str,
    argv: list[str],
    extra: Callable[[argparse.ArgumentParser], None],
    *,
    like: str,
    default_config: str | None = None,
) -> tuple[ConfigDict, argparse.Namespace]:
    """Parses the arguments of a command that takes a config.

    Args:
        name: of the command, e.g. "pretrain".
        description: what --help says first.
        argv: arguments after the command's name.
        extra: adds the command's own options to the parser.
        like: a shipped config file whose fields the command needs; those of its `objective` may differ.
        default_config: FILE[:ARGS] when --config is not given; None makes --config required.

    Returns:
        The locked config with overrides applied, and the command's own options.

    Raises:
        UserError: anything wrong with the config or its overrides.
        SystemExit: --help or --print-config (code 0), or argparse's own refusal (code 2).
    """
    parser = argparse.ArgumentParser(
        prog=f"ecg-jax {name}",
        description=description,
        epilog=CONFIG_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=default_config is None,
        default=default_config,
        metavar="FILE[:ARGS]",
        help="config file" + (f" (default: {default_config})" if default_config else ""),
    )
    parser.add_argument("--print-config", action="store_true", help=argparse.SUPPRESS)
    extra(parser)
    for action in parser._actions if "--print-config" in argv else ():
        action.required = action.required and action.dest == "config"  # printing needs no workdir

    overrides, rest = split_overrides(argv)
    options = parser.parse_args(rest)
    config = load_config(options.config)
    fields = _field_names(config)
    if missing := [field for field in _field_names(load_config(like)) if field not in fields]:
        raise UserError(
            f"--config={options.config} lacks the fields {', '.join(missing[:5])}, which {like} declares; is it a "
            f"config for `ecg-jax {name}`?"
        )
    for path, value in overrides:
        override(config, path, value)
    if options.print_config:
        print(config)
        raise SystemExit(0)
    return config, options
