"""Conversations as data: who says what, in OpenAI's shape, up to what the user says last."""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from lemoe.errors import InputError

Turn = tuple[str, str]  # role and what it says

ROLES = ("system", "user", "assistant")
SHAPE = '{"messages": [{"role": "user", "content": "..."}]}'
_MESSAGE_KEYS = {"role", "content", "name"}
_OPENING = re.compile(r'\{\s*"messages"\s*:')


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation, each a role and what it says; the last is the user's, which is to be answered.

    Example:
        >>> import lemoe
        >>> said = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Who are you?"}]
        >>> lemoe.Conversation.from_messages(said).prompt
        'Who are you?'
    """

    turns: tuple[Turn, ...]

    @property
    def prompt(self) -> str:
        """What the user says last."""
        return self.turns[-1][1]

    @classmethod
    def from_prompt(cls, prompt: str, system: str | None = None) -> "Conversation":
        """A conversation that begins."""
        return cls((("user", prompt),)).with_system(system)

    @classmethod
    def from_messages(cls, messages: object) -> "Conversation":
        """The conversation of OpenAI's `messages`; `content` is a text or a list of parts of type `text`.

        Raises:
            InputError: naming every message that is none, or if the last is not the user's.
        """
        if not isinstance(messages, list) or not messages:
            raise InputError(f"`messages` is no list with a message in it; expected {SHAPE}")
        turns, problems = [], []
        for number, message in enumerate(messages):
            try:
                turns.append(_read_message(message))
            except ValueError as problem:
                problems.append(f"messages[{number}]: {problem}")
        if problems:
            raise InputError("; ".join(problems))
        if turns[-1][0] != "user":
            raise InputError(f"the last message is of role {turns[-1][0]!r}; expected user, who is to be answered")
        return cls(tuple(turns))

    def with_system(self, text: str | None) -> "Conversation":
        """The same with a system prompt, unless it has one."""
        if text is None or self.turns[0][0] == "system":
            return self
        return replace(self, turns=(("system", text), *self.turns))


def read_conversation(line: str) -> Conversation | None:
    """The conversation in a line `{"messages": [...]}`; None for a text that is no JSON object.

    Raises:
        InputError: if it is another JSON object, or cannot be read though it begins as `{"messages":`.
    """
    if not line.startswith("{"):
        return None
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        if _OPENING.match(line):
            raise InputError(f"invalid JSON: {error}") from None
        return None
    if set(document) != {"messages"}:
        raise InputError(f"a JSON object with {_list_keys(document)}; expected {SHAPE} and no other key")
    return Conversation.from_messages(document["messages"])


def check_text(text: str) -> str:
    """Return the text.

    Raises:
        ValueError: if it holds half a surrogate pair, which no tokenizer takes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair, which is not text") from None
    return text


def _read_message(message: object) -> Turn:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message) <= _MESSAGE_KEYS:
        keys = _list_keys(message) if isinstance(message, dict) else f"{message!r:.40}"
        raise ValueError(f"{keys}; expected `role` and `content`")
    if message["role"] not in ROLES:
        raise ValueError(f"role {message['role']!r:.40}; expected one of {', '.join(ROLES)}")
    return message["role"], check_text(_read_content(message["content"]))


def _read_content(content: Any) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if isinstance(parts, list) and all(map(_is_text_part, parts)):
        return "".join(part["text"] for part in parts)
    raise ValueError('`content` is neither a text nor a list of {"type": "text", "text": "..."}')


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _list_keys(document: dict[str, Any]) -> str:
    return f"the keys {', '.join(f'{key:.40}' for key in document)}" if document else "no keys"
