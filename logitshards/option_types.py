"""click options from option fields: types, help, choices, defaults to show, shell completion.

Values from a configuration file come typed already (`config_file.py`) and pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from logitshards.option_values import (
    Scalar,
    is_mapping,
    item_of,
    scalar,
    shown,
    split_commas,
    split_pair,
)
from shards.options import OptionError, OptionField, flag, listed


class TextType(click.ParamType[Any]):
    """Values by a function of the text, which raises ValueError for an invalid one."""

    def __init__(self, name: str, from_text: Callable[[str], Any]) -> None:
        self.name = name
        self._from_text = from_text

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value of a text; anything else is one already."""
        if not isinstance(value, str):
            return value
        try:
            return self._from_text(value)
        except ValueError as error:
            name = "" if param is None else param.name or ""
            raise OptionError(name, f" {shown(value)}: {error}") from error

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Paths are completed by the shell."""
        return [CompletionItem(incomplete, type="file")] if self.name == "path" else []


class ChoiceType(click.Choice[str]):
    """One of a few texts, with an error in our form."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, if it is one of them."""
        if value not in self.choices:
            name = "" if param is None else param.name or ""
            raise OptionError(name, f" {shown(value)}: expected {listed(self.choices)}")
        return str(value)


def click_option(option: OptionField) -> click.Option:
    """The click option of a field."""
    about = option.about
    name = flag(option.name)
    attributes: dict[str, Any] = {
        "help": about.help,
        "required": option.required,
        "show_default": about.shown_default or True,
        "metavar": about.metavar,
    }
    if not option.required and option.default is not None and not is_mapping(option.kind):
        attributes["default"] = option.default
    if option.kind is bool:
        name += "" if option.default is False else f"/--no-{name.removeprefix('--')}"
        return click.Option([name, option.name], is_flag=True, **attributes)
    kind, multiple = _type_of(option)
    return click.Option([name, option.name], type=kind, multiple=multiple, **attributes)


def path_type() -> TextType:
    """The type of paths."""
    return _of_scalar(scalar(Path))


def _type_of(option: OptionField) -> tuple[click.ParamType[Any], bool]:
    """The click type of an option, and whether it may be given several times."""
    choices: Sequence[str] = option.about.choices
    if choices:
        return ChoiceType(choices), False
    if is_mapping(option.kind):
        return TextType("KEY=VALUE", split_pair), True
    item = item_of(option.kind)
    if item is None:
        return _of_scalar(scalar(option.kind)), False
    if item is Path:
        return path_type(), True
    return TextType("list", lambda text: split_commas(scalar(item), text)), False


def _of_scalar(kind: Scalar) -> TextType:
    return TextType(kind.name, kind.from_text)
