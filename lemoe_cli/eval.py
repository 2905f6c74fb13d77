"""`lemoe eval`: figures before and after, for people, for machines, for pipelines, and one record for each probe."""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe_cli.options import (
    FILE,
    edits_argument,
    force_option,
    mismatch_option,
    model_options,
    open_base,
    open_edits,
    quiet_option,
    selection_options,
)
from lemoe_cli.tasks import measure_tasks, show_tasks, tasks_options

if TYPE_CHECKING:
    from lemoe.adaptor import AdaptorState
    from lemoe.bars import Bar, Verdict
    from lemoe.evaluation import EvalResult
    from lemoe.metrics import Decode
    from lemoe.models import BaseModel

SCHEMA = 1  # of the JSON document: docs/eval.schema.json
BAR = "METRIC[/KIND][:MEASURE]=NUMBER"


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
@click.option("--min", "least", multiple=True, metavar=BAR, help="End with code 1 unless the figure is at least this.")
@click.option("--max", "most", multiple=True, metavar=BAR, help="The same, at most, where less is better.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one flat record for each figure.")
@click.option("--card", is_flag=True, help="Write the figures into the card beside the adaptor (README.md).")
@click.option("--records", type=FILE, help="Write one JSON line for each probe here.")
@click.option("--compare", metavar="PRESETS", help="Teach EDITS by each of these, as ft,lora,memoe,paper,anchor.")
@click.option("--factors", is_flag=True, help="Teach EDITS by --preset; measure forgetting, routing and order.")
@click.option("--preset", default="anchor", show_default=True, help="Method of --factors: anchor, paper, a baseline.")
@click.option("--round-size", type=click.IntRange(1), help="Edits in a round of --compare or --factors.  [default: 20]")
@click.option("--orders", type=click.IntRange(0), default=5, show_default=True, help="Random orders of --factors.")
@click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Tokens that run through the model at once.",
)
@tasks_options
@selection_options
@mismatch_option
@force_option
@quiet_option
def command(
    edits: Path,
    adaptor: Path | None,
    decode: "Decode",
    compare: str | None,
    factors: bool,
    batch_tokens: int,
    allow_base_mismatch: bool,
    force: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure an adaptor on the probes of EDITS: reliability, generality, locality, portability, routing.

    Locality is agreement with the base model's own predictions. `teacher` compares the most likely token at each
    position of the target, `greedy` lets the model write.

    With --compare or --factors, EDITS are taught here, round by round, and nothing is written.

    \b
    lemoe eval edits.jsonl -m llama -a edits.lemoe --min reliability=0.99 --max overfit=0.05
    """
    if compare is None and not factors:
        _measure(edits, adaptor, decode, batch_tokens, options, allow_base_mismatch, force=force, quiet=quiet)
        return
    if adaptor or options["records"] or options["card"] or (factors and compare is not None):
        raise click.UsageError(
            "--compare and --factors teach anew; neither goes with the other, or with --adaptor, --records, --card"
        )
    _study(edits, decode, compare, batch_tokens, options, quiet=quiet)


def _measure(
    edits: Path,
    adaptor: Path | None,
    decode: "Decode",
    batch_tokens: int,
    options: dict[str, Any],
    allow_base_mismatch: bool,
    *,
    force: bool,
    quiet: bool,
) -> None:
    """Measure, write what was asked for, show the figures, and end with 1 if a bar is not met."""
    from lemoe.bars import check_kinds, hold
    from lemoe.checkpoint import load_adaptor
    from lemoe.evaluation import evaluate
    from lemoe.insertion import check_base
    from lemoe.texts import read_texts

    bars = _bars(adaptor, decode, options)
    _check_outputs(adaptor, options, force=force)
    read = open_edits(edits, options)
    untouched = read_texts(options["texts"]) if options["texts"] else []
    state = load_adaptor(adaptor) if adaptor else None
    check_kinds(bars, read, len(state.rounds) if state else 0)
    base = open_base(options, quiet=quiet)

    from lemoe_cli.tables import show
    from lemoe_cli.ui import counter, say

    differences = check_base(base, state, allow=allow_base_mismatch) if state else ()
    for difference in differences:
        say(f"warning: another base than the adaptor was made for: {difference}")
    tasks = measure_tasks(base, state, options, allow_mismatch=allow_base_mismatch, quiet=quiet)
    with counter("measuring", quiet=quiet) as advance:
        result = evaluate(
            base,
            state,
            read,
            decode=decode,
            texts=untouched,
            fluency=options["fluency"],
            batch_tokens=batch_tokens,
            allow_base_mismatch=allow_base_mismatch,
            on_progress=advance,
        )
    _write(result, base, state, adaptor, edits, options, force=force)
    verdicts = hold(bars, result.metrics, "after" if state else "before")
    if options["as_json"]:
        settings = _run_settings(edits, base, decode, options)
        settings |= {"adaptor": str(adaptor) if adaptor else None, "base_differences": list(differences)}
        settings |= {"texts": str(options["texts"]) if options["texts"] else None, "fluency": options["fluency"]}
        document = _document(result, verdicts, settings) | {"tasks": [asdict(figure) for figure in tasks]}
        click.echo(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        show(result.metrics)
        show_tasks(tasks)
    _end_with(verdicts)


def _bars(adaptor: Path | None, decode: "Decode", options: dict[str, Any]) -> "tuple[Bar, ...]":
    from lemoe.bars import read_bars

    given = [f"--{name}" for name in ("texts", "fluency") if options[name]]
    return read_bars(options["least"], options["most"], decode, edited=adaptor is not None, given=given)


def _check_outputs(adaptor: Path | None, options: dict[str, Any], *, force: bool) -> None:
    """Refuse, before anything is computed, what cannot be written."""
    from lemoe.files import check_free

    if options["records"] is not None:
        check_free(options["records"], overwrite=force)
    if options["card"] and not adaptor:
        raise click.UsageError("--card needs an --adaptor, beside which the card stands")


def _write(
    result: "EvalResult",
    base: "BaseModel",
    state: "AdaptorState | None",
    adaptor: Path | None,
    edits: Path,
    options: dict[str, Any],
    *,
    force: bool,
) -> None:
    """The files that were asked for."""
    from lemoe.card import write_card
    from lemoe.files import write_whole

    if options["records"] is not None:
        lines = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in result.records)
        write_whole(options["records"], "".join(lines).encode(), overwrite=force)
    if options["card"] and adaptor and state:
        write_card(adaptor if adaptor.is_dir() else adaptor.parent, base, state, edits.name, result.metrics)


def _end_with(verdicts: "Sequence[Verdict]") -> None:
    failed = [verdict for verdict in verdicts if not verdict.met]
    for verdict in failed:
        click.echo(f"bar not met: {_shortfall(verdict)}", err=True)
    if failed:
        click.get_current_context().exit(1)


def _shortfall(verdict: "Verdict") -> str:
    bar, figure = verdict.bar, verdict.figure
    found = "not measured" if figure is None else f"{figure.value:.6g} (n {figure.n})"
    return f"{bar} is {found}, must be at {'least' if bar.better == 'higher' else 'most'} {bar.limit:g}"


def _run_settings(edits: Path, base: "BaseModel", decode: "Decode", options: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and on what, as JSON says it."""
    chosen = {name: options[name] for name in ("model", "revision", "limit", "sample", "seed")}
    where = {"dtype": str(base.dtype).removeprefix("torch."), "device": str(base.device)}
    digest = hashlib.sha256(edits.read_bytes()).hexdigest()
    return {"edits": str(edits), "edits_sha256": digest, "decode": decode, **chosen, **where}


def _study(
    edits: Path,
    decode: "Decode",
    compare: str | None,
    batch_tokens: int,
    options: dict[str, Any],
    *,
    quiet: bool,
) -> None:
    """Teach `edits` by several methods, or by one in several orders, and show what came of it."""
    from lemoe_cli.studies import methods_named, run_comparison, run_factors

    methods = methods_named(options["preset"] if compare is None else compare, options)
    read = open_edits(edits, options)
    base = open_base(options, quiet=quiet)
    about = _run_settings(edits, base, decode, options) if options["as_json"] else None
    if compare is None:
        run_factors(base, read, methods[0], options["orders"], decode, batch_tokens, about, quiet=quiet)
    else:
        run_comparison(base, read, methods, decode, batch_tokens, about, quiet=quiet)


def _document(result: "EvalResult", verdicts: "Sequence[Verdict]", settings: dict[str, Any]) -> dict[str, Any]:
    metrics = [asdict(m) | {"better": m.better, "version": m.version} for m in result.metrics]
    bars = [
        asdict(verdict.bar)
        | {"better": verdict.bar.better, "value": verdict.figure.value if verdict.figure else None, "met": verdict.met}
        for verdict in verdicts
    ]
    return {"schema": SCHEMA, "settings": settings, "versions": versions(), "metrics": metrics, "bars": bars}


def versions() -> dict[str, str]:
    """What computed the figures."""
    import torch
    import transformers

    from lemoe import __version__

    return {
        "lemoe": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
