"""The hidden states with which texts enter a decoder layer: a pass that ends there."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lemoe.base.frozen.prefix_pass import StopForward, forward_decoder, keeps_only_keys_values, supports_token_trees
from lemoe.base.frozen.token_trees import TokenForest, TreeBatch
from lemoe.base.hooks import hidden_argument, removed_on_exit
from lemoe.base.loading import BaseModel
from lemoe.base.tokens import batch_invariant_width, length_buckets


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
    longest = max(map(len, texts), default=0)
    shared = keeps_only_keys_values(base) and supports_token_trees(base, longest)
    forest = TokenForest.from_texts([tuple(text) for text in texts], shared, groups)
    widths = [len(tree) for tree in forest.trees]
    if groups is not None:
        widths = [batch_invariant_width(width, None if shared else base.max_length) for width in widths]
    states: dict[int, Tensor] = {}
    for members in length_buckets(widths, max_tokens):
        width = max(widths[tree] for tree in members)
        rows = TreeBatch.from_trees([forest.trees[tree] for tree in members], base.pad_token_id, base.device, width)
        if shared:
            inputs = {"attention_mask": rows.attention_mask(base.dtype), "position_ids": rows.positions}
        else:
            sizes = torch.tensor([len(forest.trees[tree]) for tree in members], device=base.device)
            inputs = {"attention_mask": (torch.arange(width, device=base.device) < sizes.unsqueeze(1)).long()}
        entered = _run_until(base, base.layers[layer], input_ids=rows.ids, **inputs)
        entered = entered.to(base.device).float().reshape(*rows.ids.shape, -1)
        states.update(zip(members, entered, strict=True))
    return [states[tree][torch.tensor(nodes, device=base.device)] for tree, nodes in forest.locations]


def _run_until(base: BaseModel, layer: nn.Module, **inputs: Tensor) -> Tensor:
    """What enters `layer` in a forward pass, which ends there."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(hidden_argument(args, kwargs))
        raise StopForward

    with removed_on_exit([layer.register_forward_pre_hook(stop, with_kwargs=True)]), suppress(StopForward):
        forward_decoder(base, **inputs)
    return seen[0]
