"""Files as documents: every compression, mark and column type, and what is an error by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from shards.errors import InputError
from teacher_dump.corpus.compressed import open_compressed
from teacher_dump.corpus.documents import read_documents
from teacher_dump.corpus.listing import CorpusFile
from teacher_dump.corpus.rules import TokenisingRules

TEXTS = [f"w{number} w{number + 1}" for number in range(200)]
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]


def long_window(content: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    sink = io.BytesIO()
    with compressor.stream_writer(sink, closefd=False) as writer:
        writer.write(content)
    return sink.getvalue()


zstd = zstandard.ZstdCompressor(write_checksum=True).compress  # as the command line tool does
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstd,
    "zstd": zstd,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def documents(path: Path, **more: Any) -> list[Any]:
    options: dict[str, Any] = {"text_key": "text", "held_out": 0.0, "seed": 0, **more}
    rules = TokenisingRules(tokenizer_sha256="", vocab_size=60_000, eos_token_id=0, **options)
    return list(read_documents(CorpusFile(path=path, name=path.name), rules))


def refusal(path: Path, **more: Any) -> str:
    with pytest.raises(InputError) as error:
        documents(path, **more)
    assert str(error.value).startswith(f"{path}")
    assert "\n" not in str(error.value)
    return str(error.value)


def frames(compress: Callable[[bytes], bytes]) -> list[bytes]:
    """Whole lines each; the last but one is empty."""
    return [compress(b"".join(part)) for part in (LINES[:50], LINES[50:120], [], LINES[120:])]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressed_file_of_several_frames_is_read_whole(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl.{name}"
    path.write_bytes(b"".join(frames(COMPRESSORS[name])))
    assert documents(path) == TEXTS
    path = path.rename(tmp_path / f"A.NDJSON.{name.upper()}")
    assert documents(path) == TEXTS
    path.write_bytes(b"")
    assert documents(path) == []


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressed_file_is_read_whole_or_refused_wherever_it_is_cut(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.jsonl.{name}"
    parts = frames(COMPRESSORS[name])
    whole = b"".join(parts)
    borders = {sum(map(len, parts[:number])) for number in range(len(parts) + 1)}
    for size in set(range(1, len(whole), 7)) | {len(whole) - 1} | {n + 1 for n in borders}:
        if size in borders or size > len(whole):
            continue
        path.write_bytes(whole[:size])
        assert "Truncated" in refusal(path)


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("garbage", [b"\x00", b"x", b"garbage that goes on " * 99, b"\x00" * 4097])
def test_what_follows_a_whole_frame_is_an_error(name: str, garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl.{name}"
    path.write_bytes(b"".join(frames(COMPRESSORS[name])) + garbage)
    if name in ("gz", "xz") and not garbage.strip(b"\x00"):
        assert (
            documents(path) == TEXTS
        )  # `gzip -d` takes zeros there, and the format of xz has them
    else:
        assert "cannot be read" in refusal(path)


def test_zeros_of_gzip_at_another_place_or_before_something_else_are_an_error(
    tmp_path: Path,
) -> None:
    path, whole = tmp_path / "a.jsonl.gz", b"".join(frames(gzip.compress))
    for content in (b"\x00" * 512, b"\x00" + whole, whole + b"\x00" * 512 + b"x"):
        path.write_bytes(content)
        assert "cannot be read" in refusal(path)
    path.write_bytes(whole + b"\x00" * 512 + gzip.compress(LINES[0]))
    assert documents(path) == [*TEXTS, TEXTS[0]]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_damaged_byte_is_an_error(name: str, tmp_path: Path) -> None:
    content = bytearray(b"".join(frames(COMPRESSORS[name])))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / f"a.jsonl.{name}").write_bytes(content)
    assert "damaged" in refusal(tmp_path / f"a.jsonl.{name}")


def test_zstd_of_a_long_window_and_with_skippable_frames_is_read(tmp_path: Path) -> None:
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"12345"
    content = skippable + long_window(b"".join(LINES)) + skippable
    assert zstandard.get_frame_parameters(content[13:]).window_size == 1 << 31
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert documents(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_stream_stays_at_its_end(name: str) -> None:
    kind = "zst" if name == "zstd" else name
    stream = open_compressed(io.BytesIO(COMPRESSORS[name](b"x" * 5_000_000)), kind)
    assert len(stream.read(3_000_000)) == 3_000_000
    assert len(stream.read()) == 2_000_000
    assert stream.read(1) == stream.read() == b""


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.jsonl.gz", "a.json.xz"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    text = "w1 \ufeff w2"
    is_text = name.endswith((".txt", ".md"))
    content = text if is_text else json.dumps({"text": text}, ensure_ascii=False) + "\n"
    marked = b"\xef\xbb\xbf" + content.encode()
    compress = COMPRESSORS.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(compress(marked))
    assert documents(tmp_path / name) == [text]  # the mark within it is the author's


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("encoding", "says"),
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")],
)
def test_text_in_wide_characters_is_an_error_that_says_so(
    name: str, encoding: str, says: str, tmp_path: Path
) -> None:
    content = '{"text": "w1 w2"}\n'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert f"{says} text, expected UTF-8; `iconv -f {says} -t UTF-8`" in refusal(tmp_path / name)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_one_json_document_is_not_taken_for_lines(
    name: str, indent: int | None, tmp_path: Path
) -> None:
    def write(record: Any) -> Path:
        content = (" \n" * (indent or 0) + json.dumps(record, indent=indent) + "\n").encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        return tmp_path / name

    says = refusal(write([{"text": "w1"}, {"text": "w2"}]))
    assert "found one JSON document, an array; `jq -c '.[]'`" in says
    one = write({"text": "w1", "more": {"text": "w2"}})
    if indent is None:
        assert documents(one) == ["w1"]
    else:
        assert "found one JSON document over several lines" in refusal(one)


def string_types() -> Iterator[pa.DataType]:
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        yield kind
        yield pa.dictionary(pa.int8(), kind)


def array_of(texts: list[str | None], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_dictionary(kind):
        return pa.array(texts, kind)
    different = list(dict.fromkeys(text for text in texts if text is not None))
    places = [None if text is None else different.index(text) for text in texts]
    return pa.DictionaryArray.from_arrays(
        pa.array(places, kind.index_type), pa.array(different, kind.value_type)
    )


def write_table(path: Path, columns: list[pa.Array], names: list[str]) -> Path:
    batch = pa.RecordBatch.from_arrays(columns, names)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_batches([batch]), path)
    else:
        with pa.ipc.new_file(path, batch.schema) as file:
            file.write_batch(batch)
    return path


def not_in_parquet(kind: pa.DataType) -> bool:
    """Whether pyarrow refuses to write a type, so that no such file can be made."""
    return kind == pa.dictionary(pa.int8(), pa.string_view())


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (suffix, kind)
        for suffix in ("arrow", "parquet")
        for kind in string_types()
        if suffix == "arrow" or not not_in_parquet(kind)
    ],
    ids=str,
)
def test_texts_of_every_string_type_are_the_same(
    suffix: str, kind: pa.DataType, tmp_path: Path
) -> None:
    texts: list[str | None] = ["w1", "w2", "", "w1"]
    path = write_table(tmp_path / f"a.{suffix}", [array_of(texts, kind)], ["text"])
    assert documents(path) == texts
    write_table(path, [array_of([*texts, None], kind)], ["text"])
    assert "row 4: 'text' is null" in refusal(path)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.int64()], ids=str)
def test_a_column_of_something_else_is_named_with_its_type(
    kind: pa.DataType, tmp_path: Path
) -> None:
    path = write_table(tmp_path / "a.arrow", [pa.array([], kind), pa.array([])], ["text", "n"])
    write_table(path, [pa.array([None], kind), pa.array([1])], ["text", "n"])
    assert f"column 'text' is {kind}, expected string" in refusal(path)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_a_column_name_that_stands_twice_is_an_error(suffix: str, tmp_path: Path) -> None:
    columns = [pa.array(["w1"]), pa.array(["w2"]), pa.array([[1]]), pa.array([[2]])]
    names = ["text", "text", "tokens", "tokens"]
    path = write_table(tmp_path / f"a.{suffix}", columns, names)
    assert "column 'text' appears twice" in refusal(path)
    assert "column 'tokens' appears twice" in refusal(path, token_key="tokens")


LISTS = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
MASKS = [[1, 1, 0], [0, 1, 1], [0, 0, 1]]


def list_types(item: pa.DataType) -> Iterator[pa.DataType]:
    yield from (pa.list_(item), pa.large_list(item), pa.list_(item, 3))
    yield from (pa.list_view(item), pa.large_list_view(item))


@pytest.mark.parametrize("kind", list(list_types(pa.uint16())), ids=str)
def test_token_lists_of_every_type_are_the_same(kind: pa.DataType, tmp_path: Path) -> None:
    whole = pa.array([[9, 9, 9], *LISTS, [9, 9, 9]], kind)
    for column in (pa.array(LISTS, kind), whole.slice(1, 3)):
        path = write_table(tmp_path / "a.arrow", [column], ["tokens"])
        found = documents(path, token_key="tokens")
        assert [document.tokens.tolist() for document in found] == LISTS


@pytest.mark.parametrize("item", [pa.bool_(), pa.uint8(), pa.int64()], ids=str)
@pytest.mark.parametrize("number", range(5))
def test_masks_are_booleans_or_zeros_and_ones(
    number: int, item: pa.DataType, tmp_path: Path
) -> None:
    kind = list(list_types(item))[number]
    masks = [[bool(m) if item == pa.bool_() else m for m in mask] for mask in MASKS]
    columns = [pa.array(LISTS), pa.array(masks, kind)]
    path = write_table(tmp_path / "a.arrow", columns, ["tokens", "m"])
    found = documents(path, token_key="tokens", mask_key="m")
    assert [document.mask.tolist() for document in found] == MASKS
    assert {document.mask.dtype for document in found} == {np.dtype(np.bool_)}


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ([[1, 1, 0], [0, 2, 1], [0, 0, 1]], "row 1: 'm' has 2, expected 0 or 1"),
        ([[1, 1, 0], [0, 0, 1], [0, 0, -1]], "row 2: 'm' has -1, expected 0 or 1"),
        ([[1, 1, 0], [0, None, 1], [0, 0, 1]], "row 1: column 'm' has a null"),
        ([[1, 1, 0], [0, 0, 1], None], "row 2: column 'm' is list<item: int64>, expected lists"),
        ([[1.0, 1, 0], [0, 0, 1], [0, 0, 1]], "expected lists of booleans or 0 and 1"),
        ([[1, 1, 0], [0, 0], [0, 0, 1]], "row 1: 'm' and 'tokens' differ in length"),
    ],
)
def test_another_mask_is_an_error_with_its_row(masks: Any, says: str, tmp_path: Path) -> None:
    columns = [pa.array(LISTS), pa.array(masks)]
    path = write_table(tmp_path / "a.arrow", columns, ["tokens", "m"])
    assert says in refusal(path, token_key="tokens", mask_key="m")


def write_npz(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, tokens=np.arange(9))


def replace_header(path: Path) -> None:
    np.save(path, np.arange(9))
    path.write_bytes(path.read_bytes().replace(b"'shape': (9,)", b"'shape': ((((("))


@pytest.mark.parametrize(
    "write",
    [
        write_npz,
        replace_header,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x93NUMPY"),
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16),
        lambda path: path.write_text("some text"),
        lambda path: path.write_bytes(gzip.compress(b"tokens")),
        lambda path: np.save(path, np.array([{}]), allow_pickle=True),
    ],
)
def test_another_file_named_npy_is_an_error(write: Callable[[Path], Any], tmp_path: Path) -> None:
    write(tmp_path / "a.npy")
    assert "not a .npy file that can be mapped" in refusal(tmp_path / "a.npy")


WIDTHS = ["uint16", "uint32", "int32", "int64"]


def flat(random: np.random.Generator, num_ids: int = 50_000, size: int = 200_000) -> Any:
    tokens = random.integers(1, num_ids, size)
    tokens[random.integers(0, size, size // 50)] = 0
    return tokens


@pytest.mark.parametrize("size", [40, 200_000])
@pytest.mark.parametrize("read_as", WIDTHS)
@pytest.mark.parametrize("written_as", WIDTHS)
def test_a_flat_file_is_read_in_its_width_or_refused(
    written_as: str, read_as: str, size: int, tmp_path: Path
) -> None:
    """Ids beyond the vocabulary are refused later, and these ids are within it."""
    tokens = flat(np.random.default_rng(0), size=size)
    path = tmp_path / "a.bin"
    tokens.astype(written_as).tofile(path)
    written, given = np.dtype(written_as).itemsize, np.dtype(read_as).itemsize
    if written == given:
        found = documents(path, token_dtype=read_as)
        assert np.array_equal(np.concatenate([document.tokens for document in found]), tokens)
    elif written > given:
        dtype = "uint32" if written == 4 else "int64"
        assert f"give --token-dtype {dtype}" in refusal(path, token_dtype=read_as)
    else:
        found = documents(path, token_dtype=read_as)
        assert max(int(document.tokens.max()) for document in found) >= 60_000


@pytest.mark.parametrize("written_as", ["uint32", "int64"])
def test_ids_above_65535_do_not_hide_a_wrong_width(written_as: str, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    flat(np.random.default_rng(0), 250_000).astype(written_as).tofile(path)
    rules = TokenisingRules(
        tokenizer_sha256="", vocab_size=256_000, eos_token_id=0, text_key="text", held_out=0.0,
        seed=0, token_dtype="uint16",
    )  # fmt: skip
    with pytest.raises(InputError, match="--token-dtype"):
        list(read_documents(CorpusFile(path=path, name="a.bin"), rules))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_an_honest_file_may_have_many_zeros(dtype: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / "a.bin"
    tokens = flat(random, size=100_000)
    for zeros in (
        random.random(100_000) < 0.95,
        np.arange(100_000) >= 30_000,  # padded at the end
        np.arange(100_000) % 3 > 0,
        np.arange(100_000) < 90_000,
        np.ones(100_000, bool),
    ):
        np.where(zeros, 0, tokens).astype(dtype).tofile(path)
        found = documents(path, token_dtype=dtype)
        assert sum(len(document.tokens) for document in found) == 100_000
    tokens[:60_000:2] = 0  # one-token documents, but not everywhere
    tokens.astype(dtype).tofile(path)
    documents(path, token_dtype=dtype)


def test_tokens_in_the_layout_of_llm_c_are_refused(tmp_path: Path) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 1000
    content = header.tobytes() + np.ones(1000, np.uint16).tobytes()
    (tmp_path / "a.bin").write_bytes(content)
    for dtype in WIDTHS:
        says = refusal(tmp_path / "a.bin", token_dtype=dtype)
        assert "`tail -c +1025` and give --token-dtype uint16" in says
    subprocess.run(
        "tail -c +1025 a.bin > b.bin", shell=True, check=True, cwd=tmp_path, capture_output=True
    )
    assert np.array_equal(np.fromfile(tmp_path / "b.bin", np.uint16), np.ones(1000))
