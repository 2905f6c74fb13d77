"""What never changes while editing is computed once: the pass through the layers up to the edited one.

Every distinct beginning of the texts goes through once (see `lemoe.base.frozen.token_trees`), and what the layers
give for it is kept. A batch of the texts is then frozen from that: the layers above are called with its tokens in
their places, which records the arguments (masks, rotary angles) with which they can be replayed.
"""

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, DynamicLayer

from lemoe.base.equality import TensorEquality
from lemoe.base.frozen.check import check_replay
from lemoe.base.frozen.hooks import standing_in
from lemoe.base.frozen.replay import FrozenBatch, LayerCall, constant_cache, hidden_of
from lemoe.base.frozen.token_trees import Forest, Rows, Tree
from lemoe.base.hooks import released
from lemoe.base.loading import BaseModel
from lemoe.base.placement import taken
from lemoe.base.structure import FFNSite
from lemoe.base.tokens import Batch, Passage, length_buckets, steady_width
from lemoe.errors import ModelError


class _NoLayer(DynamicLayer):
    """Remembers nothing but that it was used."""

    used = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.used = True
        return key_states, value_states


class _Enough(Exception):
    """Leaves a forward pass early; never seen outside."""


@dataclass(frozen=True, eq=False)
class Below(TensorEquality):
    """Texts after the layers up to the edited one, in which every distinct beginning went through once.

    Attributes:
        paths: for each text, which of the `nodes` below its tokens are.
        inputs: `[nodes, hidden]`, the input of the edited FFN.
        output: `[nodes, hidden]`, the output of the edited layer.
        last: `[nodes, hidden]`, the output of the last layer.
        openings: keys and values `[nodes, heads, width]` in each layer above, on its device; all else is on the base's.
        keyed: whether keys and values are all that layers keep of a text; else replays begin at its first column.
        in_tuple: whether the layers wrap what they give.

    `last` and `openings` are None and empty if the texts went no further than the edited layer.
    """

    base: BaseModel
    site: FFNSite
    layer: int
    paths: list[Tensor]
    inputs: Tensor
    output: Tensor
    last: Tensor | None
    openings: list[tuple[Tensor, Tensor]]
    in_tuple: bool
    keyed: bool

    def base_hidden(self, batch: Batch) -> Tensor:
        """`[targets, hidden]`, the base model's last hidden states at a batch's target positions."""
        if self.last is None:
            raise ValueError("these texts did not run through the whole model")
        return self.last[self.at(batch)[batch.target_rows, batch.target_columns]]

    def at(self, batch: Batch, start: int = 0) -> Tensor:
        """`[batch, seq]`, the nodes of a batch's tokens from column `start` on; padding takes any."""
        width = batch.ids.shape[1]
        paths = [self.paths[row] for row in batch.rows]
        return torch.stack([functional.pad(path, (0, width - len(path))) for path in paths])[:, start:]

    @torch.no_grad()
    def freeze(self, batch: Batch, start: int = 0) -> FrozenBatch:
        """Keep what replaying a batch of the texts needs, `batch.rows` being their numbers.

        Args:
            start: the first column at which anything will ever be added; nothing is kept of those before it but the
                keys and values that the layers above attend to, if those are `keyed`.
        """
        if start and self.last is None:
            raise ValueError("these texts did not run through the whole model")
        first = start if self.keyed else 0
        layers, calls, embeddings = self.base.layers, [], []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = args[1:] if args else ()
            calls.append(LayerCall(module, rest, {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in layers[self.layer + 1 :]]
        handles.append(
            self.base.embedding.register_forward_hook(lambda module, args, output: embeddings.append(output))
        )
        opening, nodes = self.at(batch).tensor_split([first], dim=1)
        output = self.output[nodes]
        cache = self._opening(opening) if first else None
        with released(handles), standing_in(list(layers), (output,) if self.in_tuple else output):
            _forward(self.base, cache, input_ids=batch.ids[:, first:], attention_mask=batch.mask)
        return FrozenBatch(
            batch=batch,
            start=start,
            first=first,
            inputs=self.inputs[nodes[:, start - first :]],
            output=output,
            calls=tuple(calls),
            top=_top(self.base, self.site, self.layer) if calls else None,
            embeddings=embeddings[0][:, start - first :],
        )

    def _opening(self, nodes: Tensor) -> Cache:
        """A cache that never grows, of `nodes` `[batch, seq]`; the layers that do not run only know its length."""
        nothing = self.output.new_zeros(1, 1, 1, 1).expand(len(nodes), 1, nodes.shape[1], 1)
        above = [
            (taken(keys, nodes).transpose(1, 2), taken(values, nodes).transpose(1, 2)) for keys, values in self.openings
        ]
        return constant_cache([*[(nothing, nothing)] * (self.layer + 1), *above])


@torch.no_grad()
def run_below(
    base: BaseModel,
    site: FFNSite,
    layer: int,
    passages: Sequence[Passage],
    max_tokens: int,
    whole: bool = False,
    groups: Sequence[int] | None = None,
) -> Below:
    """Run `passages` through the layers up to `layer`, whose FFN is at `site`.

    Args:
        max_tokens: padded tokens that run through the model at once.
        whole: run them through the layers above as well, for the base model's answers, and for keys and values, so
            that replays can start behind an opening.
        groups: one number for each passage. What a passage gives then depends on those of its group alone, to the bit
            on a CPU in float32, however many others run beside it.

    Raises:
        ModelError: if replaying the layers above gives something else than the model itself.
    """
    check_replay(base, site, layer, _run_texts)
    return _run_texts(base, site, layer, passages, max_tokens, whole, groups)


def _run_texts(
    base: BaseModel,
    site: FFNSite,
    layer: int,
    passages: Sequence[Passage],
    max_tokens: int,
    whole: bool = False,
    groups: Sequence[int] | None = None,
) -> Below:
    """`run_below`, unchecked."""
    keyed = keeps_keys(base)
    shared = keyed and token_trees(base, max((len(passage.read) for passage in passages), default=0))
    forest = Forest.of([passage.read for passage in passages], shared, groups)
    firsts, parts, total = [0] * len(forest.trees), [], 0
    widths = [len(tree) for tree in forest.trees]
    if groups is not None:
        widths = [steady_width(width, None if shared else base.max_length) for width in widths]
    for members in length_buckets(widths, max_tokens):
        trees, width = [forest.trees[tree] for tree in members], max(widths[tree] for tree in members)
        parts.append(_run_trees(base, site, layer, trees, width, shared, whole, keyed))
        for tree in members:
            firsts[tree], total = total, total + len(forest.trees[tree])
    paths = [torch.tensor(line, device=base.device) + firsts[tree] for tree, line in forest.places]
    return Below(
        base,
        site,
        layer,
        paths,
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.output for part in parts]),
        torch.cat([part.last for part in parts if part.last is not None]) if whole else None,
        [
            (torch.cat([keys for keys, _ in each]), torch.cat([values for _, values in each]))
            for each in zip(*(part.openings for part in parts), strict=True)
        ],
        parts[0].in_tuple,
        keyed,
    )


@dataclass(frozen=True, eq=False)
class _Part(TensorEquality):
    """What one pass gives; see `Below`."""

    inputs: Tensor
    output: Tensor
    last: Tensor | None
    openings: list[tuple[Tensor, Tensor]]
    in_tuple: bool


def _run_trees(
    base: BaseModel,
    site: FFNSite,
    layer: int,
    trees: Sequence[Tree],
    width: int,
    shared: bool,
    whole: bool,
    keyed: bool,
) -> _Part:
    rows = Rows.of(trees, base.pad_token, base.device, width)
    sizes = torch.tensor([len(tree) for tree in trees], device=base.device)
    real = torch.arange(rows.ids.shape[1], device=base.device) < sizes.unsqueeze(1)
    seen: dict[str, Any] = {}
    cache = _cache_above(layer) if keyed else None

    def kept(hidden: Tensor) -> Tensor:
        return hidden.to(base.device).reshape(*real.shape, -1)[real]

    def done(module: nn.Module, args: tuple[Any, ...], given: Any) -> None:
        seen["output"] = given
        if not whole:
            raise _Enough

    handles = [
        site.entry.register_forward_pre_hook(lambda module, args: seen.update(inputs=args[0])),
        base.layers[-1].register_forward_hook(lambda module, args, given: seen.update(last=kept(hidden_of(given)))),
        base.layers[layer].register_forward_hook(done),
    ]
    with released(handles), suppress(_Enough):
        if shared:
            mask = rows.mask(base.dtype)
            _forward(base, cache, input_ids=rows.ids, attention_mask=mask, position_ids=rows.positions)
        else:
            _forward(base, cache, input_ids=rows.ids, attention_mask=real.long())
    above = cache.layers[layer + 1 :] if cache else []
    return _Part(
        inputs=kept(seen["inputs"]),
        output=kept(hidden_of(seen["output"])),
        last=seen.get("last"),
        openings=[(taken(each.keys.transpose(1, 2), real), taken(each.values.transpose(1, 2), real)) for each in above],
        in_tuple=isinstance(seen["output"], tuple),
    )


def _cache_above(layer: int) -> DynamicCache:
    """A cache that keeps nothing of the layers up to `layer`."""
    cache = DynamicCache()
    cache.layers = [_NoLayer() for _ in range(layer + 1)]
    return cache


_keeps_keys: "WeakKeyDictionary[BaseModel, bool]" = WeakKeyDictionary()


def keeps_keys(base: BaseModel) -> bool:
    """Whether keys and values are all that layers keep of a text: tried once.

    Others keep a state (recurrent and convolutional layers) or an index of their own.
    """
    if base not in _keeps_keys:
        ids, cache = torch.tensor([[0, 1]], device=base.device), _cache_above(len(base.layers) - 1)
        try:
            _forward(base, cache, input_ids=ids, attention_mask=torch.ones_like(ids))
            _keeps_keys[base] = all(layer.used for layer in cache.layers)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            _keeps_keys[base] = False
    return _keeps_keys[base]


_takes_trees: "WeakKeyDictionary[BaseModel, bool]" = WeakKeyDictionary()
NARROW = ("sliding_window", "attention_chunk_size")  # how far a config says that some layers see


def token_trees(base: BaseModel, longest: int) -> bool:
    """Whether the model can run texts of at most `longest` tokens as token trees: tried once, on two short texts.

    It cannot where positions or masks are its own affair (ALiBi, some attention kernels), or where a layer sees less
    far than the texts reach.
    """
    config = base.model.config.get_text_config()
    if any(longest > (getattr(config, name, None) or longest) for name in NARROW):
        return False
    if base not in _takes_trees:
        _takes_trees[base] = _try_trees(base)
    return _takes_trees[base]


def _try_trees(base: BaseModel) -> bool:
    one, other = (1, 2, 3, 4), (1, 2, 5)
    rows = Rows.of(Forest.of([one, other]).trees, base.pad_token, base.device)
    apart = [_last_hidden(base, input_ids=torch.tensor([ids], device=base.device)) for ids in (one, other)]
    try:
        mask = rows.mask(base.dtype)
        together = _last_hidden(base, input_ids=rows.ids, attention_mask=mask, position_ids=rows.positions)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    expected = torch.cat([apart[0], apart[1][-1:]]).float()
    near = torch.finfo(base.dtype).eps ** 0.5 * float(expected.abs().max())
    return bool(((together.float() - expected).abs() <= near).all())


@torch.no_grad()
def _last_hidden(base: BaseModel, **inputs: Any) -> Tensor:
    """`[seq, hidden]` of one text, after the last layer."""
    seen: list[Tensor] = []
    handle = base.layers[-1].register_forward_hook(lambda module, args, output: seen.append(hidden_of(output)[0]))
    with released([handle]):
        _forward(base, **inputs)
    return seen[0]


def _forward(base: BaseModel, past_key_values: Cache | None = None, **inputs: Any) -> None:
    base.decoder(**inputs, past_key_values=past_key_values, use_cache=past_key_values is not None)


def _top(base: BaseModel, site: FFNSite, layer: int) -> FFNSite | None:
    """The last layer's FFN, where it stands as the edited one does and all of it reads one module's one input."""
    below = site.path.removeprefix(f"{base.layers_path}.{layer}.")
    with suppress(ModelError):
        top = base.site(len(base.layers) - 1, below)
        alone = len(inspect.signature(top.entry.forward).parameters) == 1
        return replace(top, exit=top.last) if alone and (top.whole or not top.gated) else None
    return None
