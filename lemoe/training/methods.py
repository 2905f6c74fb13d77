"""The methods that presets name: one record holds what the rest of the code needs to know of each.

Nothing here imports torch, so that a command can refuse early what a method cannot do.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lemoe.errors import InputError
from lemoe.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lemoe.adaptor.state import AdaptorState
    from lemoe.base.loading import BaseModel
    from lemoe.data.edits import Edit
    from lemoe.routing.router import Router
    from lemoe.training.steps import OnStep


class RoundTrainer(Protocol):
    """Trains one round; `before` is the result of the earlier rounds, None for the first."""

    def __call__(
        self, base: "BaseModel", edits: "Sequence[Edit]", settings: Settings, before: Any, on_step: "OnStep"
    ) -> Any: ...


@dataclass(frozen=True)
class Method:
    """A way to train edits.

    Attributes:
        name: of the method, of its preset and, where it adds experts, of its router.
        module: in `lemoe.training`; its `train_round` is a `RoundTrainer`.
        rounds_depend: whether the training of a round depends on the rounds before it.
        baseline: whether rounds can neither be separated nor stacked, since a round changes what earlier ones learned,
            or nothing is trained. Then `train_round` returns the result of all rounds so far, else the new round alone.
    """

    name: str
    module: str
    rounds_depend: bool = True
    baseline: bool = False

    @property
    def train_round(self) -> RoundTrainer:
        """The function that trains a round.

        Raises:
            LemoeError: if it needs a package that is not installed.
        """
        trainer: RoundTrainer = importlib.import_module(f"lemoe.training.{self.module}").train_round
        return trainer

    @property
    def router(self) -> "type[Router] | None":
        """The router class of its adaptors; None for a method that changes weights."""
        from lemoe.routing.registry import ROUTERS

        return ROUTERS.get(self.name)


METHODS = {
    method.name: method
    for method in (
        Method("anchor", "anchor.round", rounds_depend=False),
        Method("paper", "paper"),
        Method("context", "baselines.context", baseline=True),
        Method("rag", "baselines.context", baseline=True),
        Method("ft", "baselines.ft", baseline=True),
        Method("rect", "baselines.ft", baseline=True),
        Method("lora", "baselines.lora", baseline=True),
        Method("lora-merge", "baselines.lora_merge", baseline=True),
        Method("memoe", "baselines.memoe", baseline=True),
        Method("grace", "baselines.grace", baseline=True),
        Method("ultraedit", "baselines.ultraedit", baseline=True),
    )
}


def method_of(settings: Settings) -> Method:
    """The method that `settings` name."""
    return METHODS[settings.method]


def check_installed(chosen: "Iterable[Settings]") -> None:
    """Refuse, before anything is trained, a method that needs a package that is not installed.

    Raises:
        LemoeError: saying what to install.
    """
    for settings in chosen:
        _ = method_of(settings).train_round


def check_adds_experts(settings: Settings) -> None:
    """Refuse a method whose rounds can neither be separated nor stacked.

    Raises:
        InputError: saying what it is for.
    """
    if method_of(settings).baseline:
        name = settings.method
        raise InputError(f"preset {name} is a baseline, for comparison alone: `compare` measures it")


def parent_round(settings: Settings, before: "AdaptorState | None") -> str | None:
    """The id of the round that a new one depends on."""
    return before.rounds[-1].id if before and method_of(settings).rounds_depend else None
