"""What `lemoe eval --compare` and `--factors` run and show."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lemoe_cli.eval import SCHEMA, versions
from lemoe_cli.ui import results, size_text, stage, table

if TYPE_CHECKING:
    from lemoe.comparison import Compared, Comparison
    from lemoe.edits import Edit
    from lemoe.factors import Factors, Matrix
    from lemoe.metrics import Decode
    from lemoe.models import BaseModel
    from lemoe.settings import Settings

COMMON_ROUND_SIZE = 20  # edits; presets differ, and rounds of different sizes could not be compared


def methods_named(names: str, options: Mapping[str, Any]) -> "list[Settings]":
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


def run_comparison(
    base: "BaseModel",
    edits: "Sequence[Edit]",
    methods: "Sequence[Settings]",
    decode: "Decode",
    batch_tokens: int,
    about: dict[str, Any] | None,
    *,
    quiet: bool,
) -> None:
    """Compare `methods` on `edits`, as a table, or as JSON that begins with what the run is `about`."""
    from lemoe.comparison import compare

    with stage("comparing", quiet=quiet) as notify:
        comparison = compare(base, edits, methods, decode=decode, batch_tokens=batch_tokens, notify=notify)
    if about is not None:
        _print_json(about, "comparison", comparison)
    else:
        _show_comparison(comparison)


def run_factors(
    base: "BaseModel",
    edits: "Sequence[Edit]",
    settings: "Settings",
    orders: int,
    decode: "Decode",
    batch_tokens: int,
    about: dict[str, Any] | None,
    *,
    quiet: bool,
) -> None:
    """Measure the three factors of one method on `edits`; shown as by `run_comparison`."""
    from lemoe.factors import measure_factors

    with stage("measuring factors", quiet=quiet) as notify:
        factors = measure_factors(
            base, edits, settings, orders=orders, decode=decode, batch_tokens=batch_tokens, notify=notify
        )
    if about is not None:
        _print_json(about, "factors", factors)
    else:
        _show_factors(factors)


def _print_json(about: dict[str, Any], name: str, found: "Comparison | Factors") -> None:
    document = {"schema": SCHEMA, "settings": about, "versions": versions(), name: asdict(found)}
    click.echo(json.dumps(document, indent=1, ensure_ascii=False))


def _show_comparison(comparison: "Comparison") -> None:
    columns = ("", "reliability\nwhen taught", "\nin the end", "generality", "locality", "s an edit", "an edit")
    table(
        f"{comparison.edits} edits in {len(comparison.rounds)} rounds: share of target tokens (of whole targets) given",
        columns,
        [_method_row(each) for each in comparison.methods],
    )


def _method_row(each: "Compared") -> tuple[str, ...]:
    cells = []
    for name in ("reliability", "generality", "locality"):
        tokens, exact = each.value(name), each.value(name, "exact_match")
        cells.append("" if tokens is None or exact is None else _pair(tokens.value, exact.value))
    learned = _pair(each.learned, each.learned_exact)
    return each.settings.method, learned, *cells, f"{each.seconds_per_edit:.2f}", size_text(round(each.bytes_per_edit))


def _pair(tokens: float, exact: float) -> str:
    return f"{tokens:.3f} ({exact:.3f})"


def _show_factors(factors: "Factors") -> None:
    _show_matrix("Forgetting: target tokens of round i given, after round j", factors.forgetting)
    results.print(f"lost since it was taught, mean over rounds: {factors.forgotten:.3f}\n")
    if factors.routing is not None:
        _show_matrix("Routing: share of round i's prompts that reach their expert, after round j", factors.routing)
        results.print()
    rows = []
    for order in factors.orders:
        figures = [(order.value(name), order.value(name, "exact_match")) for name in ("reliability", "generality")]
        cells = ["" if one is None or other is None else _pair(one, other) for one, other in figures]
        rows.append((order.order if order.seed is None else f"{order.order} {order.seed}", *cells))
    table("Order: target tokens (whole targets) given after the last round", ("", "reliability", "generality"), rows)
    spread = factors.spread("reliability")
    if spread is not None and len(factors.orders) > 1:
        results.print(f"largest less smallest reliability: {spread:.3f}")


def _show_matrix(title: str, matrix: "Matrix") -> None:
    columns = ("i \\ j", *map(str, range(1, len(matrix) + 1)))
    rows = [
        (str(number), *("" if value is None else f"{value:.3f}" for value in row))
        for number, row in enumerate(matrix, 1)
    ]
    table(title, columns, rows)
