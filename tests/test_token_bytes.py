"""Bytes of tokens against the texts that they decode to."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from student_train.evaluation.token_bytes import bytes_by_id
from tests.tiny_dataset import VOCAB_SIZE, make_tokenizer

TEXTS = ["Grüße, a\tb\n 日本 x\U0001f600  y", "plain words and plain words", "naïve — “quoted”"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    letters = ["▁", "▁▁", "a", "▁a", "ü", "日"]
    pieces = ["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "▁"), ("▁", "a")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.add_tokens([AddedToken("▁▁", special=False, normalized=False)])  # as Gemma's
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_bytes_of_a_text_are_those_of_its_tokens(make: object, tmp_path: Path) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    tokenizer.add_tokens([AddedToken("w0rd", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table = bytes_by_id(tmp_path / "tokenizer.json", tokenizer.get_vocab_size())
    assert table is not None
    for text in [*TEXTS, "a w0rd"]:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert table[ids].sum() == len(text.encode())
    assert table[tokenizer.token_to_id("<eos>")] == 0


def test_bytes_that_a_tokenizer_does_not_tell_are_not_made_up(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert bytes_by_id(tmp_path / "tokenizer.json", VOCAB_SIZE) is None
    assert bytes_by_id(tmp_path / "nothing.json", VOCAB_SIZE) is None
