"""Editing by changed weights, which are stored apart from the base model, and applied to it and removed again."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.base.loading import BaseModel
from lemoe.base.placement import is_offloaded
from lemoe.errors import ModelError


class WeightChange(ABC):
    """Weights that replace a base model's own, or are added to them."""

    @abstractmethod
    def tensors(self) -> Sequence[Tensor]:
        """All tensors that a file would have to hold."""

    @abstractmethod
    def applied(self, base: BaseModel) -> AbstractContextManager[None]:
        """While open, `base` is the changed model; afterwards it is as before, bit for bit."""


@dataclass(frozen=True, eq=False)
class AddedWeights(TensorEquality, WeightChange):
    """What is added to the weights of linear maps.

    Attributes:
        paths: of the maps in the model.
        changes: one for each, of its weight's shape.
    """

    paths: tuple[str, ...]
    changes: tuple[Tensor, ...]

    def tensors(self) -> Sequence[Tensor]:
        return self.changes

    @contextmanager
    def applied(self, base: BaseModel) -> Iterator[None]:
        check_resident(base)
        weights = [base.model.get_submodule(path).weight for path in self.paths]
        sums = [weight + change.to(weight) for weight, change in zip(weights, self.changes, strict=True)]
        with swap_values(weights, sums):
            yield


def add_up(before: AddedWeights | None, changes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The `changes` of a round on top of those of earlier rounds."""
    if before is None:
        return tuple(changes)
    return tuple(earlier + change for earlier, change in zip(before.changes, changes, strict=True))


def check_resident(base: BaseModel) -> None:
    """Refuse a base with offloaded weights, which are loaded anew for each use: a change of them would be lost.

    Raises:
        ModelError: saying what to do.
    """
    if is_offloaded(base.model):
        raise ModelError(
            "this baseline changes the base's own weights, some of which the device map keeps off the devices; compare "
            "other methods, or take more devices"
        )


@contextmanager
def swap_values(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """While open, `parameters` hold `values`, not copies of them; their own data is neither copied nor changed."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value.to(parameter.device)
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


@contextmanager
def require_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """While open, `parameters` require gradients; afterwards they do not, and their gradients are freed."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
