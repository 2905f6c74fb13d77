"""Hooks around modules of the frozen model, each a context that leaves nothing behind."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lemoe.structure import FFNSite

Delta = Callable[[Tensor], Tensor | None]


def beside(site: FFNSite, delta: Delta) -> AbstractContextManager[None]:
    """While open, `delta(FFN input)` is added to what the FFN at `site` gives.

    `delta` gets the FFN input `[..., hidden]` and returns a tensor of that shape, or None for nothing to add, in
    which case the FFN's output is the very tensor that the base model gives.
    """
    seen: dict[str, Tensor] = {}

    def entry(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["input"] = args[0]

    def exit_(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        change = delta(seen.pop("input"))
        return None if change is None else output + change.to(output.dtype)

    return _hooked(site, entry, exit_)


def only_at(site: FFNSite, places: Tensor) -> AbstractContextManager[None]:
    """While open, the FFN at `site` runs at `places` `[n]` of all positions, row after row, and gives 0 elsewhere."""
    shapes: list[torch.Size] = []

    def entry(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes.append(args[0].shape)
        return (args[0].reshape(-1, args[0].shape[-1])[places], *args[1:])

    def exit_(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        shape = shapes.pop()
        everywhere = output.new_zeros(shape.numel() // shape[-1], output.shape[-1])
        return everywhere.index_put((places,), output).reshape(*shape[:-1], output.shape[-1])

    return _hooked(site, entry, exit_)


@contextmanager
def _hooked(site: FFNSite, entry: Callable[..., Any], exit_: Callable[..., Any]) -> Iterator[None]:
    """While open, `entry` hooks what the FFN at `site` is called with, and `exit_` what it gives."""
    with released((site.entry.register_forward_pre_hook(entry), site.exit.register_forward_hook(exit_))):
        yield


@contextmanager
def released(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks when done."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def standing_in(layers: Sequence[nn.Module], given: Any) -> Iterator[None]:
    """While open, `layers` do nothing but give `given`."""
    before = [module.__dict__.get("forward") for module in layers]
    for module in layers:
        module.__dict__["forward"] = lambda *args, **kwargs: given
    try:
        yield
    finally:
        for module, forward in zip(layers, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward
