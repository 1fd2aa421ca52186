"""`--keep METHOD` and the options of all methods, made from the classes that `KEEP_METHODS` has.

If two methods have an option of the same name, it must be the same option.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from shards.keep import KEEP_METHODS, Keep
from shards.options import OptionError, OptionField, options_of


def is_keep(option: OptionField) -> bool:
    """Whether an option is the keep method, which stands for several options."""
    return isinstance(option.kind, type) and issubclass(option.kind, Keep)


def keep_options(option: OptionField) -> dict[str, OptionField]:
    """The choice of a method, and after it every option of every method, by name.

    Help begins with the methods that take an option. TypeError if two methods have an option of
    one name that is not the same.
    """
    about = dataclasses.replace(option.about, choices=tuple(KEEP_METHODS))
    default = option.default.method if isinstance(option.default, Keep) else option.default
    method = dataclasses.replace(option, kind=str, default=default, about=about)
    options: dict[str, OptionField] = {}
    methods: dict[str, list[str]] = {}
    for name, kind in KEEP_METHODS.items():
        for own in _options_of(kind, option).values():
            if options.setdefault(own.name, own) != own:
                raise TypeError(f"keep methods {methods[own.name][0]} and {name} differ in {own}")
            methods.setdefault(own.name, []).append(name)
    return {
        option.name: method,
        **{name: _by_methods(own, methods[name]) for name, own in options.items()},
    }


def build_keep(option: OptionField, given: Mapping[str, Any]) -> Keep:
    """The method that is given with its options, or the default with the options that are given.

    OptionError for an option of another method, and for one that is missing.
    """
    kind = KEEP_METHODS[given.get(option.name) or option.default.method]
    values = {}
    own = _options_of(kind, option)
    for name in keep_options(option):
        if name == option.name or name not in given:
            continue
        if name not in own:
            raise OptionError(name, f": not an option of --keep {kind.method}{_reason(name, kind)}")
        values[name] = given[name]
    if type(option.default) is kind:
        return dataclasses.replace(option.default, **values)
    for name, part in own.items():
        if part.required and name not in values:
            raise OptionError(name, f": missing; --keep {kind.method} needs it")
    return kind(**values)


def _options_of(kind: type[Keep], option: OptionField) -> dict[str, OptionField]:
    """The options of a method that the command of `option` has."""
    own = options_of(kind)
    return {name: own[name] for name in own if name not in option.about.without}


def _reason(name: str, kind: type[Keep]) -> str:
    if name == "temperature" and kind.has_tail:
        return ", which stores probabilities at temperature 1; train-student has a --temperature"
    return ""


def _by_methods(option: OptionField, methods: list[str]) -> OptionField:
    """An option with the names of the methods in its help; no command needs it."""
    about = dataclasses.replace(option.about, help=f"{', '.join(methods)}: {option.about.help}")
    default = None if option.required else option.default
    return dataclasses.replace(option, default=default, about=about)
