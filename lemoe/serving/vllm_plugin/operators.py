"""The edits in the layers of a model of vLLM: hooks that call operators, which compiled code calls as they are.

Each operator changes its first argument in place, or could: that keeps them in order, and in the graph.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context

from lemoe.base.structure import find_layers
from lemoe.serving.vllm_plugin.edits import Edits


def _edits(name: str) -> Edits:
    found: Edits = get_forward_context().no_compile_layers[name].edits
    return found


@torch.library.custom_op("lemoe::read_layer", mutates_args=("hidden",))
def read_layer(hidden: Tensor, residual: Tensor | None, name: str) -> None:
    """The gate reads the residual stream `[tokens, hidden]` in front of a layer."""
    _edits(name).read(hidden if residual is None else hidden + residual)


@torch.library.custom_op("lemoe::read_ffn", mutates_args=("inputs",))
def read_ffn(inputs: Tensor, name: str) -> None:
    """The experts read the FFN's input `[tokens, hidden]`."""
    _edits(name).act(inputs)


@torch.library.custom_op("lemoe::add_edits", mutates_args=("hidden",))
def add_edits(hidden: Tensor, name: str) -> None:
    """What the experts answered is added to the residual stream `[tokens, hidden]` behind the layer."""
    _edits(name).add_to(hidden)


@read_layer.register_fake
def _(hidden: Tensor, residual: Tensor | None, name: str) -> None: ...


@read_ffn.register_fake
def _(inputs: Tensor, name: str) -> None: ...


@add_edits.register_fake
def _(hidden: Tensor, name: str) -> None: ...


def hook_layers(model: nn.Module, edits: Edits, ffn_path: str) -> None:
    """Have the gate read the layer that it reads, and the experts act at the layer that they edit."""
    layers = find_layers(model)[2]
    name = edits.name

    def before_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, residual = (kwargs.get(key, args[at] if at < len(args) else None) for key, at in _STREAM)
        read_layer(hidden, residual, name)

    def before_ffn(module: nn.Module, args: tuple[Any, ...]) -> None:
        read_ffn(args[0], name)

    def after_layer(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        add_edits(output[0] if isinstance(output, tuple) else output, name)

    if edits.layer_read is not None:
        layers[edits.layer_read].register_forward_pre_hook(before_layer, with_kwargs=True)
    edited = layers[edits.layer]
    edited.get_submodule(ffn_path).register_forward_pre_hook(before_ffn)
    edited.register_forward_hook(after_layer)


_STREAM = (("hidden_states", 1), ("residual", 2))  # name and place of a layer's arguments that sum to the stream
