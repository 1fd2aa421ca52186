"""Options are typed once: in dataclasses, from which come help, docs, completion and objects."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import cli
from logitshards.commands import build, command
from logitshards.keep_options import is_keep, keep_options
from shards.keep import KEEP_METHODS, Draws, Keep, Threshold, Tokens, TopPK
from shards.options import OptionField, flag, option, options_of
from student_train.config import TrainConfig
from teacher_dump.config import DumpConfig
from tests.command_runs import COMMANDS, COMPLETE, parsed, refused, run

ROOT = Path(__file__).parent.parent
OPTIONS = [
    pytest.param(name, parameter, id=f"{name} {parameter.opts[0]}")
    for name, made in COMMANDS.items()
    for parameter in made.params
    if isinstance(parameter, click.Option)
]
FIELDS = [
    pytest.param(name, option, id=f"{name} {option.name}")
    for name, made in COMMANDS.items()
    for option in made.options.values()
]


@pytest.mark.parametrize(("name", "parameter"), OPTIONS)
def test_every_option_has_help_and_stands_in_the_docs(name: str, parameter: click.Option) -> None:
    assert parameter.help
    assert parameter.help.endswith((".", "...")), parameter.help
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    names = "|".join([*parameter.opts, *parameter.secondary_opts])
    assert re.search(rf"({names})(?![\w-])", text), "in no doc"


@pytest.mark.parametrize(("name", "option"), FIELDS)
def test_help_shows_the_default_of_the_dataclass(name: str, option: OptionField) -> None:
    (parameter,) = [p for p in COMMANDS[name].params if p.name == option.name]
    context = click.Context(COMMANDS[name])
    assert isinstance(parameter, click.Option)
    extra = parameter.get_help_extra(context)
    shown = extra.get("default")
    assert ("required" in extra) == (option.default is MISSING)
    if option.about.shown_default is not None:
        assert not option.default
        assert shown == f"({option.about.shown_default})"
    elif option.default is True:
        assert shown == option.name
    elif option.default in (None, MISSING, {}) or option.default is False:
        assert shown is None
    else:
        assert shown == str(option.default)


def test_the_docs_of_training_have_the_defaults_of_the_dataclass() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--([\w-]+)` \| (.*?) \|", page, re.MULTILINE)
    assert len(rows) > 10
    for name, values in rows:
        default = COMMANDS["train-student"].options[name.replace("-", "_")].default
        named = re.search(r"`([\w-]+)` \(default\)", values)
        if named:
            assert named[1] == default
        elif re.fullmatch(r"[\d.]+", values):
            assert float(values) == default
        else:
            assert default is None or values.split("`")[1] == default, name


def test_no_default_is_typed_in_the_commands() -> None:
    for file in (ROOT / "cli.py", *(ROOT / "logitshards").glob("*.py")):
        if file.name == "show_options.py":
            continue  # dataclasses
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in ("default", "default_factory"):
                assert not isinstance(node.value, ast.Constant), ast.unparse(node)
        if file.name == "cli.py":
            functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
            assert functions
            assert not any(f.args.defaults or any(f.args.kw_defaults) for f in functions)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_shows_choices_and_the_shell_completes_them(name: str) -> None:
    text = " ".join(run(name, "--help").output.split())
    complete = ShellComplete(COMMANDS[name], {}, name, "_COMPLETE")
    for made in COMMANDS[name].options.values():
        if made.about.choices:
            assert f"[{'|'.join(made.about.choices)}]" in text
            found = [item.value for item in complete.get_completions([flag(made.name)], "")]
            assert found == list(made.about.choices)


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "vllm", "pyarrow", "numpy", "tokenizers", "yaml", "altair")
    code = (
        "import sys, cli\n"
        "from click.testing import CliRunner\n"
        "for words in ['dump-logits'], ['train-student'], ['train-student', 'report'], "
        "['inspect-shards']:\n"
        "    result = CliRunner().invoke(cli.main, [*words, '--help'])\n"
        "    assert 'Options:' in result.output, result.output\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("name", [*COMMANDS, None])
def test_every_command_says_its_version(name: str | None) -> None:
    made = cli.main if name is None else COMMANDS[name]
    result = CliRunner().invoke(made, ["--version"])
    assert re.fullmatch(r"logitshards \d+\.\d+\.\d+\n", result.output)


def test_a_package_that_is_not_installed_has_an_unknown_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert run("dump-logits", "--version").output == "logitshards 0+unknown\n"


@pytest.mark.parametrize(
    ("words", "keep"),
    [
        ([], Threshold()),
        (["--keep", "top-p-k", "--top-k", "7"], TopPK(top_k=7)),
        (
            ["--keep", "draws", "--draws", "9", "--temperature", "2"],
            Draws(draws=9, temperature=2.0),
        ),
        (["--keep", "threshold", "--logprob-step", "0.5"], Threshold(logprob_step=0.5)),
    ],
)
def test_keep_is_made_of_the_options_of_its_method(words: list[str], keep: Keep) -> None:
    config = parsed("dump-logits", *COMPLETE["dump-logits"], *words)["DumpConfig"]
    assert isinstance(config, DumpConfig)
    assert config.keep == keep


def test_tokens_are_kept_without_a_teacher() -> None:
    words = ["--keep", "tokens", "--tokenizer", "t", "--corpus", "a", "--out", "o"]
    config = parsed("dump-logits", *words)["DumpConfig"]
    assert isinstance(config, DumpConfig)
    assert config.keep == Tokens()


@pytest.mark.parametrize(
    ("method", "words", "says"),
    [
        ("top-p-k", ["--draws", "9"], "--draws: not an option of --keep top-p-k"),
        ("threshold", ["--top-k", "9"], "--top-k: not an option of --keep threshold"),
        ("tokens", ["--logprob-step", "1"], "--logprob-step: not an option of --keep tokens"),
        ("tokens", ["--temperature", "2"], "--temperature: not an option of --keep tokens"),
        (
            "top-p-k",
            ["--temperature", "2"],
            "--temperature: not an option of --keep top-p-k, which stores probabilities at"
            " temperature 1; train-student has a --temperature",
        ),
    ],
)
def test_an_option_of_another_method_is_refused(method: str, words: list[str], says: str) -> None:
    line = refused(run("dump-logits", *COMPLETE["dump-logits"], "--keep", method, *words))
    assert line == f"dump-logits: {says}"


@pytest.fixture
def another_method() -> Iterator[type[Keep]]:
    @dataclass(frozen=True, kw_only=True)
    class Largest(Keep):
        method: ClassVar[str] = "largest"
        share: float = option("Share of the largest entry.")

        def max_entries(self, vocab_size: int) -> int:
            return vocab_size

    yield Largest
    del KEEP_METHODS["largest"]


def test_a_method_of_somebody_else_has_its_options(another_method: type[Keep]) -> None:
    seen: list[DumpConfig] = []
    made = command("dump-logits", DumpConfig)(seen.append)
    help_text = CliRunner().invoke(made, ["--help"]).output
    (choices,) = re.findall(r"--keep \[([^]]*)\]", help_text)
    assert {*KEEP_METHODS} == {*choices.split("|")}
    assert "largest: Share of the largest entry." in help_text
    words = [*COMPLETE["dump-logits"], "--keep", "largest"]
    assert CliRunner().invoke(made, [*words, "--share", "0.5"]).exit_code == 0
    assert seen[0].keep == another_method(share=0.5)  # type: ignore[call-arg]
    result = CliRunner().invoke(made, words)
    assert refused(result) == "dump-logits: --share: missing; --keep largest needs it"


def test_methods_share_only_options_that_are_the_same(another_method: type[Keep]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(another_method):  # type: ignore[valid-type,misc]
        method: ClassVar[str] = "other"
        share: float = option("Another share.")

    keep = options_of(DumpConfig)["keep"]
    assert is_keep(keep)
    try:
        with pytest.raises(TypeError, match="keep methods largest and other differ"):
            keep_options(keep)
    finally:
        del KEEP_METHODS["other"]


def test_all_types_are_built_once_more_by_name() -> None:
    config = build(TrainConfig, {"shards": (Path("a"),), "student": "demo", "out": Path("o"),
                                 "tokens": 5, "eval_tasks": ("x", "y")})  # fmt: skip
    assert config == TrainConfig(
        shards=(Path("a"),), student="demo", out=Path("o"), tokens=5, eval_tasks=("x", "y")
    )
