"""`lemoe merge`: several adaptors, one file."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe_cli.command import Moved, lemoe_command
from lemoe_cli.options import (
    FILE,
    adaptors_argument,
    check_inputs,
    force_option,
    json_option,
    merging_options,
    output_option,
    progress_options,
)
from lemoe_cli.results import print_json

if TYPE_CHECKING:
    from lemoe.adaptor.merging import MergeResult, OnConflict
    from lemoe.adaptor.state import TaughtEdit

SCHEMA = 1


@lemoe_command(
    "merge",
    examples=(
        "lemoe merge facts.lemoe prices.lemoe -o both.safetensors",
        "lemoe merge edits.lemoe --drop facts-7 -o without.safetensors",
    ),
    moved={"--compact": Moved("compact"), "--export": Moved("export", "-o")},
)
@adaptors_argument
@merging_options
@output_option("--output", "-o", type=FILE, help="The stacked adaptor's file.")
@output_option("--dry-run", is_flag=True, help="Say what the result would hold, and write nothing.")
@json_option
@force_option
@progress_options
def merge_command(
    adaptors: tuple[Path, ...],
    on_conflict: "OnConflict",
    drop: tuple[str, ...],
    dtype: str | None,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Stack ADAPTORS of the same base model into one, in the given order.

    A round that several of them hold counts once. Adaptors of different bases, layers or methods are refused with
    the differences listed. One adaptor with --drop is that adaptor as if it had never had what is dropped. Where
    several edits have one id, 3/ID is the one of round 3; `lemoe show --edits` lists them so.

    "Who is the CEO of X?" and "The CEO of X is" are one question: --on-conflict lets the latest adaptor answer it,
    refuses, or keeps the answer of the earliest. With both, only the very same prompt is one question. What may be one
    question is named, and both answer.
    """
    if output is None and not dry_run:
        raise click.UsageError("give the result's file with --output, or --dry-run to see what it would hold")
    check_inputs(adaptors, {"model": None}, quiet=quiet)
    target = None if dry_run else output

    from lemoe.adaptor.merging import merge_adaptors

    merged = merge_adaptors(adaptors, target, on_conflict=on_conflict, drop=drop, dtype=dtype, overwrite=force)
    if as_json:
        print_json(list_merged(merged, target))
    else:
        show_merged(len(adaptors), merged, output, dry_run=dry_run)


def list_merged(merged: "MergeResult", written: Path | None) -> dict[str, Any]:
    """What the stack holds, and what became of edits with the same question, for JSON."""
    state = merged.state
    return {
        "schema": SCHEMA,
        "path": str(written) if written else None,
        "size": merged.size,
        "rounds": len(state.rounds),
        "repeated_rounds": merged.repeated_rounds,
        "edits": len(state.edits),
        "dtype": str(state.experts.up.dtype).removeprefix("torch."),
        "dropped": [_list_edit(edit) for edit in merged.dropped],
        "kept_out": _list_pairs(merged.kept_out),
        "superseded": _list_pairs(state.superseded_edits),
        "possible": _list_pairs(merged.possible),
    }


def _list_pairs(pairs: "Iterable[tuple[TaughtEdit, TaughtEdit]]") -> list[dict[str, Any]]:
    return [{"edit": _list_edit(edit), "other": _list_edit(other)} for edit, other in pairs]


def _list_edit(edit: "TaughtEdit") -> dict[str, Any]:
    return asdict(edit)


def show_merged(count: int, merged: "MergeResult", output: Path | None, *, dry_run: bool) -> None:
    """What the stack of `count` adaptors holds, and what became of edits with the same question."""
    from lemoe.adaptor.contradictions import contradiction_notes
    from lemoe.adaptor.state import superseded_note
    from lemoe_cli.ui import print_note, print_table, size_text

    state = merged.state
    rows = [
        (
            "rounds",
            f"{len(state.rounds)}" + (f", {merged.repeated_rounds} came again" if merged.repeated_rounds else ""),
        ),
        ("edits", str(sum(len(record.edits) for record in state.rounds))),
        ("experts stored as", str(state.experts.up.dtype).removeprefix("torch.")),
    ]
    if merged.dropped:
        rows.append(("edits dropped", str(len(merged.dropped))))
    if output is not None and not dry_run:
        rows += [("size", size_text(merged.size)), ("adaptor", str(output))]
    what = "1 adaptor" if count == 1 else f"{count} adaptors"
    print_table(f"{what} {'would be ' if dry_run else ''}stacked", ("", ""), rows, left=2)
    for edit in merged.dropped:
        print_note(f"edit {edit.label} of round {edit.round} is dropped")
    for later, earlier in merged.kept_out:
        print_note(f"edit {later.label} is left out: {earlier.label} answers its question")
    for earlier, later in state.superseded_edits:
        print_note(superseded_note(earlier, later))
    for note in contradiction_notes(merged.possible):
        print_note(note)
