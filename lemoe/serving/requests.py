"""What requests may say: the fields of OpenAI's API that are served; others are refused rather than ignored."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

COMPLETION_TOKENS = 16  # of a completion that does not say how many, as in OpenAI's API


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What a stream holds besides the text."""

    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of requests share. Fields of fixed value are those whose other values are not served."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _read_zero(cls, value: Any) -> Any:
        return 0 if value == 0 else value

    @property
    def stop_texts(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    store: bool | None = None

    @property
    def tokens(self) -> int | None:
        """How many the answer may have; None for as many as the context holds."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=1)
    echo: Literal[False] | None = None
    logprobs: None = None

    @property
    def tokens(self) -> int:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]


AnyRequest = ChatRequest | CompletionRequest


class LoadRequest(BaseModel):
    """`POST /v1/load_adaptor`: loads an adaptor's file, or replaces the adaptor of that name."""

    model_config = ConfigDict(extra="forbid")

    name: str
    path: str


class UnloadRequest(BaseModel):
    """`POST /v1/unload_adaptor`."""

    model_config = ConfigDict(extra="forbid")

    name: str
