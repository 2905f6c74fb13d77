"""`lemoe edit`: the main job."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe.data.counting import format_count
from lemoe_cli.command import lemoe_command, options_of
from lemoe_cli.options import (
    ADAPTOR,
    AUTO,
    FILE,
    LayerChoice,
    adaptor_option,
    check_inputs,
    conflict_option,
    edits_argument,
    edits_option,
    force_option,
    json_option,
    make_loader,
    mismatch_option,
    model_options,
    open_base,
    open_edits,
    output_option,
    progress_options,
    selection_options,
    setting_option,
    settings_from,
    settings_options,
    training_option,
)
from lemoe_cli.results import print_json

if TYPE_CHECKING:
    from lemoe.adaptor.merging import OnConflict
    from lemoe.data.edits import Edit
    from lemoe.runs.edit import EditReport
    from lemoe.runs.engines import Engine


class RoundRange(click.ParamType[range]):
    """Indices of rounds, from 0: one, or the first and the last."""

    name = "N|N-N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:
        first, dash, last = str(value).partition("-")
        try:
            indices = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            indices = range(0)
        if not indices:
            self.fail(f"{value!r} is neither a round, counted from 0, nor the first and the last: 7, 0-49", param, ctx)
        return indices


_SETTINGS = (
    "order",
    "round_size",
    "seed",
    "layer",
    "layer_path",
    "steps",
    "learning_rate",
    "width",
    "batch_tokens",
    "train_rephrases",
)

SCHEMA = 1

where_option = options_of("Where to train")

LAYER_HELP = (
    "Decoder layer to edit, from 0; auto measures it, even where the model's preset says one.  "
    "[default: the preset's, else measured once for each model]"
)


@lemoe_command(
    "edit",
    examples=(
        "lemoe edit edits.jsonl -m llama",
        "lemoe edit more.jsonl -m llama --from edits.lemoe -o both.lemoe --on-conflict error",
    ),
)
@edits_argument
@model_options
@selection_options
@edits_option("--plan", "plan_file", type=FILE, help="Follow this plan; edits not in it are left out and counted.")
@edits_option("--rounds", type=RoundRange(), help="Train only these rounds of the plan, from 0, as a part to merge.")
@adaptor_option("--from", "start", type=ADAPTOR, help="Continue this adaptor; its edits stay as they are.")
@conflict_option("Which edit answers where EDITS ask what the adaptor of --from answers; keep takes the earlier.")
@mismatch_option
@settings_options
@training_option("--layer", type=LayerChoice(), help=LAYER_HELP)
@setting_option("--layer-path", help="Path of the FFN within the layer, where it is not recognised.")
@setting_option("--steps", type=click.IntRange(1), help="Training steps of a round, at most.")
@setting_option("--learning-rate", type=float, help="Of the experts.")
@training_option(
    "--width",
    type=click.IntRange(1),
    help="Neurons of an expert.  [default: anchor 4, more for long answers; paper as the base's FFN]",
)
@setting_option("--batch-tokens", type=click.IntRange(1), help="Tokens that run through the model at once.")
@setting_option("--train-rephrases", is_flag=True, help="Train on the edits' own rephrases too.")
@where_option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where rounds are trained: here, or by workers of Ray (extra `ray`).",
)
@where_option("--address", help="Ray cluster to work on.  [default: one on this machine, for this run]")
@where_option("--workers", type=click.IntRange(1), help="Rounds that Ray trains at once.  [default: as there is room]")
@output_option("--output", "-o", type=FILE, help="Folder for the result.  [default: EDITS with .lemoe]")
@output_option("--resume", is_flag=True, help="Go on with an interrupted run: same edits, same settings.")
@output_option(
    "--log-to",
    type=click.Choice(["tensorboard", "csv", "json"]),
    help="Log every step and round under DIR/logs, for other tools (tensorboard: extra `tensorboard`).",
)
@json_option
@force_option
@progress_options
def edit_command(
    edits: Path,
    output: Path | None,
    plan_file: Path | None,
    rounds: range | None,
    start: Path | None,
    on_conflict: "OnConflict",
    allow_base_mismatch: bool,
    engine: str,
    address: str | None,
    workers: int | None,
    resume: bool,
    log_to: str | None,
    as_json: bool,
    force: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Teach EDITS to a model: plan, train one expert a round, write the adaptor.

    Each round's state is written as soon as it is done (DIR/rounds/0001.safetensors, ...), the stack of all of
    them at the end (DIR/adaptor.safetensors). The base model's files are never changed.

    With --plan and --rounds, parts of a plan are taught apart, on as many machines as there are: `lemoe merge` of all
    parts, in order, gives the adaptor of one run, byte for byte.

    With --from, an edit that asks what the adaptor answers already, in the same or in other words ("Who is the CEO of
    X?", "The CEO of X is"), supersedes it, is refused or is left out, as --on-conflict says; with both, only the very
    same prompt is the same question. What may be the same question is named, and both answer.

    --resume goes on from the finished rounds of an interrupted run, with its plan and its --rounds, which the folder
    knows. It is refused, before anything is trained, where EDITS has grown or a setting or the model differs from
    what those rounds were trained with; --resume --plan DIR/plan.yaml finishes the planned edits alone.
    """
    from lemoe.planning.plan_file import read_plan
    from lemoe.runs.folder import PLAN_NAME, check_folder, check_round_range
    from lemoe_cli.logs import check_log

    _check_engine_options(engine, address, workers, options)
    check_log(log_to)
    read = open_edits(edits, options)
    folder = output or edits.with_suffix(".lemoe")
    measure_layer = options["layer"] == AUTO
    settings = settings_from({**options, "layer": None} if measure_layer else options, _SETTINGS)
    check_folder(folder, force=force, resume=resume)
    planned = plan_file is not None or (resume and (folder / PLAN_NAME).exists())
    check_round_range(rounds, settings, planned=planned)
    if plan_file is not None:
        read_plan(plan_file, read)
    check_inputs([start], options, quiet=quiet)

    from lemoe.adaptor.checkpoint import load_adaptor
    from lemoe.runs.edit import EditOptions, check_engine, edit

    trainer = _make_engine(engine, address, workers, options)
    check_engine(trainer, settings)
    earlier = load_adaptor(start) if start else None
    base = open_base(options, quiet=quiet)

    from lemoe_cli.logs import LoggedProgress
    from lemoe_cli.ui import EditProgress

    with LoggedProgress(folder, log_to, quiet=quiet) if log_to else EditProgress(quiet=quiet) as progress:
        report = edit(
            base,
            read,
            folder,
            settings,
            EditOptions(
                source=edits.name,
                plan_file=plan_file,
                round_range=rounds,
                start=earlier,
                on_conflict=on_conflict,
                force=force,
                resume=resume,
                allow_base_mismatch=allow_base_mismatch,
                measure_layer=measure_layer,
            ),
            engine=trainer,
            progress=progress,
        )
    if as_json:
        print_json({"schema": SCHEMA, **asdict(report), "path": str(report.path)})
    else:
        _show_report(report, read)


def _check_engine_options(name: str, address: str | None, workers: int | None, options: Mapping[str, Any]) -> None:
    if name == "ray" and options["device_map"]:
        raise click.UsageError("--device-map is for --engine local: each worker of Ray has one device for its base")
    if name != "ray" and (address or workers):
        raise click.UsageError("--address and --workers are for --engine ray")


def _make_engine(name: str, address: str | None, workers: int | None, options: Mapping[str, Any]) -> "Engine":
    if name == "ray":
        from lemoe.runs.engines.ray import RayEngine

        return RayEngine(make_loader(options), address, workers)
    from lemoe.runs.engines.local import LocalEngine

    return LocalEngine()


def _show_report(report: "EditReport", edits: "Sequence[Edit]") -> None:
    from lemoe.data.edits import join_labels
    from lemoe_cli.ui import duration_text, print_note, print_table, size_text

    per_edit = report.seconds / max(1, report.taught)
    rows = [
        ("reliability, target tokens", f"{report.reliability_before:.3f}", f"{report.reliability_after:.3f}"),
        ("reliability, whole target", f"{report.exact_before:.3f}", f"{report.exact_after:.3f}"),
    ]
    print_table(f"{format_count(report.taught, 'edit')} taught", ("", "before", "after"), rows)
    left_out = _describe_left_out(report)
    print_table(
        "",
        ("", ""),
        [
            *([("left out", left_out)] if left_out else []),
            ("time", f"{duration_text(report.seconds)} ({per_edit:.2f} s per edit)"),
            ("rounds", f"{report.rounds} in the adaptor"),
            ("size", size_text(report.size)),
            ("adaptor", str(report.path)),
        ],
        left=2,
    )
    if report.missed:
        names = set(report.missed)
        missed = [edit for edit in edits if edit.id in names]
        print_note(
            f"{format_count(len(missed), 'edit')} still missed the target after all retries: {join_labels(missed)}"
        )
    for number in report.unreached:
        print_note(f"round {number} ended above its loss target; give it more --steps")


def _describe_left_out(report: "EditReport") -> str:
    """How many of the edits are in no new round, and why."""
    counts = (
        (report.already_taught, "already in the adaptor"),
        (report.kept_out, "answered by the adaptor in another way"),
        (report.repeated, "repeated or superseded by later ones"),
        (len(report.unplanned), "not in the plan"),
    )
    return ", ".join(f"{count} {why}" for count, why in counts if count)
