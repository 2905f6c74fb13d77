"""The methods that presets name: one record tells the rest of the code what it needs to know of each.

Nothing here loads torch, so that a command can refuse what a method cannot do before anything heavy is read.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lemoe.errors import InputError
from lemoe.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lemoe.adaptor.state import AdaptorState
    from lemoe.base.loading import BaseModel
    from lemoe.data.edits import Edit
    from lemoe.routing.router import Router
    from lemoe.training.steps import OnStep


class RoundTrainer(Protocol):
    """Teaches one round after what earlier rounds have made of the model (`before`, None for the first)."""

    def __call__(
        self, base: "BaseModel", edits: "Sequence[Edit]", settings: Settings, before: Any, on_step: "OnStep"
    ) -> Any: ...


@dataclass(frozen=True)
class Method:
    """A way to teach edits.

    Attributes:
        name: of the method, of its preset and, where it adds experts, of its router.
        module: below `lemoe.training`; its `train_round` is a `RoundTrainer`.
        rounds_depend: whether a round is trained beside those before it.
        baseline: whether a round rewrites what earlier ones taught, so that rounds can neither be kept apart nor
            stacked. Then `train_round` gives all that has been taught so far, else the new round alone.
    """

    name: str
    module: str
    rounds_depend: bool = True
    baseline: bool = False

    @property
    def train_round(self) -> RoundTrainer:
        """What trains a round.

        Raises:
            LemoeError: if it needs a package that is not installed.
        """
        trainer: RoundTrainer = importlib.import_module(f"lemoe.training.{self.module}").train_round
        return trainer

    @property
    def router(self) -> "type[Router] | None":
        """How its adaptors route; None where it changes weights."""
        from lemoe.routing.registry import ROUTERS

        return ROUTERS.get(self.name)


METHODS = {
    method.name: method
    for method in (
        Method("anchor", "anchor.round", rounds_depend=False),
        Method("paper", "paper"),
        Method("ft", "ft", baseline=True),
        Method("lora", "lora", baseline=True),
        Method("memoe", "memoe", baseline=True),
    )
}


def method_of(settings: Settings) -> Method:
    """The method that `settings` name."""
    return METHODS[settings.method]


def check_adds_experts(settings: Settings) -> None:
    """Refuse a method whose rounds can neither be kept apart nor stacked.

    Raises:
        InputError: saying what it is for.
    """
    if method_of(settings).baseline:
        name = settings.method
        raise InputError(f"preset {name} is a baseline, for comparison alone: lemoe eval EDITS --compare {name}")


def parent_round(settings: Settings, before: "AdaptorState | None") -> str | None:
    """The id of the round that a new one depends on."""
    return before.rounds[-1].id if before and method_of(settings).rounds_depend else None
