"""A tiny random teacher, text for it, and what its distributions really are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parent.parent
TOKENIZER_LENGTH = 301
MODEL_VOCABULARY = 320


def make_tiny_teacher(folder: Path, *, max_position_embeddings: int = 64) -> Path:
    """A random two-layer Llama whose 19 padded vocabulary rows would win every softmax."""
    words = ["<eos>"] + [f"w{number}" for number in range(1, TOKENIZER_LENGTH)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=MODEL_VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # sharp and varied distributions, so that a row in the wrong place cannot pass
        model.model.embed_tokens.weight.normal_(0, 1.0)
        model.lm_head.weight.normal_(0, 0.25)
        model.lm_head.weight[TOKENIZER_LENGTH:] = 3.0 * model.lm_head.weight[:19].abs()
    model.save_pretrained(folder)
    return folder


def write_corpus(path: Path, *, num_documents: int, seed: int = 0) -> Path:
    """Documents of 5 to 60 random words each, as JSON lines."""
    random = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(num_documents):
            words = random.integers(1, TOKENIZER_LENGTH, random.integers(5, 61))
            stream.write(json.dumps({"text": " ".join(f"w{word}" for word in words)}) + "\n")
    return path


def dense_logprobs(folder: Path, tokens: npt.NDArray[np.int32], vocab: int) -> npt.NDArray[Any]:
    """What transformers in float32 gives after each of tokens[:-1]: [n - 1, vocab], nats."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.from_numpy(tokens[:-1].astype(np.int64))[None]
        logits = model(ids).logits[0, :, :vocab].double()
    table: npt.NDArray[Any] = torch.log_softmax(logits, -1).numpy()
    return table


TOP_P_K = ("--top-k", "20")


def dump_command(
    teacher: Path, corpus: Path, out: Path, *more: str, keep: tuple[str, ...] = TOP_P_K
) -> list[str]:
    """The command line of a real `dump-logits` on a tiny scale."""
    return [
        *(sys.executable, str(ROOT / "cli.py"), "dump-logits", "--teacher", str(teacher)),
        *("--corpus", str(corpus), "--out", str(out), "--sequence-length", "32"),
        *("--held-out", "0.1", "--sequences-per-shard", "8", *keep, *more),
    ]


def run_dump(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed."""
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)
