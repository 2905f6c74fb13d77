"""The shapes of OpenAI's answers, in whole and in pieces, and of its errors."""

import json
from dataclasses import dataclass
from typing import Any


class RefusedError(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        param: the field that is to blame, if one is.
        code: by which clients tell errors apart, if they do.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @classmethod
    def from_failure(cls, failure: Exception) -> "RefusedError":
        """What a client is told of a failure of the server."""
        return cls(f"{type(failure).__name__}: {failure}", status=500)

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class AnswerShape:
    """What answers of one kind look like: the names of the whole and of its pieces, and whether it is a chat."""

    whole: str
    piece: str
    chat: bool

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A whole answer."""
        return self._choice(index, "message", text, finish_reason)

    def piece_of(self, head: dict[str, Any], text: str, finish_reason: str | None = None) -> str:
        """A piece of an answer, as an event of a stream."""
        return format_event({**head, "object": self.piece, "choices": [self._choice(0, "delta", text, finish_reason)]})

    def _choice(self, index: int, said: str, text: str, finish_reason: str | None) -> dict[str, Any]:
        content = {said: {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **content, "finish_reason": finish_reason, "logprobs": None}


CHAT = AnswerShape("chat.completion", "chat.completion.chunk", chat=True)
COMPLETION = AnswerShape("text_completion", "text_completion", chat=False)
LAST_EVENT = "data: [DONE]\n\n"


def format_event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def count_usage(prompt: int, written: int) -> dict[str, int]:
    """The tokens of a request."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
