"""`lemoe ask` as a conversation in a terminal: lines are answered, and commands tell why."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from lemoe.adaptor.finding import find_edits
from lemoe.errors import LemoeError
from lemoe.inference.chatting import Chat
from lemoe_cli.routes import describe_route, explain_route
from lemoe_cli.ui import print_note, print_table, results, show_stage, strip_control

if TYPE_CHECKING:
    from lemoe.base.loading import BaseModel
    from lemoe.inference.insertion import InsertedAdaptor

MARK = "> "  # in front of what the user types
SHOWN = 20  # edits
_COMMAND = re.compile(r"/([a-z]*)(?:\s+(.*))?")


class _Quit(Exception):
    """The user ends the conversation."""


@dataclass(frozen=True)
class _Session:
    chat: Chat
    quiet: bool


@dataclass(frozen=True)
class _Command:
    """What begins with a slash; `run` gets the text behind its name."""

    argument: str
    meaning: str
    run: Callable[[_Session, str], None]


def converse(
    base: "BaseModel",
    edited: "InsertedAdaptor | None",
    system: str | None,
    max_new_tokens: int,
    *,
    quiet: bool,
    read_line: Callable[[str], str] = input,
) -> None:
    """Answer line after line until the user ends it with Ctrl-D or /quit; Ctrl-C gives up the line at work.

    Args:
        read_line: as `input`.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  which gives `input` its history and line editing

    chat = Chat(base, edited, system=system, max_new_tokens=max_new_tokens)
    if not chat.has_memory:
        print_note(f"{base.source.name} has no chat template: each line is a prompt of its own, answered by itself")
    if not quiet:
        print_note("/help lists the commands, Ctrl-D ends")
    session = _Session(chat, quiet)
    with suppress(_Quit):
        while True:
            with suppress(KeyboardInterrupt):  # one that comes while another is handled
                _take_line(session, read_line)


def _take_line(session: _Session, read_line: Callable[[str], str]) -> None:
    try:
        text = read_line(MARK).strip()
        command = _COMMAND.fullmatch(text)
        if command:
            _run_command(session, command[1], command[2] or "")
        elif text:
            _answer(session, text)
    except KeyboardInterrupt:
        print_note("")
    except EOFError:
        print_note("")
        raise _Quit from None
    except UnicodeDecodeError:
        print_note("error: that is not text in the terminal's encoding")
    except LemoeError as error:
        print_note(f"error: {error}")


def _answer(session: _Session, text: str) -> None:
    with show_stage("answering", quiet=session.quiet):
        answer = session.chat.say(text)
    _print_text(answer.text)
    if answer.route is not None:
        results.print(f"edit: {strip_control(describe_route(answer))}", style="dim")


def _print_text(text: str) -> None:
    for line in text.split("\n"):
        results.print(strip_control(line))


def _run_command(session: _Session, name: str, argument: str) -> None:
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name, COMMANDS, 1)
        print_note(f"error: no command /{name}; " + (f"did you mean /{near[0]}?" if near else "/help lists them"))
        return
    command.run(session, argument.strip())


def _show_edits(session: _Session, text: str) -> None:
    edited = session.chat.edited
    if edited is None:
        print_note("no adaptor, and so no edits")
        return
    edits = list(edited.state.edits)
    found = [each.edit for each in find_edits(edits, text)] if text else edits
    rows = [(f"{edit.round}/{edit.id}", _first_line(edit.prompt), _first_line(edit.target)) for edit in found[:SHOWN]]
    print_table("", ("round/edit", "prompt", "target"), rows, left=3)
    if len(found) > SHOWN:
        print_note(f"and {len(found) - SHOWN} more; /edits TEXT lists those with words of TEXT")


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _show_base(session: _Session, argument: str) -> None:
    with show_stage("answering without edits", quiet=session.quiet):
        text = session.chat.answer_as_base()
    if text is None:
        print_note("nothing was asked yet")
    else:
        _print_text(text)


def _show_why(session: _Session, argument: str) -> None:
    chat = session.chat
    if chat.last is None:
        print_note("nothing was asked yet")
    elif chat.edited is None or chat.last.route is None:
        print_note("no adaptor, and so no edit acts")
    else:
        print_table("", ("", ""), explain_route(chat.last.route, chat.last, chat.edited.state), left=2)


def _change_system(session: _Session, text: str) -> None:
    session.chat.set_system(text or None)
    print_note("the system prompt is given from the next turn on" if text else "no system prompt from the next turn on")


def _forget(session: _Session, argument: str) -> None:
    session.chat.forget()
    print_note("another conversation begins")


def _show_help(session: _Session, argument: str) -> None:
    rows = [(f"/{name} {command.argument}".strip(), command.meaning) for name, command in COMMANDS.items()]
    print_table("", ("", ""), [*rows, ("Ctrl-C", "give up the line or the answer"), ("Ctrl-D", "end")], left=2)


def _quit(session: _Session, argument: str) -> None:
    raise _Quit


COMMANDS = {
    "edits": _Command("[TEXT]", "the edits that the adaptor holds, or those with words of TEXT", _show_edits),
    "base": _Command("", "the base model's answer to the last turn", _show_base),
    "why": _Command("", "why the last turn took its route", _show_why),
    "system": _Command("[TEXT]", "the system prompt from the next turn on; without TEXT, none", _change_system),
    "new": _Command("", "forget the conversation, and begin another", _forget),
    "help": _Command("", "these commands", _show_help),
    "quit": _Command("", "end", _quit),
}
