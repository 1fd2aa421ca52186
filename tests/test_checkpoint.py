"""Checkpoints, run folders and metrics as files: whole, or as they were before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shards.errors import InputError, RunError
from student_train import checkpoint
from student_train.checkpoint import Progress
from student_train.data.order import Position
from student_train.metrics import Metrics, cut_back
from student_train.processes.world import World
from student_train.run_folder import RunFolder, publish_folder


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )


def make_progress(step: int) -> Progress:
    position = Position(epoch=0, window=2, line=5)
    return Progress(step=step, tokens=step, sequences=[7], positions=[position])


def trained(seed: int = 0) -> tuple[LlamaForCausalLM, torch.optim.AdamW]:
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None]).logits.square().sum().backward()
    optimizer.step()
    return model, optimizer


ALONE = World(device=torch.device("cpu"))


def save(
    folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, progress: Progress
) -> None:
    checkpoint.save(folder, model, optimizer, progress, ALONE)


def write_more(folder: Path) -> None:
    (folder / "more").write_bytes(bytes(range(100)))


def load_newest(
    folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW
) -> Progress | None:
    newest = checkpoint.find_newest(folder)
    return None if newest is None else checkpoint.load(newest, model, optimizer, ALONE)


def test_a_checkpoint_restores_weights_moments_and_progress_exactly(tmp_path: Path) -> None:
    model, optimizer = trained()
    progress = replace(make_progress(3), evaluation={"cross_entropy": 0.1})
    save(tmp_path, model, optimizer, progress)
    other, other_optimizer = trained(seed=1)
    assert load_newest(tmp_path, other, other_optimizer) == progress
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(other_optimizer.state_dict()["state"][index][name], value)


def test_an_evaluation_is_recorded_in_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    model, optimizer = trained()
    due = replace(make_progress(3), evaluation_due=True)
    save(tmp_path, model, optimizer, due)
    evaluated = replace(due, evaluation={"cross_entropy": 0.1}, evaluation_due=False)
    checkpoint.record(tmp_path, evaluated)
    left = tmp_path / "step-00000003" / ".progress.json.0123456789abcdef.tmp"
    left.write_text("half of another")
    assert load_newest(tmp_path, model, optimizer) == evaluated
    assert not left.exists()


def test_options_of_adamw_are_those_of_the_command(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, model, optimizer, make_progress(1))
    other = make_model(seed=1)
    fused = torch.optim.AdamW(other.parameters(), lr=0.5, fused=True)
    load_newest(tmp_path, other, fused)
    assert fused.param_groups[0]["fused"]
    assert fused.param_groups[0]["lr"] == 0.5
    states = zip(optimizer.state.values(), fused.state.values(), strict=True)
    assert all(torch.equal(found[k], state[k]) for state, found in states for k in state)


def test_without_a_checkpoint_nothing_changes(tmp_path: Path) -> None:
    model, optimizer = trained()
    assert load_newest(tmp_path / "none", model, optimizer) is None


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (9, 10, 100):
        save(tmp_path, model, optimizer, make_progress(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    found = load_newest(tmp_path, model, optimizer)
    assert found == make_progress(100)


def test_what_was_killed_while_it_was_written_is_ignored_and_removed(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, model, optimizer, make_progress(1))
    half = tmp_path / ".step-00000002.0123456789abcdef.tmp"
    half.mkdir()
    (half / "sha256.json").write_bytes(b"half")
    found = load_newest(tmp_path, model, optimizer)
    assert found == make_progress(1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


FILES = ["weights/__0_0.distcp", "weights/.metadata", "progress.json", "sha256.json", "more"]


@pytest.mark.parametrize("damage", ["cut", "gone", "a byte", "a digit", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_not_used(tmp_path: Path, name: str, damage: str) -> None:
    model, optimizer = trained()
    progress = make_progress(1)
    checkpoint.save(tmp_path, model, optimizer, progress, ALONE, write_more)
    assert load_newest(tmp_path, model, optimizer) == progress
    file = tmp_path / "step-00000001" / name
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"{}")
    elif damage == "a digit":  # what was JSON still is
        place = next(i for i, byte in enumerate(content) if chr(byte).isdigit())
        content[place] ^= 1
        file.write_bytes(content)
    else:
        content[len(content) // 2] ^= 0x80
        file.write_bytes(content)
    with pytest.raises(RunError, match=r"step-00000001: .* delete this folder"):
        load_newest(tmp_path, model, optimizer)


def test_a_whole_checkpoint_of_another_model_is_not_to_be_deleted(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, model, optimizer, make_progress(1))
    model.register_parameter("renamed", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(RunError, match=r"cannot be read \(Missing key.*do not delete it"):
        load_newest(tmp_path, model, optimizer)


def test_memory_that_runs_out_is_no_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    save(tmp_path, model, optimizer, make_progress(1))

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(checkpoint, "read_state", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_newest(tmp_path, model, optimizer)


def test_a_folder_that_cannot_be_filled_leaves_the_one_before_it(tmp_path: Path) -> None:
    final = tmp_path / "model"
    publish_folder(final, lambda path: (path / "a").write_text("first") and None)

    def fail(path: Path) -> None:
        (path / "a").write_text("second")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish_folder(final, fail)
    assert (final / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [final]


def line(step: int, kind: str = "train") -> str:
    return json.dumps({"step": step, "kind": kind, "tokens": 100 * step}) + "\n"


def test_metrics_are_cut_back_to_a_step_and_half_a_line_goes(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = [line(step) for step in (1, 2, 2, 3)]
    for text, step, expected in (
        ("".join(whole), 2, "".join(whole[:3])),
        ("".join(whole), 0, ""),
        ("".join(whole), 9, "".join(whole)),
        ("".join(whole) + '{"step": 4, "ki', 9, "".join(whole)),
    ):
        file.write_text(text)
        cut_back(file, step)
        assert file.read_text() == expected


def test_an_evaluation_that_is_made_again_is_cut_too(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    kinds = [(1, "train"), (1, "validation"), (2, "train"), (2, "validation"), (3, "train")]
    whole = [line(step, kind) for step, kind in kinds]
    file.write_text("".join(whole))
    cut_back(file, 2, evaluated=False)
    assert file.read_text() == "".join(whole[:3])


@pytest.mark.parametrize("damaged", ["nonsense\n", "\0\0\n", '{"step": 2}\n', "[2]\n"])
def test_a_whole_line_that_is_not_of_figures_is_named_and_nothing_is_cut(
    damaged: str, tmp_path: Path
) -> None:
    file = tmp_path / "metrics.jsonl"
    content = line(1) + damaged + line(3)
    file.write_text(content)
    with pytest.raises(
        InputError, match=r"metrics\.jsonl:2: not a line of figures.* delete the line"
    ):
        cut_back(file, 3)
    assert file.read_text() == content


def test_metrics_can_be_read_while_they_are_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with Metrics(folder, step=0) as metrics:
        metrics.write(1, "train", {"loss": 0.5})
        metrics.write_speed(1, {"tokens_per_s": 2.0})
        found = json.loads(folder.metrics.read_text())
        assert found == {"step": 1, "kind": "train", "loss": 0.5}
        found = json.loads(folder.speed.read_text())
        assert found == {"step": 1, "kind": "speed", "tokens_per_s": 2.0}


def test_a_file_where_the_run_folder_should_be_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("mine")
    with pytest.raises(InputError, match="a file"):
        RunFolder(file).check({"config": {}})
