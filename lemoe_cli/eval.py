"""`lemoe eval`: metrics before and after, for people, machines and pipelines, and one record for each probe."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe.errors import OutputError
from lemoe_cli.command import Moved, lemoe_command, options_of
from lemoe_cli.options import (
    ADAPTOR,
    FILE,
    adaptor_option,
    batch_tokens_option,
    check_cache,
    check_inputs,
    check_match,
    decode_option,
    edits_argument,
    expert_cache_option,
    force_option,
    measuring_option,
    mismatch_option,
    model_options,
    open_adaptor,
    open_base,
    open_edits,
    output_option,
    progress_options,
    report_option,
    selection_options,
)
from lemoe_cli.results import (
    check_report_files,
    list_settings,
    make_document,
    print_json,
    report_writers,
    run_all_steps,
    write_and_tell,
)
from lemoe_cli.tasks import measure_tasks, show_tasks, tasks_options

if TYPE_CHECKING:
    from lemoe.adaptor.checkpoint import AdaptorFile
    from lemoe.adaptor.state import AdaptorState
    from lemoe.base.loading import BaseModel
    from lemoe.data.edits import Edit
    from lemoe.evaluation.evaluate import EvalResult
    from lemoe.evaluation.harness import TaskMetric
    from lemoe.evaluation.metrics import Decode, Metric
    from lemoe.evaluation.thresholds import Threshold, ThresholdCheck

checking_option = options_of("Checking")

THRESHOLD = "METRIC[/KIND][:MEASURE]=NUMBER"


@lemoe_command(
    "eval",
    examples=(
        "lemoe eval edits.jsonl -m llama -a edits.lemoe --report report.html",
        "lemoe eval edits.jsonl -m llama -a edits.lemoe --min reliability=0.99 --max overfit=0.05",
    ),
    moved={"--compare": Moved("compare", "--presets"), "--factors": Moved("study")},
)
@edits_argument
@model_options
@selection_options
@adaptor_option(
    "--adaptor",
    "-a",
    type=ADAPTOR,
    help="Adaptor to measure, or org/name on the hub; without, the base alone.",
)
@expert_cache_option
@mismatch_option
@measuring_option(
    "--probe",
    type=click.Choice(["file", "auto"]),
    default="file",
    show_default=True,
    help="Rephrases and locality prompts of EDITS, or made up (kind made_up) for edits that have none.",
)
@decode_option
@measuring_option("--texts", type=FILE, help="Texts that editing must not touch: their perplexity (metric collapse).")
@measuring_option(
    "--fluency", is_flag=True, help="Let the model write on from each edit's prompts (metric fluency); slow."
)
@tasks_options
@batch_tokens_option
@checking_option(
    "--min", "least", multiple=True, metavar=THRESHOLD, help="End with code 1 unless the metric is at least this."
)
@checking_option("--max", "most", multiple=True, metavar=THRESHOLD, help="The same, at most, where less is better.")
@output_option("--json", "as_json", is_flag=True, help="Print JSON: one flat record for each metric.")
@output_option("--records", type=FILE, help="Write one JSON line for each probe here.")
@report_option
@output_option("--card", is_flag=True, help="Write the metrics into the card beside the adaptor (README.md).")
@force_option
@progress_options
def eval_command(
    edits: Path,
    adaptor: Path | None,
    decode: "Decode",
    batch_tokens: int,
    allow_base_mismatch: bool,
    force: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure an adaptor on the probes of EDITS: reliability, generality, locality, portability, routing.

    Locality is agreement with the base model's own predictions. `teacher` compares the most likely token at each
    position of the target, `greedy` lets the model write.

    Where EDITS has no rephrases or no locality prompts, generality or locality stays unknown. --probe auto makes them
    up from the bank of questions, as training does with its own paraphrases: other wordings of each edit, and other
    questions about its subject. What they measure is marked made_up, and is a rough estimate.
    """
    from lemoe.data.texts import read_texts
    from lemoe.evaluation.thresholds import check_kinds, check_thresholds

    check_cache(adaptor, options)
    thresholds = _read_thresholds(adaptor, decode, options)
    read = open_edits(edits, options)
    untouched = read_texts(options["texts"]) if options["texts"] else []
    _check_files(adaptor, options, force=force)
    if options["reports"]:
        check_report_files(options["reports"], force=force)
    check_inputs([adaptor], options, quiet=quiet)

    file = open_adaptor(adaptor) if adaptor else None
    state = file.state if file else None
    rounds = len(state.rounds) if state else 0
    check_kinds(thresholds, read, rounds, made_up=options["probe"] == "auto")
    base = open_base(options, quiet=quiet)

    from lemoe.evaluation.made_up import find_missing_probes
    from lemoe_cli.tables import show_metrics

    differences = check_match(base, state, allow=allow_base_mismatch) if state else ()
    missing = find_missing_probes(read)
    read = _make_up_probes(base, state, read, options) if options["probe"] == "auto" else read
    tasks = measure_tasks(base, file, options, allow_mismatch=allow_base_mismatch, quiet=quiet)
    result = _measure_adaptor(base, file, read, decode, untouched, batch_tokens, options, quiet=quiet)
    checks = check_thresholds(thresholds, result.metrics, "after" if state else "before")

    def print_results() -> None:
        if options["as_json"]:
            settings = list_settings(edits, base, decode, options)
            settings |= {"adaptor": str(adaptor) if adaptor else None, "base_differences": list(differences)}
            settings |= {"texts": str(options["texts"]) if options["texts"] else None, "fluency": options["fluency"]}
            settings |= {"probe": options["probe"], "missing_probes": list(missing)}
            print_json(make_document(settings, _list_findings(result.metrics, checks, tasks)))
        else:
            show_metrics(result.metrics)
            show_tasks(tasks)

    writers = _make_writers(result, base, state, adaptor, read, edits, decode, options, force=force, quiet=quiet)
    problems = run_all_steps(chain([print_results], writers))
    if not quiet:
        _tell_missing(missing, options["probe"])
    failed = _print_failed(checks)
    if problems:
        raise OutputError("\n  ".join(problems))
    if failed:
        click.get_current_context().exit(1)


def _make_up_probes(
    base: "BaseModel", state: "AdaptorState | None", edits: "Sequence[Edit]", options: dict[str, Any]
) -> "list[Edit]":
    from lemoe.evaluation.made_up import add_made_up_probes

    settings = replace(state.settings, layer=state.base.layer) if state else None
    return add_made_up_probes(base, edits, settings, seed=options["seed"] or 0)


def _tell_missing(missing: "Sequence[str]", probe: str) -> None:
    """Say what was not measured for want of probes, or was measured by made-up ones alone."""
    from lemoe_cli.ui import print_note

    if not missing:
        return
    kinds = {"generality": "no rephrases", "locality": "no locality prompts"}
    lacking, unknown = ", ".join(kinds[name] for name in missing), " and ".join(missing)
    verb = "is" if len(missing) == 1 else "are"
    if probe == "auto":
        print_note(f"{lacking} in this file: {unknown} {verb} measured on made-up prompts, a rough estimate")
    else:
        print_note(f"{lacking} in this file: {unknown} {verb} unknown; --probe auto makes some up")


def _measure_adaptor(
    base: "BaseModel",
    adaptor: "AdaptorFile | None",
    edits: "Sequence[Edit]",
    decode: "Decode",
    texts: Sequence[str],
    batch_tokens: int,
    options: dict[str, Any],
    *,
    quiet: bool,
) -> "EvalResult":
    from lemoe.evaluation.evaluate import EvalOptions, evaluate
    from lemoe_cli.ui import show_counter

    with show_counter("measuring", quiet=quiet) as advance:
        return evaluate(
            base,
            adaptor,
            edits,
            EvalOptions(
                decode=decode,
                texts=texts,
                fluency=options["fluency"],
                batch_tokens=batch_tokens,
                expert_cache=options["expert_cache"],
                allow_base_mismatch=True,  # which has been refused unless it was asked for
            ),
            on_progress=advance,
        )


def _read_thresholds(adaptor: Path | None, decode: "Decode", options: dict[str, Any]) -> "tuple[Threshold, ...]":
    from lemoe.evaluation.thresholds import read_thresholds

    given = [name for name in ("texts", "fluency") if options[name]]
    return read_thresholds(options["least"], options["most"], decode, edited=adaptor is not None, given=given)


def _check_files(adaptor: Path | None, options: dict[str, Any], *, force: bool) -> None:
    """Refuse, before anything is computed, what cannot be written."""
    from lemoe.data.files import check_overwrite

    if options["records"] is not None:
        check_overwrite(options["records"], overwrite=force)
    if options["card"] and not adaptor:
        raise click.UsageError("--card needs an --adaptor, beside which the card is written")


def _make_writers(
    result: "EvalResult",
    base: "BaseModel",
    state: "AdaptorState | None",
    adaptor: Path | None,
    edits: "Sequence[Edit]",
    source: Path,
    decode: "Decode",
    options: dict[str, Any],
    *,
    force: bool,
    quiet: bool,
) -> Iterator[Callable[[], object]]:
    """A function for each of the files that are asked for, which writes it."""
    from lemoe.data.files import write_atomically
    from lemoe.report import build_report
    from lemoe.report.card import CARD_NAME, write_card

    if options["records"] is not None:
        lines = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in result.records)
        write = partial(write_atomically, options["records"], "".join(lines).encode(), overwrite=force)
        yield partial(write_and_tell, write, options["records"], quiet=quiet)
    if options["reports"]:
        report = build_report(base, state, edits, result, source=source.name, decode=decode)
        yield from report_writers(report, options["reports"], force=force, quiet=quiet)
    if options["card"] and adaptor and state:
        folder = adaptor if adaptor.is_dir() else adaptor.parent
        write_metrics = partial(write_card, folder, base, state, source.name, result.metrics)
        yield partial(write_and_tell, write_metrics, folder / CARD_NAME, quiet=quiet)


def _print_failed(checks: "Sequence[ThresholdCheck]") -> bool:
    """Name the thresholds that are not met; returns whether there are any."""
    from lemoe_cli.ui import strip_control

    failed = [check for check in checks if not check.met]
    for check in failed:
        click.echo(strip_control(f"threshold not met: {_describe_shortfall(check)}"), err=True)
    return bool(failed)


def _describe_shortfall(check: "ThresholdCheck") -> str:
    threshold, metric = check.threshold, check.metric
    found = "not measured" if metric is None else f"{metric.value:.6g} (n {metric.n})"
    bound = "least" if threshold.better == "higher" else "most"
    return f"{threshold} is {found}, must be at {bound} {threshold.limit:g}"


def _list_findings(
    metrics: "Sequence[Metric]", checks: "Sequence[ThresholdCheck]", tasks: "Sequence[TaskMetric]"
) -> dict[str, Any]:
    """The results for the JSON document."""
    values = [asdict(m) | {"better": m.better, "version": m.version} for m in metrics]
    thresholds = [
        asdict(check.threshold)
        | {"better": check.threshold.better, "value": check.metric.value if check.metric else None, "met": check.met}
        for check in checks
    ]
    return {"metrics": values, "bars": thresholds, "tasks": [asdict(task) for task in tasks]}
