"""`lemoe study`: what decides how lifelong editing ends (forgetting, routing, order), and settings varied."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe.errors import InputError
from lemoe_cli.command import lemoe_command
from lemoe_cli.options import any_preset_options, training_option
from lemoe_cli.studies import (
    Findings,
    Study,
    measuring_options,
    round_size_option,
    run_study,
    settle_layers,
    source_options,
    written_options,
)

if TYPE_CHECKING:
    from lemoe.base.embedded import Notify
    from lemoe.base.loading import BaseModel
    from lemoe.data.edits import Edit
    from lemoe.settings import Settings

ORDERS = 5


class Variation(click.ParamType[tuple[str, tuple[Any, ...]]]):
    """A setting and several values for it."""

    name = "SETTING=VALUE,VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[Any, ...]]:
        import yaml

        name, equals, listed = str(value).partition("=")
        try:
            values = tuple(yaml.safe_load(text) for text in listed.split(",")) if listed else ()
        except yaml.YAMLError:
            values = ()
        if not (name.strip() and equals and values) or None in values:
            self.fail(f"{value!r} is no setting with values; expected one like round-size=1,10,50", param, ctx)
        return name.strip().replace("-", "_"), tuple(dict.fromkeys(values))


@lemoe_command(
    "study",
    examples=(
        "lemoe study edits.jsonl -m llama --preset paper --orders 3",
        "lemoe study edits.jsonl -m llama --vary round-size=1,10,50 --vary layer=20,24,28 --report study.html",
    ),
)
@source_options
@any_preset_options
@round_size_option
@training_option("--orders", type=click.IntRange(0), help=f"Random orders beside the planned one.  [default: {ORDERS}]")
@training_option(
    "--vary",
    type=Variation(),
    multiple=True,
    help="Teach once with each value instead, as round-size=1,10,50; repeated, with each combination.",
)
@measuring_options
@written_options
def study_command(
    edits: Path,
    preset: str | None,
    config: Path | None,
    orders: int | None,
    vary: tuple[tuple[str, tuple[Any, ...]], ...],
    **options: Any,
) -> None:
    """Study one method on EDITS: forgetting, routing and order, or how its settings change the result.

    Without --vary: the reliability of each round after each later one, whether prompts still reach the expert that
    was trained on them, and what other orders of the same edits come to.

    With --vary the edits are taught once for each combination of values, of any settings, and all results are in one
    table, and in the plot of a --report page. Everything is taught anew, and nothing is kept but the results.
    """
    from lemoe.settings import resolve_settings

    varied = _check_variations(vary, orders)
    given = {"round_size": options["round_size"], "seed": options["seed"]}
    settings = resolve_settings(preset, config, given)
    measure = (
        _make_sweep(settings, varied, options)
        if varied
        else _make_factors(settings, ORDERS if orders is None else orders, options)
    )
    run_study("lemoe study", edits, measure, options)


def _check_variations(vary: Sequence[tuple[str, tuple[Any, ...]]], orders: int | None) -> dict[str, tuple[Any, ...]]:
    """The values of each setting."""
    varied = dict(vary)
    if len(varied) < len(vary):
        raise InputError("--vary names a setting twice; give all of its values at once, as round-size=1,10,50")
    if "method" in varied or "preset" in varied:
        raise InputError("--vary is for the settings of one preset; several presets: lemoe compare --presets A,B")
    if varied and orders is not None:
        raise click.UsageError("--orders and --vary exclude each other; --vary order=planned,random varies the order")
    return varied


def _make_factors(settings: "Settings", orders: int, options: Mapping[str, Any]) -> Study:
    def measure(base: "BaseModel", read: "Sequence[Edit]", notify: "Notify") -> Findings:
        from lemoe.evaluation.factors import measure_factors

        (settled,) = settle_layers(base, [settings], notify)
        found = measure_factors(
            base,
            read,
            settled,
            orders=orders,
            decode=options["decode"],
            batch_tokens=options["batch_tokens"],
            notify=notify,
        )
        return Findings(factors=found)

    return measure


def _make_sweep(settings: "Settings", varied: Mapping[str, Sequence[Any]], options: Mapping[str, Any]) -> Study:
    from lemoe.settings import vary_settings

    combinations = vary_settings(settings, varied)

    def measure(base: "BaseModel", read: "Sequence[Edit]", notify: "Notify") -> Findings:
        from lemoe.evaluation.sweep import sweep

        settled = settle_layers(base, combinations, notify)
        found = sweep(
            base,
            read,
            settled,
            list(varied),
            decode=options["decode"],
            batch_tokens=options["batch_tokens"],
            notify=notify,
        )
        return Findings(sweep=found)

    return measure
