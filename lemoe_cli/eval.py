"""`lemoe eval`: figures before and after, for people, for machines, and one record for each probe."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe_cli.options import (
    FILE,
    edits_argument,
    force_option,
    mismatch_option,
    model_options,
    open_base,
    open_edits,
    quiet_option,
    selection_options,
)

if TYPE_CHECKING:
    from lemoe.adaptor import AdaptorState
    from lemoe.evaluation import EvalResult
    from lemoe.metrics import Decode, Metric
    from lemoe.models import BaseModel

SCHEMA = 1


@click.command("eval")
@edits_argument
@model_options
@click.option("--adaptor", "-a", type=FILE, help="Adaptor to measure; without one, the base model alone.")
@click.option(
    "--decode",
    type=click.Choice(["teacher", "greedy"]),
    default="teacher",
    show_default=True,
    help="Likeliest token at each position of the target, or what the model writes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one flat record for each figure.")
@click.option("--card", is_flag=True, help="Write the figures into the card beside the adaptor (README.md).")
@click.option("--records", type=FILE, help="Write one JSON line for each probe here.")
@click.option(
    "--report", "reports", type=FILE, multiple=True, help="Write a page (.html) or Markdown (.md); repeatable."
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Tokens that run through the model at once.",
)
@selection_options
@mismatch_option
@force_option
@quiet_option
def command(
    edits: Path,
    adaptor: Path | None,
    decode: "Decode",
    as_json: bool,
    card: bool,
    records: Path | None,
    reports: tuple[Path, ...],
    batch_tokens: int,
    allow_base_mismatch: bool,
    force: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure an adaptor on the probes of EDITS: reliability, generality, locality, portability, routing.

    Locality is agreement with the base model's own predictions. `teacher` compares the most likely token at each
    position of the target, `greedy` lets the model write.
    """
    from lemoe.checkpoint import load_adaptor
    from lemoe.evaluation import evaluate
    from lemoe.files import check_free, write_whole
    from lemoe.insertion import check_base

    if records is not None:
        check_free(records, overwrite=force)
    if reports:
        from lemoe.report import check_reports, report_of, write_reports

        check_reports(reports, overwrite=force)
    if card and not adaptor:
        raise click.UsageError("--card needs an --adaptor, beside which the card stands")
    read = open_edits(edits, options)
    state = load_adaptor(adaptor) if adaptor else None
    base = open_base(options, quiet=quiet)

    from lemoe_cli.ui import counter, say

    differences = check_base(base, state, allow=allow_base_mismatch) if state else ()
    for difference in differences:
        say(f"warning: another base than the adaptor was made for: {difference}")
    with counter("measuring", quiet=quiet) as advance:
        result = evaluate(
            base,
            state,
            read,
            decode=decode,
            batch_tokens=batch_tokens,
            allow_base_mismatch=allow_base_mismatch,
            on_progress=advance,
        )
    if records is not None:
        lines = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in result.records)
        write_whole(records, "".join(lines).encode(), overwrite=force)
    if reports:
        report = report_of(base, state, read, result, source=edits.name, decode=decode)
        write_reports(report, reports, overwrite=force)
    if card and adaptor and state:
        _update_card(adaptor, base, state, edits.name, result)
    if as_json:
        settings: dict[str, Any] = {"edits": str(edits), "adaptor": str(adaptor) if adaptor else None, "decode": decode}
        settings |= {name: options[name] for name in ("model", "revision", "limit", "sample", "seed")}
        settings |= {"dtype": str(base.dtype).removeprefix("torch."), "device": str(base.device)}
        settings |= {"base_differences": list(differences)}
        click.echo(json.dumps(_document(result, settings), indent=1, ensure_ascii=False))
    else:
        _show(result)


def _update_card(adaptor: Path, base: "BaseModel", state: "AdaptorState", edits: str, result: "EvalResult") -> None:
    from lemoe.card import write_card

    write_card(adaptor if adaptor.is_dir() else adaptor.parent, base, state, edits, result.metrics)


def _document(result: "EvalResult", settings: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers

    from lemoe import __version__

    versions = {
        "lemoe": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    metrics = [asdict(metric) for metric in result.metrics]
    return {"schema": SCHEMA, "settings": settings, "versions": versions, "metrics": metrics}


def _show(result: "EvalResult") -> None:
    from lemoe_cli.ui import results, table

    groups: dict[tuple[str, str], list[Metric]] = {}
    for metric in result.metrics:
        groups.setdefault((metric.name, metric.kind), []).append(metric)
    several = {name for name, kind in groups if sum(n == name for n, _ in groups) > 2}
    scored = {
        (name, kind): group
        for (name, kind), group in groups.items()
        if name != "routing" and (kind == "all" or name in several)
    }
    rows = [
        (name if kind == "all" else "", kind, *_cells(group), str(group[0].n)) for (name, kind), group in scored.items()
    ]
    columns = ("", "kind", "tokens\nbefore", "\nafter", "whole\nbefore", "\nafter", "n")
    table(
        "Share of target tokens, and of whole targets, given (± standard error)",
        columns,
        rows,
        left=2,
    )
    _show_measure(groups, "perplexity", "Perplexity of the targets")
    _show_measure(groups, "complete_match", "Share of answers that are the target, ended by the model itself")
    routes = [
        (kind, f"{group[0].value:.3f}", str(group[0].n)) for (name, kind), group in groups.items() if name == "routing"
    ]
    if routes:
        results.print()
        table("Share of edits whose prompt reaches the expert that it trained", ("rounds", "share", "n"), routes)


def _show_measure(groups: "dict[tuple[str, str], list[Metric]]", measure: str, title: str) -> None:
    """One more measure of the metrics that have it, over all their kinds."""
    from lemoe_cli.ui import results, table

    rows = []
    for (name, kind), group in groups.items():
        stages = {metric.stage: metric for metric in group if metric.measure == measure}
        if kind == "all" and stages:
            before, after = (stages.get(stage) for stage in ("before", "after"))
            cells = ("" if m is None else _figure(m, spread=m is after) for m in (before, after))
            rows.append((name, *cells, str(group[0].n)))
    if rows:
        results.print()
        table(title, ("", "before", "after", "n"), rows)


def _cells(group: "Sequence[Metric]") -> list[str]:
    by_place = {(metric.measure, metric.stage): metric for metric in group}
    cells = []
    for measure in ("token_accuracy", "exact_match"):
        for stage in ("before", "after"):
            metric = by_place.get((measure, stage))
            cells.append("" if metric is None else _figure(metric, spread=stage == "after"))
    return cells


def _figure(metric: "Metric", *, spread: bool) -> str:
    if metric.stderr is None or not spread:
        return f"{metric.value:.3f}"
    return f"{metric.value:.3f} ±{metric.stderr:.3f}".replace("±0.", "±.")
