"""An adaptor inserted into a live model: hooks beside one frozen FFN, and nothing of the base touched.

The route of a sequence travels in the model's own key/value cache, as one more cache layer, so that whatever
`generate` does to the cache (reorder beams, repeat rows, crop) it does to the routes as well.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lemoe.adaptor import AdaptorState
from lemoe.checkpoint import load_adaptor
from lemoe.errors import AdaptorError
from lemoe.experts import Routing
from lemoe.frozen import beside
from lemoe.models import BaseModel
from lemoe.routing import pool


class RouteMemory(DynamicLayer):
    """The route of each position so far: experts as keys, weights as values, `[batch, 1, seq, k]`."""

    @classmethod
    def of(cls, cache: Cache | None) -> "RouteMemory | None":
        return next((layer for layer in cache.layers if isinstance(layer, cls)), None) if cache is not None else None


class InsertedAdaptor:
    """An adaptor state at work in a base model.

    A sequence is routed once, by its prompt: the tokens of the forward pass that starts it. `generate` marks the
    prompt itself; for a forward pass over prompt and answer together, say where the prompt ends with `prompts`.
    """

    def __init__(self, base: BaseModel, state: AdaptorState):
        """Insert `state` into `base`.

        Raises:
            AdaptorError: if the state was made for another base model, listing the differences.
        """
        check_base(base, state)
        self.base = base
        self.state = state.to(base.device)
        self._site = base.site(state.base.layer, state.settings.layer_path)
        self._signature = inspect.signature(base.decoder.forward)
        self._routing: Routing | None = None
        self._prompt_columns: Tensor | int | None = None
        self._bypass = False
        self._inserted = ExitStack()
        hooks = (
            base.decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            base.decoder.register_forward_hook(self._after),
        )
        for hook in hooks:
            self._inserted.callback(hook.remove)
        self._inserted.enter_context(beside(self._site, self._delta))
        self._inserted.enter_context(_wrapped_generate(base.model, self._generate))

    def remove(self) -> None:
        """Take the adaptor out; the base model then gives bit-identical logits to before. Harmless if repeated."""
        self._inserted.close()

    def __enter__(self) -> "InsertedAdaptor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @contextmanager
    def prompts(self, columns: Tensor | int) -> Iterator[None]:
        """While open, forward passes that start a sequence take their first `columns` columns as its prompt.

        Args:
            columns: one number, or one for each row `[batch]`; padding on the left counts as columns.
        """
        before, self._prompt_columns = self._prompt_columns, columns
        try:
            yield
        finally:
            self._prompt_columns = before

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """While open, the model answers as its base."""
        self._bypass = True
        try:
            yield
        finally:
            self._bypass = False

    @contextmanager
    def replaying(self, pooled: Tensor, length: int) -> Iterator[Routing]:
        """While open, replayed layers take the routes of pooled prompts `[batch, hidden]` at all `length` positions."""
        self._routing = self.state.router.route(pooled, length)
        try:
            yield self._routing
        finally:
            self._routing = None

    @torch.no_grad()
    def routes(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
        """The expert that acts most on each prompt (token ids), with its weight."""
        routes = []
        for prompt in prompts:
            embeddings = self.base.embedding(torch.tensor([list(prompt)], device=self.base.device))
            mask = torch.ones(embeddings.shape[:2], device=self.base.device)
            routing = self.state.router.route(pool(embeddings, mask), 1)
            routes.append((int(routing.experts[0, 0, 0]), float(routing.weights[0, 0, 0])))
        return routes

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if ids is None:
            return generate(*args, **kwargs)
        with self.prompts(ids.shape[1]):
            return generate(*args, **kwargs)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._bypass:
            return
        call = self._signature.bind_partial(*args, **kwargs).arguments
        cache = call.get("past_key_values")
        memory = RouteMemory.of(cache)
        if memory is not None and memory.get_seq_length():
            length = _first(call.get("input_ids"), call.get("inputs_embeds")).shape[1]
            last_experts, last_weights = memory.keys[:, 0, -1:], memory.values[:, 0, -1:]
            self._routing = Routing(last_experts.expand(-1, length, -1), last_weights.expand(-1, length, -1))
        else:
            self._routing = self._route(call)

    def _route(self, call: dict[str, Any]) -> Routing:
        ids, embeddings = call.get("input_ids"), call.get("inputs_embeds")
        if embeddings is None:
            embeddings = self.base.embedding(ids)
        mask = _prompt_mask(embeddings, call.get("attention_mask"), self._prompt_columns)
        return self.state.router.route(pool(embeddings, mask), embeddings.shape[1])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if self._bypass or not isinstance(cache, Cache) or self._routing is None:
            return
        memory = RouteMemory.of(cache)
        if memory is None:
            memory = RouteMemory()
            cache.layers.append(memory)
        memory.update(self._routing.experts.unsqueeze(1), self._routing.weights.unsqueeze(1))

    def _delta(self, inputs: Tensor) -> Tensor | None:
        if self._bypass:
            return None
        if self._routing is None:
            raise AdaptorError("the edited layer was called outside a forward pass of the model")
        shaped = inputs.reshape(*self._routing.experts.shape[:2], inputs.shape[-1])  # OPT flattens batch and sequence
        change = self.state.experts.delta(shaped, self._routing, self._site.activation)
        return None if change is None else change.reshape(inputs.shape)


def insert(base: BaseModel, adaptor: AdaptorState | Path | str) -> InsertedAdaptor:
    """Insert an adaptor, given as a state or as the path of its file, into `base`.

    Raises:
        AdaptorError: if the file is not a valid adaptor, or was made for another base model.
    """
    return InsertedAdaptor(base, adaptor if isinstance(adaptor, AdaptorState) else load_adaptor(adaptor))


def check_base(base: BaseModel, state: AdaptorState) -> None:
    """Refuse a state that was made for another base.

    Raises:
        AdaptorError: listing the differences.
    """
    there = base.fingerprint(state.base.layer, state.settings.layer_path)
    differences = state.base.differences(there)
    if differences:
        raise AdaptorError(
            f"this adaptor was made for another base model ({state.base.name}) than {base.source.name}:\n  "
            + "\n  ".join(differences)
        )


def _prompt_mask(embeddings: Tensor, attention_mask: Tensor | None, columns: Tensor | int | None) -> Tensor:
    """`[batch, seq]`: which positions are tokens of the prompt, neither padding nor answer."""
    batch, length = embeddings.shape[:2]
    mask = torch.ones((batch, length), dtype=torch.bool, device=embeddings.device)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        mask &= attention_mask[:, -length:].bool()
    if columns is not None:
        ends = torch.as_tensor(columns, device=embeddings.device).reshape(-1, 1)
        mask &= torch.arange(length, device=embeddings.device) < ends
    return mask


def _first(*tensors: Tensor | None) -> Tensor:
    return next(tensor for tensor in tensors if tensor is not None)


@contextmanager
def _wrapped_generate(model: nn.Module, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Let `wrapper` stand around `model.generate` while open."""
    own = model.__dict__.get("generate")
    model.__dict__["generate"] = functools.partial(wrapper, model.generate)
    try:
        yield
    finally:
        if own is None:
            del model.generate
        else:
            model.__dict__["generate"] = own
