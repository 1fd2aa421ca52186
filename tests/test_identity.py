"""Every difference between two identities is named."""

import json

from shards.identity import canonical_json, differences
from tests.strategies import make_identity


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
