"""Experts that stay in their file until a sequence is routed to them, so that an adaptor may be larger than memory.

The least recently used leave memory first. Reading starts when the route is decided, while the layers before the edited
one still run.
"""

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Lock

import torch
from torch import Tensor

from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.adaptor.experts import Activation, Experts
from lemoe.routing.router import Routing

READER_THREADS = 2  # threads


class ExpertCache:
    """An LRU cache of a file's experts, on `device`.

    A batch may be routed to more experts than fit: all of them are in memory while it runs. Threads may share it.
    """

    def __init__(self, file: AdaptorFile, device: torch.device, size: int):
        """Keep up to `size` bytes of the file's experts, and at least one."""
        self._file = file
        self._shapes = file.state.experts
        self._device = device
        self._size = size
        self._kept: OrderedDict[int, Experts] = OrderedDict()
        self._bytes = 0
        self._acting: list[int] = []
        self._coming: dict[int, Future[Experts]] = {}
        self._readers = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="lemoe-experts")
        self._lock = Lock()
        self.reads = 0

    def __len__(self) -> int:
        return len(self._shapes)

    def prefetch(self, routing: Routing) -> None:
        """Start reading the experts that a routing needs."""
        with self._lock:
            for index in _acting_experts(routing.experts):
                if index not in self._kept and index not in self._coming:
                    self._coming[index] = self._readers.submit(self._read_expert, index)

    def delta(self, inputs: Tensor, routing: Routing, activation: Activation) -> Tensor | None:
        """What the routed experts add to the FFN's output; see `Experts.delta`."""
        acting = _acting_experts(routing.experts)
        if not acting:
            return None
        with self._lock:
            stacked = self._stack_experts(acting)
        indices = torch.searchsorted(torch.tensor(acting, device=routing.experts.device), routing.experts.contiguous())
        return stacked.delta(inputs, replace(routing, experts=indices.where(routing.experts >= 0, -1)), activation)

    def _stack_experts(self, acting: list[int]) -> Experts:
        """These experts as one stack, which is reused while a sequence goes on with the same ones."""
        if acting != self._acting:
            self._stack = Experts.stack(self._get_experts(acting))
            self._acting = acting
            self._evict_oldest()
        return self._stack

    def _get_experts(self, wanted: Iterable[int]) -> list[Experts]:
        experts = []
        for index in wanted:
            if index not in self._kept:
                coming = self._coming.pop(index, None)
                self._kept[index] = coming.result() if coming else self._read_expert(index)
                self._bytes += self._kept[index].nbytes
                self.reads += 1
            self._kept.move_to_end(index)
            experts.append(self._kept[index])
        return experts

    def _evict_oldest(self) -> None:
        while self._bytes > self._size and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def _read_expert(self, index: int) -> Experts:
        start, end = int(self._shapes.offsets[index]), int(self._shapes.offsets[index + 1])
        gate = None if self._shapes.gate is None else self._file.read_rows("experts.gate", start, end)
        up, down = (self._file.read_rows(name, start, end) for name in ("experts.up", "experts.down"))
        offsets = torch.tensor([0, end - start])
        return Experts(up, down, gate, offsets, self._shapes.scale[index : index + 1]).to(self._device)


def _acting_experts(experts: Tensor) -> list[int]:
    acting: list[int] = experts[experts >= 0].unique().tolist()
    return acting
