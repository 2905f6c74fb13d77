"""Every way of teaching edits, baselines included, behind one interface: what a model has become after each round."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from lemoe.adaptor.checkpoint import tensors_of
from lemoe.adaptor.state import AdaptorState, stack
from lemoe.base.loading import BaseModel
from lemoe.base.matmul import fast_products
from lemoe.data.edits import Edit
from lemoe.settings import Settings
from lemoe.training.methods import train_round
from lemoe.training.steps import OnStep
from lemoe.training.weight_change import WeightChange

Edited = AdaptorState | WeightChange
T = TypeVar("T")


class Editor(Protocol[T]):
    """Teaches one round to what earlier rounds have made of the model, and gives what it is then."""

    def __call__(
        self, base: BaseModel, edits: Sequence[Edit], settings: Settings, before: T | None, on_step: OnStep
    ) -> T: ...


def editor_of(method: str) -> Editor[Any]:
    """The editor of a method.

    Raises:
        LemoeError: if it needs a package that is not installed.
    """
    if method == "ft":
        from lemoe.training import ft

        return ft.train
    if method == "lora":
        from lemoe.training import lora

        return lora.train
    if method == "memoe":
        from lemoe.training import memoe

        return memoe.train
    return _add_round


def _add_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: AdaptorState | None, on_step: OnStep
) -> AdaptorState:
    new = train_round(base, edits, settings, before, on_step)
    return stack([before, new]) if before else new


def teach(
    base: BaseModel,
    rounds: Sequence[Sequence[Edit]],
    settings: Settings,
    on_step: OnStep = lambda step: None,
) -> Iterator[Edited]:
    """Teach `rounds` one after the other by the method of `settings`; yields what the model is after each.

    Raises:
        InputError: listing the edits of a round that cannot be used with this model.
        LemoeError: if the method needs a package that is not installed.
        ModelError: if it changes weights of the base, and a device map keeps some of them off the devices.
    """
    train = editor_of(settings.method)
    edited: Edited | None = None
    for members in rounds:
        with fast_products(base.model):
            edited = train(base, members, settings, edited, on_step)
        yield edited


def size_of(edited: Edited) -> int:
    """Bytes of all tensors that a file of it holds or would hold."""
    tensors = tensors_of(edited).values() if isinstance(edited, AdaptorState) else edited.tensors()
    return sum(tensor.nbytes for tensor in tensors)
