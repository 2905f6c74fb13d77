"""Hooks around the FFN of a frozen model, each a context that leaves nothing behind."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Delta = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Site:
    """Where an FFN stands: `entry` receives its input, `exit` returns what is added to the residual stream.

    The two are one module in most families (`mlp`), two in OPT (`fc1`, `fc2`) and in Gemma 2 and 3 (`mlp` and
    the norm behind it).
    """

    entry: nn.Module
    exit: nn.Module
    activation: nn.Module


def beside(site: Site, delta: Delta) -> AbstractContextManager[None]:
    """While open, `delta(FFN input)` is added to what the FFN at `site` gives.

    `delta` gets the FFN input `[..., hidden]` and returns a tensor of that shape, on any device, or None for nothing
    to add, in which case the FFN's output is the very tensor that the base model gives.
    """
    seen: dict[str, Tensor] = {}

    def entry(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["input"] = args[0]

    def exit_(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        change = delta(seen.pop("input"))
        return None if change is None else output + change.to(output)

    return hooked(site, entry, exit_)


@contextmanager
def hooked(site: Site, entry: Callable[..., Any], exit_: Callable[..., Any]) -> Iterator[None]:
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
