"""The memory that training takes is known before it starts: against what a CPU allocates."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from shards.dataset import Dataset
from shards.errors import InputError
from student_train.memory import (
    _LIBRARIES,
    ERROR,
    Setting,
    Shape,
    check_fit,
    check_memory,
    estimate,
    make_setting,
    most_sequences,
    remedies,
    saved_of_block,
)
from student_train.model.model import head_weight, hidden_states
from student_train.model.presets import PRESETS
from student_train.objective.distillation import Objective
from student_train.objective.loss import distillation_loss
from tests.tiny_dataset import make_dataset
from tests.tiny_runs import make_config

ROOT = Path(__file__).parent.parent
GIB = 1 << 30
FREE = 79 * GIB  # of a GPU of "80 GB"
VOCAB = 151_936

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
LENGTH = 128


def preset(name: str) -> Shape:
    fields = asdict(PRESETS[name])
    del fields["learning_rate"]
    return Shape.of(LlamaConfig(vocab_size=VOCAB, **fields))


def saved_bytes(model: Any) -> int:
    """Bytes of all storages that a forward pass keeps, but for the weights."""
    owned = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        states = hidden_states(model, torch.zeros((2, LENGTH), dtype=torch.int64))
    assert states.requires_grad
    return sum(kept.values())


@pytest.mark.filterwarnings("ignore")  # torch.compile warns within
@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config])
@pytest.mark.parametrize(
    "setting",
    [
        Setting(sequences=2, length=LENGTH),
        Setting(sequences=2, length=LENGTH, bfloat16=False),
        Setting(sequences=2, length=LENGTH, compiled=True),
        Setting(sequences=2, length=LENGTH, checkpointing=True),
    ],
    ids=["bfloat16", "float32", "compiled", "checkpointing"],
)
def test_what_a_block_saves_is_counted(setting: Setting, kind: type[PretrainedConfig]) -> None:
    found = []
    for num_blocks in (1, 2):
        torch.compiler.reset()
        config = kind(**SHAPE, num_hidden_layers=num_blocks)
        dtype = torch.bfloat16 if setting.bfloat16 else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        if setting.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for block in model.model.layers if setting.compiled else ():
            block.compile(backend="aot_eager_decomp_partition")
        found.append(saved_bytes(model))
    shape = Shape.of(config)
    of_token = 2 * shape.hidden if setting.checkpointing else saved_of_block(shape, setting)
    assert setting.tokens * of_token == pytest.approx(found[1] - found[0], rel=ERROR)


@pytest.mark.parametrize(("name", "kilobytes"), [("330M", 43.1), ("1.9B", 88.1)])
def test_presets_save_this_much_per_token_and_layer(name: str, kilobytes: float) -> None:
    saved = saved_of_block(preset(name), Setting(sequences=1, length=2048))
    assert saved / 1000 == pytest.approx(kilobytes, abs=0.1)


class Student(nn.Module):
    """A model whose forward pass ends with the loss, as sharding needs it."""

    def __init__(self, model: Any, block_bytes: int) -> None:
        super().__init__()
        self.model, self.block_bytes = model, block_bytes

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = hidden_states(self.model, tokens).flatten(0, 1)
        objective = Objective(kind="kld", alpha=0.0, temperature=1.0)
        weight, labels = head_weight(self.model), tokens.flatten()
        loss = distillation_loss(
            hidden, weight, labels, None, objective, block_bytes=self.block_bytes
        )
        return loss.total


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch warns within
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_step_allocates_what_is_estimated(
    checkpointing: bool, tied: bool, one_process: None
) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape: dict[str, Any] = {**SHAPE, "vocab_size": 2048, "num_hidden_layers": 8}
    config = LlamaConfig(**shape, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    block_bytes = 4 * config.vocab_size * LENGTH
    student = Student(model, block_bytes)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for module in (*model.model.layers, student):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    optimizer = torch.optim.AdamW(student.parameters(), foreach=False)
    tokens = torch.zeros((4, LENGTH), dtype=torch.int64)

    def step() -> None:
        student(tokens).backward()
        optimizer.step()

    step()
    tracker = MemTracker()
    tracker.track_external(student, optimizer, tokens)
    with tracker:
        step()
    measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    setting = Setting(
        sequences=4, length=LENGTH, checkpointing=checkpointing, block_bytes=block_bytes
    )
    entries = setting.tokens * (24 + 800)  # which this step does not have
    found = estimate(Shape.of(config), setting).total - _LIBRARIES - entries
    assert found == pytest.approx(measured, rel=ERROR)


def test_ranks_share_the_states_and_not_the_activations() -> None:
    shape, setting = preset("1.9B"), Setting(sequences=8, length=2048)
    one, eight = (estimate(shape, replace(setting, world_size=size)) for size in (1, 8))
    assert one.gradients == 4 * shape.parameters
    assert one.moments == 8 * shape.parameters
    assert eight.gradients == pytest.approx(one.gradients / 8, abs=4)
    assert eight.activations == one.activations
    assert one.weights - eight.weights == pytest.approx(4 * shape.parameters * 7 / 8, abs=4)


def test_a_student_that_does_not_fit_is_refused_with_the_options_that_help() -> None:
    setting = Setting(sequences=8, length=2048)
    with pytest.raises(InputError) as caught:
        check_fit(preset("6.8B"), setting, "6.8B", FREE)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("--student 6.8B: needs about 194.8 GiB of memory per GPU (weights ")
    assert "79.0 GiB free; try 2 GPUs with --gradient-checkpointing: torchrun" in message
    assert list(remedies(preset("3.8B"), replace(setting, compiled=True), FREE)) == [
        "--micro-batch-sequences 1",
        "--gradient-checkpointing",
        "4 GPUs: torchrun --nproc-per-node 4",
    ]
    narrow = list(remedies(preset("330M"), setting, 12 * GIB))
    assert narrow[0] == "--micro-batch-sequences 2"
    assert list(remedies(preset("6.8B"), replace(setting, sequences=1, length=1), GIB)) == []


def test_close_to_the_limit_is_a_warning_and_well_below_it_a_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shape, setting = preset("330M"), Setting(sequences=8, length=2048)
    needed = estimate(shape, setting).total
    with caplog.at_level(logging.INFO):
        check_fit(shape, setting, "330M", 2 * needed)
    (line,) = caplog.messages
    assert line.startswith("memory per GPU: weights 1.6 GiB, gradients 1.2 GiB, moments 2.5 GiB, ")
    assert line.endswith(f"; GPU has {2 * needed / GIB:.1f} GiB free")
    for free in (int(0.95 * needed), int(1.05 * needed)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_fit(shape, setting, "330M", free)
        assert "may not fit into the GPU's memory (the estimate is within 10 %" in caplog.text
        assert "if it runs out, try --micro-batch-sequences 4" in caplog.text
    with pytest.raises(InputError, match="but the GPU has"):
        check_fit(shape, setting, "330M", int(0.85 * needed))


def test_of_an_unknown_kind_of_block_only_the_states_are_sure() -> None:
    shape = Shape.of(GPT2Config(vocab_size=512, n_embd=64, n_layer=3, n_head=4))
    assert (shape.num_blocks, shape.hidden, shape.counted) == (3, 64, False)
    setting = Setting(sequences=8, length=2048)
    states = estimate(shape, setting).states
    check_fit(shape, setting, "gpt2", states)
    with pytest.raises(InputError, match="but the GPU has"):
        check_fit(shape, setting, "gpt2", states - 1)


def test_a_run_says_how_it_computes_its_steps(tmp_path: Path) -> None:
    dataset = Dataset.open(make_dataset(tmp_path / "dataset"))
    length = dataset.spec.sequence_length
    config = make_config(dataset.path, "demo", tmp_path / "out", dtype="bfloat16")
    compiled = make_setting(config, dataset.spec, 1)
    assert compiled == Setting(sequences=3, length=length, compiled=True)
    tempered = replace(config, student_temperature=2.0, gradient_checkpointing=True, compile=False)
    assert make_setting(tempered, dataset.spec, 4) == Setting(
        sequences=1, length=length, world_size=4, tempered=True, checkpointing=True
    )


def test_on_a_cpu_nothing_is_estimated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = Dataset.open(make_dataset(tmp_path / "dataset"))
    config = make_config(dataset.path, "demo", tmp_path / "out")
    with caplog.at_level(logging.INFO):
        check_memory(config, dataset, 1, torch.device("cpu"))
    assert not caplog.messages


def table() -> list[str]:
    """Rows of docs/training.md: the largest micro batch without and with checkpointing."""
    rows = []
    for name in PRESETS:
        if name == "demo":
            continue
        shape, cells = preset(name), []
        for ranks in (1, 2, 4, 8):
            setting = Setting(sequences=64, length=2048, world_size=ranks, compiled=True)
            most = [
                most_sequences(shape, replace(setting, checkpointing=value), FREE)
                for value in (False, True)
            ]
            cells.append(", ".join(str(number or "\N{EN DASH}") for number in most))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def test_the_table_of_the_docs_is_what_is_computed() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for row in table():
        assert row in text.splitlines(), "\n".join(table())
