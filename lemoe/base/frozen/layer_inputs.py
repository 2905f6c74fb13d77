"""The hidden states with which texts enter a decoder layer: a pass that ends there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lemoe.base.frozen.prefix_pass import StopForward, lay_out_trees
from lemoe.base.hooks import hidden_argument, removed_on_exit
from lemoe.base.loading import BaseModel


@torch.no_grad()
def read_layer_inputs(
    base: BaseModel,
    layer: int,
    texts: Sequence[Sequence[int]],
    max_tokens: int,
    groups: Sequence[int] | None = None,
) -> list[Tensor]:
    """The hidden states `[tokens, hidden]` of each of `texts` (token ids) that enter decoder layer `layer`, in float32.

    Texts with a common prefix share its computation.

    Args:
        max_tokens: padded tokens that run through the model at once.
        groups: one number per text. The states of a text then depend on its group alone, bit for bit on a CPU in
            float32, however many other texts share the batch.
    """
    layout = lay_out_trees(base, [tuple(text) for text in texts], max_tokens, groups)
    seen: list[Tensor] = []

    def record_and_stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(hidden_argument(args, kwargs))
        raise StopForward

    states: dict[int, Tensor] = {}
    with removed_on_exit([base.layers[layer].register_forward_pre_hook(record_and_stop, with_kwargs=True)]):
        for members, rows in layout.batch_rows(base):
            rows.run(base)
            entered = seen.pop().to(base.device).float().reshape(*rows.real.shape, -1)
            states.update(zip(members, entered, strict=True))
    return [states[tree][torch.tensor(nodes, device=base.device)] for tree, nodes in layout.forest.locations]
