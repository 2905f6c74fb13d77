"""Prefixes that were read, by name, so that a sequence is read on from where it was left, however it got there.

A prefix's name is a hash over all its tokens, worked out from the name of the prefix before and the tokens since. It
travels with the tokens in the model's KV cache, which beams, repeated rows, cropping and copies reorder as they like:
what the cache says of a sequence is what was read of it. Prefixes that were forgotten are read again.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy
from numpy.typing import NDArray

from lemoe.routing.anchor.gate import Gate
from lemoe.routing.anchor.route import SHUT, Reading, Route

PADDING = -1
NAME = 16  # bytes of a name; of 10^12 prefixes, two have one name with a chance of 10^-15
CELLS = 1 + NAME // 4  # numbers that the KV cache holds for each column: the token, and a name, which may be none
NAMELESS = bytes(NAME)

Ids = NDArray[numpy.int32]


@dataclass(slots=True)
class Prefix:
    """A sequence as far as it was read: the gate's state there, its name, and its columns, padding included."""

    route: Route
    name: bytes = NAMELESS
    columns: int = 0

    def copy(self) -> "Prefix":
        """The same prefix, to go on differently from here."""
        return Prefix(self.route.copy(), self.name, self.columns)

    def read(self, ids: Ids) -> list[Reading]:
        """Go on by some columns `[seq]`; returns how the gate stands after each, shut on padding."""
        if not len(ids):
            return []
        self.name = blake2b(self.name + ids.astype("<i4").tobytes(), digest_size=NAME).digest()
        self.columns += len(ids)
        return [self.route.push(token) if token != PADDING else SHUT for token in ids.tolist()]


class ReadPrefixes:
    """Prefixes of late, in so many bytes; those used least recently are forgotten first, but none of the last call."""

    def __init__(self, gate: Gate, kept: int):
        self._gate = gate
        self._kept = kept
        self._known: OrderedDict[bytes, Prefix] = OrderedDict()
        self._size = 0

    def resume(self, past: "Ids | None") -> Prefix:
        """A sequence of these cells `[columns, CELLS]`, read to its end; a new one without."""
        if past is None:
            return Prefix(Route(self._gate))
        named = numpy.flatnonzero(past[:, 1:].any(1))[::-1].tolist()
        found = (self._at(past[column], column) for column in named)
        prefix = next((each for each in found if each is not None), None)
        prefix = prefix.copy() if prefix is not None else Prefix(Route(self._gate))
        prefix.read(past[prefix.columns :, 0])
        return prefix

    def resume_at(self, cells: Ids, columns: int) -> Prefix | None:
        """A sequence of so many columns of which the last holds these `cells`, if it was read to there."""
        found = self._at(cells, columns - 1)
        return found.copy() if found is not None and found.columns == columns else None

    def _at(self, cells: Ids, column: int) -> Prefix | None:
        """The prefix that is named in a column: the one that ends with it, or the one that ends before it."""
        name = cells[1:].astype("<i4").tobytes()
        found = self._known.get(name)
        if found is None or not column <= found.columns <= column + 1:
            return None
        self._known.move_to_end(name)
        return found

    def keep(self, prefixes: Iterable[Prefix]) -> None:
        """Remember these, and forget others where the room is short."""
        fresh = set()
        for prefix in prefixes:
            self._forget(prefix.name)
            self._known[prefix.name] = prefix
            self._size += prefix.route.size
            fresh.add(prefix.name)
        while self._size > self._kept and (oldest := next(iter(self._known))) not in fresh:
            self._forget(oldest)

    def _forget(self, name: bytes) -> None:
        gone = self._known.pop(name, None)
        if gone is not None:
            self._size -= gone.route.size


def cells_of(ids: Ids, starts: Iterable[bytes], ends: Iterable[bytes]) -> Ids:
    """What the KV cache holds of new columns `[batch, seq, CELLS]`: ids, and names of the prefixes around them.

    The last column names the prefix that ends with it; the first of several names the one before it, from which a
    sequence is read on that is cropped in between.
    """
    cells = numpy.zeros((*ids.shape, CELLS), numpy.int32)
    cells[..., 0] = ids
    cells[:, 0, 1:] = _numbers(starts)
    cells[:, -1, 1:] = _numbers(ends)
    return cells


def _numbers(names: Iterable[bytes]) -> Ids:
    """Names as numbers `[names, CELLS - 1]`."""
    return numpy.frombuffer(b"".join(names), "<i4").reshape(-1, CELLS - 1)
