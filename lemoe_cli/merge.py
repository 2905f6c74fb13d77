"""`lemoe merge`: several adaptors, one file."""

from pathlib import Path

import click

from lemoe_cli.options import FILE, force_option


@click.command("merge")
@click.argument("adaptors", type=FILE, nargs=-1, required=True)
@click.option("--output", "-o", type=FILE, required=True, help="The stacked adaptor's file.")
@force_option
def command(adaptors: tuple[Path, ...], output: Path, force: bool) -> None:
    """Stack ADAPTORS of the same base model into one, in the given order.

    A round that several of them hold counts once. Adaptors of different bases, layers or methods are refused with
    the differences listed.
    """
    from lemoe.merging import merge
    from lemoe_cli.ui import size_text, table

    merged = merge(adaptors, output, overwrite=force)
    edits = sum(len(record.edits) for record in merged.rounds)
    rows = [
        ("rounds", str(len(merged.rounds))),
        ("edits", str(edits)),
        ("size", size_text(output.stat().st_size)),
        ("adaptor", str(output)),
    ]
    table(f"{len(adaptors)} adaptors stacked", ("", ""), rows, left=2)
