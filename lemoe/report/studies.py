"""What a report reads of studies that teach the edits anew: by several methods, in several orders, settings varied."""

from collections.abc import Sequence
from dataclasses import dataclass

from lemoe.evaluation.comparison import Comparison, MethodResult
from lemoe.evaluation.factors import Factors, OrderScore
from lemoe.evaluation.metrics import Metric
from lemoe.evaluation.sweep import Sweep

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
    """Metrics (token accuracy) of a method or combination, its seconds of training and bytes kept, both per edit."""

    name: str
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
    return tuple(_make_row(one.settings.method, one) for one in comparison.methods)


@dataclass(frozen=True)
class SweepTable:
    """A method's metrics for each combination of the varied settings; a row is named by their values."""

    method: str
    varied: tuple[str, ...]
    rows: tuple[MethodRow, ...]


def make_sweep_table(sweep: Sweep) -> SweepTable:
    """The combinations as rows of a table."""
    rows = tuple(_make_row(", ".join(map(str, sweep.values(one))), one) for one in sweep.results)
    return SweepTable(sweep.results[0].settings.method, sweep.varied, rows)


def _make_row(name: str, one: MethodResult) -> MethodRow:
    return MethodRow(
        name=name,
        learned=one.learned,
        reliability=one.value("reliability"),
        generality=one.value("generality"),
        locality=one.value("locality"),
        seconds=one.seconds_per_edit,
        bytes=one.bytes_per_edit,
    )
