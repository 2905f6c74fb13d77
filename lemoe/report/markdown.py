"""The report in short, as GitHub shows Markdown in a pull request."""

import re
from collections.abc import Iterable, Sequence

from lemoe.report.content import Report
from lemoe.report.failures import Failure, Failures
from lemoe.report.scores import MetricScores, Score
from lemoe.report.text import counted, percent, with_error

ANSWER_SHOWN = 120  # characters
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
    if report.orders:
        orders = [(row.name, row.reliability, row.generality) for row in report.orders.rows]
        spread = ("largest difference", report.orders.reliability_spread, report.orders.generality_spread)
        rows = [[name, *map(_number, values)] for name, *values in [*orders, spread]]
        parts.append(_table(("order", "reliability", "generality"), rows))
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
