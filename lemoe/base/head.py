"""Logits from the decoder's output, computed by the model's own code.

Families scale or cap hidden states or logits there, or have more than one module; so the model itself is called, with
its decoder replaced by a module that returns the hidden states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lemoe.base.matmul import frozen_linear
from lemoe.base.placement import index_on_device, own_weights
from lemoe.errors import ModelError


class ModelHead:
    """The part of `model` after its decoder."""

    def __init__(self, model: nn.Module, decoder_path: str, head: nn.Linear, output_class: Callable[..., Any]):
        """Prepare to compute logits.

        Args:
            decoder_path: path of the decoder in the model.
            head: the model's output embeddings.
            output_class: of the decoder's output.

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
        """Logits `[..., vocab]` of the decoder's output, `[..., width]`."""
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=hidden.device)
        with self._replace_decoder_output(rows):
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def logits_over(self, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that gives logits `[..., tokens]` over `token_ids` alone."""
        weights = own_weights(self._head).items()
        chosen = {name: index_on_device(value, token_ids).to(token_ids.device) for name, value in weights}
        weight, bias = chosen["weight"], chosen.get("bias")

        def run_rows(inputs: Tensor) -> Tensor:
            return frozen_linear(inputs.to(weight.device), weight, bias)

        def compute_logits(hidden: Tensor) -> Tensor:
            with replaced_forward([self._head], run_rows):
                return self.logits(hidden)

        return compute_logits

    @contextmanager
    def _replace_decoder_output(self, hidden: Tensor) -> Iterator[None]:
        """While open, neither the decoder nor any hook on it runs, and it returns `hidden`."""
        decoder = self._parent.get_submodule(self._name)
        setattr(self._parent, self._name, _FixedOutput(decoder, self._output_class(last_hidden_state=hidden)))
        try:
            yield
        finally:
            setattr(self._parent, self._name, decoder)


class _FixedOutput(nn.Module):
    """Replaces a module: it returns `output` and has the module's attributes."""

    def __init__(self, module: nn.Module, output: Any):
        super().__init__()
        self.__dict__.update(_replaced=module, _output=output)  # not as a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_replaced"], name)


@contextmanager
def replaced_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """While open, `modules` run `forward` in place of their own."""
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
