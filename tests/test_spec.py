"""A dataset's description is read back as it was written, or refused by the name of a key."""

import ast
import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.dataset import Dataset
from shards.errors import ShardFormatError
from shards.files.checksums import chunks_crc32, file_sha256, footer_sha256
from shards.files.json_text import canonical_json, json_differences
from shards.files.sealed import seal
from shards.keep import MAX_DRAWS, Draws, Threshold, Tokens, TopPK
from shards.layout import Layout
from shards.manifest import load_manifest
from shards.reader import ShardReader
from shards.schema import ALL_COLUMNS
from shards.sidecar import Sidecar, sidecar_path
from shards.spec import (
    BOS_MODES,
    SPLITS,
    DatasetSpec,
    Documents,
    Model,
    Tokenizer,
    TrainingRun,
    differences,
)
from tests.strategies import make_spec, write_dataset

ROOT = Path(__file__).parent.parent

hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
dtypes = st.sampled_from(["float32", "bfloat16", "float64"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
json_values = json_values.filter(lambda value: "inf" not in json.dumps(value).lower())
models = st.builds(
    Model,
    config_sha256=hashes,
    weights_sha256=hashes,
    revision=st.none() | st.text(max_size=8),
    dtype=dtypes,
    head_dtype=dtypes,
    code_sha256=st.none() | hashes,
    engine_args=st.dictionaries(st.text(max_size=8), json_values, max_size=3),
    entropies=st.booleans(),
)
runs = st.builds(
    TrainingRun,
    run_sha256=hashes,
    first_step=st.integers(0, 10**9),
    dtype=dtypes,
    head_dtype=dtypes,
    entropies=st.booleans(),
)
steps = st.floats(1e-4, 1.0)
temperatures = st.floats(0.01, 100)
keeps = (
    st.builds(TopPK, top_p=st.floats(1e-9, 1), top_k=st.integers(1, 10**6), logprob_step=steps)
    | st.builds(
        Draws, draws=st.integers(1, MAX_DRAWS), temperature=temperatures, logprob_step=steps
    )
    | st.builds(
        Threshold, threshold=st.floats(1e-3, 1), temperature=temperatures, logprob_step=steps
    )
)
layouts = st.builds(
    Layout,
    sequences_per_shard=st.integers(1, 10**6),
    sequences_per_row_group=st.integers(1, 10**6),
)


@st.composite
def documents(draw):
    bos = draw(st.sampled_from(BOS_MODES))
    return Documents(
        joined=draw(st.booleans()),
        bos=bos,
        bos_token_id=None if bos == "none" else draw(st.integers(0, 10**6)),
        eos_token_id=draw(st.none() | st.integers(0, 10**6)),
        held_out=draw(st.floats(0, 1)),
        masked=bos != "none" or draw(st.booleans()),
    )


@st.composite
def specs(draw):
    """A description of any kind."""
    teacher = draw(st.none() | models | runs)
    return DatasetSpec(
        teacher=teacher,
        tokenizer=Tokenizer(sha256=draw(hashes), vocab_size=draw(st.integers(1, 10**6))),
        documents=draw(documents()),
        keep=Tokens() if teacher is None else draw(keeps),
        layout=draw(layouts),
        sequence_length=draw(st.integers(1, 10**6)),
        seed=draw(st.integers(0, 2**63 - 1)),
        tokens_sha256=draw(hashes),
    )


RUN = TrainingRun(run_sha256="55" * 32, first_step=100, dtype="float32", head_dtype="float32")
BOS = Documents(
    joined=True,
    bos="sequence+document",
    bos_token_id=1,
    eos_token_id=2,
    held_out=0.01,
    masked=True,
)
SPECS = {
    "top-p-k": make_spec(),
    "draws": make_spec(keep=Draws(), has_mask=True),
    "threshold": make_spec(keep=Threshold(), has_entropy=False),
    "training run": make_spec(teacher=RUN),
    "tokens": replace(make_spec(), teacher=None, keep=Tokens()),
    "bos": make_spec(documents=BOS),
    "engine arguments": make_spec(
        teacher=replace(
            make_spec().teacher, engine_args={"quantization": "fp8", "deep": {"a": [1, None]}}
        )
    ),
}


def through_a_file(spec):
    return json.loads(json.dumps(spec.to_json(), indent=2, allow_nan=False))


@given(specs())
def test_any_description_is_read_back_as_it_was_written(spec):
    written = through_a_file(spec)
    found = DatasetSpec.from_json(written, "spec")
    assert found == spec
    assert found.to_json() == spec.to_json() == written
    assert found.columns == spec.columns
    assert differences(spec, found) == []


@pytest.mark.parametrize("bos", BOS_MODES)
@pytest.mark.parametrize("keep", [TopPK(), Draws(), Threshold(), Tokens()], ids=lambda k: k.method)
@pytest.mark.parametrize("teacher", [make_spec().teacher, RUN, None], ids=lambda t: t and t.kind)
def test_every_combination_of_teacher_keep_method_and_bos_mode_is_written_or_refused(
    teacher, keep, bos
):
    parts = {
        "teacher": teacher,
        "keep": keep,
        "documents": replace(BOS, bos=bos, bos_token_id=None if bos == "none" else 1),
    }
    if (teacher is None) != isinstance(keep, Tokens):
        with pytest.raises(ValueError, match=f"keep method '{keep.method}' with "):
            make_spec(**parts) if teacher else replace(make_spec(), **parts)
        return
    spec = replace(make_spec(), **parts)
    assert DatasetSpec.from_json(through_a_file(spec), "spec") == spec


def test_a_larger_number_of_defaults_is_never_written_than_read():
    """Keys with a default may be absent, as in a file of an earlier release."""
    content = through_a_file(make_spec())
    for key in ("code_sha256", "engine_args", "entropies"):
        del content["teacher"][key]
    assert DatasetSpec.from_json(content, "spec") == make_spec()


def sections(content, prefix=()):
    """The path of every object in a description."""
    yield prefix
    for key, value in content.items():
        if isinstance(value, dict) and key not in ("engine_args",):
            yield from sections(value, (*prefix, key))


def at(content, path):
    for key in path:
        content = content[key]
    return content


def leaves(content):
    """(path of the section, key) of every value that is no section."""
    for path in sections(content):
        for key, value in at(content, path).items():
            if not isinstance(value, dict) or key == "engine_args":
                yield path, key


def check_refused(content, *messages):
    with pytest.raises(ShardFormatError) as caught:
        DatasetSpec.from_json(content, "x.json: spec")
    text = str(caught.value)
    assert text.startswith("x.json: spec: ")
    assert "\n" not in text
    for message in messages:
        assert message in text


@pytest.mark.parametrize("name", SPECS)
def test_an_unknown_key_at_any_depth_is_refused_by_its_dotted_name(name):
    for path in list(sections(through_a_file(SPECS[name]))):
        content = through_a_file(SPECS[name])
        at(content, path)["novelty"] = None
        check_refused(content, f"unknown key '{'.'.join((*path, 'novelty'))}'")


@pytest.mark.parametrize("name", SPECS)
def test_a_missing_key_at_any_depth_is_refused_by_its_dotted_name(name):
    defaults = {"code_sha256", "engine_args", "entropies"}
    options = {"top_p", "top_k", "draws", "threshold", "temperature", "logprob_step"}
    for path, key in list(leaves(through_a_file(SPECS[name]))):
        content = through_a_file(SPECS[name])
        del at(content, path)[key]
        if key in ("kind", "method"):
            check_refused(content, f"key '{path[0]}': expected an object with the key '{key}'")
        elif key not in defaults | options:
            check_refused(content, f"no key '{'.'.join((*path, key))}'")


@pytest.mark.parametrize("name", SPECS)
def test_a_missing_section_is_refused_by_its_name(name):
    for path in list(sections(through_a_file(SPECS[name])))[1:]:
        content = through_a_file(SPECS[name])
        del at(content, path[:-1])[path[-1]]
        check_refused(content, f"no key '{'.'.join(path)}'")
        for value in ([], "x", 1, True):
            content = through_a_file(SPECS[name])
            at(content, path[:-1])[path[-1]] = value
            check_refused(content, f"key '{'.'.join(path)}': expected an object")


@pytest.mark.parametrize("name", SPECS)
def test_a_value_of_another_type_is_refused_by_its_dotted_name(name):
    """No number for a text, no text for a number, and true is not 1."""
    for path, key in list(leaves(through_a_file(SPECS[name]))):
        value = at(through_a_file(SPECS[name]), path)[key]
        dotted = ".".join((*path, key))
        for wrong in (True, "7", 7, 7.5, [], {"a": 1}, None):
            content = through_a_file(SPECS[name])
            at(content, path)[key] = wrong
            if key in ("kind", "method"):
                check_refused(content, f"key '{path[0]}': unknown {key} {wrong!r}")
            elif not fits(value, wrong, key):
                check_refused(content, f"key '{dotted}': expected ")


def fits(value, other, key):
    if key in ("revision", "code_sha256"):
        return other is None or isinstance(other, str)
    if key in ("bos_token_id", "eos_token_id"):
        return other is None or type(other) is int
    if key == "teacher":  # None: its keys are those of a section otherwise
        return other is None
    if isinstance(value, float):
        return type(other) in (int, float)
    return type(other) is type(value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("keep", "method"), "nucleus", "key 'keep': unknown method 'nucleus', this release knows"),
        (("keep", "method"), "sample", "key 'keep': unknown method 'sample'"),
        (("teacher", "kind"), "ensemble", "key 'teacher': unknown kind 'ensemble', this release"),
        (("teacher", "kind"), "training-run", "unknown key 'teacher."),
        (("documents", "bos"), "auto", "key 'documents': bos 'auto': expected one of none, "),
        (("documents", "bos"), "document", "bos 'document' with bos_token_id None"),
        (("documents", "bos_token_id"), 1, "bos 'none' with bos_token_id 1"),
        (("teacher",), None, "keep method 'top-p-k' with no teacher"),
        (("keep",), {"method": "tokens"}, "keep method 'tokens' with a teacher"),
        (("keep", "top_k"), 0, "top_k 0: expected at least 1"),
        (("tokenizer", "vocab_size"), 0, "key 'tokenizer': vocab_size 0: expected at least 1"),
        (("sequence_length",), 0, "sequence_length 0: expected at least 1"),
        (("layout", "sequences_per_shard"), 0, "both numbers must be at least 1"),
    ],
)
def test_what_this_release_does_not_know_is_refused_by_name(path, value, message):
    content = through_a_file(make_spec())
    at(content, path[:-1])[path[-1]] = value
    check_refused(content, message)


def test_a_bos_token_without_a_mask_is_refused():
    with pytest.raises(ValueError, match="without a mask: an inserted token is no label"):
        replace(BOS, masked=False)


@pytest.mark.parametrize("method", [TopPK(), Draws(), Threshold()], ids=lambda keep: keep.method)
def test_no_keep_method_of_a_teacher_goes_without_one(method):
    content = {**through_a_file(make_spec(keep=method)), "teacher": None}
    check_refused(content, f"keep method '{method.method}' with no teacher")


@pytest.fixture
def path(tmp_path):
    write_dataset(tmp_path / "dataset", make_spec(), train=3, validation=1)
    return tmp_path / "dataset"


def reseal(file, **changes):
    """A sealed file as another release might have written it."""
    content = json.loads(file.read_text())
    del content["checksum"], content["format_version"]
    file.write_text(seal({**content, **changes}))


def rewrite_footer(shard, /, **changes):
    """A shard with another footer, and a sidecar that fits its bytes."""
    table = pq.read_table(shard)
    content = json.loads(table.schema.metadata[b"logitshards"])
    metadata = {"logitshards": json.dumps({**content, **changes})}
    pq.write_table(table.replace_schema_metadata(metadata), shard, use_dictionary=False)
    bytes_ = memoryview(shard.read_bytes())
    sidecar = replace(
        Sidecar.read(sidecar_path(shard)),
        bytes=len(bytes_),
        footer_sha256=footer_sha256(bytes_),
        sha256=file_sha256(bytes_),
        chunks_crc32=chunks_crc32(bytes_, pq.read_metadata(shard)),
    )
    sidecar_path(shard).unlink()
    sidecar.write(sidecar_path(shard))


def in_manifest(path, spec):
    reseal(path / "manifest.json", spec=spec)
    load_manifest(path)


def in_footer(path, spec):
    shard = path / "train" / "shard-000000.parquet"
    rewrite_footer(shard, spec=spec)
    ShardReader(shard).close()


UNKNOWN = {
    "key": (("novelty",), 1, "unknown key 'novelty'"),
    "nested key": (("layout", "novelty"), 1, "unknown key 'layout.novelty'"),
    "method": (("keep",), {"method": "nucleus"}, "key 'keep': unknown method 'nucleus'"),
    "teacher": (("teacher",), {"kind": "ensemble"}, "key 'teacher': unknown kind 'ensemble'"),
    "BOS mode": (("documents", "bos"), "auto", "key 'documents': bos 'auto': expected one of"),
    "type": (("seed",), "7", "key 'seed': expected int, found '7'"),
    "true for 1": (("sequence_length",), True, "key 'sequence_length': expected int, found True"),
    "no teacher": (("teacher",), None, "keep method 'top-p-k' with no teacher"),
}


@pytest.mark.parametrize("what", UNKNOWN)
@pytest.mark.parametrize(
    ("read", "where"),
    [
        (in_manifest, "dataset/manifest.json: spec: "),
        (in_footer, "train/shard-000000.parquet: footer: spec: "),
    ],
    ids=["manifest", "footer"],
)
def test_a_file_that_this_release_does_not_understand_is_refused_by_name(path, read, where, what):
    place, value, message = UNKNOWN[what]
    read(path, through_a_file(make_spec()))
    content = through_a_file(make_spec())
    at(content, place[:-1])[place[-1]] = value
    with pytest.raises(ShardFormatError) as caught:
        read(path, content)
    assert where in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_refused_in_every_file(path):
    content = through_a_file(make_spec())
    del content["documents"]["held_out"]
    for read in (in_manifest, in_footer):
        with pytest.raises(ShardFormatError, match=r"no key 'documents\.held_out'"):
            read(path, content)


def test_an_unknown_split_is_refused_in_every_file(path):
    shard = path / "train" / "shard-000000.parquet"
    rewrite_footer(shard, split="test")
    message = "unknown split 'test', this release knows train, validation"
    with pytest.raises(ShardFormatError, match=f"shard-000000.parquet: footer: {message}"):
        ShardReader(shard)
    size = {"sequences": 1, "positions": 1}
    reseal(path / "manifest.json", splits={"test": size, "train": size})
    with pytest.raises(ShardFormatError, match=f"manifest.json: {message}"):
        load_manifest(path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_format_version_is_refused_in_every_file(path, version):
    message = f"format version {version!r}, this release reads version 1"
    shard = path / "train" / "shard-000000.parquet"
    rewrite_footer(shard, format_version=version)
    with pytest.raises(ShardFormatError, match=f"shard-000000.parquet: {message}"):
        ShardReader(shard)
    for file in (sidecar_path(shard), path / "manifest.json"):
        content = {**json.loads(file.read_text()), "format_version": version}
        file.write_text(json.dumps(content))
        with pytest.raises(ShardFormatError, match=f"{file.name}: {message}"):
            load_manifest(path) if file.name == "manifest.json" else ShardReader(shard)


@pytest.mark.parametrize("changes", [{"novelty": 1}, {"shard": "0"}, {"shard": True}])
def test_a_footer_with_another_key_or_type_is_refused_by_name(path, changes):
    shard = path / "train" / "shard-000000.parquet"
    rewrite_footer(shard, **changes)
    (key,) = changes
    with pytest.raises(ShardFormatError, match=f"footer: (unknown )?key '{key}'"):
        ShardReader(shard)


def columns_in_the_docs():
    """(name, when it is there) for each row of the table of columns in docs/format.md."""
    table = (ROOT / "docs" / "format.md").read_text().split("### Encoding")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(ALL_COLUMNS)
    return dict(rows)


def kinds():
    """Every combination that decides over columns."""
    teachers = [None, make_spec().teacher, replace(make_spec().teacher, entropies=False), RUN]
    for teacher, keep, masked in product(
        teachers, [TopPK(), Draws(), Threshold(), Tokens()], [False, True]
    ):
        if (teacher is None) == isinstance(keep, Tokens):
            yield replace(make_spec(has_mask=masked), teacher=teacher, keep=keep)


@pytest.mark.parametrize("spec", list(kinds()))
def test_the_columns_of_every_kind_of_dataset_are_those_of_the_docs(spec):
    content = spec.to_json()
    teacher = content["teacher"] is not None
    entropies = teacher and content["teacher"]["entropies"]
    present = {
        "always": True,
        "with a teacher": teacher,
        "truncating methods": teacher and content["keep"]["method"] == "top-p-k",
        "`teacher.entropies`": entropies,
        "`documents.masked`": content["documents"]["masked"],
    }
    docs = columns_in_the_docs()
    assert set(docs.values()) == set(present)
    assert spec.columns == tuple(name for name, when in docs.items() if present[when])


def test_equal_descriptions_have_no_differences():
    spec = make_spec()
    assert (
        differences(spec, DatasetSpec.from_json(json.loads(canonical_json(spec.to_json())), ""))
        == []
    )
    assert json_differences({"p": 1}, {"p": 1.0}) == []


def test_every_difference_is_named_by_its_dotted_key():
    found = replace(make_spec(has_mask=True), keep=TopPK(top_k=50, top_p=0.9), seed=7)
    assert differences(make_spec(), found) == [
        "documents.masked: false here, true there",
        "keep.top_k: 100 here, 50 there",
        "keep.top_p: 0.95 here, 0.9 there",
        "seed: 0 here, 7 there",
    ]
    assert differences(make_spec(), make_spec(keep=Draws(draws=100)))[:2] == [
        "keep.draws: nothing here, 100 there",
        'keep.method: "top-p-k" here, "draws" there',
    ]
    here, there = make_spec().to_json(), make_spec().to_json()
    del there["seed"]
    there["note"] = "x"
    assert json_differences(here, there) == [
        'note: nothing here, "x" there',
        "seed: 0 here, nothing there",
    ]


def test_another_kind_of_teacher_is_a_difference():
    lines = differences(make_spec(), make_spec(teacher=RUN))
    assert 'teacher.kind: "model" here, "training-run" there' in lines
    tokens = replace(make_spec(), teacher=None, keep=Tokens())
    (line,) = [line for line in differences(make_spec(), tokens) if line.startswith("teacher")]
    assert line.endswith("here, null there")


@given(specs(), specs())
def test_descriptions_differ_if_and_only_if_a_difference_is_named(one, other):
    assert (differences(one, other) == []) == (one == other)
    assert len(differences(one, other)) == len(differences(other, one))


def test_true_is_not_one_and_a_value_is_not_a_section():
    assert json_differences({"bos": True}, {"bos": 1}) == ["bos: true here, 1 there"]
    assert json_differences({"a": None}, {}) == ["a: null here, nothing there"]
    assert json_differences({"a": {"b": 1}}, {"a": 1}) == ['a: {"b": 1} here, 1 there']


def test_hashes_are_shortened_to_stay_on_one_line():
    (line,) = json_differences({"h": "ab" * 32}, {"h": "cd" * 32})
    assert line == 'h: "abababababababa... here, "cdcdcdcdcdcdcdc... there'


def test_split_names_are_the_ones_that_datasets_have(path):
    assert tuple(Dataset.open(path).split_names) == SPLITS


def sources():
    folders = ("shards", "teacher_dump", "student_train", "logitshards")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [*files, ROOT / "cli.py"]


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_nobody_digs_in_an_untyped_identity(file):
    for node in ast.walk(ast.parse(file.read_text())):
        attribute = isinstance(node, ast.Attribute) and node.attr == "identity"
        dug = isinstance(node, ast.Subscript) and ast.unparse(node.value) == "identity"
        assert not attribute, ast.unparse(node)
        assert not dug, ast.unparse(node)


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_only_the_spec_knows_its_json(file):
    """Whoever else wants a part of a description takes it from the dataclass."""
    if file.name == "spec.py":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Subscript):
            inner = ast.unparse(node.value)
            assert not inner.endswith(("spec", "to_json()")), ast.unparse(node)
