"""The methods that presets name, each behind the same interface: a way to train a round."""

from collections.abc import Sequence

from lemoe.adaptor.state import AdaptorState
from lemoe.base.loading import BaseModel
from lemoe.base.matmul import fast_products
from lemoe.data.edits import Edit
from lemoe.errors import InputError
from lemoe.settings import Settings
from lemoe.training import paper as paper_training
from lemoe.training.anchor import round as anchor_training
from lemoe.training.steps import OnStep

BASELINES = ("ft", "lora", "memoe")


def check_adds_experts(settings: Settings) -> None:
    """Refuse a method that adds no experts, so that its rounds can neither be kept apart nor stacked.

    Raises:
        InputError: saying what it is for.
    """
    if settings.method in BASELINES:
        name = settings.method
        raise InputError(f"preset {name} is a baseline, for comparison alone: lemoe eval EDITS --compare {name}")


def rounds_depend(settings: Settings) -> bool:
    """Whether a round is trained beside those before it; with method `anchor` none is."""
    return settings.rounds_depend


def parent_of(settings: Settings, before: AdaptorState | None) -> str | None:
    """The round that a new one depends on."""
    return before.rounds[-1].id if before and rounds_depend(settings) else None


def train_round(
    base: BaseModel,
    edits: Sequence[Edit],
    settings: Settings,
    before: AdaptorState | None = None,
    on_step: OnStep = lambda step: None,
) -> AdaptorState:
    """Teach `edits` as one round, by the method of `settings`, beside the frozen experts of `before`.

    With method `anchor` a round does not depend on those before it; `before` only says the layer.

    Returns:
        a state with this round alone; stack it onto `before`.

    Raises:
        InputError: listing the edits that cannot be used with this model, or if there are none; or for a baseline.
    """
    check_adds_experts(settings)
    if not edits:
        raise InputError("a round needs at least one edit")
    train = anchor_training.train_round if settings.method == "anchor" else paper_training.train_round
    with fast_products(base.model):
        return train(base, edits, settings, before, on_step)
