"""The three commands: options, one-line errors, lazy imports; no logic.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import click

from shards.errors import InputError, LogitshardsError
from shards.stop_signals import stopped_by_signals


class _PathType(click.Path):
    """A path; a YAML file may have one that looks like a number or a date."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path of what was given as text, or would be text on the command line."""
        if isinstance(value, int | float | date) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str | os.PathLike):
            self.fail(f"{value!r}: expected a path", param, ctx)
        return super().convert(value, param, ctx)


_FOLDER = _PathType(path_type=Path)


class _Command(click.Command):
    """A command whose errors are one line: exit code 2 for what was given, 1 for a failed run."""

    def invoke(self, ctx: click.Context) -> Any:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for noisy in ("httpx", "filelock", "urllib3", "fsspec"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        debug = ctx.params.pop("debug", False)
        try:
            with stopped_by_signals():
                return super().invoke(ctx)
        except LogitshardsError as error:
            if debug:
                raise
            click.echo(f"{ctx.info_name}: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(f"\n{ctx.info_name}: interrupted; the same command continues", err=True)
            ctx.exit(130)


class _CommandWithOthers(_Command):
    """A command that its options call, `NAME --option ...`, and that others hang on, `NAME OTHER`.

    A click.Group would ask for the options of NAME before OTHER.
    """

    def __init__(self, *args: Any, others: Sequence[click.Command], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._others = {other.name: other for other in others}

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """The context of this command, or of another if the first word is its name."""
        other = self._others.get(args[0]) if args else None
        if other is None:
            return super().make_context(info_name, args, parent, **extra)
        return other.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run what the context was made for."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, and below them the other commands."""
        super().format_options(ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name or "", other.get_short_help_str(70)) for name, other in self._others.items()]
            )


_debug = click.option("--debug", is_flag=True, help="Show a traceback with an error.")


def _load_config_file(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path}: expected option names and values")
    known = {
        option.lstrip("-"): parameter
        for parameter in ctx.command.params
        for option in parameter.opts
    }
    values: dict[str, Any] = {}
    for key, value in content.items():
        parameter = known.get(str(key).replace("_", "-"))
        name = "" if parameter is None else parameter.name or ""
        if parameter is None or name in ("config", "debug", "help"):
            raise click.BadParameter(f"{path}: unknown option {key!r}")
        if value is None or (isinstance(value, list) and None in value):
            raise click.BadParameter(f"{path}: {key}: a value is missing")
        if name == "engine_arg" and isinstance(value, Mapping):
            value = [f"{argument}={json.dumps(setting)}" for argument, setting in value.items()]
        elif parameter.multiple and not isinstance(value, list):
            value = [value]
        values[name] = value
    ctx.default_map = {**(ctx.default_map or {}), **values}


# What is on the command line wins over the file.
_config_file = click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_load_config_file,
    help="YAML file of options by their names; options given here win.",
)


class _CommaSeparated(click.ParamType[tuple[Any, ...]]):
    """Values of one type with commas between them, or a list in a YAML file."""

    name = "list"

    def __init__(self, kind: Callable[[Any], Any], expected: str) -> None:
        self._kind = kind
        self._expected = expected

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """A tuple of them, which is what it stays."""
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        try:
            return tuple(map(self._kind, parts if isinstance(parts, list | tuple) else [parts]))
        except (TypeError, ValueError):
            self.fail(f"{value!r}: expected {self._expected}")


def _engine_args(pairs: tuple[str, ...]) -> dict[str, object]:
    """KEY=VALUE texts; a value is read as YAML, so that numbers and booleans are what they say."""
    import yaml

    arguments: dict[str, object] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InputError(f"--engine-arg {pair}: expected KEY=VALUE")
        try:
            setting = yaml.safe_load(value)
            json.dumps(setting, allow_nan=False)
        except (yaml.YAMLError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"--engine-arg {pair}: no value that JSON has ({reason})") from error
        arguments[key.replace("-", "_")] = setting
    return arguments


@click.command(cls=_Command)
@_config_file
@click.option("--teacher", required=True, help="Model folder, or a name on the Hugging Face hub.")
@click.option("--teacher-revision", help="Revision of a hub model.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that comes with the teacher."
)
@click.option(
    "--corpus",
    type=_FOLDER,
    multiple=True,
    required=True,
    help="File, folder or pattern: text as JSON lines (.gz, .zst, .bz2, .xz), .parquet, .arrow, "
    ".txt, .md; tokens as .npy, .bin (flat or Megatron-LM's), .parquet, .arrow. Repeatable.",
)
@click.option(
    "--corpus-weight",
    type=float,
    multiple=True,
    help="How often documents of a corpus are taken: 2 is twice, 0.5 half of them. As many as "
    "--corpus, in their order.",
)
@click.option("--out", type=_FOLDER, required=True, help="Folder of the dataset.")
@click.option(
    "--sequence-length",
    type=int,
    default=2048,
    show_default=True,
    help="Tokens that the teacher reads at once.",
)
@click.option(
    "--keep",
    default="top-p-k",
    show_default=True,
    help="What to keep of a position: top-p-k, draws or threshold (docs/keep-methods.md).",
)
@click.option(
    "--top-p",
    type=float,
    show_default="0.95",
    help="top-p-k: keep the smallest set of entries with this mass ...",
)
@click.option("--top-k", type=int, show_default="100", help="... and at most this many.")
@click.option(
    "--draws", type=int, show_default="50", help="draws: so many, with replacement, per position."
)
@click.option(
    "--threshold",
    type=float,
    show_default="0.05",
    help="threshold: keep every entry of at least this probability, sample the others.",
)
@click.option(
    "--temperature",
    type=float,
    show_default="1.0",
    help="draws and threshold: temperature of the teacher before anything is selected.",
)
@click.option(
    "--logprob-step",
    type=float,
    default=1 / 16,
    show_default=True,
    help="Grid, in nats, that log-probabilities are rounded to.",
)
@click.option(
    "--held-out",
    type=float,
    default=0.01,
    show_default=True,
    help="Fraction of documents for the validation split.",
)
@click.option(
    "--engine",
    default="vllm",
    show_default=True,
    help="vllm, vllm-logprobs (without the plugin) or transformers (docs/engines.md).",
)
@click.option(
    "--engine-arg",
    multiple=True,
    metavar="KEY=VALUE",
    help="Argument of vLLM, such as max_num_batched_tokens=8192. Repeatable.",
)
@click.option(
    "--dtype", default="auto", show_default=True, help="auto (bfloat16), bfloat16 or float32."
)
@click.option(
    "--text-key",
    default="text",
    show_default=True,
    help="Key or column of the text in JSON lines, Parquet and Arrow.",
)
@click.option("--token-key", help="Column of token lists in Parquet and Arrow, instead of text.")
@click.option("--mask-key", help="Column of lists of booleans: which tokens count as labels.")
@click.option(
    "--token-dtype",
    help="uint16, uint32, int32 or int64 in a flat .bin; default: by the vocabulary.",
)
@click.option(
    "--documents",
    default="pack",
    show_default=True,
    help="pack: sequences go on over the ends of documents; separate: each document has its own.",
)
@click.option("--bos/--no-bos", default=False, show_default=True, help="Begin each document so.")
@click.option(
    "--eos/--no-eos",
    default=True,
    show_default=True,
    help="Close each document with the end-of-document token, unless it ends with it already.",
)
@click.option("--sequences-per-shard", type=int, help="Default: about 2 million tokens.")
@click.option(
    "--max-tokens",
    type=int,
    help="Labelled positions of both splits together; a larger value extends a dataset.",
)
@click.option("--seed", type=int, default=0, show_default=True,
              help="Of held-out documents and of sampling.")  # fmt: skip
@click.option(
    "--plan", is_flag=True, help="Measure briefly, say what the dump would cost, write nothing."
)
@click.option(
    "--tokens",
    type=float,
    help="With --plan: tokens of a corpus, such as 1e12, of which --corpus is a sample.",
)
@_debug
def dump_logits(plan: bool, tokens: float | None, **options: Any) -> None:
    """Run a teacher over a corpus and write its compressed next-token distributions.

    The same command again continues where it stopped.
    """
    from shards.allocator import keep_freed_tensors

    keep_freed_tensors()
    from teacher_dump.config import DumpConfig

    if tokens is not None and (not plan or not 1 <= tokens < 1e18):
        raise InputError(f"--tokens {tokens:g}: is a number from 1 to 1e18 for --plan")
    options["engine_arg"] = _engine_args(options["engine_arg"])
    config = DumpConfig(**options)
    if Path(config.teacher).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if plan:
        from teacher_dump.plan import make_plan

        for line in make_plan(config, None if tokens is None else int(tokens)).lines():
            click.echo(line)
        return
    from teacher_dump.dump import run

    summary = run(config)
    if summary.complete_before:
        click.echo(f"{summary.out}: complete, nothing to do (inspect-shards {summary.out})")
        return
    labels = max(1, summary.tokens)  # a mask may have left none
    click.echo(
        f"{summary.out}: {summary.tokens:,} tokens in {summary.sequences:,} sequences and "
        f"{summary.shards:,} shards, {summary.entries / labels:.1f} entries/token, "
        f"{summary.bytes / labels:.1f} bytes/token, {summary.tokens_per_s:,.0f} tokens/s"
    )


@click.command("report", cls=_Command)
@click.argument("runs", type=_FOLDER, nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out",
    type=_FOLDER,
    default="report.html",
    show_default=True,
    help="The page, a single file; one that is there is replaced.",
)
@_debug
def report(runs: tuple[Path, ...], out: Path) -> None:
    """Show how runs went, finished or not, on one page.

    RUN is the folder that a train-student --out made.
    """
    from student_train.report import write_report

    write_report(runs, out)
    click.echo(f"{out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")


@click.command(cls=_CommandWithOthers, others=[report])
@_config_file
@click.option(
    "--shards",
    type=_FOLDER,
    multiple=True,
    required=True,
    help="Folder of a dataset of dump-logits. Repeatable.",
)
@click.option(
    "--weights",
    type=_CommaSeparated(float, "numbers with commas between them, such as 0.7,0.3"),
    default=(),
    show_default="by size",
    help="Share of the batch lines that each of --shards gives, such as 0.7,0.3.",
)
@click.option("--student", required=True, help="Preset (demo, 330M, 670M, 1.9B, 3.8B, 6.8B), "
              "Hugging Face config.json, or model folder to continue training.")  # fmt: skip
@click.option("--out", type=_FOLDER, required=True, help="Folder of the run.")
@click.option("--loss", default="kld", show_default=True, help="kld, nll or mse.")
@click.option(
    "--tail",
    default="renormalize",
    show_default=True,
    help="What was not kept: renormalize (left out) or bucket (one more class).",
)
@click.option(
    "--alpha",
    type=float,
    default=0.9,
    show_default=True,
    help="Weight of distillation; 1 - alpha is plain language modelling.",
)
@click.option(
    "--alpha-schedule",
    default="constant",
    show_default=True,
    help="constant, linear-increase, linear-decrease, period or wsd; alpha is the highest.",
)
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Temperature of the teacher's targets.",
)
@click.option(
    "--student-temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Temperature of the student's softmax in distillation, which is multiplied by its square.",
)
@click.option(
    "--adaptive-temperature",
    help="normkd, wttm, adakd-sd or adakd-h: how --temperature follows the position "
    "(docs/training.md). Default: the same everywhere.",
)
@click.option(
    "--tokens",
    type=int,
    required=True,
    help="Labelled positions to train on; more than the dataset has: further epochs.",
)
@click.option(
    "--batch-tokens",
    type=int,
    default=1 << 19,
    show_default=True,
    help="Labelled positions of one optimizer step.",
)
@click.option(
    "--micro-batch-sequences",
    type=int,
    default=8,
    show_default=True,
    help="Sequences on the device at once.",
)
@click.option("--learning-rate", type=float, help="Default: the preset's own.")
@click.option(
    "--lr-schedule",
    default="wsd",
    show_default=True,
    help="constant, cosine, wsd or wsd-sqrt.",
)
@click.option(
    "--warmup-fraction",
    type=float,
    default=0.02,
    show_default=True,
    help="Part of the run in which the learning rate (and alpha of wsd) rises.",
)
@click.option(
    "--decay-fraction",
    type=float,
    default=0.2,
    show_default=True,
    help="Part of the run in which wsd falls, of the learning rate and of alpha.",
)
@click.option(
    "--min-learning-rate-ratio",
    type=float,
    default=0.1,
    show_default=True,
    help="Learning rate at the end, as a part of the highest.",
)
@click.option("--beta1", type=float, default=0.9, show_default=True, help="Of AdamW.")
@click.option("--beta2", type=float, default=0.95, show_default=True, help="Of AdamW.")
@click.option("--weight-decay", type=float, default=0.1, show_default=True, help="Of matrices.")
@click.option(
    "--gradient-clip",
    type=float,
    default=1.0,
    show_default=True,
    help="Largest norm of the gradient.",
)
@click.option(
    "--save-every", type=int, help="Steps between checkpoints; default: every ten minutes."
)
@click.option("--eval-every", type=int, help="Steps between evaluations; default: at the end.")
@click.option(
    "--eval-shards",
    type=_FOLDER,
    help="Dataset whose validation split is used; default: that of the first --shards.",
)
@click.option(
    "--eval-tasks",
    type=_CommaSeparated(str, "names with commas between them, such as arc_easy,my_task.yaml"),
    default=(),
    help="Tasks of lm-evaluation-harness to run on the result: names, or YAML files.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and order.")
@click.option("--dtype", default="bfloat16", show_default=True, help="bfloat16 or float32.")
@click.option("--compile", is_flag=True, help="Compile the student's blocks with torch.compile.")
@click.option(
    "--gradient-checkpointing",
    is_flag=True,
    help="Compute the blocks' activations twice instead of keeping them.",
)
@_debug
def train_student(**options: Any) -> None:
    """Train a student against a dataset of shards.

    The same command again continues from the last checkpoint.
    """
    from shards.allocator import choose_arrow_pool

    choose_arrow_pool()
    from student_train.config import TrainConfig

    config = TrainConfig(**options)
    from student_train.definitions import DEFINITIONS
    from student_train.train import run

    summary = run(config)
    for name, value in summary.items():
        parts = value if isinstance(value, list) else [value]
        texts = (f"{part:.6g}" if isinstance(part, float) else f"{part}" for part in parts)
        definition = DEFINITIONS.get(name.removeprefix("validation_"))
        means = "" if definition is None else f" nats ({definition})"
        click.echo(f"{name}: {', '.join(texts)}{means}")


@click.command(cls=_Command)
@click.argument("path", type=_FOLDER)
@click.option("--row", type=int, help="Show this sequence, position by position.")
@click.option("--split", help="The split that --row is of.  [default: train]")
@click.option("--verify", is_flag=True, help="Read and check everything; exit code 1 if not sound.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_debug
def inspect_shards(
    path: Path, row: int | None, split: str | None, verify: bool, as_json: bool
) -> None:
    """Show what a dataset, or one shard of it, holds."""
    from shards import inspect
    from shards.rendering import format_row, render

    if row is not None:
        if verify or as_json:
            raise InputError("--row: is shown as text alone, without --verify and --json")
        click.echo(format_row(_find_row(path, split or "train", row), _decoder(path)))
        return
    if split is not None:
        raise InputError(f"--split {split}: says which split --row is of, which is missing")
    if verify:
        problems = inspect.verify(path)
        for problem in problems:
            click.echo(problem, err=True)
        if problems:
            raise click.exceptions.Exit(1)
        click.echo(f"{path}: sound", err=as_json)
        if not as_json:
            return
    description = inspect.describe(path)
    click.echo(json.dumps(description, indent=2) if as_json else render(description))


def _find_row(path: Path, split: str, number: int) -> Any:
    """A row of a dataset by its sequence number, or of a shard file likewise."""
    if path.is_file():
        from shards.reader import ShardReader

        with ShardReader(path) as reader:
            offset = number - reader.sidecar.first_sequence
            if not 0 <= offset < reader.num_rows:
                first = reader.sidecar.first_sequence
                last = first + reader.num_rows - 1
                raise InputError(f"--row {number}: {path} holds sequences {first} to {last}")
            return reader.row(offset)
    from shards.dataset import Dataset

    dataset = Dataset.open(path)
    if split not in dataset.split_names:
        raise InputError(f"--split {split}: {path} has {', '.join(dataset.split_names)}")
    with dataset.split(split) as found:
        if not 0 <= number < found.num_sequences:
            last = found.num_sequences - 1
            raise InputError(f"--row {number}: {path} {split} has sequences 0 to {last}")
        return found.row(number)


def _decoder(path: Path) -> Callable[[int], str]:
    """Text of a token id, from the dataset's own tokenizer."""
    from tokenizers import Tokenizer

    folder = path if path.is_dir() else path.parent.parent
    file = folder / "tokenizer" / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{file}: not there, --row needs the dataset's tokenizer")
    tokenizer = Tokenizer.from_file(str(file))
    return lambda token: tokenizer.decode([token], skip_special_tokens=False)


@click.group()
def main() -> None:
    """The commands of logitshards; each is also installed under its own name."""


main.add_command(dump_logits, "dump-logits")
main.add_command(train_student, "train-student")
main.add_command(inspect_shards, "inspect-shards")

if __name__ == "__main__":
    main()
