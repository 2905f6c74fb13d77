"""Texts on their way into layers whose weights change: what lies below is run once, what lies above again and again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemoe.base.equality import TensorEquality
from lemoe.base.frozen.replay import LayerCall
from lemoe.base.hooks import released
from lemoe.base.loading import BaseModel
from lemoe.base.placement import taken
from lemoe.base.tokens import Batch, Passage, length_buckets


@dataclass(frozen=True, eq=False)
class LiveBatch(TensorEquality):
    """A batch of texts that stands before the first layer that changes.

    Attributes:
        hidden: `[batch, seq, hidden]`, what that layer reads.
        calls: it and the layers above, with all else that they are called with.
    """

    batch: Batch
    hidden: Tensor
    calls: tuple[LayerCall, ...]

    def run(self) -> Tensor:
        """Last hidden states `[targets, hidden]` at the target positions, by the layers as they are now."""
        hidden = self.hidden
        for call in self.calls:
            hidden = call(hidden)
        rows, columns = self.batch.target_rows, self.batch.target_columns
        return taken(hidden, rows, columns).to(rows.device)


def live_batches(base: BaseModel, layer: int, passages: Sequence[Passage], max_tokens: int) -> list[LiveBatch]:
    """Batches of `passages` before decoder layer `layer`, of at most `max_tokens` padded tokens each."""
    buckets = length_buckets([len(passage.read) for passage in passages], max_tokens)
    return [_recorded(base, layer, Batch.of(passages, rows, base.pad_token, base.device)) for rows in buckets]


@torch.no_grad()
def _recorded(base: BaseModel, layer: int, batch: Batch) -> LiveBatch:
    calls: list[LayerCall] = []
    entering: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *rest = args or (kwargs["hidden_states"],)
        entering.append(hidden)
        calls.append(LayerCall(module, tuple(rest), {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    with released([each.register_forward_pre_hook(record, with_kwargs=True) for each in base.layers[layer:]]):
        base.decoder(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return LiveBatch(batch, entering[0], tuple(calls))


def live_losses(base: BaseModel, batches: Sequence[LiveBatch]) -> Iterator[Tensor]:
    """The parts, one a batch, of the mean cross entropy (nats) of the target tokens."""
    targets = sum(len(live.batch.labels) for live in batches)
    for live in batches:
        logits = base.logits(live.run()).float()
        yield functional.cross_entropy(logits, live.batch.labels, reduction="sum") / targets
