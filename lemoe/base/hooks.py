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
    """Where an FFN stands: `entry` receives its input, and `exit` is the layer, which returns the residual stream.

    What is added is added there, since layers scale, gate or normalise what their FFN gives.
    """

    entry: nn.Module
    exit: nn.Module
    activation: nn.Module


def beside(site: Site, delta: Delta) -> AbstractContextManager[None]:
    """While open, `delta(FFN input)` is added to the residual stream behind the FFN at `site`.

    `delta` gets the FFN input `[..., hidden]` and returns a tensor of that shape, on any device, or None for nothing
    to add, in which case the layer's output is the very tensor that the base model gives.
    """
    seen: dict[str, Tensor] = {}

    def entry(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["input"] = args[0]

    def exit_(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if "input" not in seen:
            return None  # something else stands in for the layer
        change = delta(seen.pop("input"))
        return None if change is None else _added(output, change)

    return hooked(site, entry, exit_)


def _added(output: Any, change: Tensor) -> Any:
    """What a layer gives, hidden states alone or before others, with `change` added to the hidden states."""
    if isinstance(output, tuple):
        return (_added(output[0], change), *output[1:])
    return output + change.to(output).reshape(output.shape)


@contextmanager
def hooked(site: Site, entry: Callable[..., Any], exit_: Callable[..., Any]) -> Iterator[None]:
    """While open, `entry` hooks what the entry of `site` is called with, and `exit_` what its exit gives."""
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
