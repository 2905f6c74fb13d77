"""Answers requests on threads of its own, with the adaptor that each of them chooses."""

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lemoe.base.chat import encode_conversation
from lemoe.base.tokens import ContextLengthError, encode_passage
from lemoe.errors import LemoeError
from lemoe.serving.adaptors import ServedAdaptors, UnknownModelError
from lemoe.serving.generation import Sampling, Written, write_answer
from lemoe.serving.requests import AnyRequest, ChatRequest, LoadRequest, UnloadRequest
from lemoe.serving.responses import CHAT, COMPLETION, LAST_EVENT, AnswerShape, RefusedError, count_usage, format_event

CONTEXT_EXCEEDED = "context_length_exceeded"  # OpenAI's code for it
DEFAULT_THREADS = 4  # answers written at the same time

Ids = tuple[int, ...]


@dataclass(frozen=True)
class _Job:
    """An answer to be written: with which model, to which token ids, and how."""

    model: str | None
    shape: AnswerShape
    prompt: Ids
    sampling: Sampling


class Server:
    """Writes `threads` answers at a time."""

    def __init__(self, served: ServedAdaptors, threads: int = DEFAULT_THREADS):
        self.served = served
        self._base = served.base
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lemoe-serve")

    def close(self) -> None:
        """End without answering what waits."""
        self._pool.shutdown(cancel_futures=True)

    def models(self) -> dict[str, Any]:
        """What is served, as `/v1/models` says it."""
        base, *adaptors = self.served.names
        entry = {"object": "model", "created": 0, "owned_by": "lemoe"}
        data = [{"id": base, **entry, "parent": None}, *({"id": name, **entry, "parent": base} for name in adaptors)]
        return {"object": "list", "data": data}

    async def load(self, request: LoadRequest) -> dict[str, Any]:
        """Load or replace an adaptor while answers go on; returns what is served then."""
        try:
            await asyncio.to_thread(self.served.load, request.name, request.path)
        except LemoeError as error:
            raise RefusedError(str(error)) from None
        return self.models()

    async def unload(self, request: UnloadRequest) -> dict[str, Any]:
        """Unload an adaptor while answers go on; returns what is served then."""
        try:
            self.served.unload(request.name)
        except UnknownModelError as error:
            raise _not_served(error, "name") from None
        return self.models()

    async def answer(self, request: AnyRequest) -> dict[str, Any]:
        """The whole answer.

        Raises:
            RefusedError: if the request cannot be answered.
        """
        jobs = self._make_jobs(request)
        cancelled = threading.Event()
        try:
            written = await asyncio.gather(*(self._write(job, cancelled) for job in jobs))
        finally:
            cancelled.set()
        shape, prompts = jobs[0].shape, [job.prompt for job in jobs[:: request.n]]
        return {
            **self._head(request),
            "object": shape.whole,
            "choices": [shape.choice(index, each.text, each.finish_reason) for index, each in enumerate(written)],
            "usage": count_usage(sum(map(len, prompts)), sum(each.tokens for each in written)),
        }

    def stream(self, request: AnyRequest) -> AsyncIterator[str]:
        """The answer in server-sent events; an error behind the first of them is one too.

        Raises:
            RefusedError: if the request cannot be answered, or asks for several answers.
        """
        jobs = self._make_jobs(request)
        if len(jobs) > 1:
            raise RefusedError("a stream has one answer: n and the number of prompts must be 1", param="stream")
        return self._stream_job(request, jobs[0])

    def _make_jobs(self, request: AnyRequest) -> list[_Job]:
        """One for each answer, the request's prompts in order."""
        try:
            self.served.check_name(request.model)
        except UnknownModelError as error:
            raise _not_served(error, "model") from None
        if isinstance(request, ChatRequest):
            shape, prompts = CHAT, [self._encode_messages(request)]
        else:
            shape, prompts = COMPLETION, [self._encode_prompt(prompt) for prompt in request.prompts]
        return [
            _Job(request.model, shape, prompt, self._choose_sampling(request, prompt, number))
            for prompt in prompts
            for number in range(request.n)
        ]

    def _choose_sampling(self, request: AnyRequest, prompt: Ids, number: int) -> Sampling:
        """How answer `number` to a prompt is written."""
        room = (self._base.max_length or 1 << 20) - len(prompt)
        tokens = request.tokens
        if room < (tokens or 1):
            raise RefusedError(
                f"{len(prompt):,} tokens of the prompt and {tokens or 1:,} of the answer are more than the model's "
                f"context of {self._base.max_length:,}",
                code=CONTEXT_EXCEEDED,
            )
        return Sampling(
            max_tokens=room if tokens is None else tokens,
            temperature=self._own_temperature if request.temperature is None else request.temperature,
            top_p=request.top_p,
            seed=None if request.seed is None else request.seed + number,
            stop=request.stop_texts,
        )

    @property
    def _own_temperature(self) -> float:
        """The model's own, if it is meant to be sampled from; else the likeliest tokens are taken."""
        config = self._base.model.generation_config
        return float(config.temperature or 1.0) if config.do_sample else 0.0

    def _encode_prompt(self, prompt: str | Sequence[int]) -> Ids:
        if not prompt:
            raise RefusedError("an empty prompt", param="prompt")
        if not isinstance(prompt, str):
            unknown = [token for token in prompt if not 0 <= token < len(self._base.embedding.weight)]
            if unknown:
                raise RefusedError(f"the model has no token {unknown[0]}", param="prompt")
            return tuple(prompt)
        with _refusing_problems("prompt"):
            return encode_passage(self._base, prompt).prompt

    def _encode_messages(self, request: ChatRequest) -> Ids:
        with _refusing_problems("messages"):
            return encode_conversation(self._base, [(message.role, message.text) for message in request.messages])

    def _head(self, request: AnyRequest) -> dict[str, Any]:
        model = request.model or self.served.default
        return {"id": f"lemoe-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def _stream_job(self, request: AnyRequest, job: _Job) -> AsyncIterator[str]:
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        cancelled, loop, head = threading.Event(), asyncio.get_running_loop(), self._head(request)

        def give_on(text: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        writing = asyncio.create_task(self._write(job, cancelled, give_on))
        writing.add_done_callback(lambda done: give_on(None))
        try:
            while (text := await pieces.get()) is not None:
                yield job.shape.piece_of(head, text)
            written = await writing
            yield job.shape.piece_of(head, "", written.finish_reason)
            if request.stream_options is not None and request.stream_options.include_usage:
                usage = count_usage(len(job.prompt), written.tokens)
                yield format_event({**head, "object": job.shape.piece, "choices": [], "usage": usage})
            yield LAST_EVENT
        except RefusedError as error:
            yield format_event(error.body)
        except Exception as failure:
            yield format_event(RefusedError.from_failure(failure).body)
            loop.call_exception_handler({"message": "an answer failed in mid-stream", "exception": failure})  # logs it
        finally:
            cancelled.set()  # also where the client has gone

    async def _write(
        self, job: _Job, cancelled: threading.Event, on_text: Callable[[str], None] = lambda text: None
    ) -> Written:
        def write() -> Written:
            with self.served.use(job.model) as adaptor:
                given = (self._base, adaptor, job.prompt, job.sampling)
                return write_answer(*given, strip_start=job.shape.chat, on_text=on_text, cancelled=cancelled)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, write)
        except UnknownModelError as error:  # unloaded while the request waited
            raise _not_served(error, "model") from None
        except LemoeError as error:
            raise RefusedError(str(error), status=500) from None


@contextmanager
def _refusing_problems(param: str) -> Iterator[None]:
    """Refuse what cannot be encoded, of a request's field `param`."""
    try:
        yield
    except ValueError as problem:
        code = CONTEXT_EXCEEDED if isinstance(problem, ContextLengthError) else None
        raise RefusedError(str(problem), param=param, code=code) from None


def _not_served(problem: object, param: str) -> RefusedError:
    return RefusedError(str(problem), status=404, param=param, code="model_not_found")
