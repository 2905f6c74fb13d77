"""Hooks around the FFN of a frozen model, each a context manager that removes them on exit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Delta = Callable[[Tensor], Tensor | None]
Function = TypeVar("Function", bound=Callable[..., Any])


def not_compiled(function: Function) -> Function:
    """`function`, which `torch.compile` calls as it is: what it does depends on more than tensors."""
    return cast(Function, torch.compiler.disable(function))


@dataclass(frozen=True)
class Site:
    """The modules around an FFN: `entry` receives its input, `exit` is the layer, which returns the residual stream.

    Deltas are added to the layer's output, since layers scale, gate or normalise what their FFN gives.
    """

    entry: nn.Module
    exit: nn.Module
    activation: nn.Module


def added_to_residual(site: Site, delta: Delta) -> AbstractContextManager[None]:
    """While open, `delta(FFN input)` is added to the residual stream after the FFN at `site`.

    `delta` gets the FFN input `[..., hidden]` and returns a tensor of that shape, on any device, or None to add
    nothing, in which case the layer's output is the very tensor that the base model returns.
    """
    seen: dict[str, Tensor] = {}

    def record_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["input"] = args[0]

    def add_delta(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if "input" not in seen:
            return None  # the layer did not run: its output is replaced
        change = delta(seen.pop("input"))
        return None if change is None else add_to_output(output, change)

    return hooked_ffn(site, record_input, add_delta)


def add_to_output(output: Any, change: Tensor) -> Any:
    """A layer's output, hidden states alone or first in a tuple, with `change` added to the hidden states."""
    if isinstance(output, tuple):
        return (add_to_output(output[0], change), *output[1:])
    return output + change.to(output).reshape(output.shape)


@contextmanager
def hooked_ffn(site: Site, on_entry: Callable[..., Any], on_exit: Callable[..., Any]) -> Iterator[None]:
    """While open, `on_entry` is a forward pre-hook of the FFN's entry, and `on_exit` a forward hook of its exit."""
    with removed_on_exit((site.entry.register_forward_pre_hook(on_entry), site.exit.register_forward_hook(on_exit))):
        yield


@contextmanager
def removed_on_exit(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks of `handles` on exit."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a decoder layer."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
