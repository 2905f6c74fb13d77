"""`lemoe eval`: metrics before and after, for people, machines and pipelines, and one record for each probe."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe.errors import LemoeError, OutputError
from lemoe_cli.options import (
    FILE,
    check_cache,
    check_inputs,
    edits_argument,
    expert_cache_option,
    force_option,
    mismatch_option,
    model_options,
    open_adaptor,
    open_base,
    open_edits,
    quiet_option,
    selection_options,
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
    from lemoe_cli.studies import Studies

SCHEMA = 1  # of the JSON document: docs/eval.schema.json
THRESHOLD = "METRIC[/KIND][:MEASURE]=NUMBER"


@click.command("eval")
@edits_argument
@model_options
@click.option("--adaptor", "-a", type=FILE, help="Adaptor to measure; without one, the base model alone.")
@click.option(
    "--decode",
    type=click.Choice(["teacher", "greedy"]),
    default="teacher",
    show_default=True,
    help="Likeliest token at each position of the target, or what the model writes.",
)
@click.option("--texts", type=FILE, help="Texts that editing must not touch: their perplexity (metric collapse).")
@click.option("--fluency", is_flag=True, help="Let the model write on from each edit's prompts (metric fluency); slow.")
@click.option(
    "--min", "least", multiple=True, metavar=THRESHOLD, help="End with code 1 unless the metric is at least this."
)
@click.option("--max", "most", multiple=True, metavar=THRESHOLD, help="The same, at most, where less is better.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one flat record for each metric.")
@click.option("--card", is_flag=True, help="Write the metrics into the card beside the adaptor (README.md).")
@click.option("--records", type=FILE, help="Write one JSON line for each probe here.")
@click.option("--compare", metavar="PRESETS", help="Teach EDITS by each of these, as ft,lora,memoe,paper,anchor.")
@click.option("--factors", is_flag=True, help="Teach EDITS by --preset; measure forgetting, routing and order.")
@click.option("--preset", default="anchor", show_default=True, help="Method of --factors: anchor, paper, a baseline.")
@click.option("--round-size", type=click.IntRange(1), help="Edits in a round of --compare or --factors.  [default: 20]")
@click.option("--orders", type=click.IntRange(0), default=5, show_default=True, help="Random orders of --factors.")
@click.option(
    "--report", "reports", type=FILE, multiple=True, help="Write a page (.html) or Markdown (.md); repeatable."
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Tokens that run through the model at once.",
)
@tasks_options
@expert_cache_option
@selection_options
@mismatch_option
@force_option
@quiet_option
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

    --compare and --factors teach EDITS anew, round by round, whatever adaptor there is, and keep nothing.

    \b
    lemoe eval edits.jsonl -m llama -a edits.lemoe --min reliability=0.99 --max overfit=0.05
    """
    from lemoe.data.texts import read_texts
    from lemoe.evaluation.thresholds import check_kinds, check_thresholds
    from lemoe_cli.studies import resolve_studies, run_studies

    check_cache(adaptor, options)
    resolve_studies(options)
    thresholds = _read_thresholds(adaptor, decode, options)
    read = open_edits(edits, options)
    untouched = read_texts(options["texts"]) if options["texts"] else []
    _check_files(adaptor, options, force=force)
    _check_reports(options, force=force)
    check_inputs([adaptor], options)

    from lemoe.adaptor.state import check_base

    file = open_adaptor(adaptor) if adaptor else None
    state = file.state if file else None
    check_kinds(thresholds, read, len(state.rounds) if state else 0)
    base = open_base(options, quiet=quiet)

    from lemoe_cli.ui import print_note

    differences = check_base(base, state, allow=allow_base_mismatch) if state else ()
    for difference in differences:
        print_note(f"warning: another base than the adaptor was made for: {difference}")
    tasks = measure_tasks(base, file, options, allow_mismatch=allow_base_mismatch, quiet=quiet)
    result = None
    if _needs_measuring(adaptor, thresholds, options):
        result = _measure_adaptor(base, file, read, decode, untouched, batch_tokens, options, quiet=quiet)
    studies = run_studies(base, read, decode, batch_tokens, options, quiet=quiet)
    checks = check_thresholds(thresholds, result.metrics if result else (), "after" if state else "before")

    def print_results() -> None:
        if options["as_json"]:
            settings = _list_settings(edits, base, decode, options)
            settings |= {"adaptor": str(adaptor) if adaptor else None, "base_differences": list(differences)}
            settings |= {"texts": str(options["texts"]) if options["texts"] else None, "fluency": options["fluency"]}
            document = _make_document(result.metrics if result else (), checks, tasks, settings) | studies.as_dict()
            click.echo(json.dumps(document, indent=1, ensure_ascii=False))
        else:
            _show_results(result, tasks, studies)

    writers = _make_writers(result, studies, base, state, adaptor, read, edits, decode, options, force=force)
    problems = _run_all_steps(chain([print_results], writers))
    failed = _print_failed(checks)
    if problems:
        raise OutputError("\n  ".join(problems))
    if failed:
        click.get_current_context().exit(1)


def _run_all_steps(steps: Iterable[Callable[[], object]]) -> list[str]:
    """Run every step, even if some fail, and list the failures: no failure loses the results of a long measurement."""
    problems = []
    for step in steps:
        try:
            step()
        except LemoeError as error:
            problems.append(str(error))
        except (BrokenPipeError, SystemExit):  # by which rich ends: whoever read the results has seen enough
            continue
        except OSError as error:
            problems.append(f"the results cannot be printed: {error.strerror or error}")
    return problems


def _needs_measuring(adaptor: Path | None, thresholds: "Sequence[Threshold]", options: dict[str, Any]) -> bool:
    """Whether the edits' probes are measured: not where the edits are only taught anew."""
    anew = options["compare"] is not None or options["factors"]
    asked = (options[name] for name in ("records", "reports", "texts", "fluency"))
    return not anew or adaptor is not None or bool(thresholds) or any(asked)


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
    from lemoe.evaluation.evaluate import evaluate
    from lemoe_cli.ui import show_counter

    with show_counter("measuring", quiet=quiet) as advance:
        return evaluate(
            base,
            adaptor,
            edits,
            decode=decode,
            texts=texts,
            fluency=options["fluency"],
            batch_tokens=batch_tokens,
            expert_cache=options["expert_cache"],
            allow_base_mismatch=True,  # which has been refused unless it was asked for
            on_progress=advance,
        )


def _show_results(result: "EvalResult | None", tasks: "Sequence[TaskMetric]", studies: "Studies") -> None:
    from lemoe_cli.tables import show_metrics

    if result is not None:
        show_metrics(result.metrics)
    show_tasks(tasks)
    studies.show()


def _read_thresholds(adaptor: Path | None, decode: "Decode", options: dict[str, Any]) -> "tuple[Threshold, ...]":
    from lemoe.evaluation.thresholds import read_thresholds

    given = [f"--{name}" for name in ("texts", "fluency") if options[name]]
    return read_thresholds(options["least"], options["most"], decode, edited=adaptor is not None, given=given)


def _check_files(adaptor: Path | None, options: dict[str, Any], *, force: bool) -> None:
    """Refuse, before anything is computed, what cannot be written."""
    from lemoe.data.files import check_overwrite

    if options["records"] is not None:
        check_overwrite(options["records"], overwrite=force)
    if options["card"] and not adaptor:
        raise click.UsageError("--card needs an --adaptor, beside which the card is written")


def _check_reports(options: dict[str, Any], *, force: bool) -> None:
    """The same for reports; their module also draws them and is slow to load."""
    if options["reports"]:
        from lemoe.report import check_reports

        check_reports(options["reports"], overwrite=force)


def _make_writers(
    result: "EvalResult | None",
    studies: "Studies",
    base: "BaseModel",
    state: "AdaptorState | None",
    adaptor: Path | None,
    edits: "Sequence[Edit]",
    source: Path,
    decode: "Decode",
    options: dict[str, Any],
    *,
    force: bool,
) -> Iterator[Callable[[], object]]:
    """A function for each of the files that are asked for, which writes it."""
    from lemoe.data.files import write_atomically
    from lemoe.report import build_report, write_reports
    from lemoe.report.card import write_card

    if result is None:
        return
    if options["records"] is not None:
        lines = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in result.records)
        yield partial(write_atomically, options["records"], "".join(lines).encode(), overwrite=force)
    if options["reports"]:
        report = build_report(
            base,
            state,
            edits,
            result,
            source=source.name,
            decode=decode,
            factors=studies.factors,
            comparison=studies.comparison,
        )
        yield from (
            partial(write_reports, report, [path], overwrite=force) for path in dict.fromkeys(options["reports"])
        )
    if options["card"] and adaptor and state:
        folder = adaptor if adaptor.is_dir() else adaptor.parent
        yield partial(write_card, folder, base, state, source.name, result.metrics)


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


def _list_settings(edits: Path, base: "BaseModel", decode: "Decode", options: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and on what, for the JSON document."""
    chosen = {name: options[name] for name in ("model", "revision", "limit", "sample", "seed")}
    where = {"dtype": str(base.dtype).removeprefix("torch."), "device": ", ".join(map(str, base.devices))}
    digest = hashlib.sha256(edits.read_bytes()).hexdigest()
    return {"edits": str(edits), "edits_sha256": digest, "decode": decode, **chosen, **where}


def _make_document(
    metrics: "Sequence[Metric]",
    checks: "Sequence[ThresholdCheck]",
    tasks: "Sequence[TaskMetric]",
    settings: dict[str, Any],
) -> dict[str, Any]:
    values = [asdict(m) | {"better": m.better, "version": m.version} for m in metrics]
    thresholds = [
        asdict(check.threshold)
        | {"better": check.threshold.better, "value": check.metric.value if check.metric else None, "met": check.met}
        for check in checks
    ]
    found = {"metrics": values, "bars": thresholds, "tasks": [asdict(task) for task in tasks]}
    return {"schema": SCHEMA, "settings": settings, "versions": _list_versions(), **found}


def _list_versions() -> dict[str, str]:
    """The versions of what computed the metrics."""
    import torch
    import transformers

    from lemoe import __version__

    return {
        "lemoe": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
