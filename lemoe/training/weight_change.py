"""Editing by other weights: what a model has become, apart from the model, to be put in and taken out again."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

from lemoe.base.loading import BaseModel
from lemoe.base.placement import is_offloaded
from lemoe.errors import ModelError


class WeightChange(ABC):
    """Weights that a base model answers with instead of its own, or beside them."""

    @abstractmethod
    def tensors(self) -> Sequence[Tensor]:
        """Everything that a file would have to hold."""

    @abstractmethod
    def applied(self, base: BaseModel) -> AbstractContextManager[None]:
        """While open, `base` is the changed model; afterwards it is what it was, bit for bit."""


def check_resident(base: BaseModel) -> None:
    """Refuse a base of which some weights are brought in anew whenever they are needed: no change would last.

    Raises:
        ModelError: saying what to do.
    """
    if is_offloaded(base.model):
        raise ModelError(
            "baselines ft and lora change the base's own weights, some of which the device map keeps off the devices; "
            "compare other methods, or take more devices"
        )


@contextmanager
def swapped(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """While open, `parameters` are `values`, the very tensors; their own are neither copied nor changed."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value.to(parameter.device)
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


@contextmanager
def trainable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """While open, gradients reach `parameters`; afterwards none are left."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
