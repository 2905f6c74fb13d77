"""The `lemoe` command and what all subcommands share: lazy loading, and errors as one clear message."""

import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from click.exceptions import NoSuchCommand

from lemoe import __version__
from lemoe.errors import LemoeError

COMMANDS = {
    "plan": "Show how edits would be grouped into rounds, and which repeat or contradict each other.",
    "edit": "Teach edits to a model: plan, train one expert a round, write the adaptor.",
    "eval": "Measure an adaptor: reliability, generality, locality, portability, routing.",
    "ask": "Ask a model: answers before and after, and which edit acted.",
    "serve": "Serve a model with adaptors through an OpenAI-compatible API.",
    "show": "Show what an adaptor holds, and check it.",
    "merge": "Stack adaptors of the same base model into one, or take edits out.",
    "undo": "Take edits out of an adaptor, found by what they teach.",
    "compact": "Teach an adaptor's edits anew to fewer, smaller experts.",
    "export": "Write base and adaptors as one model folder, which runs without lemoe.",
    "push": "Upload an adaptor and its card to the Hugging Face hub.",
    "compare": "Teach the same edits by several methods, and put them side by side.",
    "study": "Study one method: forgetting, routing, order, and settings varied.",
}


class Terminated(BaseException):
    """SIGTERM came: unwind as from Ctrl-C, so that everything is cleaned up."""


@contextmanager
def _unwind_on_sigterm() -> Iterator[None]:
    """While open, SIGTERM unwinds the stack instead of ending the process on the spot."""

    def raise_terminated(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class LazyGroup(click.Group):
    """Loads a subcommand's module only when it is used, so that `--help` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"lemoe_cli.{cmd_name}"), f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except NoSuchCommand as unknown:
            raise NoSuchCommand(unknown.command_name, possibilities=COMMANDS, ctx=ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _unwind_on_sigterm():
                return super().invoke(ctx)
        except LemoeError as error:
            from lemoe_cli.ui import strip_control
            from lemoe_cli.wording import name_options

            for line in f"error: {name_options(str(error))}".split("\n"):
                click.echo(strip_control(line), err=True)
            ctx.exit(2)
        except (KeyboardInterrupt, Terminated) as signalled:
            kept = "; finished rounds are kept, --resume goes on from them" if ctx.invoked_subcommand == "edit" else ""
            ended = isinstance(signalled, Terminated)
            click.echo(f"{'terminated' if ended else 'interrupted'}{kept}", err=True)
            ctx.exit(143 if ended else 130)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            click.echo("error: out of memory; lower --batch-tokens, or take --dtype bfloat16", err=True)
            ctx.exit(2)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lemoe")
def cli() -> None:
    """Lifelong model editing: teach a language model new facts without retraining it.

    \b
    lemoe edit edits.jsonl --model llama
    lemoe eval edits.jsonl --model llama --adaptor edits.lemoe/adaptor.safetensors
    """


if __name__ == "__main__":
    sys.exit(cli())
