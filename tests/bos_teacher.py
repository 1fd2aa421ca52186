"""A teacher that is useless without BOS at position 0, as Gemma's models are.

It was trained for seconds: after BOS every word is followed by the next one of a fixed cycle, which
it predicts nearly for sure; without BOS it was taught to predict something else.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = 0, 1
NUM_WORDS = 14
VOCAB = 2 + NUM_WORDS
SEQUENCE_LENGTH = 16


def follower(token: int) -> int:
    """The word after a word in every document."""
    return 2 + (token - 2 + 5) % NUM_WORDS


def make_bos_tokenizer(folder: Path, *, adds_bos: bool, bos: str = "<bos>") -> None:
    """Words w2, w3, ... beside <bos> and <eos>; `adds_bos`: its post-processor puts BOS first."""
    words = ["<bos>", "<eos>", *(f"w{number}" for number in range(2, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, words.index(bos))]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="<eos>"
    ).save_pretrained(folder)


def make_bos_teacher(folder: Path) -> Path:
    """Train and save the model; its tokenizer adds BOS."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    random = np.random.default_rng(0)
    for _ in range(80):
        words = torch.from_numpy(_batch(random, 32, SEQUENCE_LENGTH))
        bos = torch.full((len(words), 1), BOS)
        with_bos = torch.cat([bos, words], 1)
        loss = _nll(model, with_bos[:, :-1], with_bos[:, 1:])
        others = torch.where(words > EOS, 2 + (words - 2 + 1) % NUM_WORDS, words)
        loss = loss + _nll(model, words[:, :-1], others[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    make_bos_tokenizer(folder, adds_bos=True)
    return folder


def write_cycles(path: Path, *, num_documents: int, seed: int = 1) -> Path:
    """Documents of 3 to 30 words of the cycle, as JSON lines."""
    random = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(num_documents):
            words = [int(random.integers(2, VOCAB))]
            while len(words) < random.integers(3, 31):
                words.append(follower(words[-1]))
            stream.write(json.dumps({"text": " ".join(f"w{word}" for word in words)}) + "\n")
    return path


def _batch(random: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Stretches of documents lying end to end, each document after BOS and before EOS."""
    tokens = np.empty((rows, length), np.int64)
    for row in tokens:
        word = int(random.integers(2, VOCAB))
        for place in range(length):
            row[place] = word
            if word == EOS:
                word = BOS
            elif word == BOS:
                word = int(random.integers(2, VOCAB))
            else:
                word = EOS if random.random() < 0.08 else follower(word)
    return tokens


def _nll(model: LlamaForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
