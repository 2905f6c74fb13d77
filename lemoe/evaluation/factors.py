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
from lemoe.base.loading import BaseLike, BaseModel, resolve_base
from lemoe.data.counting import format_count
from lemoe.data.edits import Edit, Edits, resolve_edits
from lemoe.evaluation.evaluate import EvalOptions, Record, evaluate
from lemoe.evaluation.metrics import Decode, Metric
from lemoe.planning.plan import edits_by_round, plan
from lemoe.settings import Settings
from lemoe.training.methods import check_installed
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
        """The metric of that name, over all kinds; None where the edits have no such probes."""
        chosen = [m.value for m in self.metrics if (m.name, m.measure, m.kind) == (name, measure, "all")]
        return chosen[0] if chosen else None


@dataclass(frozen=True)
class Factors:
    """The three factors of one method on one set of edits.

    Rows of a matrix are rounds, columns are points in time: entry `[i][j]` is of round `i` after round `j` was taught,
    None before round `i` was.

    Attributes:
        settings: all of the method's settings.
        rounds: ids of each round's edits, in planned order.
        forgetting, forgetting_exact: reliability (token accuracy, exact match).
        routing: share of edits whose prompt reaches the expert that they were taught to; None where no expert
            is one edit's more than another's.
        orders: the planned order first, then random ones.

    Example:
        >>> import lemoe
        >>> factors = lemoe.measure_factors("llama", "edits.jsonl", lemoe.Settings(round_size=2), orders=1)
        >>> len(factors.forgetting), factors.forgotten
        (2, 0.0)
    """

    settings: Settings
    rounds: tuple[tuple[str, ...], ...]
    forgetting: Matrix
    forgetting_exact: Matrix
    routing: Matrix | None
    orders: tuple[OrderScore, ...]

    def __repr__(self) -> str:
        counts = f"{format_count(len(self.rounds), 'round')}, {format_count(len(self.orders), 'order')}"
        return f"Factors(preset {self.settings.method}, {counts}, forgotten={self.forgotten:.3f})"

    @property
    def forgotten(self) -> float:
        """Mean loss of reliability (token accuracy) from when a round was taught to the end, the last round aside."""
        lost = [(row[i] or 0.0) - (row[-1] or 0.0) for i, row in enumerate(self.forgetting[:-1])]
        return fmean(lost) if lost else 0.0

    def spread(self, name: str, measure: str = "token_accuracy") -> float | None:
        """Range (largest less smallest) of that metric over all orders; None where the edits have no such probes."""
        values = [value for order in self.orders if (value := order.value(name, measure)) is not None]
        return max(values) - min(values) if values else None


def measure_factors(
    base: BaseLike,
    edits: Edits,
    settings: Settings | None = None,
    *,
    orders: int = 5,
    decode: Decode = "teacher",
    batch_tokens: int = 4096,
    notify: Notify = lambda stage: None,
) -> Factors:
    """Teach `edits` in planned order, measured after each round, then in `orders` random orders, measured at the end.

    Args:
        base: or what `load_base` takes.
        edits: or their records, or the path of their file.
        settings: of the method; those of preset `anchor` if None.
        decode: `teacher` or `greedy`.
        batch_tokens: padded tokens that run through the model at once, while measuring.
        notify: called with one line for each stage.

    Raises:
        InputError: listing the edits and probes that cannot be used with this model.
        LemoeError: if the method needs a package that is not installed.

    Example:
        >>> import lemoe
        >>> base = lemoe.load_base("llama")
        >>> factors = lemoe.measure_factors(base, "edits.jsonl", lemoe.Settings(round_size=2), orders=2)
        >>> [order.order for order in factors.orders]
        ['planned', 'random', 'random']
    """
    settings = settings or Settings()
    check_installed([settings])
    edits, base = resolve_edits(edits), resolve_base(base)
    notify("planning")
    planned = _plan_rounds(base, edits, replace(settings, order="planned"))
    columns: list[list[_RoundScore]] = []
    for number, edited in enumerate(teach_rounds(base, planned, settings), 1):
        notify(f"planned order: round {number} of {len(planned)} taught")
        columns.append(_score_rounds(base, edited, planned[:number], decode, batch_tokens))
    scores = [_score_order(base, edited, planned, "planned", None, decode, batch_tokens)]
    for seed in range(1, orders + 1):
        notify(f"random order {seed} of {orders}")
        rounds = _plan_rounds(base, edits, replace(settings, order="random", seed=seed))
        last = deque(teach_rounds(base, rounds, settings), maxlen=1).pop()
        scores.append(_score_order(base, last, rounds, "random", seed, decode, batch_tokens))
    routes = [[score.routed for score in column] for column in columns]
    return Factors(
        settings=settings,
        rounds=tuple(tuple(edit.id for edit in members) for members in planned),
        forgetting=_transpose_columns([[score.tokens for score in column] for column in columns]),
        forgetting_exact=_transpose_columns([[score.exact for score in column] for column in columns]),
        routing=None if routes[0][0] is None else _transpose_columns(routes),
        orders=tuple(scores),
    )


def _plan_rounds(base: BaseModel, edits: Sequence[Edit], settings: Settings) -> list[list[Edit]]:
    return edits_by_round(plan(base, edits, settings), edits)


@dataclass(frozen=True)
class _RoundScore:
    """One round's reliability and routing at one point in time; see `Factors`."""

    tokens: float
    exact: float
    routed: float | None


def _score_rounds(
    base: BaseModel, edited: Edited, rounds: Sequence[Sequence[Edit]], decode: Decode, batch_tokens: int
) -> list[_RoundScore]:
    """The scores of all rounds taught so far."""
    taught = [edit for members in rounds for edit in members]
    result = evaluate(
        base, edited, taught, EvalOptions(decode=decode, only=("reliability",), batch_tokens=batch_tokens)
    )
    records = iter(result.records)
    own_experts = edited.experts_by_edit if isinstance(edited, AdaptorState) and not edited.router.shared else None
    return [_score_round(own_experts, [(edit, next(records)) for edit in members]) for members in rounds]


def _score_round(
    own_experts: Mapping[str, frozenset[int]] | None, answered: Sequence[tuple[Edit, Record]]
) -> _RoundScore:
    """One round's scores; `own_experts` are those that each edit was taught to, None where experts are shared."""
    routed = None
    if own_experts is not None:
        routed = fmean(record.route.expert in own_experts[edit.digest] for edit, record in answered)
    scores = [record.token_accuracy_after for _, record in answered]
    return _RoundScore(fmean(scores), fmean(score == 1.0 for score in scores), routed)


def _score_order(
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
        base, edited, taught, EvalOptions(decode=decode, only=("reliability", "generality"), batch_tokens=batch_tokens)
    )
    return OrderScore(order, seed, tuple(metric for metric in result.metrics if metric.stage == "after"))


def _transpose_columns(columns: Sequence[Sequence[float | None]]) -> Matrix:
    """The matrix of columns that grow by one entry each, row by row."""
    size = len(columns)
    return tuple(
        tuple(columns[column][row] if row <= column else None for column in range(size)) for row in range(size)
    )
