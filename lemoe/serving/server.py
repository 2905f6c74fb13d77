"""Answers requests on threads of its own, with the adaptor that each of them chooses."""

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from lemoe.base.tokens import encode_passage
from lemoe.errors import LemoeError
from lemoe.serving.adaptors import ServedAdaptors, UnknownModelError
from lemoe.serving.generation import Sampling, Written, write_answer
from lemoe.serving.requests import AnyRequest, ChatRequest, CompletionRequest, LoadRequest, UnloadRequest
from lemoe.serving.responses import CHAT, COMPLETION, LAST_EVENT, AnswerShape, RefusedError, count_usage, format_event

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

    async def complete(self, request: CompletionRequest) -> dict[str, Any]:
        return await self._answer(request, self._completion_jobs(request))

    async def chat(self, request: ChatRequest) -> dict[str, Any]:
        return await self._answer(request, self._chat_jobs(request))

    def stream_completion(self, request: CompletionRequest) -> AsyncIterator[str]:
        return self._stream(request, self._completion_jobs(request))

    def stream_chat(self, request: ChatRequest) -> AsyncIterator[str]:
        return self._stream(request, self._chat_jobs(request))

    def _completion_jobs(self, request: CompletionRequest) -> list[_Job]:
        return self._make_jobs(request, COMPLETION, [self._encode_prompt(prompt) for prompt in request.prompts])

    def _chat_jobs(self, request: ChatRequest) -> list[_Job]:
        return self._make_jobs(request, CHAT, [self._encode_messages(request)])

    def _make_jobs(self, request: AnyRequest, shape: AnswerShape, prompts: Sequence[Ids]) -> list[_Job]:
        """One for each answer, the request's prompts in order.

        Raises:
            RefusedError: if the request cannot be answered.
        """
        if request.model not in (None, *self.served.names):
            known = ", ".join(self.served.names)
            raise _not_served(f"the model {request.model!r} is not served; there is: {known}", "model")
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
                code="context_length_exceeded",
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
        try:
            return encode_passage(self._base, prompt).prompt
        except ValueError as problem:
            raise RefusedError(str(problem), param="prompt") from None

    def _encode_messages(self, request: ChatRequest) -> Ids:
        tokenizer = self._base.tokenizer
        if not tokenizer.chat_template:
            name = self.served.base_name
            raise RefusedError(f"{name} has no chat template; use /v1/completions", param="messages")
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        try:
            encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except TemplateError as problem:
            raise RefusedError(f"the chat template takes no such messages: {problem}", param="messages") from None
        return tuple(encoded["input_ids"])

    async def _answer(self, request: AnyRequest, jobs: Sequence[_Job]) -> dict[str, Any]:
        cancelled = threading.Event()
        try:
            written = await asyncio.gather(*(self._write(job, cancelled) for job in jobs))
        finally:
            cancelled.set()
        shape = jobs[0].shape
        return {
            **self._head(request),
            "object": shape.whole,
            "choices": [shape.choice(index, each.text, each.finish_reason) for index, each in enumerate(written)],
            "usage": count_usage(
                sum(len(job.prompt) for job in jobs[:: request.n]), sum(each.tokens for each in written)
            ),
        }

    def _head(self, request: AnyRequest) -> dict[str, Any]:
        model = request.model or self.served.default
        return {"id": f"lemoe-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def _stream(self, request: AnyRequest, jobs: Sequence[_Job]) -> AsyncIterator[str]:
        """The answer in server-sent events; an error behind the first of them is one too.

        Raises:
            RefusedError: for several answers.
        """
        if len(jobs) > 1:
            raise RefusedError("a stream has one answer: n and the number of prompts must be 1", param="stream")
        return self._stream_job(request, jobs[0])

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
        finally:
            cancelled.set()  # also where the client has gone

    async def _write(
        self, job: _Job, cancelled: threading.Event, on_text: Callable[[str], None] = lambda text: None
    ) -> Written:
        def write() -> Written:
            with self.served.use(job.model) as adaptor:
                strip = job.shape.chat
                return write_answer(
                    self._base,
                    adaptor,
                    job.prompt,
                    job.sampling,
                    strip_start=strip,
                    on_text=on_text,
                    cancelled=cancelled,
                )

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, write)
        except UnknownModelError as error:  # unloaded while the request waited
            raise _not_served(error, "model") from None
        except LemoeError as error:
            raise RefusedError(str(error), status=500) from None


def _not_served(problem: object, param: str) -> RefusedError:
    return RefusedError(str(problem), status=404, param=param, code="model_not_found")
