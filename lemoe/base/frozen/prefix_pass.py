"""The prefix pass: the layers up to the edited one never change during editing, so they run once per text.

1. Texts are laid out as token trees (see `lemoe.base.frozen.token_trees`), so that each distinct prefix runs once.
2. The activations at the edited layer are kept for every token, as `PrefixActivations`.
3. A batch of the texts is frozen from them: the layers above are called once with its tokens, and the arguments of
   those calls (masks, rotary angles) are recorded, so that the layers can be replayed with other hidden states.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, DynamicLayer

from lemoe.base.equality import TensorEquality
from lemoe.base.frozen.check import check_replay
from lemoe.base.frozen.hooks import replaced_outputs
from lemoe.base.frozen.replay import FrozenBatch, LayerCall, constant_cache, extract_hidden
from lemoe.base.frozen.token_trees import TokenForest, TreeBatch
from lemoe.base.hooks import hidden_argument, removed_on_exit
from lemoe.base.loading import BaseModel
from lemoe.base.placement import index_on_device
from lemoe.base.structure import FFNSite
from lemoe.base.tokens import Batch, Passage, batch_invariant_width, length_buckets
from lemoe.errors import ModelError

Reach = Literal["layer", "keys_values", "end"]  # how far texts run; see `compute_prefix_activations`


class _EmptyCacheLayer(DynamicLayer):
    """Stores no keys and values, only that it was updated."""

    used = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.used = True
        return key_states, value_states


class _StoppingCacheLayer(DynamicLayer):
    """Ends the forward pass once it has its keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, *args, **kwargs)
        raise StopForward


class StopForward(Exception):
    """Raised in a hook to end a forward pass early; always caught here."""


@dataclass(frozen=True, eq=False)
class PrefixActivations(TensorEquality):
    """Activations of texts at the edited layer, one node for each distinct prefix.

    Attributes:
        text_nodes: for each text, the node of each of its tokens.
        inputs: `[nodes, hidden]`, the input of the edited FFN.
        output: `[nodes, hidden]`, the output of the edited layer.
        reach: how far the texts ran.
        last: `[nodes, hidden]`, the output of the last layer; None if they did not run to the end.
        prefix_keys_values: keys and values `[nodes, heads, width]` in each layer above, on that layer's device (all
            other tensors are on the base's); empty if those layers did not run.
        in_tuple: whether the layers return their hidden states in a tuple.
        keys_values_suffice: whether layers keep nothing of a text besides keys and values; if they do, replays start
            at the first column.
        read: `[nodes, hidden]`, the input of the layer that was to be read; None if none was.
    """

    base: BaseModel
    site: FFNSite
    layer: int
    text_nodes: list[Tensor]
    inputs: Tensor
    output: Tensor
    reach: Reach
    last: Tensor | None
    prefix_keys_values: list[tuple[Tensor, Tensor]]
    in_tuple: bool
    keys_values_suffice: bool
    read: Tensor | None = None

    def base_hidden(self, batch: Batch) -> Tensor:
        """`[targets, hidden]`, the base model's last hidden states at a batch's target positions."""
        if self.last is None:
            raise ValueError("these texts did not run to the end of the model")
        return self.last[self.node_index(batch)[batch.target_rows, batch.target_columns]]

    def node_index(self, batch: Batch, start: int = 0) -> Tensor:
        """`[batch, seq]`, the node of each of a batch's tokens from column `start` on; of padding, any node."""
        width = batch.ids.shape[1]
        nodes = [self.text_nodes[row] for row in batch.rows]
        return torch.stack([functional.pad(each, (0, width - len(each))) for each in nodes])[:, start:]

    @torch.no_grad()
    def freeze_batch(self, batch: Batch, start: int = 0) -> FrozenBatch:
        """Record what is needed to replay a batch of the texts, whose indices are `batch.rows`.

        Args:
            start: the first column to which an edit may add anything. Of the columns before it, only the keys and
                values that the layers above attend to are kept, if `keys_values_suffice`.
        """
        if start and self.reach == "layer":
            raise ValueError("these texts did not run beyond the edited layer")
        first = start if self.keys_values_suffice else 0
        layers, calls, embeddings = self.base.layers, [], []

        def record_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = args[1:] if args else ()
            calls.append(LayerCall(module, rest, {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        handles = [m.register_forward_pre_hook(record_call, with_kwargs=True) for m in layers[self.layer + 1 :]]
        handles.append(
            self.base.embedding.register_forward_hook(lambda module, args, output: embeddings.append(output))
        )
        prefix, nodes = self.node_index(batch).tensor_split([first], dim=1)
        output = self.output[nodes]
        cache = self._prefix_cache(prefix) if first else None
        with removed_on_exit(handles), replaced_outputs(list(layers), (output,) if self.in_tuple else output):
            _forward_decoder(self.base, cache, input_ids=batch.ids[:, first:], attention_mask=batch.mask)
        return FrozenBatch(
            batch=batch,
            start=start,
            first=first,
            inputs=self.inputs[nodes[:, start - first :]],
            output=output,
            calls=tuple(calls),
            last_ffn=_find_last_ffn(self.base, self.site, self.layer) if calls else None,
            embeddings=embeddings[0][:, start - first :],
        )

    def _prefix_cache(self, nodes: Tensor) -> Cache:
        """A constant cache of `nodes` `[batch, seq]`; layers that are not replayed get zeros of the right length."""
        zeros = self.output.new_zeros(1, 1, 1, 1).expand(len(nodes), 1, nodes.shape[1], 1)
        above = [
            (index_on_device(keys, nodes).transpose(1, 2), index_on_device(values, nodes).transpose(1, 2))
            for keys, values in self.prefix_keys_values
        ]
        return constant_cache([*[(zeros, zeros)] * (self.layer + 1), *above])


@torch.no_grad()
def compute_prefix_activations(
    base: BaseModel,
    site: FFNSite,
    layer: int,
    passages: Sequence[Passage],
    max_tokens: int,
    reach: Reach = "layer",
    groups: Sequence[int] | None = None,
    layer_read: int | None = None,
) -> PrefixActivations:
    """Run `passages` through the layers up to `layer`, whose FFN is at `site`.

    Args:
        max_tokens: padded tokens that run through the model at once.
        reach: how far they run: up to `layer`; as far as the last layer's keys and values, so that replays can start
            after a prefix; or to the end, for the base model's answers too.
        groups: one number per passage. The activations of a passage then depend on its group alone, bit for bit on a
            CPU in float32, however many other passages share the batch.
        layer_read: a layer, no later than `layer`, whose input is kept too.

    Raises:
        ModelError: if replaying the layers above differs from running the model itself.
    """
    check_replay(base, site, layer, _compute_unchecked)
    return _compute_unchecked(base, site, layer, passages, max_tokens, reach, groups, layer_read)


def _compute_unchecked(
    base: BaseModel,
    site: FFNSite,
    layer: int,
    passages: Sequence[Passage],
    max_tokens: int,
    reach: Reach = "layer",
    groups: Sequence[int] | None = None,
    layer_read: int | None = None,
) -> PrefixActivations:
    """`compute_prefix_activations` without `check_replay`, which itself needs it."""
    layout = lay_out_trees(base, [passage.input_ids for passage in passages], max_tokens, groups)
    forest, keys_values_suffice = layout.forest, keeps_only_keys_values(base)
    firsts, parts, total = [0] * len(forest.trees), [], 0
    for members, rows in layout.batch_rows(base):
        parts.append(_record_pass(base, site, layer, rows, reach, keys_values_suffice, layer_read))
        for tree in members:
            firsts[tree], total = total, total + len(forest.trees[tree])
    return PrefixActivations(
        base,
        site,
        layer,
        [torch.tensor(nodes, device=base.device) + firsts[tree] for tree, nodes in forest.locations],
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.output for part in parts]),
        reach,
        torch.cat([part.last for part in parts if part.last is not None]) if reach == "end" else None,
        [
            (torch.cat([keys for keys, _ in each]), torch.cat([values for _, values in each]))
            for each in zip(*(part.keys_values for part in parts), strict=True)
        ],
        parts[0].in_tuple,
        keys_values_suffice,
        None if layer_read is None else torch.cat([part.read for part in parts if part.read is not None]),
    )


@dataclass(frozen=True, eq=False)
class _TreePassOutput(TensorEquality):
    """What one forward pass over some trees gives; see `PrefixActivations`."""

    inputs: Tensor
    output: Tensor
    last: Tensor | None
    keys_values: list[tuple[Tensor, Tensor]]
    in_tuple: bool
    read: Tensor | None


@dataclass(frozen=True, eq=False)
class TreeRows(TensorEquality):
    """Token trees that run through the model at once, one per row.

    Attributes:
        batch: their tokens.
        real: `[batch, nodes]`, bool; False on padding.
        shared: whether texts share a tree, or each has one of its own.
    """

    batch: TreeBatch
    real: Tensor
    shared: bool

    def run(self, base: BaseModel, cache: Cache | None = None) -> None:
        """Run them through the decoder, which hooks may watch or end early (`StopForward`)."""
        ids = self.batch.ids
        with suppress(StopForward):
            if self.shared:
                mask = self.batch.attention_mask(base.dtype)
                _forward_decoder(base, cache, input_ids=ids, attention_mask=mask, position_ids=self.batch.positions)
            else:
                _forward_decoder(base, cache, input_ids=ids, attention_mask=self.real.long())


@dataclass(frozen=True)
class TreeLayout:
    """Texts as token trees, and which of the trees run at once, padded to which width."""

    forest: TokenForest
    shared: bool
    batches: list[tuple[list[int], int]]

    def batch_rows(self, base: BaseModel) -> Iterator[tuple[list[int], TreeRows]]:
        """The trees of each batch, by index, and their rows."""
        for members, width in self.batches:
            trees = [self.forest.trees[tree] for tree in members]
            batch = TreeBatch.from_trees(trees, base.pad_token_id, base.device, width)
            sizes = torch.tensor([len(tree) for tree in trees], device=base.device)
            yield members, TreeRows(batch, torch.arange(width, device=base.device) < sizes.unsqueeze(1), self.shared)


def lay_out_trees(
    base: BaseModel, texts: Sequence[tuple[int, ...]], max_tokens: int, groups: Sequence[int] | None
) -> TreeLayout:
    """Lay `texts` out for passes of at most `max_tokens` padded tokens; `groups`: see `compute_prefix_activations`."""
    shared = keeps_only_keys_values(base) and supports_token_trees(base, max(map(len, texts), default=0))
    forest = TokenForest.from_texts(texts, shared, groups)
    widths = [len(tree) for tree in forest.trees]
    if groups is not None:
        widths = [batch_invariant_width(width, None if shared else base.max_length) for width in widths]
    buckets = length_buckets(widths, max_tokens)
    return TreeLayout(forest, shared, [(members, max(widths[tree] for tree in members)) for members in buckets])


def _record_pass(
    base: BaseModel,
    site: FFNSite,
    layer: int,
    rows: TreeRows,
    reach: Reach,
    keys_values_suffice: bool,
    layer_read: int | None,
) -> _TreePassOutput:
    real = rows.real
    seen: dict[str, Any] = {}
    above = len(base.layers) - 1 - layer
    cache = _cache_above(layer, above, stop=reach == "keys_values") if keys_values_suffice else None
    ends_here = reach == "layer" or (reach == "keys_values" and not (cache and above))

    def drop_padding(hidden: Tensor) -> Tensor:
        return hidden.to(base.device).reshape(*real.shape, -1)[real]

    def record_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["output"] = output
        if ends_here:
            raise StopForward

    def record_read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["read"] = drop_padding(hidden_argument(args, kwargs))

    def record_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["last"] = drop_padding(extract_hidden(output))

    handles = [
        site.entry.register_forward_pre_hook(lambda module, args: seen.update(inputs=args[0])),
        base.layers[-1].register_forward_hook(record_last),
        base.layers[layer].register_forward_hook(record_output),
    ]
    if layer_read is not None:
        handles.append(base.layers[layer_read].register_forward_pre_hook(record_read, with_kwargs=True))
    with removed_on_exit(handles):
        rows.run(base, cache)
    return _TreePassOutput(
        inputs=drop_padding(seen["inputs"]),
        output=drop_padding(extract_hidden(seen["output"])),
        last=seen.get("last"),
        keys_values=[
            (index_on_device(each.keys.transpose(1, 2), real), index_on_device(each.values.transpose(1, 2), real))
            for each in (cache.layers[layer + 1 :] if cache else [])
            if each.is_initialized
        ],
        in_tuple=isinstance(seen["output"], tuple),
        read=seen.get("read"),
    )


def _cache_above(layer: int, above: int = 0, stop: bool = False) -> DynamicCache:
    """A cache of the layers above `layer`, for the others nothing; the last may end the pass it serves."""
    cache = DynamicCache()
    cache.layers = [_EmptyCacheLayer() for _ in range(layer + 1)]
    cache.layers += [_StoppingCacheLayer() if stop and left == 1 else DynamicLayer() for left in range(above, 0, -1)]
    return cache


_keys_values_support: "WeakKeyDictionary[BaseModel, bool]" = WeakKeyDictionary()


def keeps_only_keys_values(base: BaseModel) -> bool:
    """Whether layers keep nothing of a text besides keys and values: tried once.

    Others keep a state (recurrent and convolutional layers) or an index of their own.
    """
    if base not in _keys_values_support:
        ids, cache = torch.tensor([[0, 1]], device=base.device), _cache_above(len(base.layers) - 1)
        try:
            _forward_decoder(base, cache, input_ids=ids, attention_mask=torch.ones_like(ids))
            _keys_values_support[base] = all(layer.used for layer in cache.layers)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            _keys_values_support[base] = False
    return _keys_values_support[base]


_token_tree_support: "WeakKeyDictionary[BaseModel, bool]" = WeakKeyDictionary()
ATTENTION_WINDOW_KEYS = ("sliding_window", "attention_chunk_size")  # config keys that limit how far layers attend


def supports_token_trees(base: BaseModel, longest: int) -> bool:
    """Whether the model can run texts of at most `longest` tokens as token trees: tried once, on two short texts.

    It cannot where it computes positions or masks itself (ALiBi, some attention kernels), or where a layer's attention
    window is shorter than the texts.
    """
    config = base.model.config.get_text_config()
    if any(longest > (getattr(config, name, None) or longest) for name in ATTENTION_WINDOW_KEYS):
        return False
    if base not in _token_tree_support:
        _token_tree_support[base] = _try_trees(base)
    return _token_tree_support[base]


def _try_trees(base: BaseModel) -> bool:
    one, other = (1, 2, 3, 4), (1, 2, 5)
    rows = TreeBatch.from_trees(TokenForest.from_texts([one, other]).trees, base.pad_token_id, base.device)
    apart = [_run_last_hidden(base, input_ids=torch.tensor([ids], device=base.device)) for ids in (one, other)]
    try:
        mask = rows.attention_mask(base.dtype)
        together = _run_last_hidden(base, input_ids=rows.ids, attention_mask=mask, position_ids=rows.positions)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    expected = torch.cat([apart[0], apart[1][-1:]]).float()
    tolerance = torch.finfo(base.dtype).eps ** 0.5 * float(expected.abs().max())
    return bool(((together.float() - expected).abs() <= tolerance).all())


@torch.no_grad()
def _run_last_hidden(base: BaseModel, **inputs: Any) -> Tensor:
    """`[seq, hidden]` of one text, after the last layer."""
    seen: list[Tensor] = []
    handle = base.layers[-1].register_forward_hook(lambda module, args, output: seen.append(extract_hidden(output)[0]))
    with removed_on_exit([handle]):
        _forward_decoder(base, **inputs)
    return seen[0]


def _forward_decoder(base: BaseModel, past_key_values: Cache | None = None, **inputs: Any) -> None:
    base.decoder(**inputs, past_key_values=past_key_values, use_cache=past_key_values is not None)


def _find_last_ffn(base: BaseModel, site: FFNSite, layer: int) -> FFNSite | None:
    """The last layer's FFN, if it has the edited one's path in its layer and one module that reads one input."""
    path = site.path.removeprefix(f"{base.layers_path}.{layer}.")
    with suppress(ModelError):
        last = base.ffn_site(len(base.layers) - 1, path)
        one_input = len(inspect.signature(last.entry.forward).parameters) == 1
        splits = not one_input or (last.gated and not last.self_contained)
        return None if splits else replace(last, exit=last.output_module)
    return None
