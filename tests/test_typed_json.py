"""Plain JSON becomes a dataclass, or an error that names the key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from shards.files.typed_json import parse


@dataclass(frozen=True, kw_only=True)
class Leaf:
    size: int
    ratio: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Other:
    name: str


@dataclass(frozen=True, kw_only=True)
class Whole:
    leaf: Leaf
    name: str
    on: bool
    maybe: int | None
    either: Leaf | Other | None = None
    sizes: Mapping[str, Leaf] = field(default_factory=dict)
    numbers: Sequence[Sequence[int]] = ()
    anything: Mapping[str, Any] = field(default_factory=dict)
    unparsed: object = None


def either(value):
    """A tagged union, as a caller would read it."""
    return Leaf(size=value["size"]) if "size" in value else parse(Other, value)


PARSERS = {Leaf | Other: either}


def content(**changes):
    return {"leaf": {"size": 3}, "name": "a", "on": True, "maybe": None, **changes}


def read(**changes):
    return parse(Whole, content(**changes), PARSERS)


def test_what_fits_is_read():
    expected = Whole(leaf=Leaf(size=3), name="a", on=True, maybe=None)
    assert read() == expected
    assert read(maybe=7).maybe == 7
    assert read(either={"size": 1}).either == Leaf(size=1)
    assert read(either={"name": "b"}).either == Other(name="b")
    assert read(either=None).either is None
    assert read(sizes={"train": {"size": 1}}).sizes == {"train": Leaf(size=1)}
    assert read(anything={"a": [1, {"b": None}], "c": True}).anything == {
        "a": [1, {"b": None}],
        "c": True,
    }
    assert read(unparsed={"a": 1}).unparsed == {"a": 1}


def test_an_integer_is_a_float_where_one_belongs_and_lists_become_tuples():
    ratio = read(leaf={"size": 3, "ratio": 1}).leaf.ratio
    assert (ratio, type(ratio)) == (1.0, float)
    assert read(numbers=[[1, 2], []]).numbers == ((1, 2), ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 1}, "unknown key 'x'"),
        ({"leaf": {"size": 3, "x": 1}}, "unknown key 'leaf.x'"),
        ({"sizes": {"train": {"size": 3, "x": 1}}}, "unknown key 'sizes.train.x'"),
        ({"either": {"name": "b", "x": 1}}, "unknown key 'either.x'"),
        ({"leaf": {}}, "no key 'leaf.size'"),
        ({"leaf": {"size": "3"}}, "key 'leaf.size': expected int, found '3'"),
        ({"leaf": {"size": True}}, "key 'leaf.size': expected int, found True"),
        ({"leaf": {"size": 3.0}}, "key 'leaf.size': expected int, found 3.0"),
        ({"leaf": {"size": None}}, "key 'leaf.size': expected int, found None"),
        ({"leaf": {"size": 3, "ratio": True}}, "key 'leaf.ratio': expected float, found True"),
        ({"leaf": {"size": 3, "ratio": "1"}}, "key 'leaf.ratio': expected float, found '1'"),
        ({"leaf": [3]}, "key 'leaf': expected an object, found [3]"),
        ({"name": 7}, "key 'name': expected str, found 7"),
        ({"name": None}, "key 'name': expected str, found None"),
        ({"on": 1}, "key 'on': expected bool, found 1"),
        ({"maybe": False}, "key 'maybe': expected int, found False"),
        ({"sizes": []}, "key 'sizes': expected an object, found []"),
        ({"anything": "a"}, "key 'anything': expected an object, found 'a'"),
        ({"anything": True}, "key 'anything': expected an object, found True"),
        ({"numbers": "12"}, "key 'numbers': expected a list, found '12'"),
        ({"numbers": [[1], ["2"]]}, "key 'numbers.1.0': expected int, found '2'"),
        ({"numbers": [[1], 2]}, "key 'numbers.1': expected a list, found 2"),
        ({"numbers": {"0": [1]}}, "key 'numbers': expected a list"),
        ({"name": ["a" * 90]}, f"key 'name': expected str, found list ['{'a' * 28}..."),
    ],
)
def test_what_does_not_fit_is_named_by_its_dotted_key(changes, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(**changes)
    assert str(caught.value).startswith(message)


def test_a_missing_key_is_named():
    without = content()
    del without["maybe"]
    with pytest.raises(ValueError, match="no key 'maybe'"):
        parse(Whole, without)


@pytest.mark.parametrize("value", [None, 3, "a", [], [["size", 3]], True])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(ValueError, match="expected an object, found"):
        parse(Leaf, value)
