"""A configuration file says what the command line says; a value of another type is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from teacher_dump.config import DumpConfig
from tests.command_runs import parsed, refused, run


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--corpus", "a", "--corpus", "b", "--weights", "2, 0.5"],
            "corpus: [a, b]\nweights: [2, 0.5]",
        ),
        (["--corpus", "a", "--weights", "2"], "corpus: a\nweights: 2"),
        (
            ["--corpus", "a", "--corpus", "b", "--weights", "2, .5"],
            "corpus: [a, b]\nweights: 2,0.5",
        ),
        (["--corpus", "a", "--no-eos"], "corpus: a\neos: false"),
        (["--corpus", "a", "--trust-remote-code"], "corpus: a\ntrust-remote-code: true"),
        (["--corpus", "a", "--max-tokens", "5"], "corpus: a\nmax_tokens: 5"),
        (["--corpus", "a"], "corpus: a\nmax_tokens:"),
        (["--corpus", "a", "--held-out", "0.0002"], "corpus: a\nheld_out: 2e-4"),
        (["--corpus", "a", "--bos", "none"], "corpus: a\nbos: none"),
        (
            ["--corpus", "a", "--engine-arg", "enforce-eager=false", "--engine-arg", "a={b: [1]}"],
            "corpus: a\nengine_arg: {enforce-eager: false, a: {b: [1]}}",
        ),
        (["--corpus", "a", "--keep", "draws", "--draws", "7"], "corpus: a\nkeep: draws\ndraws: 7"),
    ],
)
def test_a_configuration_file_says_what_the_command_line_says(words: list[str], text: str) -> None:
    Path("o.yaml").write_text(f"{text}\nout: ${{out}}\n", encoding="utf-8")
    given = ["--teacher", "t", "--out", "o"]
    by_words = parsed("dump-logits", *given, *words)["DumpConfig"]
    by_file = parsed("dump-logits", *given, "--config", "o.yaml")["DumpConfig"]
    assert by_file == by_words


def test_the_command_line_overrides_the_file() -> None:
    Path("o.yaml").write_text("corpus: [a, b]\nseed: 3\neos: false\n", encoding="utf-8")
    words = ["--teacher", "t", "--out", "o", "--config", "o.yaml", "--corpus", "c", "--eos"]
    config = parsed("dump-logits", *words)["DumpConfig"]
    assert isinstance(config, DumpConfig)
    assert (config.corpus, config.seed, config.eos) == ((Path("c"),), 3, True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("out: 2024-01-01", "out: expected a path, found the date 2024-01-01; quotes make it text"),
        ("out: 123", "out: expected a path, found 123; quotes make it text"),
        ("out: [a]", "out: expected a path, found a list"),
        ("out:", "out: expected a path, found nothing"),
        ('out: ""', "out: expected a path, found ''"),
        ("corpus: [a, 7]", "corpus: expected a path, found 7; quotes make it text"),
        ("corpus:", "corpus: expected a path, found nothing"),
        ("corpus: {a: b}", "corpus: expected a path, found a mapping"),
        ("corpus: [[a]]", "corpus: expected a path, found a list"),
        ("keep: {a: b}", "keep: expected top-p-k, draws, threshold or tokens, found a mapping"),
        ("sequence_length: 1.5", "sequence_length: expected an integer of 64 bits, found 1.5"),
        ("sequence_length: true", "sequence_length: expected an integer of 64 bits, found true"),
        ("seed: 9223372036854775808", "seed: expected an integer of 64 bits, found 92233720368547"),
        (f"seed: {'9' * 4000}", "seed: expected an integer of 64 bits, found a larger number"),
        (f"seed: {'9' * 5000}", "not valid YAML"),
        ("bos: yes", "bos: expected auto, none, document, sequence or sequence+document, found tr"),
        ("eos: 1", "eos: expected true or false, found 1"),
        ("held_out: .nan", "held_out: expected a finite number, found nan"),
        ("held_out: -.inf", "held_out: expected a finite number, found -inf"),
        (f"held_out: {'9' * 400}", "held_out: expected a finite number, found a larger number"),
        ("held_out: much", "held_out: expected a finite number, found much"),
        ("weights: [1, x]", "weights: expected a finite number, found x"),
        ("text_key: no", "text_key: expected text, found false; quotes make it text"),
        ("text_key: !!binary YQ==", "text_key: expected text, found bytes"),
        ("engine_arg: [a]", "engine_arg: expected a mapping, found a list"),
        ("engine_arg: {1: 2}", "engine_arg: expected a name as the key, found 1"),
        ("engine_arg: {a: {1: 2}}", "engine_arg: a: not a JSON value"),
        ("engine_arg: {a: 2024-01-01}", "engine_arg: a: not a JSON value"),
        ("engine_arg: {a: .nan}", "engine_arg: a: not a JSON value"),
        ("engine_arg: {a: &x [*x]}", "engine_arg: a: not a JSON value"),
        ("sizes: 3", "unknown option sizes"),
        ("1: 3", "unknown option 1"),
        ("config: o.yaml", "unknown option config"),
        ("debug: true", "unknown option debug"),
        ("top_k: 3\ntop-k: 4", "top-k: appears twice"),
        ("seed: 3\neos: true\nseed: 4", "seed: appears twice, again in line 3"),
        ("engine_arg: {a: [{b: 1, c: 2,\n b: 1}]}", "b: appears twice, again in line 2"),
        ("engine_arg: {'a': 1, a: 2}", "a: appears twice"),
        ("engine_arg: {a: {1: 2, 0x1: 3}}", "0x1: appears twice"),
        ("engine_arg: {a: &x {b: 1}, c: {<<: *x, <<: *x}}", "<<: appears twice"),
        ("[a, b]", "expected option names and values, found a list"),
        ("seed", "expected option names and values, found seed"),
        ("a: [", "not valid YAML"),
        ("a: 2024-13-45", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("[" * 1000, "not valid YAML"),
        (b"\x00\x01", "not valid YAML"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_what_a_file_has_of_another_type_is_named(text: str | bytes, says: str) -> None:
    Path("o.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(run("dump-logits", "--config", "o.yaml", "--teacher", "t"))
    assert line.startswith(f"dump-logits: o.yaml: {says}")


def test_a_key_that_is_merged_in_and_given_again_is_no_repeated_one() -> None:
    text = "corpus: a\nengine_arg: {x: &x {a: {b: &y {<<: *z, c: 3}}}, y: {<<: *y, c: 4}}"
    text = text.replace("{x: &x", "{z: &z {c: 1, d: 2}, x: &x")
    Path("o.yaml").write_text(text, encoding="utf-8")
    words = ["--teacher", "t", "--out", "o", "--config", "o.yaml"]
    config = parsed("dump-logits", *words)["DumpConfig"]
    assert isinstance(config, DumpConfig)
    assert config.engine_arg["x"] == {"a": {"b": {"c": 3, "d": 2}}}
    assert config.engine_arg["y"] == {"c": 4, "d": 2}


def test_a_key_that_is_twice_in_a_value_of_the_command_line_is_named() -> None:
    says = refused(run("dump-logits", "--teacher", "t", "--engine-arg", "a={b: 1, b: 2}"))
    assert "b: appears twice" in says


def test_a_file_that_is_not_there_is_named() -> None:
    assert "--config no.yaml: No such file" in refused(run("inspect-shards", "--config", "no.yaml"))
    Path("folder").mkdir()
    assert "--config folder: Is a dir" in refused(run("train-student", "--config", "folder"))


def test_an_empty_file_gives_nothing() -> None:
    Path("o.yaml").write_text("# nothing\n", encoding="utf-8")
    assert refused(run("inspect-shards", "--config", "o.yaml")) == "inspect-shards: PATH: missing"
