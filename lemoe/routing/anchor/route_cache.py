"""A cache of routes by the prefix that was read: decoding reads each token once, whatever is done to the KV cache.

A prefix's name is a hash over all its tokens, worked out from the name of the shorter prefix and the tokens since. It
is stored beside the tokens, and what the base model makes of them, in cells that travel with the model's KV cache,
which beams, repeated rows, cropping and copies may reorder: the names there tell which prefix each sequence has. A
prefix that was evicted is read again from its tokens.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import numpy
from numpy.typing import NDArray

from lemoe.routing.anchor.gate import Gate
from lemoe.routing.anchor.meaning import Vector
from lemoe.routing.anchor.route import SHUT, GateState, Route

PADDING = -1  # in place of the id of a padding token
NAME_BYTES = 16  # bytes of a name: that two of 10^12 prefixes share one has a probability of 10^-15
NAMED_CELLS = 1 + NAME_BYTES // 4  # numbers that a column is remembered by: its token, and a name, zeros for none
EMPTY_NAME = bytes(NAME_BYTES)

Ids = NDArray[numpy.int32]


class Past(Protocol):
    """The cells of a sequence's columns: an array `[columns, cells]`, or what becomes one when it is needed."""

    def __len__(self) -> int: ...
    def __getitem__(self, column: int, /) -> Ids: ...
    def __array__(self, dtype: Any = None, /) -> Ids: ...


@dataclass(slots=True)
class RoutedPrefix:
    """A prefix that was read: its route, its name, its columns, padding included, and what it takes once stored."""

    route: Route
    name: bytes = EMPTY_NAME
    columns: int = 0
    size: int = 0

    def copy(self) -> "RoutedPrefix":
        """The same prefix, independent of this one."""
        return RoutedPrefix(self.route.copy(), self.name, self.columns)

    def read(self, ids: Ids, projected: Vector | None = None) -> list[GateState]:
        """Read further columns `[seq]`, with their projection `[seq, rank]`; returns the gate's state after each.

        It is shut on padding.
        """
        if not len(ids):
            return []
        self.name = blake2b(self.name + ids.astype("<i4").tobytes(), digest_size=NAME_BYTES).digest()
        self.columns += len(ids)
        rows = [None] * len(ids) if projected is None else projected
        return [
            self.route.push(token, row) if token != PADDING else SHUT
            for token, row in zip(ids.tolist(), rows, strict=True)
        ]


class RouteCache:
    """A least-recently-used cache of prefixes with at most `max_bytes`; those of the last call always stay."""

    def __init__(self, gate: Gate, max_bytes: int):
        self._gate = gate
        self.max_bytes = max_bytes
        self._prefixes: OrderedDict[bytes, RoutedPrefix] = OrderedDict()
        self._size = 0

    def resume(self, past: Past | None) -> RoutedPrefix:
        """The prefix with these cells, read to its end; an empty one if None. Only what is not cached is read again."""
        if past is None or not len(past):
            return RoutedPrefix(Route(self._gate))
        whole = self._find_prefix(past[-1], len(past) - 1)
        if whole is not None and whole.columns == len(past):
            return whole.copy()
        return self._read_again(numpy.asarray(past))

    def _read_again(self, past: Ids) -> RoutedPrefix:
        """The prefix with the cells `past` `[columns, cells]`, read on from the longest that is cached."""
        named = numpy.flatnonzero(past[:, 1:NAMED_CELLS].any(1))[::-1].tolist()
        found = (self._find_prefix(past[column], column) for column in named)
        prefix = next((each for each in found if each is not None), None)
        prefix = prefix.copy() if prefix is not None else RoutedPrefix(Route(self._gate))
        rest = past[prefix.columns :]
        prefix.read(rest[:, 0], _projections_of(rest))
        return prefix

    def _find_prefix(self, cells: Ids, column: int) -> RoutedPrefix | None:
        """The cached prefix that a column names: the one that ends with it, or the one that ends before it.

        Where columns were cut in front of it, it names no prefix of what is left.
        """
        stored = cells[1:NAMED_CELLS].astype("<i4")
        for name, columns in ((stored.tobytes(), column + 1), ((~stored).tobytes(), column)):
            found = self._prefixes.get(name)
            if found is not None and found.columns == columns:
                self._prefixes.move_to_end(name)
                return found
        return None

    def store(self, prefixes: Iterable[RoutedPrefix]) -> None:
        """Cache these, and evict others as `max_bytes` requires."""
        new_names = set()
        for prefix in prefixes:
            self._evict_prefix(prefix.name)
            self._prefixes[prefix.name] = prefix
            prefix.size = prefix.route.byte_size
            self._size += prefix.size
            new_names.add(prefix.name)
        while self._size > self.max_bytes and (oldest := next(iter(self._prefixes))) not in new_names:
            self._evict_prefix(oldest)

    def _evict_prefix(self, name: bytes) -> None:
        evicted = self._prefixes.pop(name, None)
        if evicted is not None:
            self._size -= evicted.size


def _projections_of(cells: Ids) -> Vector | None:
    """The projections `[columns, rank]` that cells hold; None if meaning does not count."""
    if cells.shape[1] == NAMED_CELLS:
        return None
    return numpy.ascontiguousarray(cells[:, NAMED_CELLS:]).view(numpy.float32)


def build_cells(ids: Ids) -> Ids:
    """The cells of columns `[..., NAMED_CELLS]` with these `ids` `[...]`, without names."""
    cells = numpy.zeros((*ids.shape, NAMED_CELLS), numpy.int32)
    cells[..., 0] = ids
    return cells


def join_projections(cells: Ids, projected: Vector | None) -> Ids:
    """These cells and their projections `[..., rank]`, if any, bit by bit in integers, so that nothing rounds them."""
    return cells if projected is None else numpy.concatenate([cells, projected.view(numpy.int32)], axis=-1)


def name_cells(cells: Ids, starts: Iterable[bytes], ends: Iterable[bytes]) -> None:
    """Put names into the cells of new columns `[batch, seq, cells]`.

    The last column names the prefix that ends with it; the first of several names, with all bits inverted, the prefix
    before it, from which a sequence that is cropped in between is read again.
    """
    cells[:, 0, 1:NAMED_CELLS] = ~_names_to_cells(starts)
    cells[:, -1, 1:NAMED_CELLS] = _names_to_cells(ends)


def _names_to_cells(names: Iterable[bytes]) -> Ids:
    """Names as int32 `[names, NAMED_CELLS - 1]`."""
    return numpy.frombuffer(b"".join(names), "<i4").reshape(-1, NAMED_CELLS - 1)
