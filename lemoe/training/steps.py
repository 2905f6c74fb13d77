"""The training loop that methods share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from lemoe.settings import Settings


@dataclass(frozen=True)
class Step:
    """Progress inside a round: `loss` is the mean cross entropy of target tokens (nats) before step `number`."""

    number: int
    total: int
    loss: float


OnStep = Callable[[Step], None]


def fit_round(
    optimiser: Optimizer,
    losses: Callable[[], Iterable[Tensor]],
    settings: Settings,
    on_step: OnStep,
    constrain: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Take all batches of a round at each step, until the loss target is reached or the steps are used up.

    Args:
        losses: gives the parts, one per batch, of the mean cross entropy of the round's target tokens.
        constrain: called after each step.

    Returns:
        the loss when training ended (nats), and the steps taken.
    """
    number = 0
    while True:
        optimiser.zero_grad()
        loss = 0.0
        for part in losses():
            loss += float(part.detach())
            if number < settings.steps:
                part.backward()
        on_step(Step(number, settings.steps, loss))
        if loss < settings.loss_target or number == settings.steps:
            return loss, number
        optimiser.step()
        constrain()
        number += 1
