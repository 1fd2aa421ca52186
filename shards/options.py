"""Options as dataclass fields: one place for a default, its help, its choices and its unit.

The command line makes its options from these fields (`logitshards/commands.py`), configuration
files use them, and Python code passes them by name. Messages name the field; the command line adds
dashes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from shards.errors import InputError

_KEY = "option"


@dataclass(frozen=True, kw_only=True)
class Option:
    """What the command line shows for a field, besides its name, type and default.

    `choices` are all values that it takes. `metavar` stands for a value in the help text.
    `shown_default` says what a default of None or of an empty list means. `without` names options
    of the parts of its value that the command does not have.
    """

    help: str
    choices: Sequence[str] = ()
    metavar: str | None = None
    shown_default: str | None = None
    without: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class OptionField:
    """A field that is an option. `kind` is its type without None, `default` MISSING: required."""

    name: str
    kind: Any
    default: Any
    about: Option

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING


def option(
    help: str,
    *,
    default: Any = MISSING,
    default_factory: Callable[[], Any] | None = None,
    choices: Sequence[str] = (),
    metavar: str | None = None,
    shown_default: str | None = None,
    without: Sequence[str] = (),
) -> Any:
    """A dataclass field that is an option; without a default it is required."""
    about = Option(
        help=help, choices=choices, metavar=metavar, shown_default=shown_default, without=without
    )
    if default_factory is not None:
        return field(default_factory=default_factory, metadata={_KEY: about})
    return field(default=default, metadata={_KEY: about})


def options_of(kind: type[Any]) -> dict[str, OptionField]:
    """The fields of a dataclass that are options, by name, in the order of the class."""
    hints = get_type_hints(kind)
    return {
        f.name: OptionField(
            name=f.name,
            kind=_without_none(hints[f.name]),
            default=f.default if f.default_factory is MISSING else f.default_factory(),
            about=f.metadata[_KEY],
        )
        for f in fields(kind)
        if _KEY in f.metadata
    }


class OptionError(InputError):
    """An option with an invalid value: "top_k 0: expected at least 1"."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}{text}")
        self.name = name
        self.text = text

    def as_flag(self) -> str:
        """The message with the option as the command line writes it."""
        return f"{flag(self.name)}{self.text}"


def flag(name: str) -> str:
    """A field's name as the command line writes it: "--top-k"."""
    return f"--{name.replace('_', '-')}"


def check(holds: bool, name: str, value: object, expected: str) -> None:
    """OptionError unless the value of an option holds; a comparison with NaN never does."""
    if not holds:
        raise OptionError(name, f" {value}: expected {expected}")


def check_choices(config: Any) -> None:
    """OptionError for an option of a dataclass whose value is not among its choices."""
    for f in fields(config):
        about: Option | None = f.metadata.get(_KEY)
        value = getattr(config, f.name)
        if about is not None and about.choices and value is not None:
            check(value in about.choices, f.name, value, listed(about.choices))


def listed(names: Sequence[str]) -> str:
    """`a, b or c`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    rest = [part for part in get_args(hint) if part is not type(None)]
    if len(rest) != 1:
        raise TypeError(f"{hint}: an option has one type, and None perhaps")
    return rest[0]
