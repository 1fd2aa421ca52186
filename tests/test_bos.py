"""BOS where the teacher needs it: modes, masks, and the probe that stops a run without it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from shards.dataset import Dataset
from shards.errors import InputError, ShardCorruptError
from shards.inspect import verify
from shards.keep import TopPK
from student_train.config import TrainConfig
from student_train.run import run as train
from teacher_dump.config import DumpConfig
from teacher_dump.dump import run
from teacher_dump.plan import make_plan
from tests.bos_teacher import (
    BOS,
    EOS,
    SEQUENCE_LENGTH,
    VOCAB,
    make_bos_teacher,
    make_bos_tokenizer,
    write_cycles,
)
from tests.tiny_teacher import all_rows


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_bos_teacher(tmp_path_factory.mktemp("bos-teacher"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_cycles(tmp_path_factory.mktemp("cycles") / "text.jsonl", num_documents=120)


def with_tokenizer(teacher: Path, folder: Path, **options) -> Path:
    shutil.copytree(teacher, folder)
    make_bos_tokenizer(folder, **options)
    return folder


def config_of(teacher: Path, corpus: Path, out: Path, **changes) -> DumpConfig:
    config = DumpConfig(
        teacher=str(teacher),
        corpus=[corpus],
        out=out,
        keep=TopPK(top_k=10),
        engine="transformers",
        dtype="float32",
        sequence_length=SEQUENCE_LENGTH,
        held_out=0.1,
        sequences_per_shard=50,
    )
    return replace(config, **changes)


def cross_entropy(rows) -> float:
    return sum(row.teacher_nll for row in rows) / sum(
        len(row.tokens) - 1 if row.loss_mask is None else row.loss_mask.sum() for row in rows
    )


def test_a_tokenizer_that_adds_bos_gets_it_before_sequences_and_documents(
    teacher, corpus, tmp_path
):
    run(config_of(teacher, corpus, tmp_path / "out"))
    dataset = Dataset.open(tmp_path / "out")
    documents = dataset.spec.documents
    assert (documents.bos, documents.bos_token_id, documents.masked) == (
        "sequence+document",
        BOS,
        True,
    )
    rows = all_rows(tmp_path / "out").values()
    assert verify(tmp_path / "out") == []
    for row in rows:
        assert row.tokens[0] == BOS
        assert len(row.tokens) <= SEQUENCE_LENGTH + 1
        # an inserted BOS is no label, every other token is one
        assert row.loss_mask.tolist() == (row.tokens[1:] != BOS).tolist()
        assert not row.counts[~row.loss_mask].any()
        assert not row.entropies[~row.loss_mask].any()
        after_end = np.flatnonzero(row.tokens[:-1] == EOS) + 1
        assert (row.tokens[after_end] == BOS).all()
        assert (np.diff(row.segments)[after_end - 1] == 1).all()
        assert row.segments[0] == 0
    assert cross_entropy(rows) < 1.0
    bos_probe = dataset.manifest.recorded[0]["bos_probe"]
    found = bos_probe["cross_entropies"]
    assert found["sequence+document"] + 1 < found["none"]


def test_a_run_without_bos_stops_before_anything_is_tokenised_and_says_what_to_give(
    teacher, corpus, tmp_path
):
    folder = with_tokenizer(teacher, tmp_path / "teacher", adds_bos=False)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"--bos sequence\+document") as error:
        run(config_of(folder, corpus, out))
    assert "bos none: the teacher's cross-entropy on a sample is" in str(error.value)
    assert not out.exists()
    with pytest.raises(InputError, match=r"give --bos sequence\+document"):
        make_plan(config_of(folder, corpus, out), None)


def test_asking_for_none_is_a_warning_and_the_record_has_the_figures(
    teacher, corpus, tmp_path, caplog
):
    out = tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        run(config_of(teacher, corpus, out, bos="none"))
    assert "give" not in caplog.text
    assert "warning: --bos none: the teacher's cross-entropy on a sample is" in caplog.text
    dataset = Dataset.open(out)
    assert (dataset.spec.documents.bos, dataset.spec.documents.bos_token_id) == ("none", None)
    assert cross_entropy(all_rows(out).values()) > 1.5
    assert min(dataset.manifest.recorded[0]["bos_probe"]["positions"].values()) > 256


def test_a_plan_shows_the_probe(teacher, corpus, tmp_path):
    lines = make_plan(config_of(teacher, corpus, tmp_path / "out"), None).lines()
    assert lines[-1].startswith("teacher cross-entropy, nats per token: ")
    assert "with --bos none" in lines[-1]
    assert "with --bos sequence+document" in lines[-1]


def test_the_same_command_again_starts_nothing_and_records_nothing(teacher, corpus, tmp_path):
    config = config_of(teacher, corpus, tmp_path / "out")
    run(config)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert run(config).complete_before
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("documents", ["joined", "separate"])
@pytest.mark.parametrize("bos", ["sequence", "document", "sequence+document"])
def test_every_mode_puts_bos_where_it_says(teacher, corpus, tmp_path, bos, documents):
    out = tmp_path / "out"
    run(config_of(teacher, corpus, out, bos=bos, documents=documents))
    texts = [json.loads(line)["text"].split() for line in corpus.read_text().splitlines()]
    tokens = sum(len(text) + 1 for text in texts)
    rows = list(all_rows(out).values())
    labels = sum(int(row.loss_mask.sum()) for row in rows)
    starts = [row.tokens[0] == BOS for row in rows]
    inner = sum(int((row.tokens[1:] == BOS).sum()) for row in rows)
    if bos == "document":
        assert labels == tokens
        assert inner == (len(texts) - 2 if documents == "joined" else 0)
    else:
        assert all(starts)
        assert labels == tokens
        assert (inner > 0) == (bos == "sequence+document" and documents == "joined")


def test_one_id_for_bos_and_eos_leaves_ends_of_documents_labels(teacher, corpus, tmp_path):
    """GPT-2 and Pythia: an inserted BOS is told by its place, not by its id."""
    folder = with_tokenizer(teacher, tmp_path / "teacher", adds_bos=True, bos="<eos>")
    out = tmp_path / "out"
    run(config_of(folder, corpus, out, bos="document"))
    num_documents = len(corpus.read_text().splitlines())
    ends = begins = 0
    for row in all_rows(out).values():
        is_special = row.tokens[1:] == EOS
        ends += int((is_special & row.loss_mask).sum())
        begins += int((is_special & ~row.loss_mask).sum())
    assert ends == num_documents
    assert begins == num_documents - 2  # the first document of each split begins a row


def test_bos_that_a_tokenizer_does_not_have_is_refused(tiny_teacher, corpus, tmp_path):
    with pytest.raises(InputError, match="no beginning-of-sequence token"):
        run(config_of(tiny_teacher, corpus, tmp_path / "out", bos="sequence"))


def test_a_student_is_exported_with_the_dataset_s_tokens(teacher, corpus, tmp_path):
    from student_train.evaluation.harness_student import HarnessStudent  # imports the harness

    run(config_of(teacher, corpus, tmp_path / "out"))
    out = tmp_path / "run"
    train(
        TrainConfig(
            shards=[tmp_path / "out"],
            student="demo",
            out=out,
            tokens=4 * SEQUENCE_LENGTH,
            batch_tokens=4 * SEQUENCE_LENGTH,
            dtype="float32",
        )
    )
    model = out / "model"
    assert AutoConfig.from_pretrained(model).bos_token_id == BOS
    assert AutoConfig.from_pretrained(model).eos_token_id == EOS
    assert GenerationConfig.from_pretrained(model).eos_token_id == EOS
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    student = HarnessStudent(
        model, Dataset.open(tmp_path / "out").spec, "float32", torch.device("cpu")
    )
    assert student.tok_encode("w2 w3") == [BOS, 2, 3]
    assert student.prefix_token_id == BOS


def chat_teacher(teacher: Path, folder: Path) -> Path:
    """Its EOS token ends turns, and it has <|endoftext|> beside it."""
    shutil.copytree(teacher, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.backend_tokenizer.to_str().replace("w15", "<|endoftext|>")
    (folder / "tokenizer.json").write_text(text)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0].content }}<eos>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_an_end_token_of_chat_turns_is_a_warning_that_names_the_others(
    teacher, corpus, tmp_path, caplog
):
    folder = chat_teacher(teacher, tmp_path / "teacher")
    with caplog.at_level(logging.WARNING):
        run(config_of(folder, corpus, tmp_path / "out"))
    assert "give --eos-token <|endoftext|>" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(config_of(folder, corpus, tmp_path / "other", eos_token="<|endoftext|>"))
    assert "--eos-token" not in caplog.text
    assert Dataset.open(tmp_path / "other").spec.documents.eos_token_id == VOCAB - 1
    saved = AutoTokenizer.from_pretrained(tmp_path / "other" / "tokenizer")
    assert saved.eos_token_id == VOCAB - 1
    ends = sum((row.tokens == VOCAB - 1).sum() for row in all_rows(tmp_path / "other").values())
    assert ends >= len(corpus.read_text().splitlines())


def test_an_end_token_that_the_tokenizer_does_not_have_is_refused(teacher, corpus, tmp_path):
    with pytest.raises(InputError, match="--eos-token <end>: not a token of the tokenizer"):
        run(config_of(teacher, corpus, tmp_path / "out", eos_token="<end>"))


@pytest.mark.parametrize("option", ["bos", "eos_token"])
def test_a_special_token_that_the_teacher_does_not_know_is_refused_at_once(
    teacher, corpus, tmp_path, option
):
    """As where a token of a chat template was added to the tokenizer alone."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"})
    tokenizer.save_pretrained(folder)
    changes = {"bos": "none"} if option == "eos_token" else {"bos": "sequence", "eos": False}
    with pytest.raises(InputError, match=f"has the id 1[67], but the teacher has only {VOCAB}"):
        run(config_of(folder, corpus, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    if option == "bos":  # the probe does not try it either
        run(config_of(folder, corpus, tmp_path / "out", bos="none", eos=False))


def test_a_sequence_of_one_token_is_probed_without_bos_alone(teacher, corpus, tmp_path):
    run(config_of(teacher, corpus, tmp_path / "out", bos="none", sequence_length=1))
    probe = Dataset.open(tmp_path / "out").manifest.recorded[0]["bos_probe"]
    assert list(probe["cross_entropies"]) == ["none"]


def test_a_difference_over_few_tokens_only_warns(teacher, corpus, tmp_path, caplog):
    folder = with_tokenizer(teacher, tmp_path / "teacher", adds_bos=False)
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(corpus.read_text().splitlines()[:3]) + "\n")
    with caplog.at_level(logging.WARNING):
        run(config_of(folder, few, tmp_path / "out", held_out=0.0))
    assert "(measured on few tokens)" in caplog.text


def test_another_tokenizer_in_the_folder_is_not_taken_for_the_dataset_s(teacher, corpus, tmp_path):
    """What a run that was killed before the manifest left, or somebody put there."""
    out = tmp_path / "out"
    make_bos_tokenizer(out / "tokenizer", adds_bos=False, bos="<eos>")
    run(config_of(teacher, corpus, out))
    assert AutoTokenizer.from_pretrained(out / "tokenizer").bos_token == "<bos>"
    assert verify(out) == []
    for split in ("train", "validation"):  # no shard yet: it may become another dataset
        shutil.rmtree(out / split)
    run(config_of(teacher, corpus, out, eos_token="w7"))
    assert Dataset.open(out).spec.documents.eos_token_id == 7
    assert AutoTokenizer.from_pretrained(out / "tokenizer").eos_token_id == 7


def test_a_tokenizer_that_is_gone_is_not_replaced_by_another(teacher, corpus, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    out = tmp_path / "out"
    run(config_of(folder, corpus, out))
    saved = shutil.copytree(out / "tokenizer", tmp_path / "saved")
    shutil.rmtree(out / "tokenizer")
    settings = folder / "tokenizer_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps({**json.loads(before), "chat_template": "{{ x }}"}))
    with pytest.raises(ShardCorruptError, match="have changed since"):
        run(config_of(folder, corpus, out))
    assert not (out / "tokenizer").exists()
    settings.write_text(before)
    assert run(config_of(folder, corpus, out)).complete_before
    for path in saved.iterdir():
        assert (out / "tokenizer" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_without_a_shard_is_started_again_with_another_corpus(teacher, corpus, tmp_path):
    out = tmp_path / "out"
    run(config_of(teacher, corpus, out))
    other = write_cycles(tmp_path / "other.jsonl", num_documents=40, seed=9)
    with pytest.raises(Exception, match="another corpus"):
        run(config_of(teacher, other, out))
    for split in ("train", "validation"):
        shutil.rmtree(out / split)
    run(config_of(teacher, other, out))
    assert verify(out) == []
    ends = sum(int((row.tokens == EOS).sum()) for row in all_rows(out).values())
    assert ends == 40
