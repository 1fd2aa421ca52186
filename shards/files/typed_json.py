"""Plain JSON to frozen dataclasses; a value that does not fit is rejected by its key.

The field's annotation says what a value may be: int, float, str, bool, None, a sequence, a
mapping of names, or another dataclass. Only two conversions happen: an integer to a float, and a
list to a tuple.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")
Parsers = Mapping[Any, Callable[[object], Any]]

_JSON_NAMES = {Mapping: "an object", Sequence: "a list"}


def parse(kind: type[_T], value: object, parsers: Parsers | None = None) -> _T:
    """An object of the dataclass `kind` from a mapping of its fields.

    `parsers` maps annotations, such as a tagged union, to functions that make their values.
    ValueError naming the dotted key for one that is unknown, missing or of another type.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object, found {_name(value)}")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(map(str, set(value) - set(known)))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}")
    hints = _hints(kind)  # type: ignore[arg-type]
    arguments = {}
    for name, f in known.items():
        if name in value:
            arguments[name] = _at(name, hints[name], value[name], parsers or {})
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"no key {name!r}")
    return kind(**arguments)


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _at(name: str, hint: Any, value: object, parsers: Parsers) -> Any:
    try:
        return _value(hint, value, parsers)
    except ValueError as error:
        text = str(error)
        nested = text.startswith(("unknown key '", "no key '", "key '"))
        start, _, rest = text.partition("'")
        raise ValueError(f"{start}'{name}.{rest}" if nested else f"key '{name}': {text}") from error


def _value(hint: Any, value: object, parsers: Parsers) -> Any:
    if hint in parsers:
        return parsers[hint](value)
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in options:
        if value is None:
            return None
        rest = tuple(part for part in options if part is not type(None))
        return _value(rest[0] if len(rest) == 1 else Union[rest], value, parsers)  # noqa: UP007
    kind = get_origin(hint) or hint
    if is_dataclass(kind) and isinstance(kind, type):
        return parse(kind, value, parsers)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Mapping and isinstance(value, Mapping):
        part = get_args(hint)[1]
        return {name: _at(name, part, inner, parsers) for name, inner in value.items()}
    if kind is Sequence and isinstance(value, list):
        (part,) = get_args(hint)
        if isinstance(part, type) and set(map(type, value)) == {part}:
            return tuple(value)  # most of a sidecar: a checksum for each column of a row group
        return tuple(_at(str(i), part, inner, parsers) for i, inner in enumerate(value))
    if kind is Any:
        return value
    wrong = isinstance(value, bool) and kind is not bool
    if wrong or kind is Sequence or not isinstance(value, kind):
        raise ValueError(f"expected {_JSON_NAMES.get(kind, kind.__name__)}, found {_name(value)}")
    return value


def _name(value: object) -> str:
    """A value in a message, short."""
    text = repr(value)
    return text if len(text) <= 40 else f"{type(value).__name__} {text[:30]}..."
