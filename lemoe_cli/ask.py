"""`lemoe ask`: answers before and after, and which edit acted, for prompts on the command line or on stdin."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lemoe.errors import InputError
from lemoe_cli.command import lemoe_command, options_of
from lemoe_cli.options import (
    ADAPTOR,
    adaptor_option,
    check_cache,
    check_inputs,
    expert_cache_option,
    mismatch_option,
    model_options,
    open_adaptor,
    open_base,
    output_option,
    progress_options,
)

if TYPE_CHECKING:
    from lemoe.inference.asking import Reply


asking_option = options_of("Asking")


@lemoe_command(
    "ask",
    examples=(
        "lemoe ask 'Where is the Eiffel Tower?' -m llama -a edits.lemoe",
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
@asking_option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Of an answer, at most.")
@output_option("--json", "as_json", is_flag=True, help="One JSON object per line, for each prompt.")
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
    max_new_tokens: int,
    as_json: bool,
    batch: int,
    allow_base_mismatch: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Ask each PROMPT: greedy answers before and after, and which edits acted, or why none did.

    Without a PROMPT, or with -, every line of stdin is one.
    """
    check_cache(adaptor, options)
    batches = _batch_prompts(_read_prompts() if prompts in ((), ("-",)) else prompts, batch)
    first = next(batches, None)
    if first is None:
        raise InputError("no prompts: name them on the command line, or give one per line on stdin")
    check_inputs([adaptor], options, quiet=quiet)

    from lemoe.adaptor.state import check_base
    from lemoe.inference.asking import ask
    from lemoe.inference.insertion import insert
    from lemoe_cli.ui import print_note

    file = open_adaptor(adaptor) if adaptor else None
    base = open_base(options, quiet=quiet)
    for difference in check_base(base, file.state, allow=allow_base_mismatch) if file else ():
        print_note(f"warning: another base than the adaptor was made for: {difference}")
    edited = None
    if file is not None:
        edited = insert(base, file, expert_cache=options["expert_cache"], allow_base_mismatch=allow_base_mismatch)
    with edited or nullcontext():
        for asked in chain([first], batches):
            replies = ask(base, asked, edited, chat=chat, max_new_tokens=max_new_tokens)
            if as_json:
                _print_json(replies)
            else:
                _show_replies(replies)


def _read_prompts() -> Iterator[str]:
    """The lines of stdin that are not empty."""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"stdin:{number}: not UTF-8 text (byte {error.start} of the line)") from None
        if "\0" in line:
            raise InputError(f"stdin:{number}: expected text, one prompt per line; there are zero bytes in it")
        if line:
            yield line


def _batch_prompts(prompts: Iterable[str], size: int) -> Iterator[list[str]]:
    waiting = iter(prompts)
    return iter(lambda: list(islice(waiting, size)), [])


def _print_json(replies: "Sequence[Reply]") -> None:
    for reply in replies:
        click.echo(json.dumps(asdict(reply), ensure_ascii=False))


def _show_replies(replies: "Sequence[Reply]") -> None:
    from lemoe_cli.ui import print_table, results

    for reply in replies:
        if reply.route is None:
            print_table(" ".join(reply.prompt.split("\n")), ("before",), [(reply.before,)])
        else:
            cells = (reply.before, reply.after or "", _describe_route(reply))
            print_table(" ".join(reply.prompt.split("\n")), ("before", "after", "edit"), [cells], left=3)
        results.print()


def _describe_route(reply: "Reply") -> str:
    """Which edits acted, and when, or why none did."""
    if reply.acted and reply.route is not None:
        later = " (later in the answer)" if reply.route.expert < 0 else ""
        return ", ".join(reply.acted) + later
    return "none: no subject mentioned" if reply.nearest is None else f"none: asks something else than {reply.nearest}"
