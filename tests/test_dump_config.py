"""What follows from a configuration, and what a run says before it starts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from shards.keep import Tokens
from teacher_dump.config import DumpConfig
from teacher_dump.dump import run
from tests.tiny_teacher import write_corpus


def config_of(**changes: object) -> DumpConfig:
    options: dict[str, object] = {"teacher": "T", "corpus": [Path("C")], "out": Path("O")}
    return DumpConfig(**{**options, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "documents", "mean", "expected"),
    [
        (2048, "joined", 2048, 128 << 10),
        (2048, "separate", 500, 128 << 10),  # 64 sequences' worth already
        (8192, "separate", 500, 32 * 8192),
        (65_536, "separate", 900, 1 << 20),
        (65_536, "joined", 65_536, 128 << 10),
    ],
)
def test_row_groups_of_separate_documents_are_large_enough_to_pack_well(
    length: int, documents: str, mean: int, expected: int
) -> None:
    layout = config_of(sequence_length=length, documents=documents).layout(mean)
    tokens = layout.sequences_per_row_group * mean
    assert expected - mean < tokens <= expected
    assert layout.sequences_per_shard * mean <= 2 << 20


def test_a_run_prints_what_it_reads_and_how_its_first_sequence_begins(
    tiny_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = write_corpus(corpus / "a.jsonl", num_documents=5).read_text()
    (corpus / "b.csv").write_text("text\nw1\n")
    config = config_of(
        teacher=None,
        tokenizer=str(tiny_teacher),
        keep=Tokens(),
        corpus=[corpus],
        out=tmp_path / "out",
        sequence_length=32,
        held_out=0.0,
    )
    with caplog.at_level(logging.INFO):
        run(config)
    said = caplog.text
    assert "b.csv" in said
    assert said.index("b.csv") < said.index("train sequence 0 begins: '")
    first_words = text.split('"text": "')[1][:30]
    assert f"train sequence 0 begins: '{first_words}" in said
