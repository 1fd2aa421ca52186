"""Packed documents through a student as it is trained on them, against each document alone.

The student is the product's own way to it: `block_at_joints` chooses the attention (flex attention
on a GPU), `prepare_blocks` compiles the blocks. Hidden states and the gradient of all weights are
compared in the 2-norm. Errors are of the norm of the exact value, which is float32 and alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.gpu.check import Figures, expect, find_device, peak_bytes
from benchmarks.selection_speed import seconds_of
from student_train.config import TrainConfig
from student_train.model.blocks import prepare_blocks
from student_train.model.model import hidden_states
from student_train.model.packed_attention import block_at_joints
from student_train.step import autocast_for

# Four layers of the preset 330M.
FULL = {
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
# Documents of each line: around the blocks of 128 of flex attention, one token, a whole line.
FULL_LINES = ((1, 127, 128, 129, 640, 1023), (2048,), (700, 1, 1, 1346), (1500, 548))
SMALL_LINES = ((1, 7, 8, 9, 39), (64,), (30, 1, 1, 32), (50, 14))

FLOAT32_ERROR = 1e-3
BFLOAT16_FACTOR = 2.0  # what packed documents may be off, of what each alone is
JOINED_ERROR = 1e-2  # the least that a model is off that reads over the joints
ROUNDS = 5


class Piece(NamedTuple):
    """A part of a batch that the model reads at once; positions None: it is one document."""

    rows: slice
    columns: slice
    positions: Tensor | None = None


class Outcome(NamedTuple):
    """Hidden states [B, L, D] and the gradient of all weights, flat, float32."""

    states: Tensor
    gradient: Tensor


class Case:
    """A model, a batch of lines of several documents each, and the exact outcome."""

    def __init__(
        self, model: PreTrainedModel, tokens: Tensor, lengths: Sequence[Sequence[int]]
    ) -> None:
        """tokens [B, L]; `lengths` are those of the documents of each line."""
        self._model, self._tokens, self._lengths = model, tokens, lengths
        size = (*tokens.shape, model.config.hidden_size)
        random = torch.Generator().manual_seed(1)
        self._gradient = torch.randn(size, generator=random).to(tokens.device)  # of the states
        self._exact = self._run(self.alone(), nullcontext())

    def packed(self) -> list[Piece]:
        """The whole batch at once, by positions that begin again."""
        rows = [torch.cat([torch.arange(n) for n in line]) for line in self._lengths]
        return [Piece(slice(None), slice(None), torch.stack(rows).to(self._tokens.device))]

    def joined(self) -> list[Piece]:
        """The whole batch at once, as if a line was one document."""
        return [Piece(slice(None), slice(None))]

    def alone(self) -> list[Piece]:
        """Each document."""
        pieces = []
        for number, line in enumerate(self._lengths):
            for first, last in pairwise(accumulate(line, initial=0)):
                pieces.append(Piece(slice(number, number + 1), slice(first, last)))
        return pieces

    def errors(
        self, pieces: Sequence[Piece], autocast: AbstractContextManager[object]
    ) -> dict[str, float]:
        """How far states and gradient are from the exact ones."""
        found = self._run(pieces, autocast)
        return {
            name: (torch.linalg.vector_norm((a - b).double()) / b.double().norm()).item()
            for name, a, b in zip(Outcome._fields, found, self._exact, strict=True)
        }

    def seconds(self, pieces: Sequence[Piece], autocast: AbstractContextManager[object]) -> float:
        """Of a forward and backward pass."""
        run = partial(self._run, pieces, autocast)
        return statistics.median(seconds_of(run, self._tokens.device) for _ in range(ROUNDS))

    def _run(self, pieces: Sequence[Piece], autocast: AbstractContextManager[object]) -> Outcome:
        self._model.zero_grad(set_to_none=True)
        all_states = torch.full_like(self._gradient, torch.nan)
        for piece in pieces:
            where = (piece.rows, piece.columns)
            with autocast:
                states = hidden_states(self._model, self._tokens[where], piece.positions)
            states.float().backward(self._gradient[where])  # type: ignore[no-untyped-call]
            all_states[where] = states.detach().float()
        gradients = [p.grad.flatten() for p in self._model.parameters() if p.grad is not None]
        self._model.zero_grad(set_to_none=True)
        return Outcome(all_states, torch.cat(gradients))


def packed_attention(folder: Path, small: bool) -> Figures:
    """Errors of states and gradients, and seconds of a forward and backward pass."""
    device = find_device()
    shape, lengths = (SMALL, SMALL_LINES) if small else (FULL, FULL_LINES)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(device).train()
    size = (len(lengths), sum(lengths[0]))
    tokens = torch.randint(model.config.vocab_size, size).to(device)
    float32, bfloat16 = nullcontext(), autocast_for("bfloat16", device)
    case = Case(model, tokens, lengths)
    short = Case(model, tokens[:-1], lengths[:-1])  # as the last micro batch of a step
    errors = {
        "joined": case.errors(case.joined(), float32),
        "alone_bfloat16": case.errors(case.alone(), bfloat16),
    }
    seconds = {"joined": case.seconds(case.joined(), bfloat16)}

    def choose() -> None:
        block_at_joints("the model", model, folder, length=size[1], autocast=bfloat16)

    seconds["choosing"] = seconds_of(choose, device)
    errors["packed_float32"] = case.errors(case.packed(), float32)
    errors["packed_bfloat16"] = case.errors(case.packed(), bfloat16)
    seconds["packed"] = case.seconds(case.packed(), bfloat16)
    seconds["compiling"] = seconds_of(partial(_compile, model, size, bfloat16), device)
    errors["compiled_bfloat16"] = case.errors(case.packed(), bfloat16)
    seconds["compiled"] = case.seconds(case.packed(), bfloat16)
    errors["short_bfloat16"] = short.errors(short.packed(), bfloat16)
    attention = model.config._attn_implementation
    if device.type == "cuda":
        expect(attention == "flex_attention", f"the attention is {attention}")
    _check(errors)
    return {
        "attention": attention,
        "errors": errors,
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
    }


def _check(errors: Mapping[str, Mapping[str, float]]) -> None:
    for kind in Outcome._fields:
        off = errors["joined"][kind]
        expect(off > JOINED_ERROR, f"joined documents: {kind} off by {off:.1e} only")
        rounding = errors["alone_bfloat16"][kind]
        for name, limit in (
            ("packed_float32", FLOAT32_ERROR),
            ("packed_bfloat16", BFLOAT16_FACTOR * rounding),
            ("compiled_bfloat16", BFLOAT16_FACTOR * rounding),
            ("short_bfloat16", BFLOAT16_FACTOR * rounding),
        ):
            off = errors[name][kind]
            expect(off < limit, f"{name}: {kind} off by {off:.1e}, expected less than {limit:.1e}")


def _compile(
    model: PreTrainedModel, size: tuple[int, int], autocast: AbstractContextManager[object]
) -> None:
    """As train-student --compile does it."""
    config = TrainConfig(
        shards=[Path()],
        student="the model",
        out=Path(),
        tokens=1,
        micro_batch_sequences=size[0],
        compile=True,
    )
    prepare_blocks(config, model, sequence_length=size[1], packed=True, autocast=autocast)
