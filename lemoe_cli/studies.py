"""What `lemoe eval --compare` and `--factors` run and show."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from lemoe_cli.ui import print_table, results, show_stage, size_text

if TYPE_CHECKING:
    from lemoe.base.loading import BaseModel
    from lemoe.data.edits import Edit
    from lemoe.evaluation.comparison import Comparison, MethodResult
    from lemoe.evaluation.factors import Factors, Matrix
    from lemoe.evaluation.metrics import Decode
    from lemoe.settings import Settings

COMMON_ROUND_SIZE = 20  # edits; presets differ, and rounds of different sizes could not be compared


def resolve_methods(names: str, options: Mapping[str, Any]) -> "list[Settings]":
    """The settings of presets given as `ft,lora,...`, all with the same rounds.

    Raises:
        InputError: for a preset that is not known.
    """
    from lemoe.settings import resolve_settings

    given = {"round_size": options["round_size"] or COMMON_ROUND_SIZE, "seed": options["seed"]}
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen:
        raise click.UsageError("--compare names no preset")
    return [resolve_settings(name, None, given) for name in chosen]


@dataclass(frozen=True)
class Studies:
    """The results; None where a study was not asked for."""

    comparison: "Comparison | None" = None
    factors: "Factors | None" = None

    def as_dict(self) -> dict[str, Any]:
        found = {"comparison": self.comparison, "factors": self.factors}
        return {name: asdict(study) for name, study in found.items() if study is not None}

    def show(self) -> None:
        """Tables."""
        if self.comparison is not None:
            _show_comparison(self.comparison)
        if self.factors is not None:
            _show_factors(self.factors)


def resolve_studies(options: Mapping[str, Any]) -> "tuple[list[Settings], Settings | None]":
    """The methods that --compare names, and the one of --factors.

    Raises:
        InputError: for a preset that is not known.
    """
    named = resolve_methods(options["compare"], options) if options["compare"] is not None else []
    return named, resolve_methods(options["preset"], options)[0] if options["factors"] else None


def run_studies(
    base: "BaseModel",
    edits: "Sequence[Edit]",
    decode: "Decode",
    batch_tokens: int,
    options: Mapping[str, Any],
    *,
    quiet: bool,
) -> Studies:
    """Teach `edits` by the methods that --compare names, and by one in several orders for --factors."""
    from lemoe.evaluation.comparison import compare
    from lemoe.evaluation.factors import measure_factors
    from lemoe.runs.layers import settle_layer

    named, method = resolve_studies(options)
    common: dict[str, Any] = {"decode": decode, "batch_tokens": batch_tokens}
    with show_stage("teaching anew", quiet=quiet) as notify:
        named = [replace(settings, layer=settle_layer(base, settings, notify).layer) for settings in named]
        method = replace(method, layer=settle_layer(base, method, notify).layer) if method else None
        comparison = compare(base, edits, named, notify=notify, **common) if named else None
        factors = (
            measure_factors(base, edits, method, orders=options["orders"], notify=notify, **common) if method else None
        )
    return Studies(comparison, factors)


def _show_comparison(comparison: "Comparison") -> None:
    columns = ("", "reliability\nwhen taught", "\nin the end", "generality", "locality", "s per edit", "per edit")
    shares = "share of target tokens (of whole targets) given"
    print_table(
        f"{comparison.edit_count} edits in {len(comparison.rounds)} rounds: {shares}",
        columns,
        [_make_method_row(each) for each in comparison.methods],
    )


def _make_method_row(each: "MethodResult") -> tuple[str, ...]:
    cells = []
    for name in ("reliability", "generality", "locality"):
        tokens, exact = each.value(name), each.value(name, "exact_match")
        cells.append("" if tokens is None or exact is None else _format_pair(tokens.value, exact.value))
    learned = _format_pair(each.learned, each.learned_exact)
    return each.settings.method, learned, *cells, f"{each.seconds_per_edit:.2f}", size_text(round(each.bytes_per_edit))


def _format_pair(tokens: float, exact: float) -> str:
    return f"{tokens:.3f} ({exact:.3f})"


def _show_factors(factors: "Factors") -> None:
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
    columns = ("i \\ j", *map(str, range(1, len(matrix) + 1)))
    rows = [
        (str(number), *("" if value is None else f"{value:.3f}" for value in row))
        for number, row in enumerate(matrix, 1)
    ]
    print_table(title, columns, rows)
