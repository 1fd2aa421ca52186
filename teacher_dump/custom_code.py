"""A teacher's own Python code: rejected unless trusted, and then part of the teacher's identity.

A model folder may name code of its own (`auto_map`), which runs with the user's rights as soon as
anything is loaded from the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.errors import InputError
from shards.files.checksums import path_sha256
from teacher_dump.json_object import read_json_object

_NAMING = ("config.json", "tokenizer_config.json")


def custom_code_sha256(folder: Path, *, trusted: bool) -> str | None:
    """One hash over all Python files of a folder that names code of its own; None for others.

    Raises InputError where the code is not trusted, and where it lies outside of the folder.
    """
    maps = {name: auto_map for name in _NAMING if (auto_map := _auto_map(folder / name))}
    if not maps:
        return None
    if not trusted:
        raise InputError(
            f"{folder}: contains Python code (auto_map in {' and '.join(maps)}); "
            "read it, and give --trust-remote-code to run it"
        )
    for name, auto_map in maps.items():
        for reference in _references(auto_map):
            if "--" in reference:
                raise InputError(
                    f"{folder / name}: {reference} is code of another repository, so the dataset"
                    " cannot identify it; copy the code into the folder and name it there"
                )
    lines = [
        f"{path.relative_to(folder).as_posix()} {path_sha256(path)}\n"
        for path in sorted(folder.rglob("*.py"))
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _auto_map(path: Path) -> dict[str, Any]:
    auto_map = read_json_object(path, optional=True).get("auto_map") or {}
    if isinstance(auto_map, list):  # an older way of a tokenizer_config.json
        return {"AutoTokenizer": auto_map}
    if not isinstance(auto_map, dict):
        raise InputError(f"{path}: auto_map is {json.dumps(auto_map)[:40]}, expected a JSON object")
    return auto_map


def _references(auto_map: dict[str, Any]) -> Iterator[str]:
    """`module.Class` of every entry; a tokenizer has two, and one of them may be null."""
    for value in auto_map.values():
        entries = value if isinstance(value, list) else [value]
        yield from (str(entry) for entry in entries if entry)
