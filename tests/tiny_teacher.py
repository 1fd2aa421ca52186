"""A tiny random teacher, text for it, and what its distributions really are."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shards.dataset import Dataset
from shards.rows import Row
from tests.gpus import SMALL_ENGINE, environment, has_gpu

ROOT = Path(__file__).parent.parent
STEP = 1 / 16  # the default grid of log-probabilities, nats
BOUND = STEP / 2 + 1e-3  # of their error
TOKENIZER_LENGTH = 301
MODEL_VOCABULARY = 320


def make_tokenizer(folder: Path) -> None:
    """Save a tokenizer whose words are <eos>, w1, w2, ..."""
    words = ["<eos>"] + [f"w{number}" for number in range(1, TOKENIZER_LENGTH)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def make_tiny_teacher(
    folder: Path,
    *,
    max_position_embeddings: int = 64,
    heads: tuple[int, int] = (2, 1),
    vocabulary: int = MODEL_VOCABULARY,
) -> Path:
    """A random two-layer Llama, some of whose padded vocabulary rows would win every softmax.

    `heads` are those of queries, and those of keys and values.
    """
    make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64 * heads[0],
        intermediate_size=128 * heads[0],
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # sharp and varied distributions, so that a row in the wrong place cannot pass
        model.model.embed_tokens.weight.normal_(0, 1.0)
        model.lm_head.weight.normal_(0, 0.25 * (2 / heads[0]) ** 0.5)
        winners = slice(TOKENIZER_LENGTH, TOKENIZER_LENGTH + 19)
        model.lm_head.weight[winners] = 3.0 * model.lm_head.weight[:19].abs()
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


@lru_cache(maxsize=1)
def _float32_model(folder: Path, attention: str) -> Any:
    """Of the class that config.json names."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_class = getattr(transformers, config["architectures"][0])
    return model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()


def dense_logprobs(
    folder: Path, tokens: npt.NDArray[np.int32], vocab: int, *, attention: str = "eager"
) -> npt.NDArray[Any]:
    """What transformers in float32 gives after each of tokens[:-1]: [n - 1, vocab], nats.

    "eager" leaves out nothing that a model asks for; "sdpa" has no scores of all pairs in memory.
    """
    model = _float32_model(folder, attention)
    with torch.inference_mode():
        ids = torch.from_numpy(tokens[:-1].astype(np.int64))[None]
        logits = model(ids).logits[0, :, :vocab].double()
    table: npt.NDArray[Any] = torch.log_softmax(logits, -1).numpy()
    return table


def all_rows(out: Path) -> dict[tuple[str, int], Row]:
    """Every row of a dataset, by split and sequence number."""
    dataset = Dataset.open(out)
    rows = {}
    for name in dataset.split_names:
        with dataset.split(name) as split:
            rows |= {(name, row.sequence): row for row in split.rows()}
    return rows


def borders_of(row: Row) -> npt.NDArray[Any]:
    """Where each position's entries begin, and where the last ones end: [T + 1]."""
    return np.concatenate([[0], np.cumsum(row.counts)])


TAIL_NOISE = 1e-6  # of the mass that the engine vllm-logprobs does not see


def largest_error(row: Row, exact: npt.NDArray[Any], tail_noise: float = 0.0) -> float:
    """Largest distance of anything stored in a row from the exact table [T, V], nats.

    Of a tail, from the nearest logarithm of a mass that is at most `tail_noise` off.
    """
    borders = borders_of(row)
    worst = 0.0
    for t in range(len(row.counts)):
        ids = row.ids[borders[t] : borders[t + 1]]
        kept = row.logprobs[borders[t] : borders[t + 1]]
        mass = np.exp(np.logaddexp.reduce(np.delete(exact[t], ids)))
        stored = float(row.tail_logmass[t])
        worst = max(
            worst,
            float(np.abs(kept - exact[t][ids]).max()),
            abs(stored - np.log(np.clip(np.exp(stored), mass - tail_noise, mass + tail_noise))),
            abs(float(row.label_logprobs[t] - exact[t][row.tokens[t + 1]])),
        )
    return worst


TOP_P_K = ("--keep", "top-p-k", "--top-k", "20")


def dump_command(
    teacher: Path, corpus: Path, out: Path, *more: str, keep: tuple[str, ...] = TOP_P_K
) -> list[str]:
    """The command line of a real `dump-logits` on a tiny scale."""
    small = SMALL_ENGINE if has_gpu() and "transformers" not in more else ()
    return [
        *(sys.executable, str(ROOT / "cli.py"), "dump-logits", "--teacher", str(teacher)),
        *("--corpus", str(corpus), "--out", str(out), "--sequence-length", "32"),
        *("--held-out", "0.1", "--sequences-per-shard", "8", *keep, *small, *more),
    ]


def run_dump(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed; it may use the GPUs."""
    options.setdefault("env", environment())
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


# Several dumps in one process, one after the other: vLLM is imported once.
ONE_AFTER_THE_OTHER = """
import json, sys
import cli
codes = []
for options in json.loads(sys.argv[1]):
    try:
        cli.dump_logits(options, prog_name="dump-logits")
    except SystemExit as end:
        codes.append(end.code)
print("CODES", *codes)
"""


def run_all(commands: list[list[str]], before: str = "") -> tuple[list[str], str]:
    """Exit codes of several dumps, and what they wrote on standard error."""
    options = json.dumps([command[3:] for command in commands])
    result = run_dump([sys.executable, "-c", before + ONE_AFTER_THE_OTHER, options], cwd=ROOT)
    return result.stdout.partition("CODES")[2].split(), result.stderr
