"""`lemoe compact`: the edits of an adaptor on fewer, smaller experts."""

import math
import sys
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe.data.counting import format_count
from lemoe_cli.command import lemoe_command
from lemoe_cli.merge import list_merged, show_merged
from lemoe_cli.options import (
    FILE,
    adaptors_argument,
    check_inputs,
    force_option,
    json_option,
    measuring_option,
    merging_options,
    model_options_without_dtype,
    open_base,
    output_option,
    progress_options,
)
from lemoe_cli.results import print_json

if TYPE_CHECKING:
    from lemoe.adaptor.merging import OnConflict
    from lemoe.runs.compaction import CompactionResult, Quality


@lemoe_command(
    "compact",
    examples=(
        "lemoe compact edits.lemoe -m llama -o small.safetensors",
        "lemoe compact facts.lemoe prices.lemoe -m llama -o small.safetensors --tolerance 0.02 --dtype bfloat16",
    ),
)
@adaptors_argument
@model_options_without_dtype
@merging_options
@measuring_option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Share of whole answers that may be lost.",
)
@output_option("--output", "-o", type=FILE, help="The compacted adaptor's file.")
@output_option("--dry-run", is_flag=True, help="Measure what would be lost, and write nothing.")
@json_option
@force_option
@progress_options
def compact_command(
    adaptors: tuple[Path, ...],
    on_conflict: "OnConflict",
    drop: tuple[str, ...],
    dtype: str | None,
    tolerance: float,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
    force: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Teach the edits of ADAPTORS, stacked, anew to fewer, smaller experts.

    The adaptor is measured before and after, by texts made of its own edits, and the smallest size that stays within
    the tolerance is kept. Where none does, nothing is written, and the exit code is 1. Superseded edits are left out
    for good, and edits that share an expert can be dropped with their round only.
    """
    if output is None and not dry_run:
        raise click.UsageError("give the result's file with --output, or --dry-run to see what would be lost")
    from lemoe.data.files import check_overwrite, remove_scratch

    target = None if dry_run else output
    if target is not None:
        check_overwrite(target, overwrite=force)
    check_inputs(adaptors, options, quiet=quiet)

    from lemoe.adaptor.checkpoint import save_adaptor
    from lemoe.adaptor.merging import merge_in_memory
    from lemoe.runs.compaction import compact_adaptor
    from lemoe_cli.ui import print_note, show_stage

    merged = merge_in_memory(adaptors, on_conflict=on_conflict, drop=drop, dtype=dtype)
    base = open_base({**options, "device_map": None, "dtype": "auto"}, quiet=quiet)
    with show_stage("compacting", quiet=quiet) as notify:
        outcome = compact_adaptor(base, merged.state, tolerance=tolerance, notify=notify)
    if not as_json:
        _show_trials(outcome)
    if outcome.state is None:
        if as_json:
            print_json(_list_trials(outcome))
        print_note(f"nothing is written: more than --tolerance {tolerance:g} would be lost")
        sys.exit(1)
    size = merged.size
    if target is not None:
        remove_scratch(target.parent, target.name)
        save_adaptor(outcome.state, target, overwrite=force)
        size = target.stat().st_size
    compacted = replace(merged, state=outcome.state, size=size)
    if as_json:
        print_json({**list_merged(compacted, target), **_list_trials(outcome)})
    else:
        show_merged(len(adaptors), compacted, output, dry_run=dry_run)


def _list_trials(outcome: "CompactionResult") -> dict[str, Any]:
    """What was tried, for JSON."""
    return {
        "kept": outcome.state is not None,
        "before": {"size": outcome.size, **_list_shares(outcome.before)},
        "trials": [
            {"neurons_per_edit": trial.neurons, "size": trial.size, **_list_shares(trial.quality)}
            for trial in outcome.trials
        ],
        "left_out": outcome.left_out,
    }


def _list_shares(quality: "Quality") -> dict[str, float | None]:
    """The shares by name; None for one without probes."""
    return {name: None if math.isnan(share) else share for name, share in asdict(quality).items()}


def _show_trials(outcome: "CompactionResult") -> None:
    from lemoe_cli.ui import print_note, print_table, size_text

    measures = asdict(outcome.before)
    rows = [("as it is", size_text(outcome.size), *(f"{share:.3f}" for share in measures.values()), "")]
    for trial in outcome.trials:
        metrics = (f"{share:.3f}" for share in astuple(trial.quality))
        loss = outcome.before.largest_drop(trial.quality)
        rows.append((f"{trial.neurons:g} neurons per edit", size_text(trial.size), *metrics, f"{loss:.3f}"))
    print_table("Share of whole answers given", ("experts", "size", *measures, "loss"), rows)
    if outcome.left_out:
        print_note(f"{format_count(outcome.left_out, 'superseded edit')} left out for good")
