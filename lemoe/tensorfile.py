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

from lemoe.files import check_free, write_whole

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
ALIGNMENT = 8  # bytes to which the header is padded
PIECE = 1 << 20  # bytes read at once


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
    path: Path, metadata: Callable[[str], Mapping[str, str]], entries: Mapping[str, Entry], *, overwrite: bool
) -> None:
    """Write a safetensors file, whole or not at all; equal content gives equal bytes.

    Args:
        metadata: gives the file's metadata for the SHA-256 of all that follows the header.

    Raises:
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
        ValueError: if the parts of a tensor are not as long as its shape says.
    """
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    ordered = {name: entries[name] for name in order}
    check_free(path, overwrite=overwrite)
    digest = hashlib.sha256()
    for part in _data(ordered):
        digest.update(part)
    content = chain([_header(metadata(digest.hexdigest()), ordered)], _data(ordered))
    write_whole(path, content, overwrite=overwrite)


def data_sha256(path: Path) -> str:
    """SHA-256 of all that follows the header of a safetensors file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while part := file.read(PIECE):
            digest.update(part)
    return digest.hexdigest()


def _header(metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.size
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _data(entries: Mapping[str, Entry]) -> Iterator[bytes]:
    for name, entry in entries.items():
        written = 0
        for part in entry.parts():
            content = part.detach().to("cpu", entry.dtype).contiguous().view(torch.uint8).numpy().tobytes()
            written += len(content)
            yield content
        if written != entry.size:
            raise ValueError(f"{name}: {written} bytes, expected {entry.size}")
