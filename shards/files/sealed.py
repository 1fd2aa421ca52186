"""Small JSON files that carry their format version and notice a flipped byte: manifest, sidecars.

They stay readable. The checksum covers the canonical form of the content: white space and key order
may change, and any other change is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.errors import ShardCorruptError, ShardFormatError
from shards.files.json_text import canonical_json
from shards.schema import FORMAT_VERSION

_VERSION = "format_version"
_CHECKSUM = "checksum"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def seal(content: Mapping[str, Any]) -> str:
    """Indented JSON of an object, between its format version and a checksum over both."""
    versioned = {_VERSION: FORMAT_VERSION, **content}
    sealed = {**versioned, _CHECKSUM: _checksum(versioned)}
    return json.dumps(sealed, indent=2, allow_nan=False) + "\n"


def unseal(path: Path) -> dict[str, Any]:
    """The content that `seal` was given, from a file.

    ShardFormatError for another format version; ShardCorruptError if the file is not JSON or not
    what was sealed; OSError if it cannot be read.
    """
    damaged = ShardCorruptError(f"{path}: damaged: its content does not match its own checksum")
    try:
        content = json.loads(path.read_bytes())
        version = content[_VERSION]
        # Before the checksum, which another version may compute differently.
        if version != FORMAT_VERSION:
            raise ShardFormatError(
                f"{path}: format version {version!r}, this release reads version {FORMAT_VERSION}"
            )
        checksum = content.pop(_CHECKSUM)
        if _checksum(content) != checksum:
            raise damaged
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    del content[_VERSION]
    assert isinstance(content, dict)
    return content
