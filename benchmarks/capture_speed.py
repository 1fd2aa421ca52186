"""Teacher pass against the limit of the engine, side by side in one run.

limit      the same plugin with the same blocks runs the LM head and returns one number per row
top-p-k, draws, threshold
           the plugin as it is, with that keep method: selection, label, tail and entropy, unpacked
           to numpy, rows made, Parquet shards written and published by the background writer
vllm-logprobs     the engine without the plugin: the same rows of top-p-k as above, same writer
prefill    the stock model as an embedding model: no LM head at all
prompt_logprobs   vLLM's own flat prompt log-probabilities, top 100, to numpy

`--layers 2` takes a teacher cut off after two layers, whose engine costs little beside head,
selection and frontend, and `--narrow 3` a third of its width, whose head costs less too. The
frontend is what the pass itself does in the engine's thread for a token: request, unpacking, row,
collecting; measured as CPU time of that thread. (What vLLM itself does there for a log-probability
of `vllm-logprobs` is not in it.)

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
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
KEEPS = ("top-p-k", "draws", "threshold")
WITHOUT_PLUGIN = "vllm-logprobs"
MODES = ("limit", *KEEPS, WITHOUT_PLUGIN, "prefill", "prompt_logprobs")
TOP_K = 100


class _ThreadTime:
    """CPU seconds of the calling thread within what it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.thread_time() - started

        return timed


def _pass(mode: str, teacher: Path, length: int, out: Path) -> Callable[[list[Any]], float]:
    """What the project runs on vLLM; for the limit its engine with another pooler."""
    from shards.process.allocator import keep_freed_tensors

    keep_freed_tensors()  # as dump-logits does
    import torch

    import teacher_dump.engines.vllm_pooler
    from benchmarks.example_spec import example_spec
    from benchmarks.teacher_inputs import engine_options
    from shards.keep import KEEP_METHODS
    from shards.layout import Layout
    from teacher_dump.collector import ShardCollector
    from teacher_dump.config import DumpConfig
    from teacher_dump.engines import vllm_logprobs_engine
    from teacher_dump.engines.head import block_rows
    from teacher_dump.engines.interface import ENGINES
    from teacher_dump.keep.packed_size import Selection
    from teacher_dump.keep.rows import make_row
    from teacher_dump.tokenizer import load_tokenizer

    method = mode if mode in KEEPS else "top-p-k"
    name = mode if mode == WITHOUT_PLUGIN else "vllm"
    keep = KEEP_METHODS[method]()
    config = DumpConfig(teacher=str(teacher), corpus=(teacher,), out=out, keep=keep, engine=name)
    selection = Selection(keep, load_tokenizer(teacher).vocab_size)
    vllm_engine: Any = import_module("teacher_dump.engines.vllm_engine")
    if mode == "limit":

        def largest(self: Any, hidden: Any, labels: Any, keys: Any) -> Any:
            rows = block_rows(hidden.device, self.selection.vocab_size)
            return torch.cat(
                [self.compute_logits(block)[:, :1].float() for block in torch.split(hidden, rows)]
            )

        pooler: Any = teacher_dump.engines.vllm_pooler.TeacherPooler
        pooler.score = largest
        vllm_engine.unpack = lambda packed, selection: packed
    engine: Any = ENGINES[name].load().start(engine_options(teacher, length, selection))
    frontend = _ThreadTime()
    engine._submit = frontend.of(engine._submit)
    vllm_engine.unpack = frontend.of(vllm_engine.unpack)
    for part in ("read_output", "select_from_largest"):
        timed = frontend.of(getattr(vllm_logprobs_engine, part))
        setattr(vllm_logprobs_engine, part, timed)
    to_row = frontend.of(make_row)
    rounds = iter(range(1_000_000))

    def run_limit(sequences: list[Any]) -> float:
        assert sum(1 for _ in engine.score(sequences)) == len(sequences)
        return 0.0

    def run_pass(sequences: list[Any]) -> float:
        frontend.seconds = 0.0
        # what is left to encode when the engine is done is the last row group, as in a real run
        layout = Layout(
            sequences_per_shard=len(sequences),
            sequences_per_row_group=max(1, len(sequences) // 8),
        )
        with ShardCollector(
            out / f"round-{next(rounds)}",
            {"train": len(sequences)},
            spec=example_spec(
                keep=keep,
                layout=layout,
                vocab_size=selection.vocab_size,
                sequence_length=length,
                entropies=config.sees_distribution,
            ),
            on_shard=lambda sidecar: None,
        ) as collector:
            add = frontend.of(collector.add)
            for sequence, selected in engine.score(sequences):
                add("train", to_row(sequence, selected, keep.logprob_step))
            collector.close()
        return frontend.seconds

    return run_limit if mode == "limit" else run_pass


def _stock(mode: str, teacher: Path, length: int) -> Callable[[list[Any]], float]:
    """`prefill` and `prompt_logprobs`: vLLM as it comes."""
    from teacher_dump.engines.vllm_start import prepare_environment

    prepare_environment()
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

        def run_prefill(sequences: list[Any]) -> float:
            prompts = [{"prompt_token_ids": s.tokens[:-1].tolist()} for s in sequences]
            llm.encode(prompts, PoolingParams(), pooling_task="embed", use_tqdm=False)
            return 0.0

        return run_prefill
    overrides = {"head_dtype": "float32"}
    llm = LLM(max_model_len=length + 1, hf_overrides=overrides, **common)
    params = SamplingParams(
        max_tokens=1, prompt_logprobs=TOP_K, flat_logprobs=True, detokenize=False
    )

    def run_logprobs(sequences: list[Any]) -> float:
        prompts = [{"prompt_token_ids": s.tokens[:-1].tolist()} for s in sequences]
        for output in llm.generate(prompts, params, use_tqdm=False):
            flat = output.prompt_logprobs
            np.array(flat.token_ids, dtype=np.int32)
            np.array(flat.logprobs, dtype=np.float32)
        return 0.0

    return run_logprobs


def _worker(pipe: Any, mode: str, teacher: Path, corpus: Path, count: int, length: int) -> None:
    """Load one engine, then time a round whenever asked."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from benchmarks.teacher_inputs import read_sequences
    from teacher_dump.keep.compiling import WORTH_COMPILING
    from teacher_dump.tokenizer import load_tokenizer

    sequences = read_sequences(corpus, teacher, count, length)
    with tempfile.TemporaryDirectory() as out:
        run = (
            _stock(mode, teacher, length)
            if mode in ("prefill", "prompt_logprobs")
            else _pass(mode, teacher, length, Path(out))
        )
        # Until the selection is compiled, as it is for all of a real run but its first seconds.
        logits = 4 * count * length * load_tokenizer(teacher).vocab_size
        for _ in range(2 + WORTH_COMPILING // logits):
            run(sequences)
        pipe.send("ready")
        while pipe.recv() == "go":
            started = time.perf_counter()
            frontend_s = run(sequences)
            pipe.send((time.perf_counter() - started, frontend_s))


def _measure(
    modes: tuple[str, ...], rounds: int, *work: Any
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each round, and of its frontend, by mode; the modes' order turns every round."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for mode in modes:
        pipes[mode], theirs = context.Pipe()
        context.Process(target=_worker, args=(theirs, mode, *work), daemon=True).start()
        theirs.close()
        assert pipes[mode].recv() == "ready"
        click.echo(f"{mode}: engine ready", err=True)
    seconds: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
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
@click.option("--layers", type=int, help="Cut the teacher off after so many layers.")
@click.option(
    "--narrow", default=1, show_default=True, help="Divide hidden size, heads and MLP by this."
)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--sequences", default=16, show_default=True, help="Sequences of one round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="Default: all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(
    teacher: Path,
    corpus: Path,
    layers: int | None,
    narrow: int,
    sequence_length: int,
    sequences: int,
    rounds: int,
    modes: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """Tokens/s of the teacher pass and of its rivals (`make demo` makes the inputs)."""
    if layers is not None or narrow > 1:
        from benchmarks.teacher_inputs import part_of

        teacher = part_of(teacher, layers, narrow)
    measured = _measure(modes or MODES, rounds, teacher, corpus, sequences, sequence_length)
    tokens = sequences * sequence_length
    seconds = {mode: [total for total, _ in values] for mode, values in measured.items()}
    figures: dict[str, Any] = {"sequence_length": sequence_length, "seconds": seconds}
    click.echo(f"L = {sequence_length}, {sequences} sequences a round, {rounds} rounds, medians")
    click.echo(
        f"{'':<18}{'tokens/s':>10}{'of limit':>10}{'of logprobs':>12}{'frontend us/token':>19}"
    )
    for mode, values in seconds.items():
        frontend = statistics.median(part for _, part in measured[mode]) / tokens * 1e6
        row = figures[mode] = {
            "tokens_per_s": tokens / statistics.median(values),
            "of_limit": _ratio(seconds, "limit", values),
            "of_prompt_logprobs": _ratio(seconds, "prompt_logprobs", values),
            "frontend_us_per_token": frontend,
        }
        click.echo(
            f"{mode:<18}{row['tokens_per_s']:>10.0f}{_text(row['of_limit']):>10}"
            f"{_text(row['of_prompt_logprobs']):>12}{frontend:>19.2f}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _ratio(seconds: dict[str, list[float]], other: str, values: list[float]) -> float | None:
    """Speed relative to another mode's, the median over rounds; None if that was not measured."""
    if other not in seconds:
        return None
    return statistics.median(a / b for a, b in zip(seconds[other], values, strict=True))


def _text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


if __name__ == "__main__":
    main()
