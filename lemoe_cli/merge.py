"""`lemoe merge`: several adaptors, one file."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lemoe_cli.options import FILE, force_option

if TYPE_CHECKING:
    from lemoe.merging import OnConflict


@click.command("merge")
@click.argument("adaptors", type=FILE, nargs=-1, required=True)
@click.option("--output", "-o", type=FILE, required=True, help="The stacked adaptor's file.")
@click.option(
    "--on-conflict",
    type=click.Choice(["latest", "error"]),
    default="latest",
    show_default=True,
    help="What to do where edits of several adaptors answer the same question.",
)
@force_option
def command(adaptors: tuple[Path, ...], output: Path, on_conflict: "OnConflict", force: bool) -> None:
    """Stack ADAPTORS of the same base model into one, in the given order.

    A round that several of them hold counts once. Adaptors of different bases, layers or methods are refused with
    the differences listed.
    """
    from lemoe.merging import merge
    from lemoe_cli.ui import say, size_text, table

    merged = merge(adaptors, output, on_conflict=on_conflict, overwrite=force)
    edits = sum(len(record.edits) for record in merged.rounds)
    rows = [
        ("rounds", str(len(merged.rounds))),
        ("edits", str(edits)),
        ("size", size_text(output.stat().st_size)),
        ("adaptor", str(output)),
    ]
    table(f"{len(adaptors)} adaptors stacked", ("", ""), rows, left=2)
    for earlier, later in merged.replaced:
        say(f"edit {earlier.id} is superseded: {later.id} answers its question now")
