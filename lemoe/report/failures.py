"""The probes that went worst, each with its route and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lemoe.data.edits import Edit
from lemoe.evaluation.evaluate import Record
from lemoe.report.routes import Destination, GateMeasure, OwnExperts
from lemoe.report.text import clean_text

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


def find_failures(
    records: Sequence[Record],
    edits: Sequence[Edit],
    own_experts: OwnExperts,
    numbers: Mapping[str, int],
    measure: GateMeasure | None,
) -> tuple[Failures, ...]:
    """The worst failures of each metric: those with the least right first, and among them those that were right before.

    Args:
        numbers: the round of each edit, by id.
        measure: of the gate; None where there is none.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.name, []).append(record)
    named = {edit.id: _describe_edit(edit, numbers) for edit in edits}
    found = []
    for name, group in groups.items():
        failed = [record for record in group if record.token_accuracy_after < 1.0]
        failed.sort(key=lambda record: (record.token_accuracy_after, -record.token_accuracy_before))
        worst = [
            _describe_failure(record, own_experts.find_destination(record), named, measure)
            for record in failed[:FAILURES_SHOWN]
        ]
        found.append(Failures(name, tuple(worst), len(failed), len(group)))
    return tuple(found)


def _describe_failure(
    record: Record, went: Destination, named: Mapping[str, str], measure: GateMeasure | None
) -> Failure:
    return Failure(
        edit=clean_text(record.edit, ID_SHOWN),
        kind=clean_text(record.kind, ID_SHOWN),
        prompt=clean_text(record.prompt),
        expected=clean_text(record.expected),
        before=clean_text(record.before),
        after=clean_text(record.after),
        accuracy=record.token_accuracy_after,
        why=_explain_route(record, went, named),
        scores="" if measure is None or record.nearest is None else _describe_scores(record, measure),
    )


def _describe_edit(edit: Edit, numbers: Mapping[str, int]) -> str:
    """An edit by its name, its round and what it teaches."""
    where = f"round {numbers[edit.id]}, " if edit.id in numbers else ""
    return f"{clean_text(edit.id, ID_SHOWN)} ({where}target “{clean_text(edit.target, ID_SHOWN)}”)"


def _explain_route(record: Record, went: Destination, named: Mapping[str, str]) -> str:
    if went == "own":
        return "reached the edit’s own expert"
    if went == "subject":
        return "no expert, mentions no edit’s subject"
    nearest = record.nearest or ""
    other = named.get(nearest, clean_text(nearest, ID_SHOWN))
    if went == "other":
        return f"reached the expert of {other}"
    of = "the edit’s subject" if nearest == record.edit else f"the subject of {other}"
    return f"no expert, mentions {of} but is read as another question"


def _describe_scores(record: Record, measure: GateMeasure) -> str:
    route, value = record.route, measure.score(record.route)
    sign = "≤" if value <= measure.threshold else ">"
    meaning = f", meaning {route.meaning:.1f}" if measure.name == "doubt" else f", fit {route.fit:.2f}"
    return f"{measure.name} {value:.2f} {sign} {measure.threshold:.2f}, coverage {route.coverage:.2f}{meaning}"
