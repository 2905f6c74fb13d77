"""Replaying the layers above the edited one, once per training step.

They start from the edited layer's output plus the experts' delta, so that no layer below runs again, and the head runs
at target positions alone. Columns before any expert acts keep their keys and values and are not replayed either.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import Cache, DynamicCache, DynamicLayer

from lemoe.base.equality import TensorEquality
from lemoe.base.frozen.hooks import ffn_at_positions
from lemoe.base.placement import index_on_device, is_offloaded
from lemoe.base.structure import FFNSite
from lemoe.base.tokens import Batch

ContextFactory = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class LayerCall(TensorEquality):
    """One decoder layer with the arguments, besides hidden states, of a recorded call."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, hidden: Tensor, context: ContextFactory = nullcontext) -> Tensor:
        """Run the layer, inside `context()` if given.

        An offloaded layer is checkpointed: it runs again in the backward pass, so that its weights need not stay.
        """
        if not (hidden.requires_grad and is_offloaded(self.layer)):
            return self._call_layer(hidden, context)
        with set_checkpoint_early_stop(False):  # a layer that runs to its end offloads its weights again
            output: Tensor = checkpoint(
                self._call_layer, hidden, context, use_reentrant=False, preserve_rng_state=False
            )
            return output

    def _call_layer(self, hidden: Tensor, context: ContextFactory) -> Tensor:
        with context():
            return extract_hidden(self.layer(hidden, *self.args, **self.kwargs))


def extract_hidden(output: Any) -> Tensor:
    """The hidden states in a layer's output, which may be a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@dataclass(frozen=True, eq=False)
class FrozenBatch(TensorEquality):
    """A batch after the prefix pass, ready for replays.

    The edited FFN's output is added to the residual stream, so the edited layer's new output is its old one plus the
    experts' delta: that layer need not run again either.

    All tensors are on the base's device; the layers above may be on others.

    Attributes:
        batch: the tokens.
        start: the first column to which the experts may add; `seq` below counts columns from here.
        first: the first column that is replayed, at most `start`.
        inputs: `[batch, seq, hidden]`, the input of the edited FFN.
        output: `[batch, columns, hidden]`, the output of the edited layer from column `first` on.
        calls: the layers above it with their recorded arguments.
        top: the FFN of the last of them, to run at target positions alone; None where it must run at all.
        embeddings: `[batch, seq, hidden]`, the output of the embedding layer.
    """

    batch: Batch
    start: int
    first: int
    inputs: Tensor
    output: Tensor
    calls: tuple[LayerCall, ...]
    last_ffn: FFNSite | None
    embeddings: Tensor

    @cached_property
    def base_hidden(self) -> Tensor:
        """`[targets, hidden]`, the base model's last hidden states at the target positions."""
        return self._run_layers_above(self.output)

    def replay(self, delta: Tensor | None) -> Tensor:
        """Last hidden states `[targets, hidden]` at the target positions, with `delta` `[batch, seq, hidden]` added."""
        if delta is None:
            return self.base_hidden
        padded = functional.pad(delta, (0, 0, self.start - self.first, 0))
        return self._run_layers_above(self.output + padded.to(self.output.dtype))

    def _run_layers_above(self, hidden: Tensor) -> Tensor:
        rows, columns = self.batch.target_rows, self.batch.target_columns - self.first
        for call in self.calls[:-1]:
            hidden = call(hidden)
        targets = rows * hidden.shape[1] + columns
        at_targets = partial(ffn_at_positions, self.last_ffn, targets) if self.last_ffn else nullcontext
        for call in self.calls[-1:]:
            hidden = call(hidden, at_targets)
        return index_on_device(hidden, rows, columns).to(rows.device)


class _ConstantLayer(DynamicLayer):
    """Keys and values `[batch, heads, seq, width]` that precede those of each call; calls store nothing."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def constant_cache(layers: Sequence[tuple[Tensor, Tensor]]) -> Cache:
    """A cache that never grows, from each layer's keys and values `[batch, heads, seq, width]`."""
    cache = DynamicCache()
    cache.layers = [_ConstantLayer(keys, values) for keys, values in layers]
    return cache
