"""One method with several values of its settings: the same edits taught with each combination, and measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lemoe.base.embedded import Notify
from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit
from lemoe.evaluation.comparison import MethodResult, measure_method
from lemoe.evaluation.metrics import Decode
from lemoe.planning.plan import edits_by_round, plan
from lemoe.settings import Settings
from lemoe.training.methods import check_installed


@dataclass(frozen=True)
class Sweep:
    """Metrics of one method for each combination of settings.

    Attributes:
        varied: names of the settings that were varied.
        edit_count: how many edits were taught each time.
        results: one for each combination, the last setting's values changing fastest.
    """

    varied: tuple[str, ...]
    edit_count: int
    results: tuple[MethodResult, ...]

    def values(self, result: MethodResult) -> tuple[Any, ...]:
        """What the varied settings were for one of the results."""
        return tuple(getattr(result.settings, name) for name in self.varied)


def sweep(
    base: BaseModel,
    edits: Sequence[Edit],
    combinations: Sequence[Settings],
    varied: Sequence[str],
    *,
    decode: Decode = "teacher",
    batch_tokens: int = 4096,
    notify: Notify = lambda stage: None,
) -> Sweep:
    """Teach `edits` with each of `combinations`, in the rounds that it plans, and measure what came of it.

    Args:
        varied: names of the settings in which the combinations differ.

    Raises:
        InputError: listing the edits and probes that cannot be used with this model.
        LemoeError: if the method needs a package that is not installed, before anything is trained.
    """
    check_installed(combinations)
    results = []
    for number, settings in enumerate(combinations, 1):
        values = ", ".join(f"{name} {getattr(settings, name)}" for name in varied)
        notify(f"{number} of {len(combinations)}: {values}")
        rounds = edits_by_round(plan(base, edits, settings), edits)
        results.append(measure_method(base, rounds, settings, decode, batch_tokens))
    return Sweep(tuple(varied), sum(map(len, rounds)), tuple(results))
