"""Safetensors files written part by part, so that a file may be larger than the memory."""

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
from lemoe.data.files import check_free, write_whole

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
ALIGNMENT = 8  # bytes to which the header is padded
PIECE = 1 << 17  # bytes read or copied at once, if a row is not larger
COMPACT, SPACED = (",", ":"), (", ", ": ")  # what stands between the items of JSON


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its type and shape, and what gives its parts, end to end."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, tensor: Tensor) -> "Entry":
        return cls(tensor.dtype, tuple(tensor.shape), lambda: (tensor,))

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, key: str, metadata: Mapping[str, object], entries: Mapping[str, Entry], *, overwrite: bool
) -> None:
    """Write a safetensors file, whole or not at all; equal content gives equal bytes.

    Args:
        key: under which the file's own metadata holds `metadata`, as sorted JSON, and the hash of everything.

    Raises:
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
        ValueError: if the parts of a tensor are not as long as its shape says.
    """
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    ordered = {name: entries[name] for name in order}
    table = _table(ordered)
    check_free(path, overwrite=overwrite)
    whole = {**metadata, HASH_KEY: _hash(table, metadata, _data(ordered))}
    write_whole(path, chain(_header(key, whole, table), _data(ordered)), overwrite=overwrite)


def _header(key: str, metadata: Mapping[str, object], table: Mapping[str, object]) -> Iterator[bytes]:
    """Its length, and the header: the metadata, JSON within a string, and then the table."""
    opening = f'{{"__metadata__":{{{json.dumps(key)}:"'.encode()
    closing = b'"},' + "".join(_json(table, COMPACT)).removeprefix("{").encode()
    length = len(opening) + sum(map(len, _escaped(metadata))) + len(closing)
    padding = -length % ALIGNMENT
    yield (length + padding).to_bytes(8, "little") + opening
    yield from _escaped(metadata)
    yield closing + b" " * padding


def _escaped(metadata: Mapping[str, object]) -> Iterator[bytes]:
    """JSON as it stands in a JSON string."""
    return (json.dumps(part)[1:-1].encode() for part in _json(metadata, SPACED))


@dataclass(frozen=True)
class Stored:
    """Where a tensor of a file is: its type and shape, and where its first byte stands in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def rows(self, first: int, end: int) -> Tensor:
        """Its rows `first` to `end`, in memory of their own: reading maps nothing."""
        row = prod(self.shape[1:]) * self.dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(self.start + first * row)
            content = bytearray(file.read((end - first) * row))
        return torch.frombuffer(content, dtype=self.dtype).reshape(end - first, *self.shape[1:]).clone()


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file that has been checked, by name."""
    types = {name: dtype for dtype, name in _NAMES.items()}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(size))
    table.pop("__metadata__", None)
    return {
        name: Stored(path, types[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in table.items()
    }


def is_as_written(path: Path, key: str) -> bool:
    """Whether the hash in a safetensors file is that of its tensors, of their table, and of its metadata."""
    with path.open("rb") as file:
        table = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = json.loads(table.pop("__metadata__")[key])
        stored = metadata.pop(HASH_KEY, None)
        found = _hash(table, metadata, iter(lambda: file.read(PIECE), b""))
    return bool(stored == found)


def _hash(table: Mapping[str, object], metadata: Mapping[str, object], data: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for text in chain(_json(table, COMPACT), _json(metadata, COMPACT)):
        digest.update(text.encode())
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def _json(value: object, separators: tuple[str, str], depth: int = 2) -> Iterator[str]:
    """Sorted JSON in parts, of which none holds more than one value at `depth`: the whole may be long."""
    if depth == 0 or not value or not isinstance(value, Mapping | list):
        yield json.dumps(value, separators=separators, sort_keys=True)
        return
    between, colon = separators
    named = isinstance(value, Mapping)
    for place, item in enumerate(sorted(value) if named else value):
        yield ("{" if named else "[") if place == 0 else between
        if named:
            yield json.dumps(item) + colon
        yield from _json(value[item] if named else item, separators, depth - 1)
    yield "}" if named else "]"


def _table(entries: Mapping[str, Entry]) -> dict[str, object]:
    table: dict[str, object] = {}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.size
        table[name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    return table


def _data(entries: Mapping[str, Entry]) -> Iterator[bytes]:
    for name, entry in entries.items():
        written = 0
        for part in entry.parts():
            content = part.detach().to("cpu", entry.dtype).contiguous().view(torch.uint8).numpy().tobytes()
            written += len(content)
            yield content
        if written != entry.size:
            raise ValueError(f"{name}: {written} bytes, expected {entry.size}")
