"""The report in short, as GitHub shows Markdown in a pull request."""

import re
from collections.abc import Iterable, Sequence

from lemoe.data.counting import format_count
from lemoe.report.content import Report
from lemoe.report.failures import Failure, Failures
from lemoe.report.rounds import Forgetting, pick_evenly
from lemoe.report.scores import MetricScores, Score
from lemoe.report.studies import MethodRow, OrderTable
from lemoe.report.text import format_number, format_percent, format_with_error

ANSWER_SHOWN = 120  # characters
MATRIX_SHOWN = 10  # rounds
_PLAIN = re.compile(r"(?:[A-Za-z0-9 ,()-]|: |\.(?=\d))*")
_ACTIVE = re.compile(r"[\\`*_~\[\]<>|&:@#$\"]|(?<=www)\.", re.IGNORECASE)


def render_markdown(report: Report) -> str:
    """Headlines, then all metrics and the worst failures folded; rendering is deterministic."""
    parts = [f"### {report.command}: {_wrap_code(report.source)}", _render_facts(report)]
    if report.metrics:
        parts += [
            _render_scores([one for metric in report.metrics for one in _pick_headlines(metric)]),
            _fold_section(
                "All metrics", _render_scores([score for metric in report.metrics for score in metric.scores])
            ),
        ]
    if report.methods:
        parts.append(_render_methods("method", report.methods))
    if report.sweep:
        parts.append(_render_methods(", ".join(map(_escape_text, report.sweep.varied)), report.sweep.rows))
    if report.forgetting:
        parts.append(_fold_section("Reliability of each round after each round", _render_matrix(report.forgetting)))
    if report.routed:
        parts.append(_fold_section("Prompts that reach their edit's expert, likewise", _render_matrix(report.routed)))
    if report.orders:
        parts.append(_render_orders(report.orders))
    parts += [_render_failures(group) for group in report.failures if group.failed]
    return "\n\n".join(parts) + "\n"


def _render_facts(report: Report) -> str:
    return "<br>\n".join(
        f"{fact.name}: {fact.value if _PLAIN.fullmatch(fact.value) else _wrap_code(fact.value)}"
        for fact in report.facts
    )


def _pick_headlines(metric: MetricScores) -> Iterable[Score]:
    return (score for score in (metric.headline, metric.exact) if score)


def _render_scores(scores: Sequence[Score]) -> str:
    rows = [
        [
            _name_score(score),
            score.measure.replace("_", " "),
            format_with_error(score.before),
            format_with_error(score.after),
            f"{score.n:,}",
        ]
        for score in scores
    ]
    return _render_table(("metric", "measure", "before", "after", "n"), rows, left=2)


def _name_score(score: Score) -> str:
    return score.name if score.kind == "all" else f"{score.name}, {_wrap_code(score.kind)}"


def _render_methods(head: str, methods: Sequence[MethodRow]) -> str:
    columns = (head, "when taught", "reliability", "generality", "locality", "s per edit", "KiB per edit")
    rows = [
        [
            row.name,
            format_number(row.learned),
            *map(format_with_error, (row.reliability, row.generality, row.locality)),
            format_number(row.seconds),
            f"{row.bytes / 1024:,.1f}",
        ]
        for row in methods
    ]
    return _render_table(columns, rows)


def _render_matrix(forgetting: Forgetting) -> str:
    """A row for each round, a column for each round after which it was measured; as many as are easily read."""
    indices = pick_evenly(range(len(forgetting.numbers)), MATRIX_SHOWN)
    numbers = [str(forgetting.numbers[index]) for index in indices]
    rows = [
        [
            number,
            *("" if (value := forgetting.values[row][column]) is None else format_number(value) for column in indices),
        ]
        for number, row in zip(numbers, indices, strict=True)
    ]
    return _render_table(("round", *(f"after {number}" for number in numbers)), rows)


def _render_orders(orders: OrderTable) -> str:
    spreads = ("largest difference", orders.reliability_spread, orders.generality_spread)
    rows = [(row.name, row.reliability, row.generality) for row in orders.rows]
    cells = [[name, *map(_format_optional, values)] for name, *values in [*rows, spreads]]
    return _render_table(("order", "reliability", "generality"), cells)


def _render_failures(group: Failures) -> str:
    most = len(group.worst)
    title = f"{group.name}: {group.failed:,} of {format_count(group.probes, 'probe')} fail" + (
        f", the worst {most}" if most < group.failed else ""
    )
    return _fold_section(title, "\n".join(map(_render_failure, group.worst)))


def _render_failure(failure: Failure) -> str:
    """An item of a list."""
    answers = (("expected", failure.expected), ("before", failure.before), ("after", failure.after))
    why = f"{failure.why}; {failure.scores}" if failure.scores else failure.why
    parts = [f"{name} {_wrap_code(_cut_answer(text)) or '–'}" for name, text in answers]
    parts[-1] += f" ({format_percent(failure.accuracy)} of the tokens)"
    return f"1. {_wrap_code(failure.prompt)}<br>{', '.join(parts)}<br>{_wrap_code(why)}"


def _cut_answer(text: str) -> str:
    return text if len(text) <= ANSWER_SHOWN else f"{text[:ANSWER_SHOWN]}…"


def _render_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    aligned = ["---"] * left + ["--:"] * (len(columns) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, aligned, *rows])


def _fold_section(title: str, content: str) -> str:
    return f"<details>\n<summary>{_escape_text(title)}</summary>\n\n{content}\n\n</details>"


def _format_optional(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _wrap_code(text: str) -> str:
    """Text in which GitHub formats nothing and mentions no one; outside of code it resolves even escaped mentions."""
    return f"<code>{_escape_text(text)}</code>" if text else ""


def _escape_text(text: str) -> str:
    """Characters with a meaning in Markdown or HTML as entities, which are never syntax."""
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", text)
