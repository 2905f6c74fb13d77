"""Geometry of the plots, in units of which a drawing is `WIDTH` wide; the page's template draws it.

Values become coordinates here and nowhere else, rounded to a tenth, so that drawings are deterministic.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from lemoe.evaluation.metrics import Metric
from lemoe.report.clusters import Cluster, Clusters
from lemoe.report.rounds import ROUNDS_SHOWN, Forgetting, RoundQuality, pick_evenly
from lemoe.report.routes import Gate, GateScores
from lemoe.report.studies import SweepTable
from lemoe.report.text import format_number, format_percent

WIDTH = 420.0
LEFT, RIGHT = 46.0, 410.0  # of what is plotted
TICKS = 10
NUMBERED = 12  # rounds up to which a heat map holds its numbers

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Tick:
    """A position on an axis, and its label."""

    position: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A value, with the ends of its error bar (equal where it has none)."""

    x: float
    y: float
    low: float
    high: float
    label: str


@dataclass(frozen=True)
class Series:
    """Values that a line joins."""

    name: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Lines:
    """Shares (0 to 1) by round."""

    top: float
    bottom: float
    height: float
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Square:
    """An entry of a heat map; `strength` is its value, 0 to 1."""

    x: float
    y: float
    strength: float
    label: str


@dataclass(frozen=True)
class HeatMap:
    """Rounds down, time across; squares hold their numbers where there is room."""

    size: float
    height: float
    numbered: bool
    squares: tuple[Square, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Bar:
    """A bin of a histogram."""

    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Panel:
    """The histogram of one metric's probes, `most` of them in a bar."""

    scores: GateScores
    top: float
    bottom: float
    most: str
    bars: tuple[Bar, ...]
    absent: Bar


@dataclass(frozen=True)
class Histograms:
    """Histograms on one axis, one below the other, with the threshold (None where it is off the axis).

    Attributes:
        end: of the axis.
        beyond, absent: positions of the bars for scores beyond it and for prompts that have none.
    """

    measure: str
    height: float
    panels: tuple[Panel, ...]
    x_ticks: tuple[Tick, ...]
    threshold: Tick | None
    end: float
    beyond: Tick
    absent: Tick


@dataclass(frozen=True)
class Group:
    """A round's dots around its centre; `hue` in degrees."""

    cluster: Cluster
    hue: int
    centre: tuple[float, float]
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Scatter:
    """Rounds in the plane, and the dots of those that are not drawn."""

    height: float
    others: tuple[tuple[float, float], ...]
    groups: tuple[Group, ...]


def quality_plot(rounds: Sequence[RoundQuality]) -> Lines:
    """Reliability and generality of each round after the last one, with standard errors."""
    shown = pick_evenly(rounds, ROUNDS_SHOWN)
    across = _make_scale(1, max(2, len(shown)), LEFT + 14, RIGHT - 14)
    found = {
        "reliability": [(across(index), score.reliability, score.number) for index, score in enumerate(shown, 1)],
        "generality": [(across(index), score.generality, score.number) for index, score in enumerate(shown, 1)],
    }
    series = [
        Series(name, tuple(_mark_metric(x, metric, f"round {number}") for x, metric, number in points if metric))
        for name, points in found.items()
    ]
    ticks = _pick_ticks([score.number for score in shown], across, first=1)
    return _build_lines("round", ticks, [one for one in series if one.marks])


def course_plot(forgetting: Forgetting) -> Lines:
    """Reliability as rounds go by: of the round just taught, and of all taught so far."""
    values = forgetting.values
    across = _make_scale(1, max(2, len(values)), LEFT + 14, RIGHT - 14)
    fresh, all_ = [], []
    for index, number in enumerate(forgetting.numbers):
        taught = [value for row in values if (value := row[index]) is not None]
        fresh.append(_mark_value(across(index + 1), values[index][index] or 0.0, f"round {number}, just taught"))
        all_.append(
            _mark_value(across(index + 1), sum(taught) / len(taught), f"after round {number}, all rounds so far")
        )
    ticks = _pick_ticks(forgetting.numbers, across, first=1)
    return _build_lines(
        "after round", ticks, [Series("round just taught", tuple(fresh)), Series("all so far", tuple(all_))]
    )


def sweep_plot(table: SweepTable) -> Lines:
    """Reliability and generality of each combination of settings, with standard errors."""
    across = _make_scale(1, max(2, len(table.rows)), LEFT + 14, RIGHT - 14)
    series = []
    for name in ("reliability", "generality"):
        points = [(index, row, getattr(row, name)) for index, row in enumerate(table.rows, 1)]
        marks = tuple(_mark_metric(across(index), metric, row.name) for index, row, metric in points if metric)
        series.append(Series(name, marks))
    step = math.ceil(len(table.rows) / TICKS)
    ticks = [Tick(across(index), row.name) for index, row in enumerate(table.rows, 1) if (index - 1) % step == 0]
    return _build_lines(", ".join(table.varied), ticks, [one for one in series if one.marks])


def _build_lines(x_label: str, ticks: Sequence[Tick], series: Sequence[Series]) -> Lines:
    y_ticks = tuple(Tick(_share_height(share), format_percent(share)) for share in (0, 0.25, 0.5, 0.75, 1))
    return Lines(14.0, 200.0, 240.0, x_label, tuple(ticks), y_ticks, tuple(series))


def _share_height(share: float) -> float:
    return round(200.0 - 186.0 * min(1.0, max(0.0, share)), 1)


def _mark_metric(x: float, metric: Metric, what: str) -> Mark:
    error = metric.stderr or 0.0
    low, high = _share_height(metric.value - error), _share_height(metric.value + error)
    return Mark(x, _share_height(metric.value), low, high, f"{what}: {metric.name} {format_number(metric.value)}")


def _mark_value(x: float, value: float, what: str) -> Mark:
    y = _share_height(value)
    return Mark(x, y, y, y, f"{what}: {format_number(value)}")


def heat_map(forgetting: Forgetting) -> HeatMap:
    """The matrix as squares, the first round at the top."""
    count = len(forgetting.values)
    top = 8.0
    size = min((RIGHT - LEFT) / count, 64.0)
    numbered = count <= NUMBERED
    squares = [
        Square(
            x=round(LEFT + column * size, 1),
            y=round(top + row * size, 1),
            strength=round(value, 3),
            label=f"{value:.2f}",
        )
        for row, entries in enumerate(forgetting.values)
        for column, value in enumerate(entries)
        if value is not None
    ]
    across = _make_scale(0, count, LEFT + size / 2, LEFT + size / 2 + count * size)
    down = _make_scale(0, count, top + size / 2, top + size / 2 + count * size)
    numbers = forgetting.numbers
    return HeatMap(
        size=round(size, 1),
        height=round(top + count * size + 40, 1),
        numbered=numbered,
        squares=tuple(squares),
        x_ticks=_pick_ticks(numbers, across, first=0),
        y_ticks=_pick_ticks(numbers, down, first=0),
    )


def gate_plot(gate: Gate) -> Histograms:
    """How far prompts are from asking for the edit whose subject they mention, by metric."""
    usual = 0 < gate.threshold <= 100
    step = gate.threshold / 7 if usual else 0.5
    edges = [step * index for index in range(22)]  # three times the threshold
    end, beyond, absent = RIGHT - 112.0, RIGHT - 72.0, RIGHT - 19.0
    across = _make_scale(0, edges[-1], LEFT, end)
    panels = tuple(
        _build_panel(scores, edges, across, 26.0 + 92.0 * index, beyond, absent)
        for index, scores in enumerate(gate.scores)
    )
    inside = 0 <= gate.threshold <= edges[-1]
    return Histograms(
        measure=gate.measure,
        height=26.0 + 92.0 * len(panels) + 22.0,
        panels=panels,
        x_ticks=tuple(Tick(across(edge), f"{edge:g}") for edge in edges[::7]),
        threshold=Tick(across(gate.threshold), f"{gate.threshold:g}") if inside else None,
        end=end,
        beyond=Tick(beyond, "more"),
        absent=Tick(absent, "none"),
    )


def _build_panel(
    scores: GateScores, edges: Sequence[float], across: Scale, top: float, beyond: float, absent: float
) -> Panel:
    """A histogram; two separate bars follow it, for scores beyond the axis and for prompts without one."""
    bottom = top + 58.0
    # A score at an edge belongs to the bin on its left, as the gate opens up to and including its threshold.
    bins = numpy.clip(numpy.searchsorted(edges, numpy.asarray(scores.values), side="left") - 1, 0, len(edges) - 1)
    counts = numpy.bincount(bins, minlength=len(edges)).tolist()
    most = max(1, *counts, scores.unmentioned)

    def draw_bar(x: float, width: float, count: int, what: str) -> Bar:
        height = round(58.0 * count / most, 1)
        return Bar(round(x, 1), round(bottom - height, 1), round(width, 1), height, f"{what}: {count:,}")

    bars = [
        draw_bar(across(low) + 0.5, across(high) - across(low) - 1, count, f"{low:.1f} to {high:.1f}")
        for low, high, count in zip(edges[:-1], edges[1:], counts[:-1], strict=True)
        if count
    ]
    if counts[-1]:
        bars.append(draw_bar(beyond - 15, 30.0, counts[-1], f"above {edges[-1]:.1f}"))
    nothing = draw_bar(absent - 15, 30.0, scores.unmentioned, "no subject mentioned")
    return Panel(scores, top, bottom, f"{most:,}", tuple(bars), nothing)


def scatter_plot(clusters: Clusters) -> Scatter:
    """Each round's prompts around their centre, one unit being as long across as down."""
    drawn = [point for cluster in clusters.drawn for point in (*cluster.points, cluster.centre)]
    points = numpy.array([*drawn, *clusters.others])
    low, high = points.min(0), points.max(0)
    unit = min((WIDTH - 32) / max(high[0] - low[0], 1e-9), 290 / max(high[1] - low[1], 1e-9))
    height = round(float(high[1] - low[1]) * unit + 32, 1)
    margin = (WIDTH - float(high[0] - low[0]) * unit) / 2

    def project_point(point: tuple[float, float]) -> tuple[float, float]:
        x, y = (point[0] - low[0]) * unit, (high[1] - point[1]) * unit
        return round(margin + float(x), 1), round(16 + float(y), 1)

    groups = [
        Group(
            cluster=cluster,
            hue=round(number * 137.508) % 360,  # the golden angle keeps neighbours apart
            centre=project_point(cluster.centre),
            dots=tuple(map(project_point, cluster.points)),
        )
        for number, cluster in enumerate(clusters.drawn)
    ]
    return Scatter(height, tuple(map(project_point, clusters.others)), tuple(groups))


def _pick_ticks(numbers: Sequence[int], scale: Scale, *, first: int) -> tuple[Tick, ...]:
    """At most `TICKS` of the rounds, at regular steps."""
    step = math.ceil(len(numbers) / TICKS)
    return tuple(Tick(scale(index + first), f"{number:,}") for index, number in enumerate(numbers) if index % step == 0)


def _make_scale(low: float, high: float, start: float, end: float) -> Scale:
    """Linear, from `low` to `high` onto `start` to `end`."""
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)
