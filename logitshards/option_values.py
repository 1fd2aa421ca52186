"""Values of options: from the text of a command line, and from YAML, whose types are checked.

The type of a dataclass field decides. A ValueError says what was expected, and in YAML also what
was found; the caller knows the option and the file.

YAML itself reads `3e-4` as text and `no` as false. So a number may be text where a fraction is
expected. Nothing else is converted: `out: 2024-01-01` is a date, not a path.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, get_args, get_origin

from logitshards.yaml_text import TwiceError, load_yaml
from shards.options import listed

_SHOWN_CHARACTERS = 60
_NOT_JSON = "not a JSON value"


@dataclass(frozen=True, kw_only=True)
class Scalar:
    """One value: its name in help texts, what messages expect, and how it is read.

    `from_text` is for the command line, `from_yaml` for what YAML made of a file; both raise
    ValueError.
    """

    name: str
    expected: str
    from_text: Callable[[str], Any]
    from_yaml: Callable[[object], Any]

    def read(self, value: object) -> Any:
        """A value of a YAML file. ValueError with what was expected and found."""
        try:
            return self.from_yaml(value)
        except ValueError:
            hint = "; quotes make it text" if self._lacks_quotes(value) else ""
            raise ValueError(f"expected {self.expected}, found {value_text(value)}{hint}") from None

    def _lacks_quotes(self, value: object) -> bool:
        return self.name in ("text", "path") and isinstance(value, bool | int | float | date)


def scalar(kind: Any, choices: Sequence[str] = ()) -> Scalar:
    """How to read values of a type: int, float, str, bool or Path. TypeError for another type."""
    if choices:
        return Scalar(
            name="choice", expected=listed(choices), from_text=_text, from_yaml=_yaml(str, _text)
        )
    if kind not in _SCALARS:
        raise TypeError(f"{kind}: no type of an option")
    return _SCALARS[kind]


def item_of(kind: Any) -> Any:
    """The type of the values of a Sequence; None for another type."""
    return get_args(kind)[0] if get_origin(kind) is Sequence else None


def is_mapping(kind: Any) -> bool:
    """Whether a type is a Mapping, whose values are anything that JSON has."""
    return get_origin(kind) is Mapping


def read_sequence(item: Scalar, value: object, *, commas: bool) -> tuple[Any, ...]:
    """A list of a YAML file, or a single value; `commas`: also as text with commas between them."""
    if commas and isinstance(value, str):
        return split_commas(item, value)
    return tuple(map(item.read, value if isinstance(value, list) else [value]))


def split_commas(item: Scalar, text: str) -> tuple[Any, ...]:
    """Values with commas between them."""
    return tuple(item.from_text(part.strip()) for part in text.split(","))


def read_mapping(value: object) -> dict[str, object]:
    """A mapping of a YAML file, from names to what JSON has."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping, found {value_text(value)}")
    arguments = {}
    for key, part in value.items():
        if not isinstance(key, str) or not key:
            raise ValueError(f"expected a name as the key, found {value_text(key)}")
        try:
            arguments[key.replace("-", "_")] = _json(part)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return arguments


def split_pair(text: str) -> tuple[str, object]:
    """KEY=VALUE; the value is read as YAML, so that numbers and booleans are what they say."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError("expected KEY=VALUE")
    try:
        setting = load_yaml(value)
    except TwiceError:
        raise
    except Exception as error:  # PyYAML lets a few of other kinds through
        raise ValueError(f"{_NOT_JSON} ({error})") from error
    return key.replace("-", "_"), _json(setting)


def value_text(value: object) -> str:
    """A value of a YAML file in a message, short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "a list"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, date):
        return f"the date {value}"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a larger number"
    return shown(value) if isinstance(value, int | float | str) else type(value).__name__


def shown(value: object) -> str:
    """A value in a message, cut where it is long; text that could not be seen is quoted."""
    text = str(value)
    if isinstance(value, str) and (not text or text != text.strip() or not text.isprintable()):
        text = repr(text)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _json(value: object) -> object:
    """The value, if a manifest can hold it as it is."""
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{_NOT_JSON} ({error})") from error
    if not same:  # such as keys that are numbers
        raise ValueError(_NOT_JSON)
    return value


def _integer(text: str) -> int:
    try:
        return _fits(int(text))
    except ValueError:
        raise ValueError("not a valid integer") from None


def _fits(number: int) -> int:
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError("not a valid integer")
    return number


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError("not a valid number") from None
    return _finite(number)


def _finite(number: float) -> float:
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not Unicode text") from None
    if not text or "\0" in text:
        raise ValueError("expected text that is not empty")
    return text


def _path(text: str) -> Path:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("not a path") from None
    if not text or "\0" in text:
        raise ValueError("not a path")
    return Path(text)


def _flag(text: str) -> bool:
    raise ValueError("takes no value")


def _yaml(kind: type[Any], convert: Callable[[Any], Any]) -> Callable[[object], Any]:
    """A reader of YAML values of one type; in Python a boolean is an integer, here it is not."""

    def read(value: object) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError
        return convert(value)

    return read


def _yaml_number(value: object) -> float:
    if isinstance(value, str):
        return _number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return _finite(value)


_SCALARS: Mapping[Any, Scalar] = {
    bool: Scalar(
        name="boolean", expected="true or false", from_text=_flag, from_yaml=_yaml(bool, bool)
    ),
    int: Scalar(
        name="integer",
        expected="an integer of 64 bits",
        from_text=_integer,
        from_yaml=_yaml(int, _fits),
    ),
    float: Scalar(
        name="number", expected="a finite number", from_text=_number, from_yaml=_yaml_number
    ),
    str: Scalar(name="text", expected="text", from_text=_text, from_yaml=_yaml(str, _text)),
    Path: Scalar(name="path", expected="a path", from_text=_path, from_yaml=_yaml(str, _path)),
}
