"""Where rounds are trained: in this process, or by workers on other machines."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from lemoe.adaptor.state import AdaptorState
from lemoe.base.loading import BaseModel
from lemoe.data.edits import Round
from lemoe.runs.progress import ProgressCallback
from lemoe.settings import Settings


class Engine(Protocol):
    """Trains rounds that do not depend on each other."""

    def train(
        self,
        base: BaseModel,
        rounds: Sequence[Round],
        settings: Settings,
        before: AdaptorState | None,
        progress: ProgressCallback,
    ) -> Iterator[tuple[Round, AdaptorState]]:
        """Give each round's state as soon as it is trained, in any order; see `lemoe.training.rounds.train_round`."""
        ...
