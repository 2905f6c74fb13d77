"""What `lemoe ask` is asked: prompts of the command line, or lines of stdin, which may hold whole conversations."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from lemoe.data.conversation import Conversation, read_conversation
from lemoe.errors import InputError


@dataclass(frozen=True)
class Line:
    """A prompt or conversation, or the problem of a line that should have been one.

    Attributes:
        number: of the line, from 1.
    """

    number: int
    asked: str | Conversation
    problem: str | None = None


def read_lines(*, conversations: bool) -> Iterator[Line]:
    """The lines of stdin that are not empty; with `conversations`, JSON objects are such.

    Raises:
        InputError: at a line that is no text.
    """
    for number, raw in enumerate(sys.stdin.buffer, 1):
        text = _decode_line(number, raw)
        if text:
            yield _parse_line(number, text) if conversations else Line(number, text)


def batch_lines(lines: Iterable[Line], size: int) -> Iterator[list[Line]]:
    """The lines, `size` at a time, each read when it is needed."""
    waiting = iter(lines)
    return iter(lambda: list(islice(waiting, size)), [])


def _decode_line(number: int, raw: bytes) -> str:
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"stdin:{number}: not UTF-8 text (byte {error.start} of the line)") from None
    if "\0" in line:
        raise InputError(f"stdin:{number}: expected text, one prompt per line; there are zero bytes in it")
    return line


def _parse_line(number: int, text: str) -> Line:
    try:
        return Line(number, read_conversation(text) or text)
    except InputError as problem:
        return Line(number, text, str(problem))
