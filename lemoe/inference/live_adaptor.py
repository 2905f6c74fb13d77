"""Experts at work in a live decoder: hooks at one frozen FFN; the model itself is not changed.

All that belongs to one forward pass is kept for the thread that runs it, and what is remembered of a sequence travels
with its key/value cache (`lemoe.inference.route_memory`), so that passes, threads and caches never see each other.
"""

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from lemoe.adaptor.experts import Activation
from lemoe.base.hooks import Site, add_to_output, hidden_argument, not_compiled
from lemoe.errors import AdaptorError
from lemoe.inference.route_memory import cached_length, memory_of, remember
from lemoe.routing.router import LiveRouter, Routing, Sequences

Arguments = dict[str, Any] | None  # by name; torch leaves them out while another thread adds or removes the hook


class ExpertSource(Protocol):
    """Experts in memory or in a file."""

    def prefetch(self, routing: Routing) -> None:
        """Called as soon as a routing is known."""

    def delta(self, inputs: Tensor, routing: Routing, activation: Activation) -> Tensor | None:
        """What the routed experts add; see `Experts.delta`."""


class _ForwardPass:
    """One forward pass of the decoder: its input until it is routed, then its route, and the FFN's input."""

    def __init__(self, sequences: Sequences):
        self.sequences = sequences
        self.routing: Routing | None = None
        self.memory: Tensor | None = None
        self.ffn_input: Tensor | None = None


class _ThreadState(threading.local):
    """What a thread does with an adaptor."""

    def __init__(self, bypass: bool):
        self.current: _ForwardPass | None = None
        self.prompt_columns: Tensor | int | None = None
        self.bypass = bypass


class LiveAdaptor:
    """Experts that add to the output of the FFN at `site` of `decoder`, routed by `router`, until `remove`.

    Preset `anchor` reads tokens as they come and needs no prompt boundary. Preset `paper` routes a sequence once, by
    its prompt: the tokens of the forward pass that starts it, or, with `mark_prompts`, the first of them.

    Any number of threads may run the model at once; `mark_prompts`, `bypassed` and `acting` hold for the thread that
    opens them. A deep copy of the model has a copy of the adaptor, which is removed by itself.
    """

    def __init__(
        self,
        decoder: nn.Module,
        site: Site,
        router: LiveRouter,
        experts: ExpertSource,
        layer_read: nn.Module | None = None,
        owner: object | None = None,
        dormant: bool = False,
    ):
        """Insert experts.

        Args:
            layer_read: the decoder layer whose incoming hidden states the router reads, if it reads any.
            owner: what the experts come from; a KV cache goes on with experts of the same owner alone. By default they
                come from nothing else.
            dormant: they act only where `acting` is open.
        """
        self.site = site
        self.router = router
        self._experts = experts
        self._owner = self if owner is None else owner
        self._signature = inspect.signature(decoder.forward)
        self._reads_layer = layer_read is not None
        self._dormant = dormant
        self._thread = _ThreadState(dormant)
        self._hooks: list[RemovableHandle] = [
            decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            decoder.register_forward_hook(self._after_forward),
            site.entry.register_forward_pre_hook(self._before_ffn),
            site.exit.register_forward_hook(self._after_ffn),
        ]
        if layer_read is not None:
            self._hooks.append(layer_read.register_forward_pre_hook(self._before_layer_read, with_kwargs=True))
        _forget_compiled()

    def remove(self) -> None:
        """Take the experts out; the model then gives bit-identical logits to before. Harmless if repeated."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            _forget_compiled()
        self._hooks.clear()

    @property
    def removed(self) -> bool:
        """Whether the experts have been taken out."""
        return not self._hooks

    @contextmanager
    def mark_prompts(self, columns: Tensor | int) -> Iterator[None]:
        """While open, forward passes that start a sequence take their first `columns` columns as its prompt.

        Args:
            columns: one number, or one for each row `[batch]`; padding on the left counts as columns.
        """
        before, self._thread.prompt_columns = self._thread.prompt_columns, columns
        try:
            yield
        finally:
            self._thread.prompt_columns = before

    def bypassed(self) -> AbstractContextManager[None]:
        """While open, the model answers as its base."""
        return self._with_bypass(True)

    def acting(self) -> AbstractContextManager[None]:
        """While open, the experts act, dormant as they may be."""
        return self._with_bypass(False)

    @contextmanager
    def _with_bypass(self, bypass: bool) -> Iterator[None]:
        before, self._thread.bypass = self._thread.bypass, bypass
        try:
            yield
        finally:
            self._thread.bypass = before

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

    def __deepcopy__(self, memo: dict[int, Any]) -> "LiveAdaptor":
        """A copy in the copied model, with the same experts."""
        copied = memo[id(self)] = copy.copy(self)
        memo |= {id(shared): shared for shared in (self._owner, self._experts) if shared is not self}
        copied.__dict__ |= {
            name: copy.deepcopy(value, memo) for name, value in self.__dict__.items() if name != "_thread"
        }
        copied._thread = _ThreadState(self._dormant)
        return copied

    def __copy__(self) -> "LiveAdaptor":
        copied = object.__new__(type(self))
        copied.__dict__ |= self.__dict__
        return copied

    def __reduce__(self) -> NoReturn:
        raise AdaptorError("a model with an adaptor inserted cannot be pickled: remove it, and keep its file instead")

    @not_compiled
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments = None) -> None:
        self._thread.current = None
        if self._thread.bypass or kwargs is None:
            return
        call = self._signature.bind_partial(*args, **kwargs).arguments
        _refuse_what_cannot_be_routed(module, self.site, call, kwargs)
        ids, embeddings = call.get("input_ids"), call.get("inputs_embeds")
        given = embeddings if ids is None else ids
        assert given is not None, "transformers calls a decoder with ids or embeddings"
        memory = self._recall(_find_cache(call), len(given))
        mask = _token_mask(given, call.get("attention_mask"), 0 if memory is None else memory.shape[1])
        prompt = mask & _prompt_columns(given, self._thread.prompt_columns)
        starts = _packed_starts(call.get("position_ids"), call.get("attention_mask"), mask) if memory is None else None
        sequences = Sequences(ids, embeddings, mask, prompt, memory, starts=starts).to(self.router.device)
        self._thread.current = _ForwardPass(sequences)
        if not self._reads_layer:
            self._route()

    def _recall(self, cache: Any, rows: int) -> Tensor | None:
        """What the router remembers of the sequences in a cache, `[batch, past, k]`; None at their start."""
        if not isinstance(cache, Cache):
            return None
        memory, length = memory_of(cache), cached_length(cache)
        if memory is None and length:
            raise AdaptorError("this KV cache was filled without the adaptor; start it anew with the adaptor inserted")
        if memory is None:
            return None
        memory.check(self._owner, rows, length)
        return memory.cells if memory.cells.shape[1] else None

    @not_compiled
    def _before_layer_read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments = None) -> None:
        current = self._thread.current
        if current is None or current.routing is not None or kwargs is None:
            return
        hidden = hidden_argument(args, kwargs)
        shape = current.sequences.mask.shape
        current.sequences = replace(current.sequences, hidden=hidden.reshape(*shape, -1).to(self.router.device))
        self._route()

    def _route(self) -> None:
        current = self._thread.current
        assert current is not None
        current.routing, current.memory = self.router.route(current.sequences)
        self._experts.prefetch(current.routing)

    @not_compiled
    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        finished, self._thread.current = self._thread.current, None
        cache = _find_cache(output)
        if finished is not None and finished.memory is not None and isinstance(cache, Cache):
            remember(cache, self._owner, finished.memory)

    @not_compiled
    def _before_ffn(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._thread.bypass:
            return
        if self._thread.current is None:
            raise AdaptorError("the edited layer was called outside a forward pass of the model")
        self._thread.current.ffn_input = args[0]

    @not_compiled
    def _after_ffn(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        current = self._thread.current
        if current is None or current.ffn_input is None:
            return None  # bypassed, or the layer did not run: its output is replaced
        inputs, current.ffn_input = current.ffn_input, None
        assert current.routing is not None
        shaped = inputs.reshape(*current.routing.experts.shape[:2], inputs.shape[-1])  # OPT flattens batch and sequence
        change = self.delta(shaped, current.routing)
        return None if change is None else add_to_output(output, change.reshape(inputs.shape))


def _forget_compiled() -> None:
    """Compile anew what was compiled: compiled code does not notice hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _find_cache(holder: Any) -> Any:
    """The KV cache among a decoder's arguments, or in its output; state-space models have their own name for it."""
    get = holder.get if isinstance(holder, dict) else lambda name: getattr(holder, name, None)
    return get("past_key_values") if get("past_key_values") is not None else get("cache_params")


def _refuse_what_cannot_be_routed(decoder: nn.Module, site: Site, call: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Refuse ways to run a model in which no route could be right.

    Raises:
        AdaptorError: saying what to do instead.
    """
    if "block_table" in kwargs or kwargs.get("cache") is not None:
        raise AdaptorError(
            "transformers' continuous batching keeps many requests in one row, in a cache that no route can travel "
            "with; serve edits with `lemoe serve` or with vLLM"
        )
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in (decoder, site.exit))
    if checkpointed and decoder.training and torch.is_grad_enabled():
        raise AdaptorError(
            "gradient checkpointing runs layers a second time, outside a forward pass, where no route is known; call "
            "model.gradient_checkpointing_disable() while the adaptor is inserted"
        )


def _token_mask(given: Tensor, attention_mask: Any, past: int) -> Tensor:
    """`[batch, seq]`: which of the new positions, behind `past` others, are tokens, not padding.

    `generate` gives static caches masks `[batch, 1, seq, length]`, one for each kind of layer, in which nothing attends
    to padding, not even itself. Layers with a window keep the last positions alone.
    """
    batch, length = given.shape[:2]
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()), None)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool()
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        first = min(past, attention_mask.shape[3] - length)
        itself = attention_mask[:, 0, :, first : first + length].diagonal(dim1=1, dim2=2)
        return (itself if itself.dtype == torch.bool else itself == 0).expand(batch, length)
    return torch.ones((batch, length), dtype=torch.bool, device=given.device)


def _packed_starts(positions: Tensor | None, attention_mask: Any, tokens: Tensor) -> Tensor | None:
    """`[batch, seq]`: where another sequence begins in a row, told by positions that start anew; None for nowhere.

    Beside a padding mask `[batch, length]`, rows are not shared. `tokens` `[batch, seq]` tells tokens from padding.
    """
    if positions is None or positions.dim() != 2 or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
        return None
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = (positions[:, 1:] <= positions[:, :-1]) & tokens[:, 1:] & tokens[:, :-1]
    return starts if bool(starts.any()) else None


def _prompt_columns(given: Tensor, columns: Tensor | int | None) -> Tensor:
    """`[batch or 1, seq]`: which of the new positions are the prompt's."""
    positions = torch.arange(given.shape[1], device=given.device).unsqueeze(0)
    if columns is None:
        return positions >= 0
    return positions < torch.as_tensor(columns, device=given.device).reshape(-1, 1)
