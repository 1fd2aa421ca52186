"""A document of any length: pieces that are the same everywhere, in little memory."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_dump.corpus.listing import list_corpus
from teacher_dump.tokenizer import load_tokenizer
from teacher_dump.tokens import long_documents
from teacher_dump.tokens.encoding import make_encoder
from teacher_dump.tokens.long_documents import cut_at_line_ends, encode_texts
from teacher_dump.tokens.open_store import open_or_build
from tests.test_token_store import rules_of
from tests.tiny_teacher import ROOT


@given(st.text(alphabet="ab\n", max_size=60), st.integers(1, 9))
def test_pieces_are_the_text_and_end_with_lines(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_documents, "PIECE_CHARACTERS", size)
        pieces = list(cut_at_line_ends(text))
    assert "".join(pieces) == text
    for piece in pieces[:-1]:
        assert 0 < len(piece) <= size
        assert piece.endswith("\n") or (len(piece) == size and "\n" not in piece)


@pytest.mark.parametrize("between", [" ", "\n"])
def test_a_long_document_is_one_document_and_said_once(
    between: str,
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(long_documents, "LONG_CHARACTERS", 1000)
    monkeypatch.setattr(long_documents, "PIECE_CHARACTERS", 300)
    caplog.set_level(logging.INFO)
    numbers = np.random.default_rng(0).integers(100, 300, 400)
    (tmp_path / "a.txt").write_text("".join(f"w{number}{between}" for number in numbers))
    (tmp_path / "b.txt").write_text("w1 w2")
    tokenizer = load_tokenizer(tiny_teacher)
    files = list_corpus([tmp_path / "a.txt", tmp_path / "b.txt"], [3.0, 1.0]).files
    rules = rules_of(tokenizer, held_out=0.0)
    store = open_or_build(tmp_path / "store", files, tokenizer, rules, lambda *_: None)
    found = store.sequences("train", 10_000)[0]
    assert found.segments.max() == 3  # three copies and the short one
    if between == "\n":  # pieces of words are words, and 300 is a multiple of 5 characters
        assert found.tokens[:401].tolist() == [*numbers, 0]
    said = [record.getMessage() for record in caplog.records if "pieces" in record.getMessage()]
    assert said == [
        f"{tmp_path}/a.txt: encoding a document of 2,000 characters in pieces, cut at line ends"
    ]


def test_only_a_text_above_the_limit_is_cut(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder(load_tokenizer(tiny_teacher))
    texts = ["w1 w2", "w1 w2 w3 w4", "", "w5"]
    whole = encode_texts(texts, encoder, np.dtype(np.uint16))
    assert [tokens.tolist() for tokens in whole] == [[1, 2], [1, 2, 3, 4], [], [5]]
    monkeypatch.setattr(long_documents, "LONG_CHARACTERS", 5)
    monkeypatch.setattr(long_documents, "PIECE_CHARACTERS", 6)
    cut = encode_texts(texts, encoder, np.dtype(np.uint16))
    assert [tokens.tolist() for tokens in cut] == [tokens.tolist() for tokens in whole]


MEASURE = """
import resource, sys
from pathlib import Path
from teacher_dump.corpus.listing import list_corpus
from teacher_dump.tokens.open_store import open_or_build
from teacher_dump.tokenizer import load_tokenizer
from tests.test_token_store import rules_of
tokenizer = load_tokenizer(Path(sys.argv[1]))
files = list_corpus([Path(sys.argv[2])]).files
rules = rules_of(tokenizer, held_out=0.0)
open_or_build(Path(sys.argv[3]), files, tokenizer, rules, lambda *_: None)
print("KB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("between", [" ", "\n"])
def test_a_document_of_26_mb_takes_less_than_500_mb(
    between: str, smollm2: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    letters = random.choice(list("etaoinshrdlu"), (5000, 6))
    words = np.array(["".join(word) for word in letters])
    lines = [" ".join(line) for line in random.choice(words, (320_000, 12))]
    (tmp_path / "small.txt").write_text(between.join(lines[:100]))
    (tmp_path / "large.txt").write_text(between.join(lines)[:26_000_000])
    assert (tmp_path / "large.txt").stat().st_size > 25_000_000

    def peak_mb(name: str) -> float:
        command: list[Any] = [sys.executable, "-c", MEASURE, smollm2, tmp_path / f"{name}.txt"]
        result = subprocess.run(
            [*map(str, command), str(tmp_path / name)],
            check=True, capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        found = re.search(r"KB (\d+)", result.stdout)
        assert found is not None
        return int(found[1]) / 1024

    assert peak_mb("large") - peak_mb("small") < 500
