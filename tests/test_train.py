"""Whole runs on a dataset of a few sequences: learning, results, continuing, refusing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from transformers import AutoModelForCausalLM, AutoTokenizer

from shards import dataset
from shards.dataset import Dataset
from shards.errors import IdentityMismatchError, InputError, RunError, ShardError, StoppedError
from student_train import checkpoint
from student_train import loop as training
from student_train import run as student_run
from student_train.evaluation.evaluate import evaluate
from student_train.model.blocks import decoder_blocks
from student_train.report.page import write_report
from student_train.run import run
from student_train.setup import check_objective
from student_train.stop import StopRequest
from tests.tiny_dataset import SEQUENCE_LENGTH, VOCAB_SIZE, make_dataset, make_tokenizer
from tests.tiny_runs import (
    STEP_SEQUENCES,
    assert_same_run,
    checkpoint_tensors,
    lines,
    make_config,
    weights,
    write_student,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("datasets") / "tiny", train=60, validation=20)


MANY: dict[str, Any] = {
    "train": 1000,
    "validation": 50,
    "sequences_per_shard": 1000,
    "sequences_per_row_group": 100,
}


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough to learn the teacher's table from, and not by heart."""
    folder = tmp_path_factory.mktemp("datasets") / "many"
    return make_dataset(folder, **MANY)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_student(tmp_path_factory.mktemp("student"))


# Steps large enough, and evaluations often enough, to see a student learn.
LEARNING: dict[str, Any] = {
    "batch_tokens": 16 * SEQUENCE_LENGTH,
    "micro_batch_sequences": 16,
    "eval_every": 10,
}


@pytest.mark.parametrize(
    ("alpha", "dtype"),
    [(0.0, "float32"), (0.5, "float32"), (1.0, "float32"), (0.5, "bfloat16")],
)
def test_a_student_learns_from_labels_from_the_teacher_and_from_both(
    many_shards: Path, student: str, tmp_path: Path, alpha: float, dtype: str
) -> None:
    config = make_config(
        many_shards,
        student,
        tmp_path / "out",
        tokens=32_000,
        **LEARNING,
        alpha=alpha,
        dtype=dtype,
    )
    summary = run(config)
    first, last = (lines(config.out, "validation")[i] for i in (0, -1))
    assert last["cross_entropy"] < first["cross_entropy"] - 0.2
    assert last["kl_bound"] < first["kl_bound"] - 0.2
    assert last["top1_agreement"] > first["top1_agreement"]
    assert summary["validation_cross_entropy"] == last["cross_entropy"]
    assert summary["steps"] == 125


def test_the_result_is_a_folder_that_transformers_loads(
    shards: Path, student: str, tmp_path: Path
) -> None:
    config = make_config(shards, student, tmp_path / "out")
    summary = run(config)
    model = AutoModelForCausalLM.from_pretrained(summary["model"])
    tokenizer = AutoTokenizer.from_pretrained(summary["model"])
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer("word3 word5").input_ids == [3, 5]
    assert model(torch.tensor([[3, 5]])).logits.shape == (1, 2, 64)


def test_a_run_writes_its_settings_a_line_per_step_tensorboard_and_a_summary(
    shards: Path, student: str, tmp_path: Path
) -> None:
    config = make_config(shards, student, tmp_path / "out", eval_every=3, save_every=2)
    summary = run(config)
    assert [line["step"] for line in lines(config.out)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(config.out, "validation")] == [3, 6]
    assert lines(config.out)[-1]["tokens"] == summary["tokens"]
    speed = [json.loads(line) for line in (config.out / "speed.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"]) for line in speed] == [
        (line["step"], line["tokens"]) for line in lines(config.out)
    ]
    for line in speed:
        assert line["seconds"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert 1 << 20 < line["peak_memory_bytes"] < 1 << 40
        assert "flop_utilisation" not in line  # of a CPU nothing is known
    assert list((config.out / "tensorboard").iterdir())
    assert json.loads((config.out / "run.json").read_text())["config"]["alpha"] == 0.9
    assert json.loads((config.out / "summary.json").read_text()) == summary
    kept = sorted(path.name for path in (config.out / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


def test_the_mean_of_a_step_does_not_depend_on_micro_batches(
    shards: Path, student: str, tmp_path: Path
) -> None:
    found = []
    for size in (1, 3, 4):
        config = make_config(
            shards, student, tmp_path / str(size), micro_batch_sequences=size, tokens=2000
        )
        run(config)
        found.append([(line["loss"], line["gradient_norm"]) for line in lines(config.out)])
    for other in found[1:]:
        for expected, actual in zip(found[0], other, strict=True):
            assert actual == pytest.approx(expected, rel=1e-3)


def test_loss_mask_and_short_rows_count_only_what_is_labelled(student: str, tmp_path: Path) -> None:
    shards = make_dataset(tmp_path / "masked", train=8, validation=0, masked=True)
    config = make_config(shards, student, tmp_path / "out", tokens=8 * SEQUENCE_LENGTH)
    summary = run(config)
    sidecars = [json.loads(path.read_text()) for path in (shards / "train").glob("*.json")]
    assert summary["tokens"] == sum(sidecar["tokens"] for sidecar in sidecars)
    assert "validation_cross_entropy" not in summary


def test_more_tokens_than_the_dataset_has_are_further_epochs(
    shards: Path, student: str, tmp_path: Path
) -> None:
    summary = run(make_config(shards, student, tmp_path / "out", tokens=2000))
    (epochs,) = summary["epochs"]  # type: ignore[misc]
    assert epochs > 2
    assert summary["steps"] == -(-2000 // (STEP_SEQUENCES * SEQUENCE_LENGTH))


@pytest.mark.parametrize("changes", [{}, {"alpha": 0.0}, {"dtype": "bfloat16"}])
def test_a_run_that_stops_after_any_checkpoint_goes_on_as_if_it_had_not(
    shards: Path, student: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = make_config(shards, student, tmp_path / "whole", save_every=1, eval_every=4, **changes)
    run(whole)
    out = tmp_path / "resumed"
    shutil.copytree(whole.out, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-00000006")  # the one of step 5 is left
    run(replace(whole, out=out))
    assert_same_run(out, whole.out)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("happens", ["goes bad", "vanishes"])
def test_a_shard_that_fails_in_the_middle_is_named_and_every_step_before_it_is_kept(
    split: str, happens: str, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in the first evaluation; the validation shard is read right after that."""
    monkeypatch.setattr(dataset, "_MAX_OPEN_READERS", 1)  # so that shards are opened again
    folder = make_dataset(tmp_path / "dataset", train=30, validation=5)
    whole = make_config(folder, student, tmp_path / "whole", tokens=1200, eval_every=4)
    steps = run(whole)["steps"]
    config = replace(whole, out=tmp_path / "out")
    shard = folder / split / "shard-000000.parquet"
    content = shard.read_bytes()

    def fail_and_evaluate(*arguments: Any, **options: Any) -> dict[str, float]:
        if happens == "vanishes":
            shard.unlink()
        else:
            with shard.open("r+b") as file:  # in place: it may be mapped
                file.seek(100)
                file.write(bytes(len(content) - 200))
        monkeypatch.undo()
        monkeypatch.setattr(dataset, "_MAX_OPEN_READERS", 1)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(training, "evaluate", fail_and_evaluate)
    with pytest.raises(ShardError, match=re.escape(str(shard))):
        run(config)
    (saved,) = (config.out / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert step == 4 if split == "validation" else 4 < step < steps
    assert [line["step"] for line in lines(config.out)] == list(range(1, step + 1))
    shard.write_bytes(content)
    assert run(config)["validation_cross_entropy"] == run(whole)["validation_cross_entropy"]
    assert_same_run(config.out, whole.out)


@pytest.fixture
def sigterm_is_an_error() -> Iterator[None]:
    """Where nobody handles it, instead of an end of all tests."""

    def fail(*_: Any) -> None:
        raise AssertionError("SIGTERM was not handled")

    before = signal.signal(signal.SIGTERM, fail)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received is None
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_under_torchrun_a_signal_that_comes_twice_at_once_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.received == signal.SIGUSR1
            assert not seen
            monkeypatch.setattr("student_train.stop._SAME_SIGNAL_S", -1.0)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("sigterm_is_an_error")
@pytest.mark.parametrize("comes", ["in the step", "in the evaluation", "while it is saved"])
@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_signal_ends_a_run_after_a_step_and_an_evaluation_is_made_up_for(
    step: int,
    comes: str,
    shards: Path,
    student: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = make_config(shards, student, tmp_path / "whole", eval_every=2, save_every=1)
    expected = run(whole)
    config = replace(whole, out=tmp_path / "out")
    place, name = {
        "in the step": (training, "optimizer_step"),
        "in the evaluation": (training, "evaluate"),
        "while it is saved": (checkpoint, "save"),
    }[comes]
    function, signals = getattr(place, name), []

    def signal_and_call(*arguments: Any, **options: Any) -> Any:
        done = len(lines(config.out)) - (comes != "in the step")
        if done >= step - 1 and not signals:
            signals.append(done + 1)
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    monkeypatch.setattr(place, name, signal_and_call)
    for _ in range(2):  # the evaluation that is made up for is ended by a signal too
        with pytest.raises(
            StoppedError, match=r"SIGTERM after step \d; .* from its checkpoint"
        ) as found:
            run(config)
        (stopped,) = signals
        assert f"after step {stopped};" in str(found.value)
        assert stopped == (step if comes != "in the evaluation" or step != 3 else 4)
        validated = [line["step"] for line in lines(config.out, "validation")]
        assert validated == [n for n in (2, 4, 6) if n < stopped]
        if comes != "in the evaluation":
            break
        signals.clear()
    monkeypatch.undo()
    found = run(config)
    assert found["validation_cross_entropy"] == expected["validation_cross_entropy"]
    assert_same_run(config.out, whole.out)


def test_a_student_learns_from_packed_documents_and_resumes_among_them(
    student: str, tmp_path: Path
) -> None:
    shards = make_dataset(tmp_path / "separate", **MANY, separate=True)
    whole = make_config(shards, student, tmp_path / "whole", tokens=24_000, save_every=90,
                        **LEARNING)  # fmt: skip
    summary = run(whole)
    first, last = (lines(whole.out, "validation")[i] for i in (0, -1))
    assert last["cross_entropy"] < first["cross_entropy"] - 0.2
    assert last["kl_bound"] < first["kl_bound"] - 0.2
    assert last["tokens"] == Dataset.open(shards).split("validation").num_positions
    assert 0.95 * 24_000 < summary["tokens"] <= 24_064  # lines are full, or nearly so
    out = tmp_path / "resumed"
    shutil.copytree(whole.out, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-00000094")  # the one of step 90 is left
    run(replace(whole, out=out))
    assert_same_run(out, whole.out)


def test_several_datasets_are_mixed_by_their_weights_and_resumed(
    shards: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student_train.checkpoint._KEPT", 99)
    other = make_dataset(tmp_path / "separate", train=40, separate=True, seed=5)
    config = make_config(shards, student, tmp_path / "whole", save_every=1, tokens=10 * 4 * 16)
    whole = replace(config, shards=[shards, other], weights=[3, 1])
    summary = run(whole)
    first, second = summary["epochs"]  # type: ignore[misc]
    write_report([whole.out], tmp_path / "report.html")
    assert f"{first:.2f}, {second:.2f}" in (tmp_path / "report.html").read_text()
    assert first == pytest.approx(30 / 60, abs=2 / 60)
    assert 10 < 40 * second < 40  # in 10 lines, which hold several each
    out = tmp_path / "resumed"
    shutil.copytree(whole.out, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    for step in range(3, 11):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08}")
    run(replace(whole, out=out))
    assert_same_run(out, whole.out)
    with pytest.raises(InputError, match="dataset_2: nothing here, "):
        run(replace(whole, shards=[shards], weights=[]))
    with pytest.raises(InputError, match=r"dataset.*tokens_sha256: \"5\" here, \"0\" there"):
        run(replace(whole, shards=[other, shards]))


def test_without_weights_datasets_are_mixed_by_their_size(
    shards: Path, student: str, tmp_path: Path
) -> None:
    other = make_dataset(tmp_path / "other", train=20, seed=5)
    config = make_config(shards, student, tmp_path / "out", tokens=80 * SEQUENCE_LENGTH)
    summary = run(replace(config, shards=[shards, other]))
    assert summary["epochs"] == pytest.approx([1, 1], abs=0.1)


def test_datasets_that_do_not_mix_are_refused(
    shards: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(shards, student, tmp_path / "out")
    sampled = make_dataset(tmp_path / "sampled", sampled=True)
    with monkeypatch.context() as patch:
        patch.setattr("tests.tiny_dataset.make_tokenizer", partial(make_tokenizer, prefix="other"))
        foreign = make_dataset(tmp_path / "foreign")
    with monkeypatch.context() as patch:
        patch.setattr("tests.tiny_dataset.SEQUENCE_LENGTH", 8)
        shorter = make_dataset(tmp_path / "shorter")
    for second, error, match in (
        (shards, InputError, "given twice"),
        (sampled, InputError, "--keep threshold.*one stores probabilities, the other"),
        (foreign, IdentityMismatchError, "another tokenizer"),
        (
            shorter,
            InputError,
            "sequences of 8 tokens, but .* has 16; expected the same --sequence-length",
        ),
    ):
        with pytest.raises(error, match=match):
            run(replace(config, shards=[shards, second]))
        assert not config.out.exists()
    run(replace(config, shards=[shards, sampled], alpha=0.0))  # which reads no entries


NUM_DEEP = 10  # blocks; torch.compile gives up on code that it has compiled 8 times


def compile_with(patch: pytest.MonkeyPatch, backend: Any) -> None:
    """Dynamo as it is, and a backend that takes less than the minute of the default one."""
    compile_module = torch.nn.Module.compile
    patch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend=backend))


@pytest.mark.filterwarnings("ignore")  # torch.compile warns within
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"compile": True},
        {"gradient_checkpointing": True, "compile": True},
    ],
)
def test_compiled_and_checkpointed_blocks_compute_the_same(
    options: dict[str, bool],
    shards: Path,
    student: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    compile_with(monkeypatch, backend)
    torch.compiler.reset()
    shape = json.loads(Path(student).read_text()) | {"num_hidden_layers": NUM_DEEP}
    deep = tmp_path / "deep.json"
    deep.write_text(json.dumps({**shape, "layer_types": None}))
    plain = make_config(shards, str(deep), tmp_path / "plain")
    config = replace(plain, out=tmp_path / "out", **options)
    expected, found = run(plain), run(config)
    # with and without gradients, for both sizes of a micro batch; not once for every block
    assert len(compiled) <= 6 if "compile" in options else not compiled
    assert bool(compiled) == ("compile" in options)
    model = AutoModelForCausalLM.from_pretrained(config.out / "model")
    assert len(decoder_blocks(model)) == NUM_DEEP
    for name in ("loss", "gradient_norm"):
        values = [line[name] for line in lines(config.out)]
        assert values == pytest.approx([line[name] for line in lines(plain.out)], rel=1e-4), name
    assert found["validation_kl_bound"] == pytest.approx(expected["validation_kl_bound"], rel=1e-4)
    for name, weight in weights(plain.out).items():
        torch.testing.assert_close(weights(config.out)[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch.compile warns within
def test_blocks_that_cannot_be_compiled_are_refused_before_anything_is_written(
    shards: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler\nand a long story")

    config = make_config(shards, student, tmp_path / "out", compile=True)
    compile_with(monkeypatch, broken)
    torch.compiler.reset()
    with pytest.raises(InputError, match=r"Llama.* does not run with --compile: no compiler$"):
        run(config)
    monkeypatch.setattr("student_train.model.blocks.decoder_blocks", lambda model: [])
    with pytest.raises(InputError, match="--compile: it does not name its blocks"):
        run(config)
    assert not config.out.exists()


@pytest.mark.filterwarnings("ignore")  # torch.compile warns within
def test_blocks_that_only_the_default_compiles_go_on_without_it(
    shards: Path,
    student: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler\nand a long story")

    config = make_config(shards, student, tmp_path / "plain")
    expected = run(config)
    # The only thing that makes this model one on a GPU, where blocks are compiled by default.
    monkeypatch.setattr(
        "student_train.model.blocks.compiles_by_default", lambda device: device.type == "cpu"
    )
    compile_with(monkeypatch, broken)
    torch.compiler.reset()
    found = run(replace(config, out=tmp_path / "out"))
    assert "LlamaForCausalLM runs without --compile: no compiler" in caplog.text
    assert found["validation_cross_entropy"] == expected["validation_cross_entropy"]
    run(replace(config, out=tmp_path / "other", compile=False))


def test_a_finished_run_is_left_as_it_is(shards: Path, student: str, tmp_path: Path) -> None:
    config = make_config(shards, student, tmp_path / "out")
    summary = run(config)
    shutil.rmtree(config.out / "checkpoints")
    assert run(config) == summary
    assert not (config.out / "checkpoints").exists()


def test_saving_more_often_is_not_another_run_but_another_seed_is(
    shards: Path, student: str, tmp_path: Path
) -> None:
    config = make_config(shards, student, tmp_path / "out")
    summary = run(config)
    assert run(replace(config, save_every=1)) == summary
    with pytest.raises(InputError, match=r"config\.seed: 3 here, 0 there"):
        run(replace(config, seed=3))
    with pytest.raises(InputError, match="learning rate of every step"):
        run(replace(config, tokens=10 * config.tokens))


def test_settings_are_compared_again_once_the_folder_is_locked(
    shards: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(shards, student, tmp_path / "out")
    other = replace(config, seed=3)

    def while_another_run_comes_and_goes(*arguments: Any) -> Any:
        monkeypatch.undo()
        run(other)
        return make(*arguments)

    make = student_run._make_student
    monkeypatch.setattr(student_run, "_make_student", while_another_run_comes_and_goes)
    with pytest.raises(InputError, match=r"config\.seed: 0 here, 3 there"):
        run(config)
    assert run(other)["steps"]


def test_a_dataset_that_was_extended_is_named_as_the_reason(student: str, tmp_path: Path) -> None:
    config = make_config(make_dataset(tmp_path / "shards"), student, tmp_path / "out")
    run(config)
    shutil.rmtree(tmp_path / "shards")
    make_dataset(tmp_path / "shards", train=100)
    with pytest.raises(InputError, match=r"sequences\.train: 100 here.*if dump-logits extended"):
        run(config)


def test_a_student_is_compared_by_what_is_in_its_files(shards: Path, tmp_path: Path) -> None:
    student = write_student(tmp_path / "student")
    config = make_config(shards, student, tmp_path / "out")
    summary = run(config)
    moved = shutil.copytree(Path(student).parent, tmp_path / "moved") / Path(student).name
    assert run(replace(config, student=str(moved))) == summary
    content = json.loads(moved.read_text())
    moved.write_text(json.dumps(content | {"rope_theta": 500.0}))
    with pytest.raises(InputError, match="student: "):
        run(replace(config, student=str(moved)))


def test_the_seed_decides_weights_and_order(shards: Path, student: str, tmp_path: Path) -> None:
    configs = [
        make_config(shards, student, tmp_path / str(i), seed=seed)
        for i, seed in enumerate((0, 0, 1))
    ]
    for config in configs:
        run(config)
    assert_same_run(configs[1].out, configs[0].out)
    assert lines(configs[2].out)[0]["loss"] != lines(configs[0].out)[0]["loss"]


def test_a_run_continues_from_a_model_folder(shards: Path, student: str, tmp_path: Path) -> None:
    first = run(make_config(shards, student, tmp_path / "first", tokens=6_000))
    second = make_config(shards, str(first["model"]), tmp_path / "second")
    run(second)
    assert lines(second.out)[0]["loss"] < 0.8 * lines(tmp_path / "first")[0]["loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"tail": "bucket"},
        {"loss": "mse"},
        {"alpha_schedule": "period"},
        {"temperature": 2.0, "student_temperature": 2.0},
        {"adaptive_temperature": "adakd-h"},
    ],
)
def test_a_student_learns_with_every_loss_and_a_changing_alpha(
    many_shards: Path, student: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = make_config(
        many_shards,
        student,
        tmp_path / "out",
        tokens=20_000,
        **LEARNING,
        alpha=0.5,
        **changes,
    )
    run(config)
    first, last = (lines(config.out, "validation")[i] for i in (0, -1))
    assert last["cross_entropy"] < first["cross_entropy"] - 0.2
    steps = lines(config.out)
    assert {line["alpha"] for line in steps} == (
        {0.0, 0.5} if "alpha_schedule" in changes else {0.5}
    )
    assert all((line["kd"] > 0) == (line["alpha"] > 0) for line in steps)


def test_a_student_learns_from_sampled_shards_at_the_temperature_of_the_dump(
    student: str, tmp_path: Path
) -> None:
    shards = make_dataset(
        tmp_path / "sampled",
        train=1000,
        validation=50,
        sequences_per_shard=1000,
        sequences_per_row_group=100,
        sampled=True,
    )
    config = make_config(
        shards,
        student,
        tmp_path / "out",
        tokens=32_000,
        **LEARNING,
        alpha=1.0,
    )
    for changes, match in (
        ({"temperature": 2.0}, r"--temperature 2.0: .* at temperature 1.0"),
        ({"adaptive_temperature": "adakd-h"}, r"--adaptive-temperature adakd-h: .* at temperature"),
        ({"loss": "mse"}, r"--loss mse: .* a weight is not the probability"),
        ({"tail": "bucket"}, r"--tail bucket: .* does not store the mass"),
    ):
        with pytest.raises(InputError, match=match):
            run(replace(config, **changes))
    check_objective(replace(config, student_temperature=2.0), Dataset.open(shards))
    assert not config.out.exists()
    run(config)
    first, last = (lines(config.out, "validation")[i] for i in (0, -1))
    assert last["cross_entropy"] < first["cross_entropy"] - 0.2
    assert last["kl_unbiased"] < first["kl_unbiased"] - 0.2
    assert "kl_bound" not in last


def test_what_does_not_fit_is_refused_before_anything_is_written(
    shards: Path, student: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = make_config(shards, student, out)
    for changes, error, match in (
        ({"student": "1.5B"}, InputError, "demo, 330M"),
        ({"student": student, "learning_rate": None}, InputError, "--learning-rate"),
        ({"batch_tokens": SEQUENCE_LENGTH - 1}, InputError, "at least one sequence"),
        ({"shards": [tmp_path / "nothing"]}, ShardError, "not a dataset"),
        ({"eval_shards": tmp_path / "nothing"}, ShardError, "not a dataset"),
        ({"student": str(shards)}, InputError, "no tokenizer"),
    ):
        with pytest.raises(error, match=match):
            run(replace(config, **changes))
        assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"contains notes\.txt but no run"):
        run(config)


def test_another_tokenizer_is_refused_though_its_vocabulary_has_the_same_size(
    shards: Path, student: str, tmp_path: Path
) -> None:
    folder = Path(str(run(make_config(shards, student, tmp_path / "first"))["model"]))
    make_tokenizer(folder, prefix="other")
    with pytest.raises(IdentityMismatchError, match="another tokenizer"):
        run(make_config(shards, str(folder), tmp_path / "second"))


def test_evaluation_on_other_shards_of_the_same_tokenizer(
    shards: Path, student: str, tmp_path: Path
) -> None:
    other = make_dataset(tmp_path / "other", train=3, validation=4, seed=1)
    config = make_config(shards, student, tmp_path / "out", eval_shards=other)
    summary = run(config)
    assert summary["validation_tokens"] == 4 * SEQUENCE_LENGTH - 5


def test_a_run_that_diverges_ends_with_one_line_and_no_checkpoint_of_it(
    shards: Path, student: str, tmp_path: Path
) -> None:
    config = make_config(
        shards, student, tmp_path / "out", learning_rate=1e30, save_every=1, gradient_clip=0.0
    )
    with pytest.raises(RunError, match="diverged"):
        run(config)
    for path in (config.out / "checkpoints").glob("step-*"):
        assert all(value.isfinite().all() for value in checkpoint_tensors(path).values())
