"""What a report reads of studies that teach the edits anew, by several methods or in several orders."""

from collections.abc import Sequence
from dataclasses import dataclass

from lemoe.evaluation.comparison import Comparison
from lemoe.evaluation.factors import Factors, OrderScore
from lemoe.evaluation.metrics import Metric

Matrix = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class OrderRow:
    """An order by name, and its metrics (token accuracy); None where the edits have no such probes."""

    name: str
    reliability: float | None
    generality: float | None


@dataclass(frozen=True)
class OrderTable:
    """The metrics of each order, and the largest difference between any two."""

    method: str
    rows: tuple[OrderRow, ...]
    reliability_spread: float | None
    generality_spread: float | None


@dataclass(frozen=True)
class MethodRow:
    """A method's metrics (token accuracy), its seconds of training and its bytes kept, both per edit."""

    method: str
    learned: float
    reliability: Metric | None
    generality: Metric | None
    locality: Metric | None
    seconds: float
    bytes: float


def make_order_table(factors: Factors) -> OrderTable:
    """The orders as a table."""
    rows = tuple(
        OrderRow(_name_order(order), order.value("reliability"), order.value("generality")) for order in factors.orders
    )
    return OrderTable(
        factors.settings.method,
        rows,
        _value_range([row.reliability for row in rows]),
        _value_range([row.generality for row in rows]),
    )


def _name_order(order: OrderScore) -> str:
    return order.order if order.seed is None else f"{order.order}, seed {order.seed}"


def _value_range(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) - min(known) if known else None


def make_method_rows(comparison: Comparison) -> tuple[MethodRow, ...]:
    """The methods as rows of a table."""
    return tuple(
        MethodRow(
            method=one.settings.method,
            learned=one.learned,
            reliability=one.value("reliability"),
            generality=one.value("generality"),
            locality=one.value("locality"),
            seconds=one.seconds_per_edit,
            bytes=one.bytes_per_edit,
        )
        for one in comparison.methods
    )
