"""What never changes while editing is computed once: the pass through the layers below the edited one.

A forward pass over a batch records the input of the edited layer and the arguments (masks, rotary angles) with
which each layer from there on was called. Replaying those layers from the recorded input then costs only the
layers above the edit, and the head runs at target positions alone (design note: "Cost").
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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

    Attributes:
        batch: what was run.
        hidden: `[batch, seq, hidden]`, the input of the edited layer.
        calls: the layers from the edited one on, ready to be replayed.
        base_hidden: `[targets, hidden]`, the base model's last hidden states at the target positions.
        embeddings: `[batch, seq, hidden]`, the output of the embedding layer.
    """

    batch: Batch
    hidden: Tensor
    calls: tuple[LayerCall, ...]
    base_hidden: Tensor
    embeddings: Tensor

    def replay(self) -> Tensor:
        """Last hidden states `[targets, hidden]` at the target positions, through whatever stands beside the FFN."""
        hidden = self.hidden
        for call in self.calls:
            hidden = call(hidden)
        return hidden[self.batch.target_rows, self.batch.target_columns]


@torch.no_grad()
def freeze(base: BaseModel, layer: int, batch: Batch) -> FrozenBatch:
    """Run the base model once over `batch` and keep what replaying from `layer` needs."""
    inputs: list[Tensor] = []
    calls: list[LayerCall] = []
    seen: dict[str, Tensor] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        inputs.append(hidden)
        calls.append(LayerCall(module, tuple(rest), kwargs))

    def last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["last"] = output[0] if isinstance(output, tuple) else output

    def embedded(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen["embeddings"] = output

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in base.layers[layer:]]
    handles += [base.layers[-1].register_forward_hook(last), base.embedding.register_forward_hook(embedded)]
    try:
        base.decoder(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    base_hidden = seen["last"][batch.target_rows, batch.target_columns]
    return FrozenBatch(batch, inputs[0], tuple(calls), base_hidden, seen["embeddings"])


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
    encoded = [tuple(base.tokenizer(text).input_ids) for text in CALIBRATION]
    levels = []
    for ids in encoded:
        if not ids:
            continue
        tokens = torch.tensor([ids], device=base.device)
        none = torch.zeros(0, dtype=torch.long, device=base.device)
        batch = Batch((0,), tokens, torch.ones_like(tokens), none, none, none, none)
        hidden = freeze(base, layer, batch).hidden.float()
        levels.append(hidden.pow(2).mean(-1).sqrt().flatten())
    return float(torch.cat(levels).median())
