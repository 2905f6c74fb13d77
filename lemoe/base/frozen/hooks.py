"""Context managers in which modules of the frozen model run at some positions only, or not at all."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lemoe.base.head import replaced_forward
from lemoe.base.hooks import Site, hooked_ffn
from lemoe.base.placement import index_on_device


def ffn_at_positions(site: Site, positions: Tensor) -> AbstractContextManager[None]:
    """While open, the FFN at `site` runs at `positions` `[n]` (flat, row by row) only and gives 0 elsewhere."""
    shapes: list[torch.Size] = []

    def select_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes.append(args[0].shape)
        return (index_on_device(args[0].reshape(-1, args[0].shape[-1]), positions), *args[1:])

    def scatter_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        shape = shapes.pop()
        zeros = output.new_zeros(shape.numel() // shape[-1], output.shape[-1])
        return zeros.index_put((positions.to(output.device),), output).reshape(*shape[:-1], output.shape[-1])

    return hooked_ffn(site, select_inputs, scatter_output)


def replaced_outputs(layers: Sequence[nn.Module], output: Any) -> AbstractContextManager[None]:
    """While open, `layers` do not run and return `output`."""
    return replaced_forward(layers, lambda *args, **kwargs: output)
