"""What never changes while editing is computed once: the pass through the layers below the edited one.

A forward pass over a batch records the edited layer's FFN input and output, and the arguments (masks, rotary angles)
with which each layer above was called. Replaying those layers from the output plus the experts' delta then costs only
what lies above the edit, and the head runs at target positions alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lemoe.models import BaseModel
from lemoe.structure import FFNSite
from lemoe.tokens import Batch

Delta = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class LayerCall:
    """One decoder layer with the arguments, besides hidden states, of a recorded call."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, hidden: Tensor) -> Tensor:
        output = self.layer(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


@dataclass(frozen=True)
class FrozenBatch:
    """A batch after the frozen pass.

    What the edited FFN gives is added to the residual stream, so that the edited layer's new output is its old one
    plus the experts' delta: that layer need not run again either.

    Attributes:
        batch: what was run.
        inputs: `[batch, seq, hidden]`, the input of the edited FFN.
        output: `[batch, seq, hidden]`, the output of the edited layer.
        calls: the layers above it, ready to be replayed.
        base_hidden: `[targets, hidden]`, the base model's last hidden states at the target positions.
        embeddings: `[batch, seq, hidden]`, the output of the embedding layer.
    """

    batch: Batch
    inputs: Tensor
    output: Tensor
    calls: tuple[LayerCall, ...]
    base_hidden: Tensor
    embeddings: Tensor

    def replay(self, delta: Tensor | None) -> Tensor:
        """Last hidden states `[targets, hidden]` at the target positions, with `delta` `[batch, seq, hidden]` added."""
        if delta is None:
            return self.base_hidden
        hidden = self.output + delta.to(self.output.dtype)
        for call in self.calls:
            hidden = call(hidden)
        return hidden[self.batch.target_rows, self.batch.target_columns]

    def take(self, rows: Tensor) -> "FrozenBatch":
        """The frozen batch of some of its passages, `rows` `[n]` in ascending order."""
        size = len(self.batch.ids)
        batch, targets = self.batch.take(rows)
        calls = tuple(
            LayerCall(call.layer, _take(call.args, rows, size), _take(call.kwargs, rows, size)) for call in self.calls
        )
        return FrozenBatch(
            batch, self.inputs[rows], self.output[rows], calls, self.base_hidden[targets], self.embeddings[rows]
        )


def _take(value: Any, rows: Tensor, size: int) -> Any:
    """`rows` of every tensor with a batch dimension of `size` inside nested arguments."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == size > 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_take(item, rows, size) for item in value)
    if isinstance(value, dict):
        return {name: _take(item, rows, size) for name, item in value.items()}
    return value


class _Enough(Exception):
    """Leaves a forward pass early; never seen outside."""


@torch.no_grad()
def freeze(base: BaseModel, site: FFNSite, layer: int, batch: Batch) -> FrozenBatch:
    """Run the base model once over `batch` and keep what replaying from `layer` needs."""
    calls: list[LayerCall] = []
    seen: dict[str, Tensor] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = args[1:] if args else ()
        calls.append(LayerCall(module, rest, {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in base.layers[layer + 1 :]]
    handles += [
        site.entry.register_forward_pre_hook(lambda module, args: seen.update(inputs=args[0])),
        base.layers[layer].register_forward_hook(keep("output")),
        base.layers[-1].register_forward_hook(keep("last")),
        base.embedding.register_forward_hook(keep("embeddings")),
    ]
    _run(base, batch, handles)
    output = seen["output"]
    base_hidden = seen["last"][batch.target_rows, batch.target_columns]
    return FrozenBatch(
        batch, seen["inputs"].reshape(output.shape), output, tuple(calls), base_hidden, seen["embeddings"]
    )


@torch.no_grad()
def ffn_inputs(base: BaseModel, site: FFNSite, batch: Batch) -> Tensor:
    """`[batch, seq, hidden]`, the input of the FFN at `site`; nothing above it runs."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Enough

    with suppress(_Enough):
        _run(base, batch, [site.entry.register_forward_pre_hook(stop)])
    return seen[0].reshape(*batch.ids.shape, -1)


def _run(base: BaseModel, batch: Batch, handles: Sequence[RemovableHandle]) -> None:
    try:
        base.decoder(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def beside(site: FFNSite, delta: Delta) -> Iterator[None]:
    """While open, `delta(FFN input)` is added to what the FFN at `site` gives.

    `delta` gets the FFN input `[..., hidden]` and returns a tensor of that shape, or None for nothing to add, in
    which case the FFN's output is the very tensor that the base model gives.
    """
    seen: dict[str, Tensor] = {}

    def entry(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["input"] = args[0]

    def exit_(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        change = delta(seen.pop("input"))
        return None if change is None else output + change.to(output.dtype)

    handles = (site.entry.register_forward_pre_hook(entry), site.exit.register_forward_hook(exit_))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


CALIBRATION = (
    "The river rises in the mountains, runs north for two hundred miles and meets the sea beside an old harbour town.",
    "Who wrote the first book on the subject, and in which year was it printed?",
    "She was born in 1911, studied chemistry, and later led the laboratory that made the discovery.",
    "def area(width, height):\n    return width * height",
    "The company's head office moved from the capital to a smaller city in the south in order to save costs.",
    "Water boils at a lower temperature on a high mountain because the air pressure is lower there.",
)


@torch.no_grad()
def residual_scale(base: BaseModel, layer: int) -> float:
    """Median RMS of the residual stream where it enters `layer`, over a fixed text.

    The text is fixed so that the scale depends on the base model alone and rounds stay independent.
    """
    levels = []
    for text in CALIBRATION:
        ids = torch.tensor([base.tokenizer(text).input_ids or [base.end_token]], device=base.device)
        hidden = base.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[layer]
        levels.append(hidden.float().pow(2).mean(-1).sqrt().flatten())
    return float(torch.cat(levels).median())
