"""The probes that went worst, each with its route and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lemoe.evaluation import Record
from lemoe.report.routes import Destination, Homes
from lemoe.report.text import shown

FAILURES_SHOWN = 10  # of each metric
ID_SHOWN = 60  # characters of an edit's name


@dataclass(frozen=True)
class Failure:
    """A probe that is not answered as expected; all texts fit to be shown.

    Attributes:
        accuracy: share of the expected tokens that the edited model gives.
        why: how the prompt was routed.
        scores: what the gate made of it; empty where there is no gate, or nothing to score.
    """

    edit: str
    kind: str
    prompt: str
    expected: str
    before: str
    after: str
    accuracy: float
    why: str
    scores: str


@dataclass(frozen=True)
class Failures:
    """The worst of a metric's probes that fail, and how many fail of how many."""

    name: str
    worst: tuple[Failure, ...]
    failed: int
    probes: int


def failures(
    records: Sequence[Record], homes: Homes, numbers: Mapping[str, int], threshold: float | None
) -> tuple[Failures, ...]:
    """The worst failures of each metric: those with the least right first, and among them those that were right before.

    Args:
        numbers: the round of each edit, by id.
        threshold: of the gate; None where there is none.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.name, []).append(record)
    found = []
    for name, group in groups.items():
        failed = [record for record in group if record.token_accuracy_after < 1.0]
        failed.sort(key=lambda record: (record.token_accuracy_after, -record.token_accuracy_before))
        worst = [_failure(record, homes.destination(record), numbers, threshold) for record in failed[:FAILURES_SHOWN]]
        found.append(Failures(name, tuple(worst), len(failed), len(group)))
    return tuple(found)


def _failure(record: Record, went: Destination, numbers: Mapping[str, int], threshold: float | None) -> Failure:
    return Failure(
        edit=shown(record.edit, ID_SHOWN),
        kind=shown(record.kind, ID_SHOWN),
        prompt=shown(record.prompt),
        expected=shown(record.expected),
        before=shown(record.before),
        after=shown(record.after),
        accuracy=record.token_accuracy_after,
        why=_why(record, went, numbers),
        scores="" if threshold is None or record.nearest is None else _scores(record, threshold),
    )


def _why(record: Record, went: Destination, numbers: Mapping[str, int]) -> str:
    if went == "own":
        return "reached the edit's own expert"
    if went == "subject":
        return "no expert: mentions no edit's subject"
    nearest = record.nearest or ""
    named = f"edit {shown(nearest, ID_SHOWN)}" + (f" (round {numbers[nearest]})" if nearest in numbers else "")
    if went == "other":
        return f"reached the expert of {named}"
    if nearest == record.edit:
        return "no expert: mentions the edit's subject, but another question is read"
    return f"no expert: mentions the subject of {named}, but another question is read"


def _scores(record: Record, threshold: float) -> str:
    route = record.route
    sign = "≤" if route.conflict <= threshold else ">"
    return (
        f"conflict {route.conflict:.2f} {sign} {threshold:.2f}, coverage {route.coverage:.2f}, fit {route.fit:.2f}"
    )
