"""Whatever is given and whatever goes wrong, a command answers with one line at most."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

import cli
from logitshards.failures import one_line
from shards.errors import InputError, RunError
from shards.options import OptionError, OptionField, flag
from tests.command_runs import COMMANDS, COMPLETE, refused, run, the_line


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dump-logits"], "dump-logits: --corpus: missing"),
        (["dump-logits", "--top-k", "abc"], "dump-logits: --top-k abc: not a valid integer"),
        (["dump-logits", "--top-k", "1.5"], "dump-logits: --top-k 1.5: not a valid integer"),
        (["dump-logits", "--top-k"], "dump-logits: --top-k: needs a value"),
        (["dump-logits", "--eos=yes"], "dump-logits: --eos: takes no value"),
        (["dump-logits", "--top-q", "1"], "dump-logits: --top-q: no such option, did you mean"),
        (["dump-logits", "--out", ""], "dump-logits: --out '': not a path"),
        (
            ["dump-logits", "--text-key", ""],
            "dump-logits: --text-key '': expected text that is not empty",
        ),
        (["dump-logits", "--top-p", "nan"], "dump-logits: --top-p nan: not a finite number"),
        (["dump-logits", "--weights", "1,x"], "dump-logits: --weights 1,x: not a valid number"),
        (["dump-logits", "--engine", "x"], "dump-logits: --engine x: expected vllm, vllm-logprobs"),
        (["dump-logits", "--engine-arg", "x"], "dump-logits: --engine-arg x: expected KEY=VALUE"),
        (
            ["dump-logits", *COMPLETE["dump-logits"], "--tokens", "5"],
            "dump-logits: --tokens 5: needs --plan",
        ),
        (
            ["dump-logits", *COMPLETE["dump-logits"], "--plan", "--tokens", "0.5"],
            "dump-logits: --tokens 0.5: expected a number from 1 to 1e18",
        ),
        (["inspect-shards"], "inspect-shards: PATH: missing"),
        (["inspect-shards", "a", "b"], "inspect-shards: got unexpected extra argument (b)"),
        (["inspect-shards", "a", "--split", "x"], "inspect-shards: --split x: expected train or"),
        (["inspect-shards", "a", "--split", "train"], "inspect-shards: --split train: needs --row"),
        (["train-student", "report"], "train-student report: RUN: missing"),
        (["train-student", "absent"], "train-student: --shards: missing"),
        (["nonsense"], "main: nonsense: no such command, expected dump-logits, train-student or"),
        ([], "main: missing command"),
        (["--nonsense"], "main: --nonsense: no such option"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_one_line(words: list[str], line: str) -> None:
    assert refused(CliRunner().invoke(cli.main, words)).startswith(line)


class Panic(BaseException):
    """As pyo3's, which is no Exception."""


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "line", "exit_code"),
    [
        (
            ValueError("odd\nsecond line"),
            "internal error: ValueError: odd (--debug shows the traceback)",
            1,
        ),
        (KeyError(), "internal error: KeyError (--debug shows the traceback)", 1),
        (Panic("cannot\n\n"), "internal error: Panic: cannot (--debug shows the traceback)", 1),
        (UnprintableError(), "internal error: UnprintableError (--debug shows the traceback)", 1),
        (MemoryError(), "out of memory", 1),
        (RuntimeError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory. Tried)", 1),
        (
            RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: 9"),
            "out of memory ([x] ",
            1,
        ),
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied", 1),
        (InputError("several\n  lines\u2028of\x1b[31m text"), r"several lines of\x1b[31m text", 2),
        (RunError("disk full"), "disk full", 1),
        (OptionError("top_k", " 0: expected at least 1"), "--top-k 0: expected at least 1", 2),
        (KeyboardInterrupt(), "interrupted; run the same command again to continue", 130),
    ],
)
def test_any_error_is_one_line_and_debug_shows_where(
    error: BaseException, line: str, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli.inspect_shards, "_function", lambda *_, **__: fail())
    result = run("inspect-shards", "a")
    assert the_line(result).startswith(f"inspect-shards: {line}")
    assert (result.exit_code, result.stdout) == (exit_code, "")
    result = run("inspect-shards", "a", "--debug")
    assert result.exit_code == exit_code
    assert result.stderr.startswith("Traceback")
    assert result.stderr.splitlines()[-1].startswith(f"inspect-shards: {line}")


def test_an_error_of_memory_is_known_as_torch_raises_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    def fail(*_: object, **__: object) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(cli.inspect_shards, "_function", fail)
    result = run("inspect-shards", "a")
    assert the_line(result).startswith("inspect-shards: out of memory (")


def test_lines_have_nothing_that_a_terminal_would_act_on() -> None:
    assert one_line("a\r\n b\x00\x85c\x1b[2Jä\ud800") == "a b\\x00 c\\x1b[2Jä\\ud800"


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", missing)
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []
    monkeypatch.setattr(
        cli.inspect_shards,
        "_function",
        lambda *_, **__: seen.append((os.environ["USER"], Path.home())),
    )
    assert run("inspect-shards", "a").exit_code == 0
    home = tmp_path / f"logitshards-{os.getuid()}"
    assert seen == [(f"user{os.getuid()}", home)]
    assert home.stat().st_mode & 0o777 == 0o700
    home.chmod(0o777)  # as somebody else's that waits there
    monkeypatch.delenv("HOME")
    assert run("inspect-shards", "a").exit_code == 0
    assert seen[1][1] != home


TEXTS = ("", " ", "-1", "0", "nan", "inf", "-inf", "1e400", "1e18", "ä", "\udcff", "x" * 10_000,
         "9" * 5_000, "true", "[]", "{}", "a=b", "a=[", "2024-01-01", "a\nb", "--", "1,2", ",",
         "9223372036854775807", "-9223372036854775808")  # fmt: skip
VALUES: tuple[object, ...] = (
          None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 1 << 63, 10**400, 2**63 - 1,
          "", " ", "ä", "x" * 10_000, "\0", "nan", [], [[]], [None], ["a", 1], {}, {"a": {"b": 1}},
          {1: 2}, "a\nb", "\x85", "/dev/null", "/proc/self/mem",
          yaml.safe_load("2024-01-01"), b"bytes")  # fmt: skip


def check(result: Result) -> None:
    """Success, or a refusal in one line without a traceback."""
    assert result.exit_code in (0, 1, 2), result.output
    if result.exit_code:
        line = the_line(result)
        assert "internal error" not in line
        assert line.isprintable()
    else:
        assert result.exception is None


def nothing(*_: object, **__: object) -> None:
    """A command that has got its objects."""


@pytest.mark.parametrize(
    ("name", "option"),
    [
        pytest.param(name, option, id=f"{name} {option.name}")
        for name, made in COMMANDS.items()
        for option in made.options.values()
    ],
)
def test_odd_values_are_taken_or_refused_in_one_line(
    name: str, option: OptionField, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(COMMANDS[name], "_function", nothing)
    word = flag(option.name)
    base = COMPLETE[name]
    if word in base:
        at = base.index(word)
        base = [*base[:at], *base[at + 2 :]]
    assert run(name, *COMPLETE[name]).exit_code == 0
    for text in TEXTS:
        check(run(name, *base, word, text))
    for value in VALUES:
        Path("o.yaml").write_text(yaml.safe_dump({option.name: value}), encoding="utf-8")
        check(run(name, *base, "--config", "o.yaml"))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("train-student", "--shards"),
        ("train-student", "--student"),
        ("train-student", "--eval-shards"),
        ("train-student report", ""),
        ("inspect-shards", ""),
    ],
)
def test_a_command_that_runs_refuses_odd_paths_in_one_line(name: str, word: str) -> None:
    given = COMPLETE[name] if word else []
    for text in TEXTS:
        check(run(name, *given, *([word] if word else []), text))
