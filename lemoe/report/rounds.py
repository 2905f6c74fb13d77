"""Quality round by round: how each round's edits are answered after the last one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lemoe.adaptor.state import AdaptorState
from lemoe.data.edits import Edit
from lemoe.evaluation.evaluate import EvalResult, Record
from lemoe.evaluation.metrics import Decode, Metric, mean_metric
from lemoe.report.studies import Matrix

ROUNDS_SHOWN = 40  # beyond which a plot holds evenly spread ones

Item = TypeVar("Item")


@dataclass(frozen=True)
class RoundQuality:
    """One round: how many of its edits were measured, and their metrics (token accuracy) after the last round."""

    number: int
    edits: int
    reliability: Metric | None
    generality: Metric | None
    agreement: Metric | None


@dataclass(frozen=True)
class Forgetting:
    """A metric of each round (row) after each round (column), None before it was taught.

    Attributes:
        numbers: of the rounds that are shown.
        total: how many rounds there are.
    """

    values: Matrix
    numbers: tuple[int, ...]
    total: int


def round_numbers(state: AdaptorState | None, edits: Sequence[Edit]) -> dict[str, int]:
    """The round, from 1, of each edit (by id) that the adaptor holds."""
    rounds = state.rounds if state else ()
    held = {digest: number for number, record in enumerate(rounds, 1) for digest in record.edits}
    return {edit.id: held[edit.digest] for edit in edits if edit.digest in held}


def score_rounds(result: EvalResult, numbers: Mapping[str, int], decode: Decode) -> tuple[RoundQuality, ...]:
    """The metrics of every round that has measured edits."""
    agreement = {m.kind: m for m in result.metrics if (m.name, m.measure) == ("routing", "agreement")}
    records: dict[int, list[Record]] = {number: [] for number in sorted(set(numbers.values()))}
    for record in result.records:
        if record.edit in numbers:
            records[numbers[record.edit]].append(record)
    return tuple(
        RoundQuality(
            number=number,
            edits=sum(other == number for other in numbers.values()),
            reliability=_mean_accuracy("reliability", number, of_round, decode),
            generality=_mean_accuracy("generality", number, of_round, decode),
            agreement=agreement.get(f"round {number}"),
        )
        for number, of_round in records.items()
    )


def _mean_accuracy(name: str, number: int, records: Sequence[Record], decode: Decode) -> Metric | None:
    scores = [record.token_accuracy_after for record in records if record.name == name]
    return mean_metric(name, f"round {number}", "token_accuracy", decode, "after", scores) if scores else None


def build_forgetting(matrix: Matrix) -> Forgetting:
    """The matrix, of evenly spread rounds where it has too many."""
    indices = pick_evenly(range(len(matrix)), ROUNDS_SHOWN)
    values = tuple(tuple(matrix[row][column] for column in indices) for row in indices)
    return Forgetting(values, tuple(index + 1 for index in indices), len(matrix))


def pick_evenly(items: Sequence[Item], most: int) -> list[Item]:
    """All items, or `most` evenly spread ones, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
