"""What `lemoe compare` and `lemoe study` share: options, the run, tables. They teach edits anew, and keep nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe.data.counting import edits_in_rounds, format_count
from lemoe.errors import OutputError
from lemoe_cli.options import (
    batch_tokens_option,
    check_inputs,
    combine_options,
    decode_option,
    edits_argument,
    force_option,
    json_option,
    model_options,
    open_base,
    open_edits,
    progress_options,
    report_option,
    selection_options,
    training_option,
)
from lemoe_cli.results import (
    check_report_files,
    list_settings,
    make_document,
    print_json,
    report_writers,
    run_all_steps,
)

if TYPE_CHECKING:
    from lemoe.base.embedded import Notify
    from lemoe.base.loading import BaseModel
    from lemoe.data.edits import Edit
    from lemoe.evaluation.comparison import Comparison, MethodResult
    from lemoe.evaluation.factors import Factors, Matrix
    from lemoe.evaluation.sweep import Sweep
    from lemoe.settings import Settings

COMMON_ROUND_SIZE = 20  # edits; presets differ, and rounds of different sizes could not be compared

round_size_option = training_option(
    "--round-size", type=click.IntRange(1), default=COMMON_ROUND_SIZE, show_default=True, help="Edits in a round."
)
measuring_options: Callable[[Any], Any] = combine_options(decode_option, batch_tokens_option)
written_options: Callable[[Any], Any] = combine_options(json_option, report_option, force_option, progress_options)
source_options: Callable[[Any], Any] = combine_options(edits_argument, model_options, selection_options)


@dataclass(frozen=True)
class Findings:
    """The results; None where a study was not asked for."""

    comparison: "Comparison | None" = None
    factors: "Factors | None" = None
    sweep: "Sweep | None" = None

    def as_dict(self) -> dict[str, Any]:
        found = {"comparison": self.comparison, "factors": self.factors, "sweep": self.sweep}
        return {name: asdict(study) for name, study in found.items() if study is not None}

    def show(self) -> None:
        """Tables."""
        if self.comparison is not None:
            _show_comparison(self.comparison)
        if self.factors is not None:
            _show_factors(self.factors)
        if self.sweep is not None:
            _show_sweep(self.sweep)


Study = Callable[["BaseModel", "Sequence[Edit]", "Notify"], Findings]


def run_study(command: str, edits: Path, measure: Study, options: Mapping[str, Any]) -> None:
    """Read the edits, load the model, `measure`, and show and write what was found."""
    read = open_edits(edits, options)
    if options["reports"]:
        check_report_files(options["reports"], force=options["force"])
    check_inputs([], options, quiet=options["quiet"])
    base = open_base(options, quiet=options["quiet"])

    from lemoe_cli.ui import show_stage

    with show_stage("teaching anew", quiet=options["quiet"]) as notify:
        found = measure(base, read, notify)

    def print_results() -> None:
        if options["as_json"]:
            print_json(make_document(list_settings(edits, base, options["decode"], options), found.as_dict()))
        else:
            found.show()

    problems = run_all_steps(chain([print_results], _make_writers(command, found, base, read, edits, options)))
    if problems:
        raise OutputError("\n  ".join(problems))


def settle_layers(base: "BaseModel", chosen: "Sequence[Settings]", notify: "Notify") -> "list[Settings]":
    """Settings with the layer to edit, measured where nothing says one."""
    from lemoe.runs.layers import settle_layer

    return [replace(settings, layer=settle_layer(base, settings, notify).layer) for settings in chosen]


def _make_writers(
    command: str,
    found: Findings,
    base: "BaseModel",
    read: "Sequence[Edit]",
    source: Path,
    options: Mapping[str, Any],
) -> Iterator[Callable[[], object]]:
    """A function for each of the reports, which writes it."""
    if not options["reports"]:
        return
    from lemoe.evaluation.evaluate import EvalResult
    from lemoe.report import build_report

    report = build_report(
        base,
        None,
        read,
        EvalResult((), ()),
        source=source.name,
        command=command,
        decode=options["decode"],
        factors=found.factors,
        comparison=found.comparison,
        sweep=found.sweep,
    )
    yield from report_writers(report, options["reports"], force=options["force"], quiet=options["quiet"])


RESULT_COLUMNS = ("reliability\nwhen taught", "\nin the end", "generality", "locality", "s per edit", "per edit")
SHARES = "share of target tokens (of whole targets) given"


def _show_comparison(comparison: "Comparison") -> None:
    from lemoe_cli.ui import print_table

    print_table(
        f"{edits_in_rounds(comparison.edit_count, len(comparison.rounds))}: {SHARES}",
        ("", *RESULT_COLUMNS),
        [(each.settings.method, *_result_cells(each)) for each in comparison.methods],
    )


def _show_sweep(sweep: "Sweep") -> None:
    from lemoe_cli.ui import print_table

    method = sweep.results[0].settings.method
    print_table(
        f"{format_count(sweep.edit_count, 'edit')}, taught by {method} with each combination: {SHARES}",
        (*(name.replace("_", "-") for name in sweep.varied), *RESULT_COLUMNS),
        [(*map(str, sweep.values(each)), *_result_cells(each)) for each in sweep.results],
        left=len(sweep.varied),
    )


def _result_cells(each: "MethodResult") -> tuple[str, ...]:
    from lemoe_cli.ui import size_text

    cells = []
    for name in ("reliability", "generality", "locality"):
        tokens, exact = each.value(name), each.value(name, "exact_match")
        cells.append("" if tokens is None or exact is None else _format_pair(tokens.value, exact.value))
    learned = _format_pair(each.learned, each.learned_exact)
    return learned, *cells, f"{each.seconds_per_edit:.2f}", size_text(round(each.bytes_per_edit))


def _format_pair(tokens: float, exact: float) -> str:
    return f"{tokens:.3f} ({exact:.3f})"


def _show_factors(factors: "Factors") -> None:
    from lemoe_cli.ui import print_table, results

    _show_matrix("Forgetting: target tokens of round i given, after round j", factors.forgetting)
    results.print(f"lost since it was taught, mean over rounds: {factors.forgotten:.3f}\n")
    if factors.routing is not None:
        _show_matrix("Routing: share of round i's prompts that reach their expert, after round j", factors.routing)
        results.print()
    rows = []
    for order in factors.orders:
        values = [(order.value(name), order.value(name, "exact_match")) for name in ("reliability", "generality")]
        cells = ["" if one is None or other is None else _format_pair(one, other) for one, other in values]
        rows.append((order.order if order.seed is None else f"{order.order} {order.seed}", *cells))
    print_table(
        "Order: target tokens (whole targets) given after the last round", ("", "reliability", "generality"), rows
    )
    spread = factors.spread("reliability")
    if spread is not None and len(factors.orders) > 1:
        results.print(f"largest less smallest reliability: {spread:.3f}")


def _show_matrix(title: str, matrix: "Matrix") -> None:
    from lemoe_cli.ui import print_table

    columns = ("i \\ j", *map(str, range(1, len(matrix) + 1)))
    rows = [
        (str(number), *("" if value is None else f"{value:.3f}" for value in row))
        for number, row in enumerate(matrix, 1)
    ]
    print_table(title, columns, rows)
