"""Metrics as tables on the terminal: measured before and after, or of the base model alone."""

from collections.abc import Sequence

from lemoe.evaluation.made_up import MADE_UP
from lemoe.evaluation.metrics import Metric
from lemoe_cli.ui import print_table, results

SHARES = ("reliability", "generality", "locality", "portability")

Groups = dict[tuple[str, str], dict[tuple[str, str], Metric]]  # by metric and kind, then by measure and stage


def show_metrics(metrics: Sequence[Metric]) -> None:
    """One table for the shares of targets given, and one for each other measure that is there."""
    groups: Groups = {}
    for metric in metrics:
        groups.setdefault((metric.name, metric.kind), {})[metric.measure, metric.stage] = metric
    stages = [stage for stage in ("before", "after") if any(m.stage == stage and m.name != "routing" for m in metrics)]
    _show_shares(groups, stages)
    _show_measure(groups, stages, "perplexity", "Perplexity of the targets", SHARES)
    _show_measure(groups, stages, "complete_match", "Share of answers that are the target, ended by the model itself")
    _show_measure(groups, stages, "target_probability", "Probability of an edit's target where another is right")
    _show_measure(groups, stages, "target_written", "Share of prompts with another answer that are given the target")
    _show_measure(groups, stages, "ngram_entropy", "Entropy of what the model writes on, bits")
    _show_measure(groups, stages, "perplexity", "Perplexity of texts that editing must not touch", ("collapse",))
    _show_measure(groups, ["after"], "unchanged", "Share of those texts that are unchanged to the last bit")
    _show_routing(metrics)


def _show_shares(groups: Groups, stages: Sequence[str]) -> None:
    heads = [head for share in ("tokens", "whole") for head in (share, *[""] * (len(stages) - 1))]
    named = [f"{head}\n{stage}" for head, stage in zip(heads, [*stages, *stages], strict=True)]
    rows = [
        (
            name if kind == "all" else "",
            _name_kind(groups, name, kind),
            *_metric_cells(group, stages),
            str(_first_metric(group).n),
        )
        for (name, kind), group in groups.items()
        if name in SHARES and (kind == "all" or _has_several_kinds(groups, name))
    ]
    if rows:
        print_table(
            "Share of target tokens, and of whole targets, given (± standard error)",
            ("", "kind", *(named if len(stages) > 1 else heads), "n"),
            rows,
            left=2,
        )


def _has_several_kinds(groups: Groups, name: str) -> bool:
    """Whether a metric has more than one kind."""
    return sum(other == name for other, _ in groups) > 2


def _name_kind(groups: Groups, name: str, kind: str) -> str:
    """The kind; for all kinds together where every probe was made up, that."""
    kinds = {other for metric, other in groups if metric == name} - {"all"}
    return MADE_UP if kind == "all" and kinds == {MADE_UP} else kind


def _first_metric(group: dict[tuple[str, str], Metric]) -> Metric:
    return next(iter(group.values()))


def _metric_cells(group: dict[tuple[str, str], Metric], stages: Sequence[str]) -> list[str]:
    measures = ("token_accuracy", "exact_match")
    return [
        _format_metric(group.get((measure, stage)), stage == stages[-1]) for measure in measures for stage in stages
    ]


def _show_measure(groups: Groups, stages: Sequence[str], measure: str, title: str, names: Sequence[str] = ()) -> None:
    """One more measure of the metrics that have it, or of `names`, by kind where it has several."""
    rows = []
    for (name, kind), group in groups.items():
        metrics = [group.get((measure, stage)) for stage in stages]
        shown = kind == "all" or (name == "overfit" and _has_several_kinds(groups, name))
        there = [metric for metric in metrics if metric]
        if shown and there and (name in names or not names):
            cells = [_format_metric(metric, metric is metrics[-1]) for metric in metrics]
            rows.append((name if kind == "all" else "", _name_kind(groups, name, kind), *cells, str(there[0].n)))
    if rows:
        results.print()
        heads = stages if len(stages) > 1 else [""]
        print_table(title, ("", "kind", *heads, "n"), rows, left=2)


def _show_routing(metrics: Sequence[Metric]) -> None:
    """The gate's metrics, then the agreement of rounds."""
    routes = [metric for metric in metrics if metric.name == "routing"]
    gate = [m for m in routes if m.measure != "agreement"]
    rounds = [m for m in routes if m.measure == "agreement"]
    if gate:
        results.print()
        rows = [
            (m.measure if m.kind == "all" else "", m.kind, _format_metric(m, True), str(m.n))
            for m in _drop_only_kinds(gate)
        ]
        print_table(
            "Gate: recall, precision, and locality prompts that open it", ("", "kind", "share", "n"), rows, left=2
        )
    if rounds:
        results.print()
        rows_ = [(metric.kind, f"{metric.value:.3f}", str(metric.n)) for metric in rounds]
        print_table("Share of edits whose prompt reaches the expert that it trained", ("rounds", "share", "n"), rows_)


def _drop_only_kinds(metrics: Sequence[Metric]) -> list[Metric]:
    """Without the only kind of a measure, which says what `all` says."""
    counts = [metric.measure for metric in metrics]
    return [metric for metric in metrics if metric.kind == "all" or counts.count(metric.measure) > 2]


def _format_metric(metric: Metric | None, spread: bool) -> str:
    if metric is None:
        return ""
    text = f"{metric.value:.3f}" if metric.value < 1e6 else f"{metric.value:.3g}"
    if metric.stderr is None or not spread:
        return text
    return f"{text} ±{metric.stderr:.3f}".replace("±0.", "±.")
