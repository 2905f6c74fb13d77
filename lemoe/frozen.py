"""What never changes while editing is computed once: the pass through the layers below the edited one.

A forward pass over a batch records the edited layer's FFN input and output, and the arguments (masks, rotary angles)
with which each layer above was called. Replaying those layers from the output plus the experts' delta then costs only
what lies above the edit, and the head runs at target positions alone. Columns before any expert acts keep their keys
and values, so that they are not replayed either; and an opening that all rows share runs once for all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lemoe.errors import ModelError
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
        start: the first column that is kept; the `seq` below are the columns from here.
        inputs: `[batch, seq, hidden]`, the input of the edited FFN.
        output: `[batch, seq, hidden]`, the output of the edited layer.
        calls: the layers above it, ready to be replayed.
        top: the FFN of the last of them, which runs at target positions alone; None where that cannot be.
        base_hidden: `[targets, hidden]`, the base model's last hidden states at the target positions.
        embeddings: `[batch, seq, hidden]`, the output of the embedding layer.
    """

    batch: Batch
    start: int
    inputs: Tensor
    output: Tensor
    calls: tuple[LayerCall, ...]
    top: FFNSite | None
    base_hidden: Tensor
    embeddings: Tensor

    def replay(self, delta: Tensor | None) -> Tensor:
        """Last hidden states `[targets, hidden]` at the target positions, with `delta` `[batch, seq, hidden]` added."""
        if delta is None:
            return self.base_hidden
        hidden = self.output + delta.to(self.output.dtype)
        rows, columns = self.batch.target_rows, self.batch.target_columns - self.start
        for call in self.calls[:-1]:
            hidden = call(hidden)
        with _only_at(self.top, rows * hidden.shape[1] + columns) if self.top else nullcontext():
            for call in self.calls[-1:]:
                hidden = call(hidden)
        return hidden[rows, columns]

    def take(self, rows: Tensor) -> "FrozenBatch":
        """The frozen batch of some of its passages, `rows` `[n]` in ascending order."""
        size = len(self.batch.ids)
        batch, targets = self.batch.take(rows)
        calls = tuple(
            LayerCall(call.layer, _take(call.args, rows, size), _take(call.kwargs, rows, size)) for call in self.calls
        )
        return FrozenBatch(
            batch,
            self.start,
            self.inputs[rows],
            self.output[rows],
            calls,
            self.top,
            self.base_hidden[targets],
            self.embeddings[rows],
        )


def _take(value: Any, rows: Tensor, size: int) -> Any:
    """`rows` of every tensor with a batch dimension of `size` inside nested arguments."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == size > 1 else value
    if isinstance(value, Cache):
        return _constant(value, lambda kept: kept[rows])
    if isinstance(value, (tuple, list)):
        return type(value)(_take(item, rows, size) for item in value)
    if isinstance(value, dict):
        return {name: _take(item, rows, size) for name, item in value.items()}
    return value


@contextmanager
def _hooked(site: FFNSite, entry: Callable[..., Any], exit_: Callable[..., Any]) -> Iterator[None]:
    """While open, `entry` hooks what the FFN at `site` is called with, and `exit_` what it gives."""
    handles = (site.entry.register_forward_pre_hook(entry), site.exit.register_forward_hook(exit_))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _only_at(site: FFNSite, places: Tensor) -> AbstractContextManager[None]:
    """While open, the FFN at `site` runs at `places` `[n]` of all positions, row after row, and gives 0 elsewhere."""
    shapes: list[torch.Size] = []

    def entry(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes.append(args[0].shape)
        return (args[0].reshape(-1, args[0].shape[-1])[places], *args[1:])

    def exit_(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        shape = shapes.pop()
        everywhere = output.new_zeros(shape.numel() // shape[-1], output.shape[-1])
        return everywhere.index_put((places,), output).reshape(*shape[:-1], output.shape[-1])

    return _hooked(site, entry, exit_)


class _ConstantLayer(DynamicLayer):
    """Keys and values `[batch, heads, seq, width]` that come before whatever a layer is called with, each time anew."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def _constant(cache: Cache, part: Callable[[Tensor], Tensor]) -> Cache:
    """A cache that never grows, of a part of each layer's keys and values."""
    constant = DynamicCache()
    for layer in cache.layers:
        kept = _ConstantLayer()
        kept.lazy_initialization(layer.keys, layer.values)
        kept.keys, kept.values = part(layer.keys), part(layer.values)
        constant.layers.append(kept)
    return constant


class _Enough(Exception):
    """Leaves a forward pass early; never seen outside."""


@torch.no_grad()
def freeze(base: BaseModel, site: FFNSite, layer: int, batch: Batch, start: int = 0) -> FrozenBatch:
    """Run the base model once over `batch` and keep what replaying from `layer` needs.

    Args:
        start: the first column at which anything will ever be added; nothing is kept of those before it but the
            keys and values that the layers above attend to.
    """
    cache = _opening(base, batch, start)
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
    _run(base, batch.ids[:, start:], batch.mask, cache, handles)
    output = seen["output"]
    return FrozenBatch(
        batch=batch,
        start=start,
        inputs=seen["inputs"].reshape(output.shape),
        output=output,
        calls=tuple(calls) if cache is None else _behind(cache, start, calls),
        top=_top(base, site, layer) if calls else None,
        base_hidden=seen["last"][batch.target_rows, batch.target_columns - start],
        embeddings=seen["embeddings"],
    )


def _top(base: BaseModel, site: FFNSite, layer: int) -> FFNSite | None:
    """The last layer's FFN, where it stands as the edited one does and all of it reads one module's input."""
    below = site.path.removeprefix(f"{base.layers_path}.{layer}.")
    with suppress(ModelError):
        top = base.site(len(base.layers) - 1, below)
        return top if top.whole or not top.gated else None
    return None


@torch.no_grad()
def ffn_inputs(base: BaseModel, site: FFNSite, batch: Batch, start: int = 0) -> Tensor:
    """`[batch, seq, hidden]`, the input of the FFN at `site` from column `start` on; nothing above it runs."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Enough

    cache = _opening(base, batch, start)
    with suppress(_Enough):
        _run(base, batch.ids[:, start:], batch.mask, cache, [site.entry.register_forward_pre_hook(stop)])
    return seen[0].reshape(len(batch.ids), batch.ids.shape[1] - start, -1)


def _opening(base: BaseModel, batch: Batch, start: int) -> Cache | None:
    """Keys and values of the columns before `start`; those in which all rows are alike run as one row."""
    if not start:
        return None
    cache = DynamicCache()
    alike = _alike(batch, start)
    if alike:
        _run(base, batch.ids[:1, :alike], batch.mask[:1, :alike], cache)
        cache.batch_repeat_interleave(len(batch.ids))
    if alike < start:
        _run(base, batch.ids[:, alike:start], batch.mask[:, :start], cache)
    return cache


def _alike(batch: Batch, start: int) -> int:
    """How many columns, of the first `start`, hold the same token in every row."""
    same = (batch.ids == batch.ids[:1])[:, :start].all(0) & batch.mask[:, :start].bool().all(0)
    return int(same.long().cumprod(0).sum())


def _behind(cache: Cache, start: int, calls: Sequence[LayerCall]) -> tuple[LayerCall, ...]:
    """Calls that read the keys and values of the first `start` columns, and leave them as they are."""
    before = _constant(cache, lambda kept: kept[..., :start, :])

    def swap(value: Any) -> Any:
        return before if isinstance(value, Cache) else value

    return tuple(
        LayerCall(call.layer, tuple(map(swap, call.args)), {name: swap(value) for name, value in call.kwargs.items()})
        for call in calls
    )


def _run(
    base: BaseModel, ids: Tensor, mask: Tensor, cache: Cache | None, handles: Sequence[RemovableHandle] = ()
) -> None:
    """One forward pass over new columns; `mask` covers those in the cache too."""
    try:
        base.decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None)
    finally:
        for handle in handles:
            handle.remove()


def beside(site: FFNSite, delta: Delta) -> AbstractContextManager[None]:
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

    return _hooked(site, entry, exit_)


CALIBRATION = (
    "The river rises in the mountains, runs north for two hundred miles and meets the sea beside an old harbour town.",
    "Who wrote the first book on the subject, and in which year was it printed?",
    "She was born in 1911, studied chemistry, and later led the laboratory that made the discovery.",
    "def area(width, height):\n    return width * height",
    "The company's head office moved from the capital to a smaller city in the south in order to save costs.",
    "Water boils at a lower temperature on a high mountain because the air pressure is lower there.",
)


_scales: "WeakKeyDictionary[BaseModel, dict[int, float]]" = WeakKeyDictionary()


def residual_scale(base: BaseModel, layer: int) -> float:
    """Median RMS of the residual stream where it enters `layer`, over a fixed text; measured once.

    The text is fixed so that the scale depends on the base model alone and rounds stay independent.
    """
    known = _scales.setdefault(base, {})
    if layer not in known:
        known[layer] = _measure_scale(base, layer)
    return known[layer]


@torch.no_grad()
def _measure_scale(base: BaseModel, layer: int) -> float:
    levels = []
    for text in CALIBRATION:
        ids = torch.tensor([base.tokenizer(text).input_ids or [base.end_token]], device=base.device)
        hidden = base.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[layer]
        levels.append(hidden.float().pow(2).mean(-1).sqrt().flatten())
    return float(torch.cat(levels).median())
