"""Text that comes with every Python: language reference, docstrings and library sources.

Written as JSON lines under the key `text`. Which files are taken depends on the Python version
alone, so a machine makes the same corpus every time.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS = 400
MAX_CHARACTERS = 6000
MODULES = "abc argparse ast bisect calendar cmd code codecs collections contextlib copy csv " \
    "dataclasses difflib dis doctest enum fileinput fnmatch fractions ftplib functools getopt " \
    "glob gzip hashlib heapq imaplib inspect ipaddress keyword locale mailbox mimetypes netrc " \
    "numbers operator optparse pathlib pdb pickle platform poplib pprint profile queue quopri " \
    "random reprlib sched secrets selectors shelve shlex shutil smtplib socket socketserver " \
    "statistics string stringprep struct subprocess symtable tabnanny tarfile tempfile textwrap " \
    "threading timeit tokenize trace traceback typing uuid warnings wave weakref webbrowser " \
    "zipapp zipfile".split()  # fmt: skip  # noqa: SIM905


def documents() -> Iterator[str]:
    """The language reference topic by topic, then pieces of the standard library's sources."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip()
    library = Path(sysconfig.get_paths()["stdlib"])
    for module in MODULES:
        path = library / f"{module}.py"
        if not path.exists():
            path = library / module / "__init__.py"
        if path.exists():
            yield from pieces(path.read_text(encoding="utf-8", errors="strict"))


def pieces(source: str) -> Iterator[str]:
    """A long source cut at blank lines between top-level statements."""
    piece: list[str] = []
    size = 0
    for block in source.split("\n\n\n"):
        if size and size + len(block) > MAX_CHARACTERS:
            yield "\n\n\n".join(piece)
            piece, size = [], 0
        piece.append(block)
        size += len(block)
    yield "\n\n\n".join(piece)


def main(out: Path) -> None:
    """Write the corpus; a finished file is left alone."""
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".part")
    with temporary.open("w", encoding="utf-8") as stream:
        for text in documents():
            if len(text) >= MIN_CHARACTERS:
                stream.write(json.dumps({"text": text[: 8 * MAX_CHARACTERS]}) + "\n")
    temporary.replace(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
