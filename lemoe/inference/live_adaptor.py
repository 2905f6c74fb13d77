"""Experts at work in a live decoder: hooks at one frozen FFN; the model itself is not changed.

The route of a sequence travels in the model's own key/value cache, as one more cache layer, so that whatever
`generate` does to the cache (reorder beams, repeat rows, crop) it does to the routes as well.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicLayer

from lemoe.adaptor.experts import Activation
from lemoe.base.hooks import Site, added_to_residual, hidden_argument
from lemoe.errors import AdaptorError
from lemoe.routing.router import LiveRouter, Routing, Sequences


class ExpertSource(Protocol):
    """Experts in memory or in a file."""

    def prefetch(self, routing: Routing) -> None:
        """Called as soon as a routing is known."""

    def delta(self, inputs: Tensor, routing: Routing, activation: Activation) -> Tensor | None:
        """What the routed experts add; see `Experts.delta`."""


class RouteMemory(DynamicLayer):
    """What the router remembers of each position so far, `[batch, 1, seq, k]`, as one more layer of the KV cache."""

    @classmethod
    def from_cache(cls, cache: Cache | None) -> "RouteMemory | None":
        return next((layer for layer in cache.layers if isinstance(layer, cls)), None) if cache is not None else None


class LiveAdaptor:
    """Experts that add to the output of the FFN at `site` of `decoder`, routed by `router`, until `remove`.

    Preset `anchor` reads tokens as they come and needs no prompt boundary. Preset `paper` routes a sequence once, by
    its prompt: the tokens of the forward pass that starts it, or, with `mark_prompts`, the first of them.
    """

    def __init__(
        self,
        decoder: nn.Module,
        site: Site,
        router: LiveRouter,
        experts: ExpertSource,
        layer_read: nn.Module | None = None,
    ):
        """Insert experts.

        Args:
            layer_read: the decoder layer whose incoming hidden states the router reads, if it reads any.
        """
        self.site = site
        self.router = router
        self._experts = experts
        self._signature = inspect.signature(decoder.forward)
        self._sequences: Sequences | None = None
        self._routing: Routing | None = None
        self._memory: Tensor | None = None
        self._prompt_columns: Tensor | int | None = None
        self._bypass = False
        self._inserted = ExitStack()
        self._reads_layer = layer_read is not None
        hooks = [
            decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            decoder.register_forward_hook(self._after_forward),
        ]
        if layer_read is not None:
            hooks.append(layer_read.register_forward_pre_hook(self._before_layer_read, with_kwargs=True))
        for hook in hooks:
            self._inserted.callback(hook.remove)
        self._inserted.enter_context(added_to_residual(site, self._expert_delta))

    def remove(self) -> None:
        """Take the experts out; the model then gives bit-identical logits to before. Harmless if repeated."""
        self._inserted.close()

    @contextmanager
    def mark_prompts(self, columns: Tensor | int) -> Iterator[None]:
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
        before, self._bypass = self._bypass, True
        try:
            yield
        finally:
            self._bypass = before

    def generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the model's own `generate`, with the end of its prompts marked."""
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if ids is None:
            return generate(*args, **kwargs)
        with self.mark_prompts(ids.shape[1]):
            return generate(*args, **kwargs)

    def delta(self, inputs: Tensor, routing: Routing) -> Tensor | None:
        """What the routed experts add, `[batch, seq, hidden]`, for FFN inputs of that shape; None for nothing.

        Experts run on the router's device, wherever the FFN does.
        """
        return self._experts.delta(inputs.to(self.router.device), routing, self.site.activation)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._bypass:
            return
        call = self._signature.bind_partial(*args, **kwargs).arguments
        cache = call.get("past_key_values")
        stored = RouteMemory.from_cache(cache)
        if stored is None and cache is not None and cache.get_seq_length():
            raise AdaptorError("this KV cache was filled without the adaptor; start it anew with the adaptor inserted")
        memory = stored.keys if stored is not None and stored.get_seq_length() else None
        ids, embeddings = call.get("input_ids"), call.get("inputs_embeds")
        given = embeddings if ids is None else ids
        assert given is not None, "transformers calls a decoder with ids or embeddings"
        mask = _token_mask(given, call.get("attention_mask"))
        prompt = mask & _prompt_columns(given, self._prompt_columns)
        self._sequences = Sequences(ids, embeddings, mask, prompt, memory).to(self.router.device)
        if not self._reads_layer:
            self._route()

    def _before_layer_read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._bypass or self._sequences is None:
            return
        hidden = hidden_argument(args, kwargs)
        self._sequences = replace(self._sequences, hidden=hidden.reshape(*self._sequences.mask.shape, -1))
        self._route()

    def _route(self) -> None:
        assert self._sequences is not None
        self._routing, self._memory = self.router.route(self._sequences)
        self._sequences = None
        self._experts.prefetch(self._routing)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._routing = self._sequences = None
        cache = getattr(output, "past_key_values", None)
        if self._bypass or not isinstance(cache, Cache) or self._memory is None:
            return
        stored = RouteMemory.from_cache(cache)
        if stored is None:
            stored = RouteMemory()
            cache.layers.append(stored)
        stored.update(self._memory, self._memory[..., :0])

    def _expert_delta(self, inputs: Tensor) -> Tensor | None:
        if self._bypass:
            return None
        if self._routing is None:
            raise AdaptorError("the edited layer was called outside a forward pass of the model")
        shaped = inputs.reshape(*self._routing.experts.shape[:2], inputs.shape[-1])  # OPT flattens batch and sequence
        change = self.delta(shaped, self._routing)
        return None if change is None else change.reshape(inputs.shape)


def _token_mask(given: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`[batch, seq]`: which of the new positions are tokens, not padding."""
    batch, length = given.shape[:2]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool()
    return torch.ones((batch, length), dtype=torch.bool, device=given.device)


def _prompt_columns(given: Tensor, columns: Tensor | int | None) -> Tensor:
    """`[batch or 1, seq]`: which of the new positions are the prompt's."""
    positions = torch.arange(given.shape[1], device=given.device).unsqueeze(0)
    if columns is None:
        return positions >= 0
    return positions < torch.as_tensor(columns, device=given.device).reshape(-1, 1)
