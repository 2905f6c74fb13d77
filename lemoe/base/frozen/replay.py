"""Running again, and again, what lies above the edited layer.

Replaying the layers above from the edited layer's output plus the experts' delta costs only what lies above the edit,
and the head runs at target positions alone. Columns before any expert acts keep their keys and values, so that they
are not replayed either.
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
from lemoe.base.frozen.hooks import only_at
from lemoe.base.placement import is_offloaded, taken
from lemoe.base.structure import FFNSite
from lemoe.base.tokens import Batch

Within = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class LayerCall(TensorEquality):
    """One decoder layer with the arguments, besides hidden states, of a recorded call."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, hidden: Tensor, within: Within = nullcontext) -> Tensor:
        """Run the layer, inside a context if given.

        The weights of an offloaded layer are not kept for the backward pass, in which it runs again.
        """
        if not (hidden.requires_grad and is_offloaded(self.layer)):
            return self._run(hidden, within)
        with set_checkpoint_early_stop(False):  # the layer comes to its end, where its weights leave again
            again: Tensor = checkpoint(self._run, hidden, within, use_reentrant=False, preserve_rng_state=False)
            return again

    def _run(self, hidden: Tensor, within: Within) -> Tensor:
        with within():
            return hidden_of(self.layer(hidden, *self.args, **self.kwargs))


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a layer gives."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@dataclass(frozen=True, eq=False)
class FrozenBatch(TensorEquality):
    """A batch after the frozen pass.

    What the edited FFN gives is added to the residual stream, so that the edited layer's new output is its old one
    plus the experts' delta: that layer need not run again either.

    All of it is on the base's device; the layers above may be on others.

    Attributes:
        batch: what was run.
        start: the first column at which anything is added; the `seq` below are the columns from here.
        first: the first column that runs again, up to `start`.
        inputs: `[batch, seq, hidden]`, the input of the edited FFN.
        output: `[batch, columns, hidden]`, the output of the edited layer from column `first` on.
        calls: the layers above it, ready to be replayed.
        top: the FFN of the last of them, which runs at target positions alone; None where that cannot be.
        embeddings: `[batch, seq, hidden]`, the output of the embedding layer.
    """

    batch: Batch
    start: int
    first: int
    inputs: Tensor
    output: Tensor
    calls: tuple[LayerCall, ...]
    top: FFNSite | None
    embeddings: Tensor

    @cached_property
    def base_hidden(self) -> Tensor:
        """`[targets, hidden]`, the base model's last hidden states at the target positions."""
        return self._above(self.output)

    def replay(self, delta: Tensor | None) -> Tensor:
        """Last hidden states `[targets, hidden]` at the target positions, with `delta` `[batch, seq, hidden]` added."""
        if delta is None:
            return self.base_hidden
        everywhere = functional.pad(delta, (0, 0, self.start - self.first, 0))
        return self._above(self.output + everywhere.to(self.output.dtype))

    def _above(self, hidden: Tensor) -> Tensor:
        rows, columns = self.batch.target_rows, self.batch.target_columns - self.first
        for call in self.calls[:-1]:
            hidden = call(hidden)
        at_targets = partial(only_at, self.top, rows * hidden.shape[1] + columns) if self.top else nullcontext
        for call in self.calls[-1:]:
            hidden = call(hidden, at_targets)
        return taken(hidden, rows, columns).to(rows.device)


class _ConstantLayer(DynamicLayer):
    """Keys and values `[batch, heads, seq, width]` that come before whatever a layer is called with, each time anew."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def constant_cache(layers: Sequence[tuple[Tensor, Tensor]]) -> Cache:
    """A cache that never grows, of each layer's keys and values `[batch, heads, seq, width]`."""
    cache = DynamicCache()
    cache.layers = [_ConstantLayer(keys, values) for keys, values in layers]
    return cache
