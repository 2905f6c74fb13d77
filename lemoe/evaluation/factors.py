"""The three factors that decide how lifelong editing ends (paper, 3): forgetting, routing, and order.

Measured on the user's own edits: reliability of each round after each later one, whether prompts still reach the
experts that they were taught to, and what other orders of the same edits come to.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from lemoe.adaptor.state import AdaptorState
from lemoe.base.embedded import Notify
from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit
from lemoe.evaluation.evaluate import Record, evaluate
from lemoe.evaluation.metrics import Decode, Metric
from lemoe.planning.plan import plan, rounds_of
from lemoe.settings import Settings
from lemoe.training.methods import method_of
from lemoe.training.rounds import Edited, teach_rounds

Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class OrderScore:
    """What one order of the edits came to.

    Attributes:
        order: `planned`, or `random`.
        seed: of a random order.
        metrics: reliability and generality after the last round, over all edits.
    """

    order: str
    seed: int | None
    metrics: tuple[Metric, ...]

    def value(self, name: str, measure: str = "token_accuracy") -> float | None:
        """The figure of that name, over all kinds; None where the edits have no such probes."""
        chosen = [m.value for m in self.metrics if (m.name, m.measure, m.kind) == (name, measure, "all")]
        return chosen[0] if chosen else None


@dataclass(frozen=True)
class Factors:
    """The three factors of one method on one set of edits.

    Rows of a matrix are rounds, columns are moments: entry `[i][j]` is of round `i` after round `j` was taught, None
    before it was.

    Attributes:
        settings: all of the method's settings.
        rounds: ids of each round's edits, in planned order.
        forgetting, forgetting_exact: reliability (token accuracy, exact match).
        routing: share of edits whose prompt reaches the expert that they were taught to; None where no expert
            is one edit's more than another's.
        orders: the planned order first, then random ones.
    """

    settings: Settings
    rounds: tuple[tuple[str, ...], ...]
    forgetting: Matrix
    forgetting_exact: Matrix
    routing: Matrix | None
    orders: tuple[OrderScore, ...]

    @property
    def forgotten(self) -> float:
        """Mean loss of reliability (token accuracy) from when a round was taught to the end, the last round aside."""
        lost = [(row[i] or 0.0) - (row[-1] or 0.0) for i, row in enumerate(self.forgetting[:-1])]
        return fmean(lost) if lost else 0.0

    def spread(self, name: str, measure: str = "token_accuracy") -> float | None:
        """Largest less smallest figure of that name over all orders; None where the edits have no such probes."""
        values = [value for order in self.orders if (value := order.value(name, measure)) is not None]
        return max(values) - min(values) if values else None


def measure_factors(
    base: BaseModel,
    edits: Sequence[Edit],
    settings: Settings,
    *,
    orders: int = 5,
    decode: Decode = "teacher",
    batch_tokens: int = 4096,
    notify: Notify = lambda stage: None,
) -> Factors:
    """Teach `edits` in planned order, measured after each round, then in `orders` random orders, measured at the end.

    Raises:
        InputError: listing the edits and probes that cannot be used with this model.
        LemoeError: if the method needs a package that is not installed.
    """
    _ = method_of(settings).train_round  # refused at once if its package is missing
    notify("planning")
    planned = _rounds(base, edits, replace(settings, order="planned"))
    columns: list[list[_Moment]] = []
    for number, edited in enumerate(teach_rounds(base, planned, settings), 1):
        notify(f"planned order: round {number} of {len(planned)} taught")
        columns.append(_column(base, edited, planned[:number], decode, batch_tokens))
    scores = [_score(base, edited, planned, "planned", None, decode, batch_tokens)]
    for seed in range(1, orders + 1):
        notify(f"random order {seed} of {orders}")
        rounds = _rounds(base, edits, replace(settings, order="random", seed=seed))
        last = deque(teach_rounds(base, rounds, settings), maxlen=1).pop()
        scores.append(_score(base, last, rounds, "random", seed, decode, batch_tokens))
    routes = [[moment.routed for moment in column] for column in columns]
    return Factors(
        settings=settings,
        rounds=tuple(tuple(edit.id for edit in members) for members in planned),
        forgetting=_matrix([[moment.tokens for moment in column] for column in columns]),
        forgetting_exact=_matrix([[moment.exact for moment in column] for column in columns]),
        routing=None if routes[0][0] is None else _matrix(routes),
        orders=tuple(scores),
    )


def _rounds(base: BaseModel, edits: Sequence[Edit], settings: Settings) -> list[list[Edit]]:
    return rounds_of(plan(base, edits, settings), edits)


@dataclass(frozen=True)
class _Moment:
    """One round's figures at one moment; see `Factors`."""

    tokens: float
    exact: float
    routed: float | None


def _column(
    base: BaseModel, edited: Edited, rounds: Sequence[Sequence[Edit]], decode: Decode, batch_tokens: int
) -> list[_Moment]:
    """Figures of all rounds taught so far."""
    taught = [edit for members in rounds for edit in members]
    result = evaluate(base, edited, taught, decode=decode, only=("reliability",), batch_tokens=batch_tokens)
    records = iter(result.records)
    homes = edited.homes if isinstance(edited, AdaptorState) and not edited.router.shared else None
    return [_moment(homes, [(edit, next(records)) for edit in members]) for members in rounds]


def _moment(homes: Mapping[str, frozenset[int]] | None, answered: Sequence[tuple[Edit, Record]]) -> _Moment:
    """One round's, with the experts that each edit was taught to, where routes are told apart."""
    routed = None
    if homes is not None:
        routed = fmean(record.route.expert in homes[edit.digest] for edit, record in answered)
    scores = [record.token_accuracy_after for _, record in answered]
    return _Moment(fmean(scores), fmean(score == 1.0 for score in scores), routed)


def _score(
    base: BaseModel,
    edited: Edited,
    rounds: Sequence[Sequence[Edit]],
    order: str,
    seed: int | None,
    decode: Decode,
    batch_tokens: int,
) -> OrderScore:
    taught = [edit for members in rounds for edit in members]
    result = evaluate(
        base, edited, taught, decode=decode, only=("reliability", "generality"), batch_tokens=batch_tokens
    )
    return OrderScore(order, seed, tuple(metric for metric in result.metrics if metric.stage == "after"))


def _matrix(columns: Sequence[Sequence[float | None]]) -> Matrix:
    """Rows of columns that grow by one entry each."""
    size = len(columns)
    return tuple(
        tuple(columns[moment][number] if number <= moment else None for moment in range(size)) for number in range(size)
    )
