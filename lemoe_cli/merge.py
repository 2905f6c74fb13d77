"""`lemoe merge`: several adaptors, one file."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe_cli.options import FILE, force_option, model_options_without_dtype

if TYPE_CHECKING:
    from lemoe.merging import Merged, OnConflict


@click.command("merge")
@click.argument("adaptors", type=FILE, nargs=-1, required=True)
@click.option("--output", "-o", type=FILE, help="The stacked adaptor's file.")
@click.option(
    "--on-conflict",
    type=click.Choice(["latest", "error", "keep"]),
    default="latest",
    show_default=True,
    help="Which edit answers where several adaptors answer the same question; keep takes the earliest.",
)
@click.option(
    "--drop",
    multiple=True,
    metavar="ROUND|EDIT-ID",
    help="Take out a round, by number or id, or an edit.  [several]",
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
@model_options_without_dtype
@click.option("--dry-run", is_flag=True, help="Say what the result would hold, and write nothing.")
@force_option
def command(
    adaptors: tuple[Path, ...],
    output: Path | None,
    on_conflict: "OnConflict",
    drop: tuple[str, ...],
    dtype: str | None,
    compact: bool,
    tolerance: float,
    dry_run: bool,
    force: bool,
    **options: Any,
) -> None:
    """Stack ADAPTORS of the same base model into one, in the given order.

    A round that several of them hold counts once. Adaptors of different bases, layers or methods are refused with
    the differences listed. One adaptor with --drop is that adaptor as if it had never had what is dropped.

    --compact measures the adaptor before and after, and keeps the smallest that stays within the tolerance; where
    none does, nothing is written, and the exit code is 1.
    """
    from lemoe.merging import merge, read_merged

    if compact != bool(options["model"]):
        raise click.UsageError("--compact and --model need each other")
    if output is None and not dry_run:
        raise click.UsageError("give the result's file with --output, or --dry-run to see what it would hold")
    target = None if dry_run else output
    if compact:
        from lemoe_cli.compaction import compacted

        read = partial(read_merged, adaptors, on_conflict=on_conflict, drop=drop, dtype=dtype)
        merged = compacted(read, target, tolerance, options, overwrite=force)
    else:
        merged = merge(adaptors, target, on_conflict=on_conflict, drop=drop, dtype=dtype, overwrite=force)
    _show(len(adaptors), merged, output, dry_run=dry_run)


def _show(count: int, merged: "Merged", output: Path | None, *, dry_run: bool) -> None:
    from lemoe_cli.ui import say, size_text, table

    state = merged.state
    rows = [
        ("rounds", f"{len(state.rounds)}" + (f", {merged.repeated} came again" if merged.repeated else "")),
        ("edits", str(sum(len(record.edits) for record in state.rounds))),
        ("experts stored as", str(state.experts.up.dtype).removeprefix("torch.")),
    ]
    if not dry_run:
        rows += [("size", size_text(merged.size)), ("adaptor", str(output))]
    what = "1 adaptor" if count == 1 else f"{count} adaptors"
    table(f"{what} {'would be ' if dry_run else ''}stacked", ("", ""), rows, left=2)
    for edit in merged.dropped:
        say(f"edit {edit.id} is dropped")
    for later, earlier in merged.kept_out:
        say(f"edit {later.id} is left out: {earlier.id} answers its question")
    for earlier, later in state.replaced:
        say(f"edit {earlier.id} is superseded: {later.id} answers its question now")
