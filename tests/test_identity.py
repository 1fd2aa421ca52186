"""Equal tokenizers hash the same however they are saved; every difference is named."""

import json

import pytest

from shards.identity import canonical_json, differences, tokenizer_sha256
from tests.strategies import make_identity

TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 4, "content": "<pad>", "special": True, "normalized": False},
        {"id": 3, "content": "<eos>", "special": True, "normalized": False},
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "post_processor": None,
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}


def sha256_with(**changes):
    return tokenizer_sha256(json.dumps({**TOKENIZER, **changes}))


def model_with(**changes):
    return {"model": {**TOKENIZER["model"], **changes}}


@pytest.mark.parametrize(
    "changes",
    [
        {"post_processor": {"type": "TemplateProcessing"}},
        {"decoder": None},
        {"truncation": {"max_length": 512}},
        {"padding": {"pad_id": 4}},
        {"added_tokens": TOKENIZER["added_tokens"][::-1]},
        model_with(merges=[["a", "b"]]),
        model_with(vocab={"ab": 2, "b": 1, "a": 0}),
    ],
)
def test_what_does_not_change_the_ids_of_a_text_does_not_change_the_hash(changes):
    assert sha256_with(**changes) == sha256_with()


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"added_tokens": TOKENIZER["added_tokens"][:1]},
        model_with(type="WordPiece"),
        model_with(vocab={"a": 1, "b": 0, "ab": 2}),
        model_with(vocab={"a": 0, "b": 1, "ab": 2, "c": 3}),
        model_with(merges=[]),
    ],
)
def test_what_changes_the_ids_of_a_text_changes_the_hash(changes):
    assert sha256_with(**changes) != sha256_with()


def test_the_order_of_merges_counts():
    forward, backward = ["a b", "b a"], ["b a", "a b"]
    assert sha256_with(**model_with(merges=forward)) != sha256_with(**model_with(merges=backward))


def test_a_unigram_tokenizer_hashes_its_scores():
    def sha256(score):
        return sha256_with(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", score]]})

    assert sha256(-1.0) == sha256(-1.0) != sha256(-2.0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_a_text_that_is_no_tokenizer_is_refused(text):
    with pytest.raises(ValueError, match="tokenizer"):
        tokenizer_sha256(text)


def test_equal_identities_have_no_differences():
    assert differences(make_identity(), json.loads(canonical_json(make_identity()))) == []
    assert differences({"p": 1}, {"p": 1.0}) == []


def test_every_difference_is_named_by_its_dotted_key():
    found = make_identity()
    found["keep"] = {**found["keep"], "top_k": 50, "top_p": 0.9}
    del found["seed"]
    found["note"] = "x"
    assert differences(make_identity(), found) == [
        "keep.top_k: 100 here, 50 there",
        "keep.top_p: 0.95 here, 0.9 there",
        'note: nothing here, "x" there',
        "seed: 0 here, nothing there",
    ]


def test_true_is_not_one_and_a_value_is_not_a_section():
    assert differences({"bos": True}, {"bos": 1}) == ["bos: true here, 1 there"]
    assert differences({"a": None}, {}) == ["a: null here, nothing there"]
    assert differences({"a": {"b": 1}}, {"a": 1}) == ['a: {"b": 1} here, 1 there']


def test_hashes_are_shortened_to_stay_on_one_line():
    (line,) = differences({"h": "ab" * 32}, {"h": "cd" * 32})
    assert line == 'h: "abababababababa... here, "cdcdcdcdcdcdcdc... there'
