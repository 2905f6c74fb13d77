"""`lemoe show`: what an adaptor file holds."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe.data.counting import format_count
from lemoe_cli.command import lemoe_command, options_of
from lemoe_cli.options import ADAPTOR, check_inputs, model_options_if_any, open_base, progress_options

if TYPE_CHECKING:
    from lemoe.adaptor.inspection import Inspection
    from lemoe.adaptor.state import TaughtEdit

showing_option = options_of("Output")

SCHEMA = 1
SHOWN = 20
EDIT = ("round/edit", "prompt", "target")


@lemoe_command(
    "show",
    examples=(
        "lemoe show edits.lemoe --edits",
        "lemoe show edits.lemoe --verify -m llama",
    ),
)
@click.argument("adaptor", type=ADAPTOR)
@showing_option("--verify", is_flag=True, help="Check hashes and records too, and with --model the base.")
@showing_option("--json", "as_json", is_flag=True, help="Everything as JSON on stdout.")
@showing_option("--edits", "list_edits", is_flag=True, help="Name every edit, with its prompt and target.")
@model_options_if_any
@progress_options
def show_command(adaptor: Path, verify: bool, as_json: bool, list_edits: bool, quiet: bool, **options: Any) -> None:
    """Show what ADAPTOR holds: its base, rounds, edits, and which of them are superseded.

    ADAPTOR is an adaptor file or the folder of a run. Hashes are shortened; --json has them whole. A file of format 1
    holds its edits as tokens alone: --model, if the adaptor was made for it, turns them into text.
    """
    check_inputs([adaptor], options, quiet=quiet)

    from lemoe.adaptor.inspection import decode_texts, inspect_adaptor, verify_adaptor

    found = inspect_adaptor(adaptor)
    checked: list[str] = []
    if verify or options["model"]:
        base = open_base(options, quiet=quiet) if options["model"] else None
        checked = verify_adaptor(found, base)
        found = decode_texts(found, base) if base else found
    if as_json:
        click.echo(json.dumps(_make_document(found, checked), indent=1, ensure_ascii=True))
        return
    _show_inspection(found, list_edits=list_edits)
    for line in checked:
        click.echo(f"checked: {line}", err=True)


def _make_document(found: "Inspection", checked: list[str]) -> dict[str, Any]:
    state = found.state
    return {
        "schema": SCHEMA,
        "path": str(found.path),
        "size": found.size,
        "sha256": found.sha256,
        "tool": found.tool,
        "base": state.base.as_dict(),
        "settings": state.settings.as_dict(),
        "edits": found.edit_count,
        "rounds": [asdict(record) for record in state.rounds],
        "superseded": [
            {"edit": earlier.id, "round": earlier.round, "by": later.id, "by_round": later.round}
            for earlier, later in found.superseded
        ],
        "checked": checked,
    }


def _shorten_digest(digest: str) -> str:
    return f"{digest[:32]}..."


def _show_inspection(found: "Inspection", *, list_edits: bool) -> None:
    from lemoe_cli.ui import print_table, size_text

    state, base = found.state, found.state.base
    rows = [
        ("base", f"{base.name}{'@' + base.revision if base.revision else ''} ({base.architecture})"),
        ("beside", f"{base.ffn} (layer {base.layer})"),
        ("method", f"{state.settings.method}, {format_count(len(state.experts), 'expert')}"),
        (
            "edits",
            f"{found.edit_count:,} in {format_count(len(state.rounds), 'round')}, {len(found.superseded)} superseded",
        ),
        ("size", f"{size_text(found.size)} ({size_text(found.size // max(1, found.edit_count))} per edit)"),
        ("written by", found.tool),
        ("sha256", _shorten_digest(found.sha256)),
        ("FFN sha256", _shorten_digest(base.ffn_sha256)),
        ("tokenizer sha256", _shorten_digest(base.tokenizer_sha256)),
    ]
    print_table(str(found.path), ("", ""), rows, left=2)
    rounds = [
        (
            str(number),
            record.id[:12],
            str(len(record.edits)),
            f"{record.loss:.3f}",
            "" if record.end_loss is None else f"{record.end_loss:.3f}",
            str(record.steps),
            "" if record.missed is None else str(len(record.missed)),
        )
        for number, record in enumerate(state.rounds, 1)
    ]
    print_table("\nRounds", ("", "id", "edits", "loss", "end loss", "steps", "missed"), rounds[:SHOWN], left=2)
    if len(rounds) > SHOWN:
        click.echo(f"... and {len(rounds) - SHOWN} more, all with --json")
    if found.superseded:
        pairs = [
            (*_edit_cells(earlier), f"{later.round}/{later.id}", later.target) for earlier, later in found.superseded
        ]
        print_table("\nSuperseded", (*EDIT, "answered now by", "with"), pairs, left=5)
    if found.missed_edits:
        print_table("\nMissed when their round ended", EDIT, [_edit_cells(edit) for edit in found.missed_edits], left=3)
    if list_edits:
        print_table("\nEdits", EDIT, [_edit_cells(edit) for edit in state.edits], left=3)


def _edit_cells(edit: "TaughtEdit") -> tuple[str, str, str]:
    """An edit by its round and id, which `lemoe merge --drop` takes, with what it teaches."""
    return f"{edit.round}/{edit.id}", edit.prompt, edit.target
