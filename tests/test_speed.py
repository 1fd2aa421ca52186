"""What is said about speed: FLOP, peaks of GPUs, the clock of a step, the memory of a process."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig
from transformers.models.mixtral import MixtralForCausalLM

from student_train.flops import (
    flop_per_token,
    model_flop_per_token,
    peak_flop_per_s,
    peak_tokens_per_s,
)
from student_train.run_progress import TrainProgress
from student_train.speed import StepClock

ROOT = Path(__file__).parent.parent
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_palm_540b_has_the_flop_of_its_paper() -> None:
    # 540.35e9 parameters, 118 layers, 48 heads of 256, 2048 tokens; 238,300 tokens/s on 6144 chips
    # of 275e12 FLOP/s are said to be 46.2 % with attention and 45.7 % without.
    shape = {"num_layers": 118, "attention_width": 48 * 256}
    with_attention = flop_per_token(num_parameters=540_350_000_000, sequence_length=2048, **shape)
    without = flop_per_token(num_parameters=540_350_000_000, sequence_length=0, **shape)
    chips = 6144 * 275e12
    assert 238_300 * with_attention / chips == pytest.approx(0.462, abs=5e-4)
    assert 238_300 * without / chips == pytest.approx(0.457, abs=5e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_counts_and_the_embedding_does_not_whether_they_are_tied_or_not(
    tied: bool,
) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    # queries, keys and values of half the heads, output; gate, up, down; two norms
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    weights = 2 * layer + 32 + 64 * 32
    assert model_flop_per_token(model, 16) == 6 * weights + 12 * 2 * 32 * 16


def test_attention_of_heads_wider_than_the_model_counts_their_width() -> None:
    config = LlamaConfig(**SHAPE, head_dim=16)
    narrow = model_flop_per_token(LlamaForCausalLM(config), 0)
    assert narrow is not None
    assert model_flop_per_token(LlamaForCausalLM(config), 100) == narrow + 12 * 2 * 4 * 16 * 100


def test_gpt2_is_understood_and_a_mixture_of_experts_is_not_guessed() -> None:
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    )
    without = model_flop_per_token(gpt2, 0)
    assert without is not None
    assert model_flop_per_token(gpt2, 8) == without + 12 * 16 * 8
    mixture = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=2))
    assert model_flop_per_token(mixture, 8) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A40", 149.7),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA H1000", None),
    ],
)
def test_the_peak_of_a_gpu_goes_by_its_whole_name(name: str, tera: float | None) -> None:
    assert peak_flop_per_s(name) == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_cpu_and_float32_have_no_peak() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    assert peak_tokens_per_s(model, 16, "bfloat16", torch.device("cpu")) is None
    assert peak_tokens_per_s(model, 16, "float32", torch.device("cuda")) is None


def test_waiting_for_batches_is_told_from_working_on_them() -> None:
    def batches():
        for number in range(3):
            time.sleep(0.03)
            yield number

    clock = StepClock(torch.device("cpu"), peak_tokens_per_s=1e6)
    for _ in range(2):  # each step by itself
        taken = []
        for batch in clock.waiting(batches()):
            time.sleep(0.01)
            taken.append(batch)
        assert taken == [0, 1, 2]
        figures = clock.step_done(num_tokens=100)
        waited_s = figures["data_wait"] * figures["seconds"]
        assert 0.09 <= waited_s <= figures["seconds"] - 0.03
        assert figures["tokens_per_s"] == pytest.approx(100 / figures["seconds"])
        assert figures["flop_utilisation"] == pytest.approx(figures["tokens_per_s"] / 1e6)
        assert "peak_cuda_memory_bytes" not in figures


def test_what_reading_ahead_raises_comes_through_the_clock() -> None:
    def broken():
        yield 1
        raise OSError("disk")

    clock = StepClock(torch.device("cpu"), None)
    with pytest.raises(OSError, match="disk"):
        list(clock.waiting(broken()))


def test_peak_memory_grows_with_what_is_used_and_stays() -> None:
    """In a process of its own: that of the tests may have used half the machine before."""
    code = (
        "from student_train.speed import peak_memory_bytes\n"
        "before = peak_memory_bytes()\n"
        "block = bytearray(before)  # more than was ever used in addition to it\n"
        "block[::4096] = b'x' * len(block[::4096])\n"
        "grown = peak_memory_bytes()\n"
        "del block\n"
        "print(before, grown, peak_memory_bytes())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, grown, after = map(int, result.stdout.split())
    assert grown > 1.5 * before
    assert after >= 0.99 * grown  # Linux counts in steps of some pages


def test_the_utilisation_is_shown_where_a_peak_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"tokens": 5, "loss": 1.0, "lm": 1.0, "kd": 1.0, "alpha": 0.9, "learning_rate": 1e-3}
    for peak, shown in ((1e9, True), (None, False)):
        display = TrainProgress(0, 10, peak)
        display._line._terminal, display._line._shown_at = True, 0.0
        display.trained(1, 5, figures)
        line = capsys.readouterr().err
        assert ("MFU 0." in line) == shown
        assert re.search(
            r"step 1 of 10, 5 tokens, loss 1\.0000 \(lm 1\.0000, kd 1\.0000\), alpha 0\.90,"
            r" lr 1\.00e-03, [\d,]+ tokens/s,.* left$",
            line,
        ), line
