"""`lemoe ask`: answers before and after, and which edit acted; of prompts, lines of stdin, or in a conversation."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe.data.conversation import Conversation
from lemoe.errors import InputError
from lemoe_cli.command import lemoe_command, options_of
from lemoe_cli.options import (
    ADAPTOR,
    adaptor_option,
    check_cache,
    check_inputs,
    check_match,
    expert_cache_option,
    mismatch_option,
    model_options,
    open_adaptor,
    open_base,
    output_option,
    progress_options,
)
from lemoe_cli.prompt_lines import Line, batch_lines, read_lines
from lemoe_cli.routes import describe_route

if TYPE_CHECKING:
    from lemoe.base.loading import BaseModel
    from lemoe.inference.asking import Reply
    from lemoe.inference.insertion import InsertedAdaptor


asking_option = options_of("Asking")

TOKENS = 32  # of an answer, at most
TOKENS_IN_CONVERSATION = 256


@lemoe_command(
    "ask",
    examples=(
        "lemoe ask 'Where is the Eiffel Tower?' -m llama -a edits.lemoe",
        "lemoe ask -m llama -a edits.lemoe",
        "lemoe ask -m llama -a edits.lemoe --chat --json < prompts.txt",
    ),
)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@model_options
@adaptor_option(
    "--adaptor",
    "-a",
    type=ADAPTOR,
    help="Adaptor to ask, or org/name on the hub; without, the base alone.",
)
@asking_option("--chat", is_flag=True, help="Ask through the tokenizer's chat template.")
@asking_option("--system", metavar="TEXT", help="System prompt of a conversation, or of each prompt with --chat.")
@asking_option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help=f"Of an answer, at most.  [default: {TOKENS}; in a conversation {TOKENS_IN_CONVERSATION}]",
)
@output_option(
    "--json",
    "as_json",
    is_flag=True,
    help='One JSON object per line, for each prompt; lines of stdin may be {"messages": [...]} too.',
)
@asking_option(
    "--batch",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Prompts answered together; 1 answers each line of stdin as it comes.",
)
@expert_cache_option
@mismatch_option
@progress_options
def ask_command(
    prompts: tuple[str, ...],
    adaptor: Path | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int | None,
    as_json: bool,
    batch: int,
    allow_base_mismatch: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Ask each PROMPT: greedy answers before and after, and which edits acted, or why none did.

    Without a PROMPT, in a terminal, this is a conversation: /help lists its commands. With -, or where stdin is no
    terminal, every line of stdin is a prompt.
    """
    check_cache(adaptor, options)
    talking = not prompts and not as_json and sys.stdin.isatty() and sys.stdout.isatty()
    if system is not None and not chat and not talking:
        raise click.UsageError("--system needs --chat: only a chat template has a place for a system prompt")
    batches = iter(()) if talking else _read_batches(prompts, batch, as_json=as_json)
    check_inputs([adaptor], options, quiet=quiet)

    from lemoe_cli.conversation import converse

    base = open_base(options, quiet=quiet)
    inserted = _insert_adaptor(base, adaptor, options["expert_cache"], allow_mismatch=allow_base_mismatch)
    with inserted or nullcontext():
        if talking:
            converse(base, inserted, system, max_new_tokens or TOKENS_IN_CONVERSATION, quiet=quiet)
        else:
            _answer_batches(base, inserted, batches, Asking(chat, system, max_new_tokens or TOKENS), as_json=as_json)


@dataclass(frozen=True)
class Asking:
    """How prompts are asked; see the options of the command."""

    chat: bool
    system: str | None
    max_new_tokens: int


def _read_batches(prompts: Sequence[str], size: int, *, as_json: bool) -> Iterator[list[Line]]:
    named = (Line(number, prompt) for number, prompt in enumerate(prompts, 1))
    batches = batch_lines(read_lines(conversations=as_json) if prompts in ((), ("-",)) else named, size)
    first = next(batches, None)
    if first is None:
        raise InputError("no prompts: name them on the command line, or give one per line on stdin")
    return chain([first], batches)


def _insert_adaptor(
    base: "BaseModel", adaptor: Path | None, expert_cache: int | None, *, allow_mismatch: bool
) -> "InsertedAdaptor | None":
    from lemoe.inference.insertion import insert

    if adaptor is None:
        return None
    file = open_adaptor(adaptor)
    check_match(base, file.state, allow=allow_mismatch)
    return insert(base, file, expert_cache=expert_cache, allow_base_mismatch=allow_mismatch)


def _answer_batches(
    base: "BaseModel",
    edited: "InsertedAdaptor | None",
    batches: Iterable[Sequence[Line]],
    asking: Asking,
    *,
    as_json: bool,
) -> None:
    """Answer all lines, in their order; those that hold no conversation that the model takes are reported."""
    failed = 0
    for batch in batches:
        lines = [_check_line(base, line, asking) for line in batch]
        replies = iter(_ask_lines(base, edited, [line for line in lines if line.problem is None], asking))
        for line in lines:
            if line.problem is not None:
                failed += 1
                _report_line(line)
            elif as_json:
                click.echo(json.dumps(asdict(next(replies)), ensure_ascii=False))
            else:
                _show_reply(next(replies))
    if failed:
        raise InputError(f"lines of stdin that were not answered: {failed}")


def _check_line(base: "BaseModel", line: Line, asking: Asking) -> Line:
    """The line with its system prompt and its problem, if it is a conversation; all prompts are checked together."""
    from lemoe.inference.asking import find_problem

    if line.problem is not None or isinstance(line.asked, str):
        return line
    asked = line.asked.with_system(asking.system)
    return replace(line, asked=asked, problem=find_problem(base, asked, max_new_tokens=asking.max_new_tokens))


def _ask_lines(
    base: "BaseModel", edited: "InsertedAdaptor | None", lines: Sequence[Line], asking: Asking
) -> "list[Reply]":
    from lemoe.inference.asking import Prompt, ask

    asked: list[Prompt] = [
        Conversation.from_prompt(line.asked, asking.system)
        if isinstance(line.asked, str) and asking.system is not None
        else line.asked
        for line in lines
    ]
    return ask(base, asked, edited, chat=asking.chat, max_new_tokens=asking.max_new_tokens)


def _report_line(line: Line) -> None:
    """On stderr, and on stdout in the place of its answer, so that who wrote it does not wait."""
    from lemoe_cli.ui import print_note

    print_note(f"stdin:{line.number}: {line.problem}")
    click.echo(json.dumps({"line": line.number, "error": line.problem}, ensure_ascii=False))


def _show_reply(reply: "Reply") -> None:
    from lemoe_cli.ui import print_table, results

    title = " ".join(reply.prompt.split("\n"))
    if reply.route is None:
        print_table(title, ("before",), [(reply.before,)])
    else:
        cells = (reply.before, reply.after or "", describe_route(reply))
        print_table(title, ("before", "after", "edit"), [cells], left=3)
    results.print()
