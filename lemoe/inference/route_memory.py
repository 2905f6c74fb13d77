"""What routes remember of a sequence travels with its KV cache: reordered, repeated, cropped and copied as that is.

A cache that was filled with an adaptor gets a class of its own, which does to the memory what is done to the cache.
Nothing is added to the cache's layers, of whose kinds `generate` makes its choices.
"""

import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from lemoe.errors import AdaptorError


class RouteMemory:
    """What the router remembers of each position, `[batch, past, k]`.

    Attributes:
        owner: the adaptor that the cache was filled with; a weak reference.
    """

    def __init__(self, owner: object, cells: Tensor):
        self.owner = weakref.ref(owner)
        self._buffer = cells.contiguous()
        self._length = cells.shape[1]

    @property
    def cells(self) -> Tensor:
        return self._buffer[:, : self._length]

    def append(self, cells: Tensor) -> None:
        """Add further positions `[batch, seq, k]`; each is copied a few times at most, however long a text gets."""
        start, self._length = self._length, self._length + cells.shape[1]
        if self._length > self._buffer.shape[1]:
            room = cells.new_zeros(cells.shape[0], self._length, cells.shape[2])
            self._buffer = torch.cat([self._buffer[:, :start], cells, room], dim=1)
        else:
            self._buffer[:, start : self._length] = cells

    def crop(self, length: int) -> None:
        """Forget what lies behind the first `length` positions."""
        self._length = min(self._length, length)

    def select(self, rows: Tensor) -> None:
        """Keep these rows `[batch]`, in this order."""
        self._buffer = self.cells[rows.to(self._buffer.device)]

    def repeat(self, times: int) -> None:
        """Repeat each row."""
        self._buffer = self.cells.repeat_interleave(times, dim=0)

    def check(self, owner: object, rows: int, length: int | None) -> None:
        """Check that a cache of so many rows and positions (None: not known) was filled with this memory's adaptor.

        Raises:
            AdaptorError: if not.
        """
        if self.owner() is not owner:
            raise AdaptorError("this KV cache was filled with another adaptor; start it anew with this one")
        length = self._length if length is None else length
        if (len(self._buffer), self._length) != (rows, length):
            raise AdaptorError(
                f"this KV cache holds {rows:,} x {length:,} positions, of which the adaptor read "
                f"{len(self._buffer):,} x {self._length:,}; start it anew with the adaptor inserted"
            )


class _RoutedCache(Cache):
    """Mixed into the class of a cache that has a `RouteMemory`."""

    _lemoe_routes: RouteMemory | None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self._lemoe_routes is not None:
            self._lemoe_routes.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self._lemoe_routes is not None:
            self._lemoe_routes.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._lemoe_routes is not None:
            self._lemoe_routes.repeat(repeats)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        length = cached_length(self)
        if self._lemoe_routes is not None and length is None:
            raise AdaptorError("this KV cache does not count its positions, and cannot be cropped with edits at work")
        if self._lemoe_routes is not None and length is not None:
            self._lemoe_routes.crop(length)

    def reset(self) -> None:
        super().reset()
        self._lemoe_routes = None


_routed_classes: dict[type[Cache], type[Cache]] = {}


def _routed_class(kind: type[Cache]) -> type[Cache]:
    """The class of a cache of this `kind` that has a memory."""
    if kind not in _routed_classes:
        _routed_classes[kind] = type(f"Routed{kind.__name__}", (_RoutedCache, kind), {})
    return _routed_classes[kind]


def memory_of(cache: Cache) -> RouteMemory | None:
    """The memory that travels with a cache, if it has one."""
    return cache._lemoe_routes if isinstance(cache, _RoutedCache) else None


def remember(cache: Cache, owner: object, cells: Tensor) -> None:
    """Add what the router of `owner` remembers of new positions, `[batch, seq, k]`, to a cache's memory."""
    memory = memory_of(cache)
    if memory is not None:
        memory.append(cells)
        return
    if not isinstance(cache, _RoutedCache):
        cache.__class__ = _routed_class(type(cache))
    assert isinstance(cache, _RoutedCache)
    cache._lemoe_routes = RouteMemory(owner, cells)


def cached_length(cache: Cache) -> int | None:
    """How many positions a cache holds, dropped ones of a sliding window included; None if no layer counts them."""
    with suppress(ValueError):
        return int(cache.get_seq_length())
    return None
