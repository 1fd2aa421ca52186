"""Engines that are right at the end of a prompt alone are found out before the first shard."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.errors import RunError
from shards.keep import Draws, Keep, Threshold, TopPK
from shards.rows import Int32Array
from teacher_dump.config import DumpConfig
from teacher_dump.dump import run
from teacher_dump.engines import transformers_engine
from teacher_dump.engines.options import EngineOptions
from teacher_dump.engines.transformers_engine import TransformersEngine
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.rows import TokenSequence
from teacher_dump.prefix_check import score_checked
from tests.tiny_teacher import TOKENIZER_LENGTH, make_tiny_teacher, write_corpus

LENGTH = 64
KEEPS = [TopPK(top_k=20), Threshold(), Draws()]
SAYS_SO = "the engine says the same in the middle of a prompt as at its end"


class KeepsTheLastRows(TransformersEngine):
    """Rows before the last window of a prompt are those of other positions: vLLM's replay."""

    def logits(self, tokens: Int32Array) -> Iterator[torch.Tensor]:
        whole = torch.cat(list(super().logits(tokens)))
        rows = torch.arange(len(whole))
        window = 8
        yield whole[torch.where(rows < len(whole) - window, rows % window, rows)]


class ShiftsRows(TransformersEngine):
    """Every row is that of the position before, as with labels that are wrong by one."""

    def logits(self, tokens: Int32Array) -> Iterator[torch.Tensor]:
        yield torch.cat(list(super().logits(tokens))).roll(1, 0)


class ShiftsRowsBack(TransformersEngine):
    """Every row is that of the next position."""

    def logits(self, tokens: Int32Array) -> Iterator[torch.Tensor]:
        yield torch.cat(list(super().logits(tokens))).roll(-1, 0)


class RightAtTheEndAlone(TransformersEngine):
    """Every position but the last says the same whatever the prompt is: vLLM's fast prefill."""

    def logits(self, tokens: Int32Array) -> Iterator[torch.Tensor]:
        whole = torch.cat(list(super().logits(tokens)))
        whole[:-1] = whole[:1]
        yield whole


class WrongInOnePiece(TransformersEngine):
    """A stretch in the middle of long prompts is that of another one."""

    def logits(self, tokens: Int32Array) -> Iterator[torch.Tensor]:
        whole = torch.cat(list(super().logits(tokens)))
        if len(tokens) == LENGTH:
            whole[16:32] = whole[32:48]
        yield whole


class LooksAhead(TransformersEngine):
    """Attention reaches later positions: the last token changes what the first ones say."""

    def logits(self, tokens: Int32Array) -> Iterator[torch.Tensor]:
        whole = torch.cat(list(super().logits(tokens)))
        yield whole + 0.5 * whole.mean(0)


WRONG = [
    KeepsTheLastRows,
    ShiftsRows,
    ShiftsRowsBack,
    RightAtTheEndAlone,
    WrongInOnePiece,
    LooksAhead,
]


def _config(teacher: Path, out: Path, *, keep: Keep, dtype: str = "bfloat16") -> DumpConfig:
    corpus = out.parent / "corpus.jsonl"
    return DumpConfig(
        teacher=str(teacher),
        corpus=[write_corpus(corpus, num_documents=40)],
        out=out,
        keep=keep,
        engine="transformers",
        dtype=dtype,
        sequence_length=LENGTH,
        sequences_per_shard=2,
    )


@pytest.mark.parametrize(
    ("wrong", "keep"),
    [
        *((wrong, KEEPS[0]) for wrong in WRONG),
        *((KeepsTheLastRows, keep) for keep in KEEPS[1:]),
    ],
)
def test_an_engine_that_is_wrong_in_the_middle_of_a_prompt_writes_no_shard(
    wrong: type[TransformersEngine],
    keep: Keep,
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformers_engine, "start", wrong)
    out = tmp_path / "out"
    with pytest.raises(RunError, match="does not give this teacher's targets") as error:
        run(_config(tiny_teacher, out, keep=keep))
    assert "in train sequence 0: " in str(error.value)
    assert not list(out.rglob("*.parquet"))


class HasHardlyLearned(TransformersEngine):
    """The tokens before a position hardly matter, as early in training."""

    def logits(self, tokens: Int32Array) -> Iterator[torch.Tensor]:
        whole = torch.cat(list(super().logits(tokens)))
        yield 0.02 * whole


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_teacher_of_little_training_passes(
    dtype: str,
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(transformers_engine, "start", HasHardlyLearned)
    caplog.set_level(logging.INFO)
    run(_config(tiny_teacher, tmp_path / "out", keep=KEEPS[0], dtype=dtype))
    assert SAYS_SO in caplog.text


@pytest.mark.parametrize(
    ("keep", "dtype"), [*((keep, "bfloat16") for keep in KEEPS), (KEEPS[0], "float32")]
)
def test_a_right_engine_passes_and_the_log_says_how_well(
    keep: Keep, dtype: str, tiny_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(_config(tiny_teacher, tmp_path / "out", keep=keep, dtype=dtype))
    (line,) = [line for line in caplog.messages if line.startswith(SAYS_SO)]
    difference = float(line.partition("within ")[2].split()[0])
    assert difference < (1e-3 if dtype == "float32" else 0.5)


def test_every_sequence_comes_out_once_and_an_engine_is_checked_once(
    tiny_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = _engine(tiny_teacher)
    random = np.random.default_rng(0)
    lengths = [2, 9, 40, 65, 3, 65]
    sequences = [
        TokenSequence(
            split="train",
            number=number,
            tokens=random.integers(1, TOKENIZER_LENGTH, length).astype(np.int32),
            segments=np.zeros(length, np.int32),
            loss_mask=random.random(length - 1) < 0.5,
        )
        for number, length in enumerate(lengths)
    ]
    config = _config(tiny_teacher, tmp_path / "out", keep=KEEPS[0], dtype="float32")
    scored = list(score_checked(engine, sequences, config))
    assert sorted(sequence.number for sequence, _ in scored) == list(range(len(lengths)))
    assert {sequence.number for sequence, _ in scored[:2]} == {0, 3}  # 3 is the first long one
    for sequence, selected in scored:
        assert len(selected.counts) == len(sequence.tokens) - 1
    again = [sequence.number for sequence, _ in score_checked(engine, sequences, config)]
    assert again == list(range(len(lengths)))
    assert [line.startswith(SAYS_SO) for line in caplog.messages].count(True) == 1


@pytest.mark.parametrize("lengths", [[], [2], [2, 2], [3]])
def test_sequences_without_a_middle_are_scored_all_the_same(
    lengths: list[int], tiny_teacher: Path, tmp_path: Path
) -> None:
    engine = _engine(tiny_teacher)
    sequences = [
        TokenSequence(
            split="train",
            number=number,
            tokens=np.arange(1, length + 1, dtype=np.int32),
            segments=np.zeros(length, np.int32),
        )
        for number, length in enumerate(lengths)
    ]
    config = _config(tiny_teacher, tmp_path / "out", keep=KEEPS[0], dtype="float32")
    assert sum(1 for _ in score_checked(engine, sequences, config)) == len(lengths)


@pytest.mark.parametrize(
    ("rope", "checked"),
    [
        ({"rope_type": "default"}, True),
        ({"rope_type": "dynamic", "factor": 8.0}, False),
        ({"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [9.0] * 32,
          "original_max_position_embeddings": 32}, False),
    ],
)  # fmt: skip
def test_teachers_whose_positions_depend_on_the_length_are_not_compared(
    rope: dict[str, object],
    checked: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher = make_tiny_teacher(tmp_path / "teacher", max_position_embeddings=32)
    path = teacher / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["rope_parameters"] = {"rope_theta": 1e4, **rope}
    config["max_position_embeddings"] = 64 if rope["rope_type"] != "dynamic" else 32
    path.write_text(json.dumps(config), encoding="utf-8")
    caplog.set_level(logging.INFO)
    engine = _engine(teacher)
    assert engine.prefixes_agree == checked
    tokens = np.random.default_rng(0).integers(1, TOKENIZER_LENGTH, 65).astype(np.int32)
    sequence = TokenSequence(split="train", number=0, tokens=tokens, segments=tokens * 0)
    more = _config(teacher, tmp_path / "out", keep=KEEPS[0], dtype="float32")
    assert len(list(score_checked(engine, [sequence], more))) == 1
    assert any(line.startswith(SAYS_SO) for line in caplog.messages) == checked
    # and such a teacher does say something else in a longer sequence
    (whole,) = (selected.label_logprobs for _, selected in engine.score([sequence]))
    half = replace(sequence, tokens=tokens[:25], segments=sequence.segments[:25])
    (short,) = (selected.label_logprobs for _, selected in engine.score([half]))
    assert np.allclose(whole[:24], short, rtol=0, atol=1e-4) == checked


def _engine(teacher: Path) -> TransformersEngine:
    options = EngineOptions(
        teacher_folder=teacher,
        architecture="LlamaForCausalLM",
        dtype="float32",
        head_dtype="float32",
        sequence_length=LENGTH,
        selection=Selection(TopPK(top_k=5), TOKENIZER_LENGTH),
    )
    return TransformersEngine(options)
