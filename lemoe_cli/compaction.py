"""`lemoe merge --compact`: what compaction tried, lost and saved."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemoe_cli.options import open_base

if TYPE_CHECKING:
    from lemoe.adaptor.merging import MergeResult
    from lemoe.runs.compaction import CompactionResult


def run_compaction(
    read: "Callable[[], MergeResult]",
    output: Path | None,
    tolerance: float,
    options: Mapping[str, Any],
    *,
    overwrite: bool,
) -> "MergeResult":
    """The stack that `read` gives, compacted, shown, and written to `output`; ends with 1 if too much is lost."""
    from lemoe.adaptor.checkpoint import save_adaptor
    from lemoe.data.files import check_overwrite, remove_scratch
    from lemoe.runs.compaction import compact_adaptor
    from lemoe_cli.ui import print_note, show_stage

    if output is not None:
        check_overwrite(output, overwrite=overwrite)
    merged = read()
    base = open_base({**options, "device_map": None, "dtype": "auto"}, quiet=False)
    with show_stage("compacting", quiet=False) as notify:
        outcome = compact_adaptor(base, merged.state, tolerance=tolerance, notify=notify)
    _show_trials(outcome)
    if outcome.state is None:
        print_note(f"nothing is written: more than --tolerance {tolerance:g} would be lost")
        sys.exit(1)
    if output is None:
        return replace(merged, state=outcome.state)
    remove_scratch(output.parent, output.name)
    save_adaptor(outcome.state, output, overwrite=overwrite)
    return replace(merged, state=outcome.state, size=output.stat().st_size)


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
        print_note(f"{outcome.left_out} superseded edit(s) are left out for good")
