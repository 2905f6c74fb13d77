"""What commands do with results: JSON documents, no failure that loses another's output, and a question first."""

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe.errors import InputError, LemoeError

if TYPE_CHECKING:
    from lemoe.base.loading import BaseModel
    from lemoe.evaluation.metrics import Decode
    from lemoe.report.content import Report

SCHEMA = 1  # of the JSON document: docs/eval.schema.json


def run_all_steps(steps: Iterable[Callable[[], object]]) -> list[str]:
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


def write_and_tell(write: Callable[[], object], path: Path, *, quiet: bool) -> None:
    """Write a file, and say so on stderr."""
    write()
    if not quiet:
        from lemoe_cli.ui import strip_control

        click.echo(strip_control(f"written: {path}"), err=True)


def confirm(question: str) -> None:
    """Ask on stderr; anything but yes ends the command.

    Raises:
        InputError: if there is nobody to answer.
    """
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise InputError("nobody is there to answer: --yes agrees beforehand") from None
    if not agreed:
        raise click.Abort


def print_json(document: Mapping[str, Any]) -> None:
    """A document on stdout."""
    click.echo(json.dumps(document, indent=1, ensure_ascii=False))


def make_document(settings: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What was `found`, with the settings and versions that it was found with."""
    return {"schema": SCHEMA, "settings": dict(settings), "versions": _list_versions(), **found}


def list_settings(edits: Path, base: "BaseModel", decode: "Decode", options: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, and on what."""
    chosen = {name: options[name] for name in ("model", "revision", "limit", "sample", "seed")}
    where = {"dtype": str(base.dtype).removeprefix("torch."), "device": ", ".join(map(str, base.devices))}
    digest = hashlib.sha256(edits.read_bytes()).hexdigest()
    return {"edits": str(edits), "edits_sha256": digest, "decode": decode, **chosen, **where}


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


def report_writers(
    report: "Report", paths: Iterable[Path], *, force: bool, quiet: bool
) -> Iterator[Callable[[], object]]:
    """A function for each of the paths, which writes the report there and says so."""
    from lemoe.report import write_reports

    for path in dict.fromkeys(paths):
        yield partial(write_and_tell, partial(write_reports, report, [path], overwrite=force), path, quiet=quiet)


def check_report_files(reports: Iterable[Path], *, force: bool) -> None:
    """Refuse, before anything is computed, reports that cannot be written."""
    from lemoe.report import check_reports

    check_reports(reports, overwrite=force)
