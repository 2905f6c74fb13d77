"""From what the decoder gives to logits, by the model's own code.

Between the two, families scale hidden states or logits, cap them, or put more than one module; so the model itself is
called, with something in its decoder's place that gives the hidden states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lemoe.base.matmul import frozen_linear
from lemoe.base.placement import own_weights, taken
from lemoe.errors import ModelError


class ModelHead:
    """The part of `model` behind its decoder."""

    def __init__(self, model: nn.Module, decoder_path: str, head: nn.Linear, output_class: Callable[..., Any]):
        """See `logits`.

        Args:
            decoder_path: of the decoder in the model.
            head: the model's output embeddings.
            output_class: of what the decoder gives.

        Raises:
            ModelError: if the model is its own decoder.
        """
        if not decoder_path:
            raise ModelError(
                f"{type(model).__name__}: its layers are not in a decoder of their own, apart from its head"
            )
        parent, _, self._name = decoder_path.rpartition(".")
        self._parent = model.get_submodule(parent)
        self._model, self._head, self._output_class = model, head, output_class

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocab]` for what the decoder gives, `[..., width]`."""
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=hidden.device)
        with self._decoder_gives(rows):
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def logits_over(self, words: Tensor) -> Callable[[Tensor], Tensor]:
        """What gives logits `[..., words]` over the token ids `words` alone."""
        chosen = {name: taken(value, words).to(words.device) for name, value in own_weights(self._head).items()}
        weight, bias = chosen["weight"], chosen.get("bias")

        def over_words(inputs: Tensor) -> Tensor:
            return frozen_linear(inputs.to(weight.device), weight, bias)

        def logits(hidden: Tensor) -> Tensor:
            with replaced_forward([self._head], over_words):
                return self.logits(hidden)

        return logits

    @contextmanager
    def _decoder_gives(self, hidden: Tensor) -> Iterator[None]:
        """While open, the decoder does not run, nor any hook on it, and gives `hidden`."""
        decoder = self._parent.get_submodule(self._name)
        setattr(self._parent, self._name, _Given(decoder, self._output_class(last_hidden_state=hidden)))
        try:
            yield
        finally:
            setattr(self._parent, self._name, decoder)


class _Given(nn.Module):
    """In the place of a module: it gives `output`, and has the module's attributes."""

    def __init__(self, module: nn.Module, output: Any):
        super().__init__()
        self.__dict__.update(_replaced=module, _output=output)  # not as a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_replaced"], name)


@contextmanager
def replaced_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """While open, `modules` do nothing but call `forward`."""
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own
