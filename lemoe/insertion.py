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
from lemoe.frozen import FrozenBatch, beside
from lemoe.models import BaseModel
from lemoe.routing import Routing, Sequences
from lemoe.tokens import Passage


class RouteMemory(DynamicLayer):
    """What the router remembers of each position so far, `[batch, 1, seq, k]`, as one more layer of the KV cache."""

    @classmethod
    def of(cls, cache: Cache | None) -> "RouteMemory | None":
        return next((layer for layer in cache.layers if isinstance(layer, cls)), None) if cache is not None else None


class InsertedAdaptor:
    """An adaptor state at work in a base model.

    Preset `anchor` reads tokens as they come and needs no prompt boundary. Preset `paper` routes a sequence once, by
    its prompt: the tokens of the forward pass that starts it. `generate` marks the prompt itself; for a forward pass
    over prompt and answer together, say where the prompt ends with `prompts`.

    Attributes:
        state: the adaptor.
        site: the FFN that it stands beside.
        router: its router at work; `router.explain` tells why a prompt takes its route.
    """

    def __init__(self, base: BaseModel, state: AdaptorState, *, allow_base_mismatch: bool = False):
        """Insert `state` into `base`.

        Args:
            allow_base_mismatch: insert it into a base that it was not made for, if only it has a place there.

        Raises:
            AdaptorError: if the state was made for another base model, listing the differences, or if another
                adaptor is inserted already.
        """
        check_base(base, state, allow=allow_base_mismatch)
        if "generate" in base.model.__dict__:
            raise AdaptorError("an adaptor is inserted already; remove it first, or stack the two and insert the stack")
        self.base = base
        self.state = state
        self.router = state.router.live(base, state.settings)
        self._experts = state.experts.to(base.device)
        self.site = base.site(state.base.layer, state.settings.layer_path)
        self._signature = inspect.signature(base.decoder.forward)
        self._routing: Routing | None = None
        self._memory: Tensor | None = None
        self._prompt_columns: Tensor | int | None = None
        self._bypass = False
        self._inserted = ExitStack()
        hooks = (
            base.decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            base.decoder.register_forward_hook(self._after),
        )
        for hook in hooks:
            self._inserted.callback(hook.remove)
        self._inserted.enter_context(beside(self.site, self._delta))
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
        before, self._bypass = self._bypass, True
        try:
            yield
        finally:
            self._bypass = before

    def routing_of(self, passage: Passage) -> Routing:
        """The route that a passage takes, explained."""
        ids = torch.tensor([passage.read], device=self.base.device)
        prompt = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) < len(passage.prompt)
        return self.router.route(Sequences(ids, None, torch.ones_like(prompt), prompt))[0]

    def opens(self, ids: Sequence[int]) -> bool:
        """Whether any expert acts anywhere on a text (token ids)."""
        tokens = torch.tensor([list(ids)], device=self.base.device)
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        routing, _ = self.router.route(Sequences(tokens, None, everywhere, everywhere))
        return bool((routing.experts >= 0).any())

    @torch.no_grad()
    def replay(self, frozen: FrozenBatch, routings: Sequence[Routing]) -> Tensor:
        """Last hidden states `[targets, hidden]` of a frozen batch with the routed experts at work.

        Args:
            routings: of each row by itself. The experts run row by row, so that no row depends on the others.
        """
        delta = torch.zeros(frozen.inputs.shape, device=frozen.inputs.device)
        for row, routing in enumerate(routings):
            columns = routing.experts.shape[1]
            change = self._experts.delta(frozen.inputs[row : row + 1, :columns], routing, self.site.activation)
            if change is not None:
                delta[row, :columns] = change[0]
        return frozen.replay(delta)

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
        stored = RouteMemory.of(cache)
        if stored is None and cache is not None and cache.get_seq_length():
            raise AdaptorError("this KV cache was filled without the adaptor; start it anew with the adaptor inserted")
        memory = stored.keys if stored is not None and stored.get_seq_length() else None
        ids, embeddings = call.get("input_ids"), call.get("inputs_embeds")
        given = embeddings if ids is None else ids
        assert given is not None, "transformers calls a decoder with ids or embeddings"
        mask = _token_mask(given, call.get("attention_mask"))
        prompt = mask & _prompt_columns(given, self._prompt_columns)
        self._routing, self._memory = self.router.route(Sequences(ids, embeddings, mask, prompt, memory))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._routing = None
        cache = getattr(output, "past_key_values", None)
        if self._bypass or not isinstance(cache, Cache) or self._memory is None:
            return
        stored = RouteMemory.of(cache)
        if stored is None:
            stored = RouteMemory()
            cache.layers.append(stored)
        stored.update(self._memory, self._memory[..., :0])

    def _delta(self, inputs: Tensor) -> Tensor | None:
        if self._bypass:
            return None
        if self._routing is None:
            raise AdaptorError("the edited layer was called outside a forward pass of the model")
        shaped = inputs.reshape(*self._routing.experts.shape[:2], inputs.shape[-1])  # OPT flattens batch and sequence
        change = self._experts.delta(shaped, self._routing, self.site.activation)
        return None if change is None else change.reshape(inputs.shape)


def insert(
    base: BaseModel, adaptor: AdaptorState | Path | str, *, allow_base_mismatch: bool = False
) -> InsertedAdaptor:
    """Insert an adaptor, given as a state or as the path of its file, into `base`.

    Args:
        allow_base_mismatch: insert it into a base that it was not made for, if only it has a place there.

    Raises:
        AdaptorError: if the file is not a valid adaptor, or was made for another base model.
    """
    state = adaptor if isinstance(adaptor, AdaptorState) else load_adaptor(adaptor)
    return InsertedAdaptor(base, state, allow_base_mismatch=allow_base_mismatch)


def check_base(base: BaseModel, state: AdaptorState, *, allow: bool = False) -> tuple[str, ...]:
    """Refuse a state that was made for another base, or, with `allow`, only one that has no place in this one.

    Returns:
        the differences, with `allow`.

    Raises:
        AdaptorError: listing the differences.
    """
    there = base.fingerprint(state.base.layer, state.settings.layer_path)
    differences = state.base.differences(there)
    if differences and not (allow and state.base.fits(there)):
        raise AdaptorError(
            f"this adaptor was made for another base model ({state.base.name}) than {base.source.name}:\n  "
            + "\n  ".join(differences)
        )
    return tuple(differences)


def _token_mask(given: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`[batch, seq]`: which of the new positions are tokens, not padding."""
    batch, length = given.shape[:2]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool()
    return torch.ones((batch, length), dtype=torch.bool, device=given.device)


def _prompt_columns(given: Tensor, columns: Tensor | int | None) -> Tensor:
    """`[batch or 1, seq]`: which of the new positions are the prompt's."""
    places = torch.arange(given.shape[1], device=given.device).unsqueeze(0)
    if columns is None:
        return places >= 0
    return places < torch.as_tensor(columns, device=given.device).reshape(-1, 1)


@contextmanager
def _wrapped_generate(model: nn.Module, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Let `wrapper` stand around `model.generate` while open."""
    model.__dict__["generate"] = functools.partial(wrapper, model.generate)
    try:
        yield
    finally:
        del model.__dict__["generate"]
