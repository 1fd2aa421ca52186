"""What benchmarks of the teacher pass run on: sequences, options, a part of a teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

_WIDTHS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def read_sequences(corpus: Path, teacher: Path, count: int, length: int) -> list[Any]:
    """The first sequences of a JSON-lines text, repeated if it is short, tokens [length + 1]."""
    from teacher_dump.keep.rows import TokenSequence
    from teacher_dump.tokenizer import load_tokenizer
    from teacher_dump.tokens.encoding import make_encoder

    tokenizer = load_tokenizer(teacher)
    encoder = make_encoder(tokenizer)
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    encoded = [
        ids
        for text in texts
        for ids in [*encoder.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id]
    ]
    tokens = np.resize(np.array(encoded, dtype=np.int32), count * length + 1)
    segments = np.zeros(length + 1, dtype=np.int32)
    return [
        TokenSequence(
            split="train",
            number=number,
            tokens=tokens[number * length : (number + 1) * length + 1],
            segments=segments,
        )
        for number in range(count)
    ]


def engine_options(teacher: Path, length: int, selection: Any) -> Any:
    """A bfloat16 teacher with a float32 head, which is what `dump-logits` makes of SmolLM2."""
    from teacher_dump.engines.options import EngineOptions
    from teacher_dump.teacher import find_teacher

    return EngineOptions(
        teacher_folder=teacher,
        architecture=find_teacher(str(teacher), None).architecture,
        dtype="bfloat16",
        head_dtype="float32",
        sequence_length=length,
        selection=selection,
    )


def part_of(teacher: Path, num_layers: int | None, divisor: int) -> Path:
    """A copy of a model with its first layers and a part of its width alone, beside it, made once.

    The width is what `divisor` leaves of hidden size, heads and MLP. Predictions of the copy mean
    nothing; its vocabulary is the model's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(teacher)
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        config.layer_types = None
    for name in _WIDTHS:
        if getattr(config, name) % divisor:
            raise ValueError(f"{name} {getattr(config, name)} cannot be divided by {divisor}")
        setattr(config, name, getattr(config, name) // divisor)
    folder = teacher.with_name(f"{teacher.name}-{config.num_hidden_layers}x{config.hidden_size}")
    if folder.exists():
        return folder
    whole = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    model = AutoModelForCausalLM.from_config(config)
    part = {
        name: whole[name][tuple(map(slice, value.shape))]
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(part)
    temporary = folder.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for file in teacher.iterdir():
        if not (temporary / file.name).exists() and not file.name.startswith("model"):
            shutil.copy(file, temporary)
    temporary.rename(folder)
    return folder
