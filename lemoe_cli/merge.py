"""`lemoe merge`: several adaptors, one file; or base and adaptors, one model folder."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe_cli.options import (
    FILE,
    check_inputs,
    conflict_option,
    force_option,
    model_options_without_dtype,
    quiet_option,
)

if TYPE_CHECKING:
    from lemoe.adaptor.merging import MergeResult, OnConflict
    from lemoe.exporting.folder import ExportResult


@click.command("merge")
@click.argument("adaptors", type=FILE, nargs=-1, required=True, metavar="[MODEL] ADAPTORS...")
@click.option("--output", "-o", type=FILE, help="The stacked adaptor's file.")
@conflict_option("Which edit answers where several adaptors answer the same question; keep takes the earliest.")
@click.option(
    "--drop",
    multiple=True,
    metavar="ROUND|EDIT|ROUND/EDIT",
    help="Take out a round, by number or id, or an edit, by id or digest.  [several]",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Store experts so.  [default: as they are]"
)
@click.option("--compact", is_flag=True, help="Teach each round's edits to fewer, smaller experts; needs --model.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Share of whole answers that --compact may lose.",
)
@click.option("--export", type=FILE, help="Write a whole model folder here; the first argument is then the base MODEL.")
@model_options_without_dtype
@click.option("--dry-run", is_flag=True, help="Say what the result would hold, and write nothing.")
@force_option
@quiet_option
def merge_command(
    adaptors: tuple[Path, ...],
    output: Path | None,
    on_conflict: "OnConflict",
    drop: tuple[str, ...],
    dtype: str | None,
    compact: bool,
    tolerance: float,
    export: Path | None,
    dry_run: bool,
    force: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Stack ADAPTORS of the same base model into one, in the given order.

    A round that several of them hold counts once. Adaptors of different bases, layers or methods are refused with
    the differences listed. One adaptor with --drop is that adaptor as if it had never had what is dropped. Where
    several edits have one id, 3/ID is the one of round 3; `lemoe show --edits` lists them so.

    "Who is the CEO of X?" and "The CEO of X is" are one question: --on-conflict lets the latest adaptor answer it,
    refuses, or keeps the answer of the earliest. With both, only the very same prompt is one question. What may be one
    question is named, and both answer.

    --compact measures the adaptor before and after, and keeps the smallest that stays within the tolerance; where
    none does, nothing is written, and the exit code is 1.

    With --export the result is a complete folder that transformers loads with trust_remote_code=True and without
    lemoe: `lemoe merge MODEL A B --export DIR`.
    """
    if export is not None:
        if compact or output is not None or dry_run:
            raise click.UsageError("--export writes a folder of its own; leave out --compact, --output and --dry-run")
        if len(adaptors) < 2 or options["model"]:
            raise click.UsageError("--export takes the base model in front of the adaptors: lemoe merge MODEL A ...")
        check_inputs(adaptors[1:], {**options, "model": str(adaptors[0])})
        _export_folder(adaptors, export, on_conflict, drop, dtype, options, force=force, quiet=quiet)
        return
    if compact != bool(options["model"]):
        raise click.UsageError("--compact and --model need each other")
    if output is None and not dry_run:
        raise click.UsageError("give the result's file with --output, or --dry-run to see what it would hold")
    check_inputs(adaptors, options)
    target = None if dry_run else output

    from lemoe.adaptor.merging import merge_adaptors, merge_in_memory

    if compact:
        from lemoe_cli.compaction import run_compaction

        read = partial(merge_in_memory, adaptors, on_conflict=on_conflict, drop=drop, dtype=dtype)
        merged = run_compaction(read, target, tolerance, options, overwrite=force)
    else:
        merged = merge_adaptors(adaptors, target, on_conflict=on_conflict, drop=drop, dtype=dtype, overwrite=force)
    _show_merged(len(adaptors), merged, output, dry_run=dry_run)


def _export_folder(
    arguments: tuple[Path, ...],
    folder: Path,
    on_conflict: "OnConflict",
    drop: tuple[str, ...],
    dtype: str | None,
    options: Mapping[str, Any],
    *,
    force: bool,
    quiet: bool,
) -> None:
    from lemoe.exporting.folder import export_model
    from lemoe_cli.ui import show_stage

    model, *adaptors = arguments
    with show_stage("reading the adaptors", quiet=quiet) as notify:
        exported = export_model(
            str(model),
            adaptors,
            folder,
            device=options["device"],
            revision=options["revision"],
            on_conflict=on_conflict,
            drop=drop,
            dtype=dtype,
            overwrite=force,
            notify=notify,
        )
    _show_export(len(adaptors), exported)


def _show_export(count: int, exported: "ExportResult") -> None:
    from lemoe_cli.ui import print_table, size_text

    _show_merged(count, exported.merged, None, dry_run=False)
    rows = [
        ("folder", str(exported.folder)),
        ("size", size_text(exported.size)),
        ("checked", f"{exported.compared} texts: logits and answers are those of base and adaptor, bit for bit"),
    ]
    print_table("", ("", ""), rows, left=2)


def _show_merged(count: int, merged: "MergeResult", output: Path | None, *, dry_run: bool) -> None:
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
