"""What training a round has in common, whatever the method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lemoe.edits import Edit
from lemoe.models import BaseModel
from lemoe.tokens import Passage, encode_all


@dataclass(frozen=True)
class Step:
    """Progress inside a round: `loss` is the mean cross entropy of target tokens (nats) before step `number`."""

    number: int
    of: int
    loss: float


OnStep = Callable[[Step], None]


def encode_edits(base: BaseModel, edits: Sequence[Edit]) -> list[Passage]:
    """Token ids of each edit's prompt and target.

    Raises:
        InputError: listing the edits that cannot be used with this model.
    """
    return encode_all(base, ((f"edit {edit.id}", edit.prompt, edit.target) for edit in edits))
