"""Separate documents in common lines: which ones, and that a student reads each as if alone."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)

from shards.dataset import Dataset
from shards.errors import InputError
from student_train.data.batches import TAIL_COLUMNS, Batch, sequential_batches, training_batches
from student_train.data.lines import Source
from student_train.data.order import START, Position
from student_train.data.packing import pack
from student_train.model import packed_attention
from student_train.model.model import head_weight, hidden_states
from student_train.model.packed_attention import block_at_joints
from student_train.objective.distillation import Objective
from student_train.step import autocast_for, batch_loss
from tests.kept_entries import batch_entries, make_entries
from tests.packed_batches import assert_is_row, key, pieces, spans
from tests.tiny_dataset import SEQUENCE_LENGTH, VOCAB_SIZE, make_dataset

STEP_LINES = 3
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@given(lengths=st.lists(st.integers(1, 16), max_size=60))
def test_every_sequence_is_in_one_line_and_no_two_lines_would_fit_into_one(
    lengths: list[int],
) -> None:
    lines = pack(np.array(lengths, np.int64), 16)
    assert sorted(index for line in lines for index in line) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[index] for index in line) for line in lines)
    assert all(0 < size <= 16 for size in sizes)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 16


@given(lengths=st.lists(st.integers(1, 16), max_size=60), random=st.randoms())
def test_the_number_of_lines_depends_on_the_lengths_alone(
    lengths: list[int], random: Random
) -> None:
    shuffled = random.sample(lengths, len(lengths))
    assert len(pack(np.array(shuffled, np.int64), 16)) == len(pack(np.array(lengths), 16))


@pytest.fixture(scope="module", params=[False, True], ids=["all count", "masked"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("datasets") / "separate"
    return Dataset.open(make_dataset(folder, train=40, masked=request.param, separate=True))


def packed_batches(dataset: Dataset, start: Position = START) -> list[Batch]:
    """Ten steps, of two micro batches each."""
    batches = training_batches(
        [Source.of(dataset.split("train"), seed=1, window_row_groups=4, start=start)],
        repeat(0),
        step_lines=STEP_LINES,
        micro_batch_lines=2,
        columns=TAIL_COLUMNS,
    )
    return list(islice(batches, 20))


def test_an_epoch_of_packed_lines_holds_every_row_exactly_once_unshifted(dataset: Dataset) -> None:
    rows = {row.tokens[:-1].tobytes(): row for row in dataset.split("train").rows()}
    left = Counter(row.tokens[:-1].tobytes() for row in dataset.split("train").rows())
    for batch in packed_batches(dataset):
        assert batch.input_ids.shape[1] == SEQUENCE_LENGTH  # so that nothing is compiled again
        found = [piece for _, piece in pieces(batch)]
        assert (len(found),) == batch.num_sequences
        for piece in found[: left.total()]:
            left[key(piece[0])] -= 1
            assert_is_row(piece, rows[key(piece[0])])
        if not left.total():
            break
    assert set(left.values()) == {0}


def test_a_step_is_entered_by_the_position_after_the_one_before_it(dataset: Dataset) -> None:
    whole = packed_batches(dataset)
    position = START
    for step in range(8):
        for found, expected in zip(packed_batches(dataset, position), whole[2 * step :],
                                   strict=False):  # fmt: skip
            assert torch.equal(found.input_ids, expected.input_ids)
            assert torch.equal(found.position_ids, expected.position_ids)  # type: ignore[arg-type]
            assert all(map(torch.equal, batch_entries(found), batch_entries(expected)))
        (position,) = whole[2 * step + 1].positions or ()


def test_an_evaluation_sees_every_row_once(dataset: Dataset) -> None:
    split = dataset.split("train")
    batches = list(sequential_batches(split, batch_lines=2, columns=TAIL_COLUMNS))
    assert {batch.labels.shape[1] for batch in batches} == {SEQUENCE_LENGTH}
    assert sum(batch.num_sequences[0] for batch in batches) == split.num_sequences
    assert sum(batch.num_valid for batch in batches) == sum(s.tokens for s in split.sidecars())


def make_model(config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():  # attention that makes a difference
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.double().eval()


def check(model: PreTrainedModel, *, length: int = 16, dtype: str = "float32") -> None:
    autocast = autocast_for(dtype, model.device)
    block_at_joints("it", model, Path("separate"), length=length, autocast=autocast)


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_logits_and_gradients_are_those_of_each_sequence_alone(
    family: str, dataset: Dataset
) -> None:
    model = make_model(CONFIGS[family])
    check(model)
    batch = next(batch for batch in packed_batches(dataset) if batch.num_sequences[0] > 3)
    objective = Objective(kind="kld", alpha=0.5, temperature=1.0)
    together = batch_loss(model, batch, objective=objective).total
    together.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    packed = hidden_states(model, batch.input_ids, batch.position_ids) @ head_weight(model).T
    assert batch.position_ids is not None
    alone = torch.zeros((), dtype=torch.float64)
    ids, logprobs = batch_entries(batch)
    for b, positions in enumerate(batch.position_ids):
        for first, last in spans(positions):
            part = (slice(b, b + 1), slice(first, last))
            single = Batch(
                input_ids=batch.input_ids[part],
                labels=batch.labels[part],
                num_valid=int((batch.labels[part] >= 0).sum()),
                num_sequences=(1,),
                entries=make_entries(ids[part].flatten(0, 1), logprobs[part].flatten(0, 1)),
            )
            logits = hidden_states(model, single.input_ids) @ head_weight(model).T
            torch.testing.assert_close(packed[part], logits)
            loss = batch_loss(model, single, objective=objective).total
            loss.backward()
            alone += loss.detach()
    torch.testing.assert_close(together.detach(), alone)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)


def test_a_student_that_carries_a_state_over_joints_is_refused() -> None:
    model = make_model(
        MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(InputError, match=r"--student it: Mamba.* packed sequences"):
        check(model)


def test_a_student_whose_positions_depend_on_others_of_its_batch_is_refused() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config = Phi3Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0,
        original_max_position_embeddings=16, rope_parameters=rope,
    )  # fmt: skip
    model = make_model(config)
    running = torch.arange(17)[None]
    tokens = running % VOCAB_SIZE
    short = hidden_states(model, tokens[:, :8], running[:, :8])
    beside = torch.cat([running[:, :8].repeat(1, 2), running], 1)  # a longer one in its line
    other = hidden_states(model, torch.cat([tokens[:, :8].repeat(1, 2), tokens], 1), beside)
    assert (other[:, :8] - short).abs().max() > 1e-3
    check(model, length=16)
    with pytest.raises(InputError, match="beyond 16 positions the longest document of a batch"):
        check(model, length=17)


def test_a_student_whose_mask_is_lost_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIGS["llama"])
    forward = model.base_model.forward

    def running(input_ids: torch.Tensor, use_cache: bool, position_ids: object = None) -> object:
        mask = torch.ones_like(input_ids)  # a mask of its own switches the look at joints off
        return forward(
            input_ids=input_ids,
            use_cache=use_cache,
            position_ids=position_ids,
            attention_mask=mask,
        )

    monkeypatch.setattr(model.base_model, "forward", running)
    with pytest.raises(InputError, match="one document changes what it computes for the next"):
        check(model)


@pytest.fixture
def flex_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention where these tests run, not compiled: that takes a minute."""
    monkeypatch.setitem(packed_attention._ATTENTION, "cpu", "flex_attention")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("flex_on_a_cpu")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_flex_attention_computes_what_the_mask_does(family: str) -> None:
    length = 300  # several of its blocks of 128, the last of them not full
    config = copy.deepcopy(CONFIGS[family])
    config.max_position_embeddings = length
    model = make_model(config)
    tokens = torch.arange(2 * length).reshape(2, length) % VOCAB_SIZE
    positions = torch.stack(
        [torch.cat([torch.arange(part) for part in parts]) for parts in ([1, 1, 130, 168], [300])]
    )
    with torch.no_grad():
        model.set_attn_implementation("eager")  # which has Gemma's soft-capping; float32 softmax
        masked = hidden_states(model, tokens, positions) @ head_weight(model).T
        model.set_attn_implementation("flex_attention")
        flex = hidden_states(model, tokens, positions) @ head_weight(model).T
    torch.testing.assert_close(flex, masked, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("flex_on_a_cpu")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
def test_a_student_that_runs_forwards_and_not_backwards_is_refused() -> None:
    model = make_model(CONFIGS["llama"]).float()
    with pytest.raises(InputError, match="FlexAttention does not support backward on CPU"):
        check(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_probe_leaves_a_student_as_it_was_in_either_dtype(dtype: str) -> None:
    model = make_model(CONFIGS["llama"]).float().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check(model, length=10**6, dtype=dtype)  # cheap on a CPU, whatever the length of the run
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_student_whose_gradients_are_not_finite_is_refused() -> None:
    model = make_model(CONFIGS["llama"]).float()
    layer = model.base_model.layers[0].mlp
    layer.register_full_backward_hook(lambda *_: (torch.full((1, 16, 32), math.nan),))
    with pytest.raises(InputError, match="its gradients are not finite"):
        check(model)


def test_the_datasets_of_this_file_are_packed_at_all(tmp_path: Path) -> None:
    joined = Dataset.open(make_dataset(tmp_path / "joined", train=40))
    batch = packed_batches(joined)[0]
    assert batch.position_ids is None
    assert batch.num_sequences == (len(batch.labels),)
