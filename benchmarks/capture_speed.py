"""Teacher pass against the limit of the engine, side by side in one run.

limit      the same plugin with the same blocks runs the LM head and returns one number per row
extract    the plugin as it is: selection, label, tail and entropy, unpacked to numpy, rows made,
           Parquet shards written and published by the background writer
prefill    the stock model as an embedding model: no LM head at all
prompt_logprobs   vLLM's own flat prompt log-probabilities, top 100, to numpy

Engines are loaded one process each (vLLM holds one engine well), hold their model, and are asked
for rounds in turn, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
MODES = ("limit", "extract", "prefill", "prompt_logprobs")
TOP_K = 100


def _sequences(corpus: Path, teacher: Path, count: int, length: int) -> list[Any]:
    """The first sequences of a text, tokens [length + 1]."""
    from teacher_dump.sequences import TokenSequence
    from teacher_dump.teacher import load_tokenizer

    tokenizer = load_tokenizer(teacher)
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    encoded = [
        ids for text in texts for ids in [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    ]
    tokens = np.array(encoded[: count * length + 1], dtype=np.int32)
    assert len(tokens) == count * length + 1, "the corpus is too short for this benchmark"
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


def _plugin(mode: str, teacher: Path, length: int, out: Path) -> Callable[[list[Any]], None]:
    """`limit` and `extract`: the project's engine, with another pooler for the limit."""
    import torch

    from teacher_dump import vllm_engine, vllm_pooler
    from teacher_dump.collector import ShardCollector, ShardPlan, make_row
    from teacher_dump.keep import TopPK
    from teacher_dump.teacher import find_teacher, load_tokenizer, tokenizer_identity

    keep = TopPK(
        top_p=0.95,
        top_k=TOP_K,
        logprob_step=1 / 16,
        vocab_size=tokenizer_identity(load_tokenizer(teacher))["vocab_size"],
    )
    if mode == "limit":

        def largest(self: Any, hidden: Any, labels: Any) -> Any:
            rows = self.block_rows(hidden.device)
            return torch.cat(
                [self.compute_logits(block)[:, :1].float() for block in torch.split(hidden, rows)]
            )

        vllm_pooler.TeacherPooler.score = largest
        vllm_engine.unpack = lambda packed, keep: packed
    engine = vllm_engine.VllmEngine(
        teacher_folder=teacher,
        architecture=find_teacher(str(teacher), None).architecture,
        dtype="bfloat16",
        head_dtype="float32",
        sequence_length=length,
        keep=keep,
        engine_args={},
    )
    rounds = iter(range(1_000_000))

    def run_limit(sequences: list[Any]) -> None:
        assert sum(1 for _ in engine.score(sequences)) == len(sequences)

    def run_extract(sequences: list[Any]) -> None:
        layout = {"sequences_per_shard": len(sequences), "sequences_per_row_group": len(sequences)}
        plan = ShardPlan(split="train", shard=0, sequences=range(len(sequences)))
        with ShardCollector(
            out / f"round-{next(rounds)}",
            [plan],
            identity={"vocab_size": keep.vocab_size, "layout": layout},
            sequences_per_shard=len(sequences),
            sequences_per_row_group=len(sequences),
            on_shard=lambda sidecar: None,
        ) as collector:
            for sequence, selected in engine.score(sequences):
                collector.add("train", make_row(sequence, selected, keep.logprob_step))
            collector.close()

    return run_limit if mode == "limit" else run_extract


def _stock(mode: str, teacher: Path, length: int) -> Callable[[list[Any]], None]:
    """`prefill` and `prompt_logprobs`: vLLM as it comes."""
    from teacher_dump import vllm_engine

    vllm_engine._prepare_environment()
    from vllm import LLM, PoolingParams, SamplingParams

    common: dict[str, Any] = {
        "model": str(teacher),
        "dtype": "bfloat16",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": mode != "prefill",  # its scoring wants one
        "max_logprobs": TOP_K,
    }
    if mode == "prefill":
        llm = LLM(runner="pooling", convert="embed", max_model_len=length, **common)

        def run_prefill(sequences: list[Any]) -> None:
            prompts = [{"prompt_token_ids": s.tokens[:-1].tolist()} for s in sequences]
            llm.encode(prompts, PoolingParams(), pooling_task="embed", use_tqdm=False)

        return run_prefill
    overrides = {"head_dtype": "float32"}
    llm = LLM(max_model_len=length + 1, hf_overrides=overrides, **common)
    params = SamplingParams(
        max_tokens=1, prompt_logprobs=TOP_K, flat_logprobs=True, detokenize=False
    )

    def run_logprobs(sequences: list[Any]) -> None:
        prompts = [{"prompt_token_ids": s.tokens[:-1].tolist()} for s in sequences]
        for output in llm.generate(prompts, params, use_tqdm=False):
            flat = output.prompt_logprobs
            np.array(flat.token_ids, dtype=np.int32)
            np.array(flat.logprobs, dtype=np.float32)

    return run_logprobs


def _worker(pipe: Any, mode: str, teacher: Path, corpus: Path, count: int, length: int) -> None:
    """Load one engine, then time a round whenever asked."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    sequences = _sequences(corpus, teacher, count, length)
    with tempfile.TemporaryDirectory() as out:
        run = (
            _plugin(mode, teacher, length, Path(out))
            if mode in ("limit", "extract")
            else _stock(mode, teacher, length)
        )
        run(sequences[:2])  # warm
        pipe.send("ready")
        while pipe.recv() == "go":
            started = time.perf_counter()
            run(sequences)
            pipe.send(time.perf_counter() - started)


def _measure(modes: tuple[str, ...], rounds: int, *work: Any) -> dict[str, list[float]]:
    """Seconds of each round by mode; the order of the modes turns with every round."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for mode in modes:
        pipes[mode], theirs = context.Pipe()
        context.Process(target=_worker, args=(theirs, mode, *work), daemon=True).start()
        theirs.close()
        assert pipes[mode].recv() == "ready"
        click.echo(f"{mode}: engine ready", err=True)
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for number in range(rounds):
        turn = number % len(modes)
        for mode in modes[turn:] + modes[:turn]:
            pipes[mode].send("go")
            seconds[mode].append(pipes[mode].recv())
    for pipe in pipes.values():
        pipe.send("stop")
    return seconds


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path), default=ROOT / "build" / "teacher")
@click.option(
    "--corpus", type=click.Path(path_type=Path), default=ROOT / "build" / "demo" / "corpus.jsonl"
)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--sequences", default=16, show_default=True, help="Sequences of one round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="Default: all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(
    teacher: Path,
    corpus: Path,
    sequence_length: int,
    sequences: int,
    rounds: int,
    modes: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """Tokens/s of the teacher pass and of its rivals (`make demo` makes the inputs)."""
    seconds = _measure(modes or MODES, rounds, teacher, corpus, sequences, sequence_length)
    tokens = sequences * sequence_length
    speeds = {mode: tokens / statistics.median(values) for mode, values in seconds.items()}
    of_limit = {
        mode: statistics.median(
            limit / mine for limit, mine in zip(seconds["limit"], values, strict=True)
        )
        for mode, values in seconds.items()
        if "limit" in seconds
    }
    click.echo(f"L = {sequence_length}, {sequences} sequences a round, {rounds} rounds, medians")
    for mode, speed in speeds.items():
        click.echo(f"{mode:<18}{speed:>10.0f} tokens/s{of_limit.get(mode, 0):>10.3f} of the limit")
    if json_file is not None:
        figures = {"sequence_length": sequence_length, "tokens_per_s": speeds,
                   "of_limit": of_limit, "seconds": seconds}  # fmt: skip
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
