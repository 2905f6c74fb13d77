"""Safetensors files written chunk by chunk, so that a file may be larger than memory."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lemoe.adaptor.header import HASH_KEY
from lemoe.data.files import check_overwrite, write_atomically

_TYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
ALIGNMENT = 8  # bytes to which the header is padded
CHUNK_BYTES = 1 << 17  # bytes read or copied at once, if a row is not larger
COMPACT_SEPARATORS, SPACED_SEPARATORS = (",", ":"), (", ", ": ")  # of items, and of a key and its value


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written: its type and shape, and a reader of its chunks of rows, in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read_chunks: Callable[[], Iterable[Tensor]]

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "TensorEntry":
        return cls(tensor.dtype, tuple(tensor.shape), lambda: (tensor,))

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, key: str, metadata: Mapping[str, object], entries: Mapping[str, TensorEntry], *, overwrite: bool
) -> None:
    """Write a safetensors file, whole or not at all; deterministic: equal content gives byte-identical files.

    Args:
        key: under which the file's own metadata holds `metadata`, as sorted JSON, and the hash of everything.

    Raises:
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
        ValueError: if the chunks of a tensor are not as long as its shape says.
    """
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    ordered = {name: entries[name] for name in order}
    table = _build_table(ordered)
    check_overwrite(path, overwrite=overwrite)
    whole = {**metadata, HASH_KEY: _hash_content(table, metadata, _encode_tensors(ordered))}
    write_atomically(path, chain(_encode_header(key, whole, table), _encode_tensors(ordered)), overwrite=overwrite)


def _encode_header(key: str, metadata: Mapping[str, object], table: Mapping[str, object]) -> Iterator[bytes]:
    """The header, its length first: the metadata, as a JSON string that holds JSON, and then the table."""
    opening = f'{{"__metadata__":{{{json.dumps(key)}:"'.encode()
    closing = b'"},' + "".join(_encode_json(table, COMPACT_SEPARATORS)).removeprefix("{").encode()
    length = len(opening) + sum(map(len, _escape_json(metadata))) + len(closing)
    padding = -length % ALIGNMENT
    yield (length + padding).to_bytes(8, "little") + opening
    yield from _escape_json(metadata)
    yield closing + b" " * padding


def _escape_json(metadata: Mapping[str, object]) -> Iterator[bytes]:
    """JSON, escaped to stand in a JSON string."""
    return (json.dumps(part)[1:-1].encode() for part in _encode_json(metadata, SPACED_SEPARATORS))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type and shape, and the file offset of its first byte."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def read_rows(self, first: int, end: int) -> Tensor:
        """Its rows `first` to `end`, copied into memory: nothing is mapped."""
        row = prod(self.shape[1:]) * self.dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(self.start + first * row)
            content = bytearray(file.read((end - first) * row))
        return torch.frombuffer(content, dtype=self.dtype).reshape(end - first, *self.shape[1:]).clone()


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file that has been checked, by name."""
    types = {name: dtype for dtype, name in _TYPE_NAMES.items()}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(size))
    table.pop("__metadata__", None)
    return {
        name: StoredTensor(path, types[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in table.items()
    }


def matches_stored_hash(path: Path, key: str) -> bool:
    """Whether the hash in a safetensors file is that of its tensors, of their table, and of its metadata."""
    with path.open("rb") as file:
        table = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = json.loads(table.pop("__metadata__")[key])
        stored = metadata.pop(HASH_KEY, None)
        found = _hash_content(table, metadata, iter(lambda: file.read(CHUNK_BYTES), b""))
    return bool(stored == found)


def _hash_content(table: Mapping[str, object], metadata: Mapping[str, object], data: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for text in chain(_encode_json(table, COMPACT_SEPARATORS), _encode_json(metadata, COMPACT_SEPARATORS)):
        digest.update(text.encode())
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def _encode_json(value: object, separators: tuple[str, str], depth: int = 2) -> Iterator[str]:
    """Sorted JSON in chunks of at most one value at `depth` each, since the whole may be long."""
    if depth == 0 or not value or not isinstance(value, Mapping | list):
        yield json.dumps(value, separators=separators, sort_keys=True)
        return
    comma, colon = separators
    is_object = isinstance(value, Mapping)
    for index, item in enumerate(sorted(value) if is_object else value):
        yield ("{" if is_object else "[") if index == 0 else comma
        if is_object:
            yield json.dumps(item) + colon
        yield from _encode_json(value[item] if is_object else item, separators, depth - 1)
    yield "}" if is_object else "]"


def _build_table(entries: Mapping[str, TensorEntry]) -> dict[str, object]:
    table: dict[str, object] = {}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.nbytes
        table[name] = {"dtype": _TYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    return table


def _encode_tensors(entries: Mapping[str, TensorEntry]) -> Iterator[bytes]:
    for name, entry in entries.items():
        written = 0
        for part in entry.read_chunks():
            content = part.detach().to("cpu", entry.dtype).contiguous().view(torch.uint8).numpy().tobytes()
            written += len(content)
            yield content
        if written != entry.nbytes:
            raise ValueError(f"{name}: {written} bytes, expected {entry.nbytes}")
