"""The report in short, as GitHub shows Markdown in a pull request."""

import re
from collections.abc import Iterable, Sequence

from lemoe.report.content import Report
from lemoe.report.failures import Failure, Failures
from lemoe.report.rounds import Forgetting, spread
from lemoe.report.scores import MetricScores, Score
from lemoe.report.studies import MethodRow, OrderTable
from lemoe.report.text import counted, figure, percent, with_error

ANSWER_SHOWN = 120  # characters
MATRIX_SHOWN = 10  # rounds
_PLAIN = re.compile(r"(?:[A-Za-z0-9 ,()-]|: |\.(?=\d))*")
_ACTIVE = re.compile(r"[\\`*_~\[\]<>|&:@#$\"]|(?<=www)\.", re.IGNORECASE)


def as_markdown(report: Report) -> str:
    """Headlines, then all figures and the worst failures folded; equal reports give equal text."""
    parts = [f"### lemoe eval: {_code(report.source)}", _facts(report)]
    if report.metrics:
        parts += [
            _scores([one for metric in report.metrics for one in _headlines(metric)]),
            _folded("All figures", _scores([score for metric in report.metrics for score in metric.scores])),
        ]
    if report.methods:
        parts.append(_methods(report.methods))
    if report.forgetting:
        parts.append(_folded("Reliability of each round after each round", _matrix(report.forgetting)))
    if report.routed:
        parts.append(_folded("Prompts that reach their edit's expert, likewise", _matrix(report.routed)))
    if report.orders:
        parts.append(_orders(report.orders))
    parts += [_failures(group) for group in report.failures if group.failed]
    return "\n\n".join(parts) + "\n"


def _facts(report: Report) -> str:
    return "<br>\n".join(
        f"{fact.name}: {fact.value if _PLAIN.fullmatch(fact.value) else _code(fact.value)}" for fact in report.facts
    )


def _headlines(metric: MetricScores) -> Iterable[Score]:
    return (score for score in (metric.headline, metric.exact) if score)


def _scores(scores: Sequence[Score]) -> str:
    rows = [
        [
            _name(score),
            score.measure.replace("_", " "),
            with_error(score.before),
            with_error(score.after),
            f"{score.n:,}",
        ]
        for score in scores
    ]
    return _table(("metric", "measure", "before", "after", "n"), rows, left=2)


def _name(score: Score) -> str:
    return score.name if score.kind == "all" else f"{score.name}, {_code(score.kind)}"


def _methods(methods: Sequence[MethodRow]) -> str:
    columns = ("method", "when taught", "reliability", "generality", "locality", "s an edit", "KiB an edit")
    rows = [
        [
            row.method,
            figure(row.learned),
            *map(with_error, (row.reliability, row.generality, row.locality)),
            figure(row.seconds),
            f"{row.bytes / 1024:,.1f}",
        ]
        for row in methods
    ]
    return _table(columns, rows)


def _matrix(forgetting: Forgetting) -> str:
    """A row for each round, a column for each round after which it was measured; as many as are easily read."""
    places = spread(range(len(forgetting.numbers)), MATRIX_SHOWN)
    numbers = [str(forgetting.numbers[place]) for place in places]
    rows = [
        [number, *("" if (value := forgetting.values[row][column]) is None else figure(value) for column in places)]
        for number, row in zip(numbers, places, strict=True)
    ]
    return _table(("round", *(f"after {number}" for number in numbers)), rows)


def _orders(orders: OrderTable) -> str:
    spreads = ("largest difference", orders.reliability_spread, orders.generality_spread)
    rows = [(row.name, row.reliability, row.generality) for row in orders.rows]
    cells = [[name, *map(_number, values)] for name, *values in [*rows, spreads]]
    return _table(("order", "reliability", "generality"), cells)


def _failures(group: Failures) -> str:
    most = len(group.worst)
    title = f"{group.name}: {group.failed:,} of {counted(group.probes, 'probe')} fail" + (
        f", the worst {most}" if most < group.failed else ""
    )
    return _folded(title, "\n".join(map(_failure, group.worst)))


def _failure(failure: Failure) -> str:
    """An item of a list."""
    answers = (("expected", failure.expected), ("before", failure.before), ("after", failure.after))
    why = f"{failure.why}; {failure.scores}" if failure.scores else failure.why
    told = [f"{name} {_code(_cut(text)) or '–'}" for name, text in answers]
    told[-1] += f" ({percent(failure.accuracy)} of the tokens)"
    return f"1. {_code(failure.prompt)}<br>{', '.join(told)}<br>{_code(why)}"


def _cut(text: str) -> str:
    return text if len(text) <= ANSWER_SHOWN else f"{text[:ANSWER_SHOWN]}…"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    aligned = ["---"] * left + ["--:"] * (len(columns) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, aligned, *rows])


def _folded(title: str, content: str) -> str:
    return f"<details>\n<summary>{_escaped(title)}</summary>\n\n{content}\n\n</details>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _code(text: str) -> str:
    """Text in which GitHub neither formats anything nor, as it would elsewhere even of entities, mentions anyone."""
    return f"<code>{_escaped(text)}</code>" if text else ""


def _escaped(text: str) -> str:
    """Signs that Markdown or HTML act on, as entities, which are never taken for syntax."""
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", text)
