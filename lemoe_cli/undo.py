"""`lemoe undo`: takes edits out of an adaptor, found by what they teach."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lemoe.errors import InputError
from lemoe_cli.command import lemoe_command, options_of
from lemoe_cli.merge import list_merged, show_merged
from lemoe_cli.options import FILE, check_inputs, force_option, json_option, output_option, progress_options
from lemoe_cli.results import confirm, print_json

if TYPE_CHECKING:
    from lemoe.adaptor.finding import Found

finding_option = options_of("Finding")

SHOWN = 5  # candidates


@lemoe_command(
    "undo",
    examples=(
        'lemoe undo edits.lemoe "the CEO of Acme"',
        'lemoe undo edits.lemoe "Eiffel Tower" --all --yes -o without.safetensors',
    ),
)
@click.argument("adaptor", type=FILE)
@click.argument("text")
@finding_option("--all", "take_all", is_flag=True, help="Take out every edit that fits, not the best one alone.")
@finding_option("--yes", "-y", is_flag=True, help="Do not ask.")
@output_option("--output", "-o", type=FILE, help="Write the result here.  [default: in place]")
@json_option
@force_option
@progress_options
def undo_command(
    adaptor: Path,
    text: str,
    take_all: bool,
    yes: bool,
    output: Path | None,
    as_json: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Take the edit that TEXT describes out of ADAPTOR, as if it had never been taught.

    TEXT is an edit's id, or words of its prompt, its target or both. The edits that fit are shown, best first, and the
    first is taken out once you agree; --all takes all of them. What it had superseded answers again, and its text is
    gone from the file. `lemoe merge --drop` takes out whole rounds too, by number.
    """
    check_inputs([adaptor], {"model": None}, quiet=quiet)

    from lemoe.adaptor.checkpoint import AdaptorFile
    from lemoe.adaptor.finding import find_edits
    from lemoe.adaptor.merging import merge_adaptors

    file = AdaptorFile(adaptor)
    found = find_edits(file.state.edits, text)
    if not found:
        raise InputError(f"{adaptor}: no edit has words of {text!r}; lemoe show {adaptor} --edits lists all")
    chosen = found if take_all else found[:1]
    _show_found(found, len(chosen))
    target = output or file.path
    if not yes:
        what = "it" if len(chosen) == 1 else f"all {len(chosen)}"
        confirm(f"Take {what} out and write {target}?")
    drop = [f"edit:{each.edit.round}/{each.edit.id}" for each in chosen]
    merged = merge_adaptors([file.path], target, drop=drop, overwrite=force or output is None)
    if as_json:
        print_json(list_merged(merged, target))
    else:
        show_merged(1, merged, target, dry_run=False)


def _show_found(found: "Sequence[Found]", taken: int) -> None:
    """On stderr, since it is asked about there."""
    from lemoe_cli.ui import print_note

    for number, each in enumerate(found[: max(SHOWN, taken)]):
        mark = "->" if number < taken else "  "
        print_note(f"{mark} {each.edit.round}/{each.edit.label}")
    if len(found) > max(SHOWN, taken):
        print_note(f"   and {len(found) - max(SHOWN, taken)} more that fit less")
