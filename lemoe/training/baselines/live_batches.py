"""Batches for training layers whose weights change: layers before them run once, they and later ones at each step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemoe.base.equality import TensorEquality
from lemoe.base.frozen.replay import LayerCall
from lemoe.base.hooks import removed_on_exit
from lemoe.base.loading import BaseModel
from lemoe.base.placement import index_on_device
from lemoe.base.tokens import Batch, Passage, length_buckets


@dataclass(frozen=True, eq=False)
class LiveBatch(TensorEquality):
    """A batch of texts, run up to the first layer that changes.

    Attributes:
        hidden: `[batch, seq, hidden]`, the input of that layer.
        calls: that layer and the later ones, with their other arguments.
    """

    batch: Batch
    hidden: Tensor
    calls: tuple[LayerCall, ...]

    def run(self) -> Tensor:
        """Last hidden states `[targets, hidden]` at the target positions, by the layers' current weights."""
        hidden = self.hidden
        for call in self.calls:
            hidden = call(hidden)
        rows, columns = self.batch.target_rows, self.batch.target_columns
        return index_on_device(hidden, rows, columns).to(rows.device)

    def by_text(self, values: Tensor) -> Tensor:
        """`[batch, seq, features]`, of a module's values of all tokens; OPT joins texts for its FFN."""
        return values.reshape(*self.hidden.shape[:2], -1)


def live_batches(base: BaseModel, layer: int, passages: Sequence[Passage], max_tokens: int) -> list[LiveBatch]:
    """Batches of `passages`, run up to decoder layer `layer`, of at most `max_tokens` padded tokens each."""
    buckets = length_buckets([len(passage.input_ids) for passage in passages], max_tokens)
    return [
        _record_batch(base, layer, Batch.from_passages(passages, rows, base.pad_token_id, base.device))
        for rows in buckets
    ]


@torch.no_grad()
def _record_batch(base: BaseModel, layer: int, batch: Batch) -> LiveBatch:
    calls: list[LayerCall] = []
    inputs: list[Tensor] = []

    def record_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *rest = args or (kwargs["hidden_states"],)
        inputs.append(hidden)
        calls.append(LayerCall(module, tuple(rest), {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    with removed_on_exit(
        [each.register_forward_pre_hook(record_call, with_kwargs=True) for each in base.layers[layer:]]
    ):
        base.decoder(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return LiveBatch(batch, inputs[0], tuple(calls))


def live_losses(base: BaseModel, batches: Sequence[LiveBatch]) -> Iterator[Tensor]:
    """The parts, one per batch, of the mean cross entropy (nats) of the target tokens."""
    targets = sum(len(live.batch.labels) for live in batches)
    for live in batches:
        logits = base.logits(live.run()).float()
        yield functional.cross_entropy(logits, live.batch.labels, reduction="sum") / targets
