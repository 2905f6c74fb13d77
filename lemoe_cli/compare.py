"""`lemoe compare`: the same edits taught by several methods, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemoe_cli.choices import PresetNames
from lemoe_cli.command import lemoe_command
from lemoe_cli.options import training_option
from lemoe_cli.studies import (
    Findings,
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

DEFAULT_PRESETS = "context,rag,ft,ultraedit,anchor"  # none of which needs an extra


@lemoe_command(
    "compare",
    examples=(
        "lemoe compare edits.jsonl -m llama",
        "lemoe compare edits.jsonl -m llama --presets ft,lora,anchor --sample 100 --report compare.html",
    ),
)
@source_options
@training_option(
    "--presets",
    type=PresetNames(baselines=True),
    default=DEFAULT_PRESETS,
    show_default=True,
    help="Methods to compare, as ft,lora,memoe,paper,anchor.",
)
@round_size_option
@measuring_options
@written_options
def compare_command(edits: Path, presets: str, **options: Any) -> None:
    """Teach EDITS by each of several methods, in the same rounds, and put quality, time and bytes side by side.

    The edits are taught anew each time; nothing is kept but the results. Without probes in EDITS, only reliability is
    measured.
    """
    methods = resolve_methods(presets, options["round_size"], options["seed"])

    def measure(base: "BaseModel", read: "Sequence[Edit]", notify: "Notify") -> Findings:
        from lemoe.evaluation.comparison import compare

        settled = settle_layers(base, methods, notify)
        found = compare(
            base, read, settled, decode=options["decode"], batch_tokens=options["batch_tokens"], notify=notify
        )
        return Findings(comparison=found)

    run_study("lemoe compare", edits, measure, options)


def resolve_methods(names: str, round_size: int, seed: int | None) -> "list[Settings]":
    """The settings of presets given as `ft,lora,...`, all with the same rounds."""
    from lemoe.settings import resolve_settings

    return [resolve_settings(name, None, {"round_size": round_size, "seed": seed}) for name in names.split(",")]
