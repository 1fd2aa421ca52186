"""The engine `transformers` against dense logits in float64, with a teacher made on the spot.

The exact logits are hidden states of the teacher times its head, both widened to float64. The
hidden states are those of the same model in the engine's dtype, so that what is compared are the
head, which must run in float32 without TF32, and the selection. In float32 the backbone is compared
too: its exact hidden states are float64.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.check import Figures, expect, find_device, peak_bytes
from shards.keep import TopPK
from shards.rows import Float32Array
from teacher_dump.engines.options import EngineOptions
from teacher_dump.engines.transformers_engine import TransformersEngine
from teacher_dump.keep.packed import Selected
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.rows import TokenSequence

FULL = {
    "vocab_size": 152_064,  # padded beyond the tokenizer's 151,936
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
SMALL = {
    "vocab_size": 1088,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
FULL_VOCABULARY, SMALL_VOCABULARY = 151_936, 1050
FULL_SEQUENCES, SMALL_SEQUENCES = 12, 3
LOGIT_DEVIATION = 3.0
ERROR = 2e-3  # nats, beyond half a step of the grid
BLOCK_ROWS = 256


def transformers_engine(folder: Path, small: bool) -> Figures:
    """Largest errors, nats, and tokens/s, by dtype of the teacher."""
    make_teacher(folder, SMALL if small else FULL)
    vocab_size = SMALL_VOCABULARY if small else FULL_VOCABULARY
    num_sequences = SMALL_SEQUENCES if small else FULL_SEQUENCES
    figures: Figures = {
        dtype: _run(folder, dtype, vocab_size, num_sequences) for dtype in ("bfloat16", "float32")
    }
    return {**figures, "peak_bytes": peak_bytes()}


def make_teacher(folder: Path, shape: dict[str, int]) -> None:
    """A random Llama in float32 whose distributions are sharp and varied."""
    torch.manual_seed(0)
    with find_device():
        model = LlamaForCausalLM(
            LlamaConfig(**shape, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
        )
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1.0)
        # The last norm leaves states of about 1 in each place.
        model.lm_head.weight.normal_(0, LOGIT_DEVIATION / shape["hidden_size"] ** 0.5)
    model.save_pretrained(folder)


def _run(folder: Path, dtype: str, vocab_size: int, num_sequences: int) -> Figures:
    """Score sequences; the first is compared, the others are timed."""
    keep = TopPK()
    length = LlamaConfig.from_pretrained(folder).max_position_embeddings
    engine = TransformersEngine(
        EngineOptions(
            teacher_folder=folder,
            architecture="LlamaForCausalLM",
            dtype=dtype,
            head_dtype="float32",
            sequence_length=length,
            selection=Selection(keep, vocab_size),
        )
    )
    sequences = [_make_sequence(number, length, vocab_size) for number in range(num_sequences)]
    ((first, selected),) = engine.score(sequences[:1])
    started = time.perf_counter()
    scored = sum(len(found.counts) for _, found in engine.score(sequences[1:]))
    seconds = time.perf_counter() - started
    errors = _errors(selected, first, _exact_logprobs(folder, dtype, first, vocab_size), keep)
    for name, error in errors.items():
        expect(error <= ERROR, f"{dtype}: {name} off by {error:.1e} nats beyond the grid")
    return {
        "errors": errors,
        "entries_per_position": float(selected.counts.mean()),
        "tokens_per_s": scored / seconds,
    }


def _make_sequence(number: int, length: int, vocab_size: int) -> TokenSequence:
    tokens = np.random.default_rng(number).integers(0, vocab_size, length + 1, dtype=np.int32)
    return TokenSequence(
        split="train", number=number, tokens=tokens, segments=np.zeros_like(tokens)
    )


@torch.inference_mode()
def _exact_logprobs(folder: Path, dtype: str, sequence: TokenSequence, vocab_size: int) -> Tensor:
    """Dense log-probabilities [T, V] float64, nats, on the device."""
    device = find_device()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    if dtype == "float32":
        model = model.double()
    tokens = torch.from_numpy(sequence.tokens[None, :-1]).to(device, torch.int64)
    hidden = model.model(tokens, use_cache=False).last_hidden_state[0].double()
    weight = model.lm_head.weight[:vocab_size].double()
    logprobs = torch.empty((len(hidden), vocab_size), dtype=torch.float64, device=device)
    for rows in torch.split(torch.arange(len(hidden), device=device), BLOCK_ROWS):
        logprobs[rows] = torch.log_softmax(hidden[rows] @ weight.T, -1)
    return logprobs


def _errors(
    selected: Selected, sequence: TokenSequence, exact: Tensor, keep: TopPK
) -> dict[str, float]:
    """The largest error of each part, nats; those of stored values beyond half a step."""
    device = exact.device
    counts, ids, logprobs = (
        torch.from_numpy(part).to(device)
        for part in (selected.counts, selected.ids, selected.logprobs)
    )
    rows = torch.arange(len(counts), device=device).repeat_interleave(counts)
    kept = exact[rows, ids.long()]
    labels = torch.from_numpy(sequence.tokens[1:]).to(device, torch.int64)
    entropy = torch.cat([-(part.exp() * part).sum(1) for part in torch.split(exact, BLOCK_ROWS)])
    least_kept = torch.full((len(counts),), torch.inf, dtype=torch.float64, device=device)
    least_kept.scatter_reduce_(0, rows, kept, "amin")
    rest = exact.clone()
    rest[rows, ids.long()] = -torch.inf
    assert selected.entropy is not None
    assert selected.tail_logmass is not None
    label = exact.gather(1, labels[:, None])[:, 0]
    found = {
        "entries": float((kept - logprobs).abs().max()) - keep.logprob_step / 2,
        # An entry that was left out is not larger than one that was kept.
        "order": float((rest.amax(1) - least_kept).max()),
        "tail": _difference(selected.tail_logmass, torch.logsumexp(rest, 1)),
        "label": _difference(selected.label_logprobs, label),
        "entropy": _difference(selected.entropy, entropy),
    }
    return {name: max(0.0, error) for name, error in found.items()}


def _difference(found: Float32Array, exact: Tensor) -> float:
    """The largest."""
    return float((torch.from_numpy(found).to(exact.device).double() - exact).abs().max())
