"""What the fields of a JSON file may be: a table for each file, gone through where the file is read."""

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_MOST = 2**63  # of whole numbers; NumPy holds no larger ones


class Kind(NamedTuple):
    """What a field may be: in words, and as a test of its value."""

    words: str
    holds: Callable[[Any], bool]


TEXT = Kind("text that is not empty", lambda value: isinstance(value, str) and bool(value))
ANY_TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
#: What a log holds; NaN and infinity are numbers here.
LOGGED = Kind(
    "a number or null",
    lambda value: value is None or type(value) is float or (type(value) is int and abs(value) < _MOST),
)


def whole(low: int) -> Kind:
    """A whole number from `low` on."""
    return Kind(f"a whole number from {low} on", lambda value: type(value) is int and low <= value < _MOST)


def number(low: float, high: float = 1e100, *, above: bool = False) -> Kind:
    """A finite number from `low` (with `above`: above it) to `high`."""
    begin = f"above {low:g}" if above else f"from {low:g} on"
    words = f"a number {begin}" + (f", at most {high:g}" if high < 1e100 else "")

    def holds(value: Any) -> bool:
        return type(value) in (int, float) and low <= value <= high and not (above and value == low)

    return Kind(words, holds)


def one_of(known: Sequence[str]) -> Kind:
    """One of these words."""
    return Kind(f"one of {', '.join(known)}", lambda value: isinstance(value, str) and value in known)


def list_of(kind: Kind) -> Kind:
    """A list with an entry or more, each of one kind."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(map(kind.holds, value))

    return Kind(f"a list, each entry {kind.words}", holds)


def object_of(kind: Kind) -> Kind:
    """An object, the value of each field of one kind."""

    def holds(value: Any) -> bool:
        return isinstance(value, dict) and all(map(kind.holds, value.values()))

    return Kind(f"an object, each field {kind.words}", holds)


def or_null(kind: Kind) -> Kind:
    """Of a kind, or null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def wrong_field(content: Any, fields: Mapping[str, Kind], where: str = "", *, optional: bool = False) -> str:
    """What is wrong with the first field that is not of its kind; "" where all are.

    Args:
        content: of the file, or of an object in it.
        fields: name -> kind; the name of an inner field has points.
        where: what comes before the names, such as "starts[0].".
        optional: whether fields may be missing.
    """
    for name, kind in fields.items():
        value, parts = content, name.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(value, dict):
                outer = where + ".".join(parts[:depth])
                return refusal(outer.rstrip("."), value, OBJECT)
            if part not in value:
                break
            value = value[part]
        else:
            if not kind.holds(value):
                return refusal(where + name, value, kind)
            continue
        if not optional:
            return f"it lacks the field {where}{name}"
    return ""


def refusal(name: str, value: Any, kind: Kind) -> str:
    """What is wrong with a field that is not of its kind; of the whole content where it has no name."""
    shown = json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
    return f"{f'the field {name}' if name else 'it'} is {shown}, and must be {kind.words}"
