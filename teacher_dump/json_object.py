"""JSON files of the teacher's folder: each is an object, or the error says which one is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shards.errors import InputError, one_line
from shards.files.git_lfs import refuse_lfs_pointer


def read_json_object(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; InputError, one line, for anything else.

    `optional`: a missing file is an empty object.
    """
    try:
        refuse_lfs_pointer(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if optional and not path.is_symlink():
            return {}
        raise InputError(f"{path}: missing") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {json.dumps(content)[:40]}")
    return content
