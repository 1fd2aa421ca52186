"""What people read is plain English: short sentences, the actor first, no stilted phrases."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from tests.command_runs import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CHANGELOG.md", *(f"docs/{name}" for name in DOCS)]
HELPS = [None, *COMMANDS]
MODULES = [
    str(path.relative_to(ROOT))
    for package in ("logitshards", "shards", "student_train", "teacher_dump")
    for path in sorted((ROOT / package).rglob("*.py"))
]

# A pattern, and what to write instead. Capitals matter only where a pattern has them: these begin a
# sentence.
STILTED = {
    r"\bof which\b": "begin a new sentence",
    r"\b[Ll]ikewise\b": "also, or say it again",
    r"\b(is|are|was|were|and) said\b": "say who prints, logs or records it",
    r"\bso many\b": "a number, or 'this many'",
    r"\bwhat (is|was|were) (given|there|asked for)\b": "name the input, the file or the option",
    r"\bbe meant\b": "invalid, or the right one",
    r"\b(leave|left) (an? )?\w+ for later\b": "say what runs later, and when",
    r"\bnobody's\b": "say what does not happen",
    r"\bin their order\b": "in the same order",
    r"\bfurther epochs\b": "repeats the dataset",
    r"\bthere twice\b": "appears twice",
    r"\b(is|are|was|were) not there\b|: not there\b": "missing",
    r"\bsomething else\b": "name it",
    r"\bmoved to the grid\b": "rounded to the grid",
    r"\bby a lock on it\b": "a lock keeps two runs from ...",
    r"\bwith the name of the difference\b": "the message names what differs",
    r"\b[Tt]he refusal\b": "the error",
    r"\b[Ww]hoever\b": "name the actor",
    r"\bmakes?\b[^.]{0,60}\bshards? again\b": "rewrites",
    r"\bAs many as\b": "one per ..., or at most ...",
    r"\bBegin each \w+ so\b": "say what the option does",
    r"\bOf (?!course\b)": "no sentence begins with 'Of': name the thing",
    r"\b(Kept|Compared|Left out|Named|Stored|Refused|Read|Measured) (is|are)\b": "the actor first",
    r"\bSo (is|are|does|do) (the|it)\b": "this also holds for ...",
    r"\bWhat [^.?|]{0,80}\b(is|are) (refused|rejected|an error)\b": "the actor first",
}


def prose(markdown: str) -> str:
    """A page without code, on one line."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE)
    return " ".join(re.sub(r"`[^`]*`", "x", text).split())


def stilted(text: str) -> list[str]:
    """Each stilted phrase with its surroundings, and what to write instead."""
    return [
        f"...{text[max(0, match.start() - 40) : match.end() + 40]}... ({better})"
        for pattern, better in STILTED.items()
        for match in re.finditer(pattern, text)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_no_page_has_a_stilted_phrase(page: str) -> None:
    assert stilted(prose((ROOT / page).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("name", HELPS)
def test_no_help_has_a_stilted_phrase(name: str | None) -> None:
    command = cli.main if name is None else COMMANDS[name]
    result = CliRunner().invoke(command, ["--help"])
    assert "Options:" in result.output
    assert stilted(" ".join(result.output.split())) == []


def messages(path: Path) -> list[str]:
    """The texts of a module that users read: of errors that it raises, and of its log."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_log = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger.")
        if is_log or isinstance(node, ast.Raise):
            parts = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
            found.append(" ".join(str(part.value) for part in parts))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_message_has_a_stilted_phrase(module: str) -> None:
    for text in messages(ROOT / module):
        assert stilted(text) == []


def explanations(path: Path) -> list[str]:
    """The docstrings and comments of a module."""
    text = path.read_text(encoding="utf-8")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [*filter(None, map(ast.get_docstring, nodes)), *comments]


@pytest.mark.parametrize("module", MODULES)
def test_no_docstring_and_no_comment_has_a_stilted_phrase(module: str) -> None:
    for text in explanations(ROOT / module):
        assert stilted(" ".join(text.split())) == []


def test_many_messages_are_read() -> None:
    texts = [text for module in MODULES for text in messages(ROOT / module)]
    assert len(texts) > 300
    assert any("run the same command again to continue" in text for text in texts)


@pytest.mark.parametrize(
    "text",
    [
        "Kept are, per position, the smallest set of entries.",
        "Another corpus is refused with the name of the difference.",
        "The signals leave an evaluation for later.",
        "The exit code is 2 for what was given.",
        "Two runs do not write into one folder, by a lock on it.",
        "A larger size makes each split's last, short shard again.",
        "Begin each document so.",
        "Of AdamW.",
        "draws: so many, with replacement, per position",
        "more than the dataset has: further epochs",
        "As many as --corpus, in their order.",
        "The threshold is moved to the grid and said.",
        "A token that is then nobody's label.",
        "What shows that they are not is refused.",
        "Of a teacher that an engine does not take, the refusal says why.",
        "There are two ways, the first of which is the default.",
        "Lists come in every type, likewise masks.",
    ],
)
def test_a_stilted_phrase_is_found(text: str) -> None:
    assert stilted(text)


@pytest.mark.parametrize(
    "text",
    [
        "For each position it keeps the smallest set of entries.",
        "A lock keeps two runs from writing to one folder.",
        "rewrites each split's short last shard",
        "So the logits of a whole batch never exist.",
        "What runs the teacher.",
        "One per --corpus, in the same order.",
    ],
)
def test_plain_english_passes(text: str) -> None:
    assert stilted(text) == []
