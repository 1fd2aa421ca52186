"""`--config FILE.yaml`: values of options by their names, with every type checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitshards.option_values import (
    is_mapping,
    item_of,
    read_mapping,
    read_sequence,
    scalar,
    shown,
    value_text,
)
from logitshards.yaml_text import TwiceError, load_yaml
from shards.errors import InputError
from shards.options import OptionError, OptionField


def read_config(path: Path, options: Mapping[str, OptionField]) -> dict[str, Any]:
    """The values of a file by option name.

    InputError names the file, the key, the expected and the found value. An empty value leaves an
    optional option out.
    """
    content = _load(path)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_") if isinstance(key, str) else ""
        if name not in options:
            raise InputError(f"{path}: unknown option {shown(key)}")
        if name in values:
            raise InputError(f"{path}: {shown(key)}: appears twice")
        try:
            values[name] = read_value(options[name], value)
        except ValueError as error:
            raise InputError(f"{path}: {key}: {error}") from error
    return {name: value for name, value in values.items() if value is not None}


def read_value(option: OptionField, value: object) -> Any:
    """An option's value from a YAML value. ValueError says what was expected and found."""
    if value is None and option.default is None:
        return None
    if is_mapping(option.kind):
        return read_mapping(value)
    item = item_of(option.kind)
    if item is not None:
        return read_sequence(scalar(item), value, commas=item is not Path)
    return scalar(option.kind, option.about.choices).read(value)


def _load(path: Path) -> Mapping[object, object]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OptionError("config", f" {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    except TwiceError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # PyYAML lets a few of other kinds through
        raise InputError(f"{path}: not valid YAML ({error})") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected option names and values, found {value_text(content)}")
    return content
