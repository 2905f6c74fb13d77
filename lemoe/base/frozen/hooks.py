"""Letting modules of the frozen model run in part, or not at all, while a context is open."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lemoe.base.head import replaced_forward
from lemoe.base.hooks import Site, hooked
from lemoe.base.placement import taken


def only_at(site: Site, places: Tensor) -> AbstractContextManager[None]:
    """While open, the FFN at `site` runs at `places` `[n]` of all positions, row after row, and gives 0 elsewhere."""
    shapes: list[torch.Size] = []

    def entry(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes.append(args[0].shape)
        return (taken(args[0].reshape(-1, args[0].shape[-1]), places), *args[1:])

    def exit_(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        shape = shapes.pop()
        everywhere = output.new_zeros(shape.numel() // shape[-1], output.shape[-1])
        return everywhere.index_put((places.to(output.device),), output).reshape(*shape[:-1], output.shape[-1])

    return hooked(site, entry, exit_)


def standing_in(layers: Sequence[nn.Module], given: Any) -> AbstractContextManager[None]:
    """While open, `layers` do nothing but give `given`."""
    return replaced_forward(layers, lambda *args, **kwargs: given)
