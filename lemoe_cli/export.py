"""`lemoe export`: base and adaptors as one model folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemoe_cli.command import lemoe_command
from lemoe_cli.merge import list_merged, show_merged
from lemoe_cli.options import (
    FILE,
    adaptors_argument,
    check_inputs,
    force_option,
    json_option,
    merging_options,
    model_argument,
    output_option,
    placing_options,
    progress_options,
)
from lemoe_cli.results import print_json

if TYPE_CHECKING:
    from lemoe.adaptor.merging import OnConflict
    from lemoe.exporting.folder import ExportResult


@lemoe_command(
    "export",
    examples=(
        "lemoe export llama edits.lemoe -o edited-llama",
        "lemoe export meta-llama/Meta-Llama-3-8B-Instruct facts.lemoe prices.lemoe -o edited --drop facts-7",
    ),
)
@model_argument
@adaptors_argument
@placing_options
@merging_options
@output_option("--output", "-o", type=FILE, required=True, help="Folder for the result.")
@json_option
@force_option
@progress_options
def export_command(
    model: str,
    adaptors: tuple[Path, ...],
    output: Path,
    on_conflict: "OnConflict",
    drop: tuple[str, ...],
    dtype: str | None,
    as_json: bool,
    force: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write MODEL with ADAPTORS as a complete folder, which transformers loads without lemoe.

    The folder holds the base's files, the stacked adaptor, the tokenizer, a card and the code of router and experts:
    `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`. It gets its name only after it was loaded again
    by a Python that cannot import lemoe and has answered bit for bit as base and adaptors do.
    """
    check_inputs(adaptors, {**options, "model": model}, quiet=quiet)

    from lemoe.exporting.folder import ExportOptions, export_model
    from lemoe_cli.ui import show_stage

    with show_stage("reading the adaptors", quiet=quiet) as notify:
        how = ExportOptions(options["device"], options["revision"], on_conflict, drop, dtype, overwrite=force)
        exported = export_model(model, adaptors, output, how, notify=notify)
    if as_json:
        written = {"path": str(exported.folder), "size": exported.size, "compared": exported.compared}
        print_json({**list_merged(exported.merged, None), **written})
    else:
        _show_export(len(adaptors), exported)


def _show_export(count: int, exported: "ExportResult") -> None:
    from lemoe_cli.ui import print_table, size_text

    show_merged(count, exported.merged, None, dry_run=False)
    rows = [
        ("folder", str(exported.folder)),
        ("size", size_text(exported.size)),
        ("checked", f"{exported.compared} texts: logits and answers are those of base and adaptor, bit for bit"),
    ]
    print_table("", ("", ""), rows, left=2)
