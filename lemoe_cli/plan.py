"""`lemoe plan`: how edits would be grouped into rounds, and what is wrong with them."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe.data.counting import format_count
from lemoe_cli.command import lemoe_command
from lemoe_cli.options import (
    FILE,
    check_inputs,
    edits_argument,
    force_option,
    json_option,
    model_options,
    open_base,
    open_edits,
    output_option,
    progress_options,
    selection_options,
    settings_from,
    settings_options,
)
from lemoe_cli.results import print_json

if TYPE_CHECKING:
    from lemoe.data.edits import Edit
    from lemoe.planning.plan import Plan

SCHEMA = 1
ROUNDS_SHOWN = 200


@lemoe_command(
    "plan",
    examples=(
        "lemoe plan edits.jsonl -m llama",
        "lemoe plan edits.jsonl -m llama --round-size 20 -o plan.yaml",
    ),
)
@edits_argument
@model_options
@selection_options
@settings_options
@output_option("--output", "-o", type=FILE, help="Write the plan here (YAML); `lemoe edit --plan` follows it.")
@json_option
@force_option
@progress_options
def plan_command(edits: Path, output: Path | None, as_json: bool, force: bool, quiet: bool, **options: Any) -> None:
    """Show how EDITS would be grouped into rounds, and which repeat or contradict each other.

    EDITS is JSON Lines with `prompt` and `target` (see the README), or a published data set as it is.
    """
    from lemoe.data.files import check_overwrite, write_atomically

    if output is not None:
        check_overwrite(output, overwrite=force)
    read = open_edits(edits, options)
    settings = settings_from(options, ("order", "round_size", "seed"))
    check_inputs([], options, quiet=quiet)
    base = open_base(options, quiet=quiet)

    from lemoe.planning.plan import plan, save_plan

    planned = plan(base, read, settings)
    if output is not None:
        write_atomically(output, save_plan(planned, read, edits.name).encode(), overwrite=force)
    if as_json:
        print_json({"schema": SCHEMA, "order": settings.order, **asdict(planned)})
    else:
        _show_plan(planned, read, settings.order)
    if output is not None and not quiet:
        click.echo(f"plan written to {output}", err=True)


def _show_plan(planned: "Plan", edits: "list[Edit]", order: str) -> None:
    from lemoe_cli.ui import print_table, results

    by_id = {edit.id: edit for edit in edits}
    rows = [
        (str(number), str(len(members)), f"{cohesion:.3f}", by_id[members[0]].prompt)
        for number, members, cohesion in zip(range(1, ROUNDS_SHOWN + 1), planned.rounds, planned.cohesion, strict=False)
    ]
    print_table(
        format_count(len(planned.rounds), "round"), ("round", "edits", "similarity", "first edit"), rows, left=4
    )
    _show_rest(len(planned.rounds) - len(rows))
    results.print()
    print_table(
        "Similarity of prompts (cosine); a good order is high within rounds, low between",
        ("order", "within", "between"),
        [
            (name + (" (chosen)" if name == order else ""), f"{value.within:.3f}", f"{value.between:.3f}")
            for name, value in planned.similarity.items()
        ],
    )
    if planned.inferred_subjects:
        shown_subjects = list(planned.inferred_subjects.items())[:20]
        results.print()
        print_table(
            f"Subjects inferred for {format_count(len(planned.inferred_subjects), 'edit')} without one",
            ("subject", "prompt"),
            [(subject, by_id[name].prompt) for name, subject in shown_subjects],
            left=2,
        )
    if not planned.conflicts:
        results.print("\nNo duplicates or conflicts.")
        return
    results.print()
    kinds = [conflict.relation for conflict in planned.conflicts]
    summary = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    shown = planned.conflicts[:20]
    print_table(
        f"Edits that repeat or contradict a later one: {summary}",
        ("relation", "earlier", "later"),
        [(c.relation, _summarise_edit(by_id[c.earlier]), _summarise_edit(by_id[c.later])) for c in shown],
        left=3,
    )
    _show_rest(len(planned.conflicts) - len(shown))


def _show_rest(count: int) -> None:
    from lemoe_cli.ui import results

    if count:
        results.print(f"... and {count} more, all in the plan file (-o)")


def _summarise_edit(edit: "Edit") -> str:
    return f"{edit.id}: {edit.prompt} -> {edit.target}"
