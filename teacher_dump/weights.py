"""The teacher's weight files: which ones a loader reads, whether they are whole, their hash.

A loader reads model.safetensors or the files that its index names, else pytorch_model.bin or those
of its index. Nothing else in the folder is the teacher: an optimizer's state, the arguments of a
training run or the same weights in another layout may come and go. Where there is no index of
safetensors, vLLM reads every file that could hold weights, so others are refused there. Headers and
sizes are checked before anything is tokenised, so that a download that was cut off shows at once.

Hashes are cached per file (by path, size and times), since a large teacher takes minutes to
read.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from shards.errors import InputError, one_line
from shards.files.checksums import path_sha256
from shards.files.git_lfs import refuse_lfs_pointer
from teacher_dump.json_object import read_json_object

_LAYOUTS = ("model.safetensors", "pytorch_model.bin")
# Pickles of a training run that vLLM leaves out.
_OF_TRAINING = ("training_args.bin", "optimizer.bin")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the library safetensors
_AGAIN = "download it again"
# Modules that give the logits, by their names; an embedding does if there is no other.
_HEADS = ("lm_head", "embed_tokens")
_FLOATS = {"F32", "F16", "BF16"}


def weights_sha256(folder: Path) -> str:
    """One hash over the weight files that a loader reads, by name; raises as `check_weights`."""
    names = check_weights(folder)
    cache = _HashCache()
    lines = [f"{name} {cache.sha256(folder / name)}\n" for name in sorted(names)]
    cache.save()
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_weights(folder: Path) -> list[str]:
    """Names of the weight files that a loader reads; reads no more than their headers.

    InputError, one line, for a file that is missing, cut off, a Git LFS pointer, or without a
    tensor that the index places in it; and where there are no weights.
    """
    named = _named_files(folder)
    for name, tensors in named.items():
        path = folder / name
        try:
            refuse_lfs_pointer(path)
            if name.endswith(".safetensors"):
                _check_safetensors(path, tensors)
            else:
                _check_pickle(path)
        except FileNotFoundError as error:
            raise InputError(f"{path}: missing, but the index names it; {_AGAIN}") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return list(named)


def has_plain_head(folder: Path) -> bool:
    """Whether the LM head, or the embedding that it is tied to, holds floats and nothing else.

    A quantised one has integers, scales or zero points. False where that cannot be told: in files
    that are no safetensors, and for a head of another name. Raises as `check_weights`.
    """
    tensors: dict[str, Any] = {}
    for name in check_weights(folder):
        if not name.endswith(".safetensors"):
            return False
        tensors |= _read_header(folder / name)
    for module in _HEADS:
        of_head = {
            name.rpartition(".")[2]: about.get("dtype")
            for name, about in tensors.items()
            if module in name.split(".")[:-1]
        }
        if of_head:
            return of_head.keys() <= {"weight", "bias"} and set(of_head.values()) <= _FLOATS
    return False


def _named_files(folder: Path) -> dict[str, list[str]]:
    """File name -> the tensors that must be in it, where an index says so."""
    for single in _LAYOUTS:
        index = folder / f"{single}.index.json"
        has_single = os.path.lexists(folder / single)
        if os.path.lexists(index):
            named = _weight_map(index)
            if has_single and single not in named:
                raise InputError(
                    f"{folder}: has {single} and {index.name}, which names other files; some"
                    " loaders read one and some the other, so remove the one that is not the"
                    " teacher's"
                )
            _refuse_others(folder, named)
            return named
        if has_single:
            _refuse_others(folder, {single: []})
            return {single: []}
    raise InputError(f"{folder}: contains no weights, expected {' or '.join(_LAYOUTS)} or an index")


def _refuse_others(folder: Path, named: Mapping[str, Sequence[str]]) -> None:
    """InputError for files beside these that vLLM would read as weights too, or in their place."""
    if os.path.lexists(folder / f"{_LAYOUTS[0]}.index.json"):
        return
    is_safetensors = _LAYOUTS[0] in named
    for name in sorted(name for name in os.listdir(folder) if not name.startswith(".")):
        of_training = name.endswith(_OF_TRAINING)
        pickle = name.endswith(".bin") and not is_safetensors and not of_training
        if name not in named and (pickle or name.endswith(".safetensors")):
            raise InputError(
                f"{folder / name}: lies beside {next(iter(named))}, and vLLM would load it too, or"
                " in its place; give a folder without it"
            )


def _weight_map(index: Path) -> dict[str, list[str]]:
    """The files of an index, each with its tensors, in the order of their names."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map that names files; {_AGAIN}")
    named: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_inside(name):
            raise InputError(f"{index}: {tensor} is in {name!r}, expected a file of the folder")
        named.setdefault(name, []).append(tensor)
    return dict(sorted(named.items()))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _check_safetensors(path: Path, tensors: Sequence[str]) -> None:
    """InputError unless the header is one, fits the file's size, and has these tensors."""
    entries = _read_header(path)
    for tensor in tensors:
        if tensor not in entries:
            raise InputError(
                f"{path}: has no tensor {tensor}, but the index places it there; {_AGAIN}"
            )


def _read_header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors; InputError unless it fits the file's size."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or size < 8 + length <= 8 + _MAX_HEADER_BYTES:
            raise InputError(_cut_off(path, f"at least {8 + length if size >= 8 else 8}", size))
        if length > _MAX_HEADER_BYTES:
            raise InputError(f"{path}: not safetensors, its header has {length} bytes; {_AGAIN}")
        text = stream.read(length)
    try:
        header = json.loads(text)
        entries = {key: value for key, value in header.items() if key != "__metadata__"}
        spans = [value["data_offsets"] for value in entries.values()]
        if not all(0 <= begin <= end for begin, end in spans):
            raise ValueError("an offset is negative")
        expected = 8 + length + max((int(end) for _, end in spans), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: not a header of safetensors ({one_line(error)}); {_AGAIN}"
        ) from error
    if size != expected:
        raise InputError(_cut_off(path, str(expected), size))
    return entries


def _check_pickle(path: Path) -> None:
    """InputError for a file of torch.save that is empty, or a zip archive without its end."""
    with path.open("rb") as stream:
        beginning = stream.read(4)
    if not beginning:
        raise InputError(f"{path}: empty; {_AGAIN}")
    if beginning == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        raise InputError(f"{path}: truncated, the end of its zip archive is missing; {_AGAIN}")


def _cut_off(path: Path, expected: str, size: int) -> str:
    return f"{path}: expected {expected} bytes, found {size}; {_AGAIN}"


class _HashCache:
    """Path, size and times -> hash, in the user's cache folder; losing it costs time."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._path: Path | None = None
        try:
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # no HOME and no entry in passwd
            return
        self._path = root / "logitshards" / "weights.json"
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        if isinstance(known, Mapping):
            self._known = dict(known)

    def sha256(self, path: Path) -> str:
        status = path.stat()
        # An image or `cp -p` can give another file the same size and time, but not the same ctime.
        times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        key = f"{path.resolve()} {times}"  # so machines that share a home share this file too
        known = self._known.get(key)
        if not isinstance(known, str):
            known = self._known[key] = path_sha256(path)
        return known

    def save(self) -> None:
        if self._path is None:
            return
        temporary = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._known), encoding="utf-8")
            temporary.replace(self._path)
        except OSError:
            return  # a read-only home only means hashing again
