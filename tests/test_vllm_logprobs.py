"""The engine without the plugin: what it refuses, and what it makes of the largest entries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import cli
from shards import inspect
from shards.errors import RunError
from shards.keep import TopPK
from teacher_dump.engines.vllm_logprobs_engine import read_output
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.rows import TokenSequence
from tests.tiny_teacher import (
    STEP,
    TOKENIZER_LENGTH,
    TOP_P_K,
    all_rows,
    dump_command,
    run_dump,
    write_corpus,
)


@pytest.mark.slow
def test_a_plan_and_masked_tokens_work(tiny_teacher: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    tokens = [random.integers(1, TOKENIZER_LENGTH, 20).tolist() for _ in range(30)]
    masks = [(random.random(20) < 0.5).tolist() for _ in range(30)]
    corpus = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"tokens": tokens, "mask": masks}), corpus)
    out = tmp_path / "out"
    more = ("--engine", "vllm-logprobs", "--token-key", "tokens", "--mask-key", "mask")
    command = dump_command(tiny_teacher, corpus, out, *more)
    planned = run_dump([*command, "--plan"])
    assert planned.returncode == 0, planned.stderr
    assert "tokens/s with this engine" in planned.stdout
    assert not out.exists()
    assert run_dump(command).returncode == 0
    assert inspect.verify(out) == []
    for row in all_rows(out).values():
        assert row.loss_mask is not None
        assert np.array_equal(row.counts > 0, row.loss_mask)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--keep", "draws"], "--keep draws needs the whole distribution; use --engine vllm"),
        (["--keep", "threshold"], "--keep threshold needs the whole distribution"),
        ([], "--keep threshold needs the whole distribution; use --engine vllm or"),
        (
            [*TOP_P_K, "--engine-arg", "max_logprobs=5"],
            "--engine-arg max_logprobs: set by the pass itself",
        ),
        ([*TOP_P_K, "--engine-arg", "logprobs_mode=raw_logits"], "set by the pass itself"),
        ([*TOP_P_K, "--sequence-length", "65"], "takes at most 64 tokens"),
    ],
)
def test_what_the_engine_does_not_do_is_refused_before_anything_is_made(
    more: list[str], says: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    out = tmp_path / "out"
    command = dump_command(tiny_teacher, corpus, out, "--engine", "vllm-logprobs", *more, keep=())
    result = CliRunner().invoke(cli.dump_logits, command[3:])
    assert result.exit_code == 2
    assert says in result.output
    assert not out.exists()


@pytest.mark.slow
def test_a_length_at_which_one_place_more_changes_the_positions_is_refused(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_teacher / "config.json").read_text(encoding="utf-8"))
    factors = [1.0] * 32
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    config |= {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 48,
        "pad_token_id": 0,
        "rope_parameters": {
            **rope, "rope_theta": 1e4, "original_max_position_embeddings": 48
        },
    }  # fmt: skip
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for path in tiny_teacher.iterdir():
        if path.name != "config.json":
            (teacher / path.name).symlink_to(path)
    (teacher / "config.json").write_text(json.dumps(config), encoding="utf-8")
    check = (
        "import sys\nfrom pathlib import Path\n"
        "from teacher_dump.engines.options import EngineOptions\n"
        "from shards.keep import TopPK\n"
        "from teacher_dump.keep.packed_size import Selection\n"
        "from teacher_dump.engines.vllm_logprobs_engine import check\n"
        "keep = Selection(TopPK(top_p=0.9, top_k=9, logprob_step=0.5), 99)\n"
        "for length in (47, 48, 49):\n"
        "    try:\n"
        "        check(EngineOptions(teacher_folder=Path(sys.argv[1]),\n"
        "              architecture='Phi3ForCausalLM', dtype='float32', head_dtype='float32',\n"
        "              sequence_length=length, selection=keep))\n"
        "        print(length, 'taken')\n"
        "    except Exception as error:\n"
        "        print(length, error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", check, str(teacher)], capture_output=True, text=True, check=True
    )
    lines = dict(line.split(" ", 1) for line in result.stdout.splitlines() if line[:2].isdigit())
    assert lines["47"] == lines["49"] == "taken"
    assert "one token more than --sequence-length 48" in lines["48"]
    assert lines["48"].endswith("use --engine transformers")


def _output(ids: list[list[int]], logprobs: list[list[float]]) -> Any:
    def flat(a: int, b: int) -> Any:
        return SimpleNamespace(
            token_ids=[i for row in ids[a:b] for i in row],
            logprobs=[x for row in logprobs[a:b] for x in row],
        )

    last = len(ids) - 1
    completion = SimpleNamespace(logprobs=flat(last, last + 1))
    return SimpleNamespace(prompt_logprobs=flat(0, last), outputs=[completion])


@pytest.mark.parametrize(
    ("ids", "logprobs", "says"),
    [
        ([[5, 1, 2]], [[-1.0, -1.0, -2.0]], "3 log-probabilities came back"),
        ([[6, 1, 2], [7, 1, 2]], [[-1.0, -1.0, -2.0]] * 2, "of other labels"),
        ([[5, 1, 2], [6, 1, 9]], [[-1.0, -1.0, -2.0]] * 2, "beyond the tokenizer's length"),
        ([[5, 1, 2], [6, 1, 2]], [[-1.0, -2.0, -1.0]] * 2, "another order"),
    ],
)
def test_what_does_not_fit_the_sequence_ends_the_run(
    ids: list[list[int]], logprobs: list[list[float]], says: str
) -> None:
    keep = Selection(TopPK(top_p=0.9, top_k=1, logprob_step=STEP), 9)
    tokens = np.array([4, 5, 6], np.int32)
    sequence = TokenSequence(split="train", number=3, tokens=tokens, segments=tokens * 0)
    with pytest.raises(RunError, match=f"train sequence 3: .*{says}"):
        read_output(_output(ids, logprobs), sequence, keep)
    good = [[5, 1, 2], [6, 3, 4]], [[-1.0, -1.0, -2.0], [-3.0, -0.5, -4.0]]
    labels, known, values = read_output(_output(*good), sequence, keep)
    assert labels.tolist() == [-1.0, -3.0]
    assert known.tolist() == [[1, 2], [3, 4]]
    assert values.tolist() == [[-1.0, -2.0], [-0.5, -4.0]]
