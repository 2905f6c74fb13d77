"""One answer of a served model: greedy or sampled, with stop texts, in pieces as it is written."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from lemoe.base.loading import BaseModel
from lemoe.inference.insertion import InsertedAdaptor


@dataclass(frozen=True)
class Sampling:
    """How an answer is written.

    Attributes:
        max_tokens: at most so many.
        temperature: 0 for the likeliest tokens.
        top_p: the likeliest tokens that together have this probability may be drawn.
        seed: of the drawing; None draws otherwise each time.
        stop: texts before which the answer ends.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """An answer: its text, why it ended, and how many tokens were written."""

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int


class _DrawToken(LogitsProcessor):
    """Draws a token by its probability (Gumbel-max), with a generator that no other request uses."""

    def __init__(self, device: torch.device, seed: int | None):
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self._generator)
        return scores.float() - noise.log()


class _AnswerStreamer(TextStreamer):
    """Gives finished words on, up to a stop text; the beginning of one is held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], strip_start: bool, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop, self._strip_start, self._on_text = stop, strip_start, on_text
        self._held = ""
        self.text = ""
        self.stopped = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.stopped:
            return
        waiting = self._held + text
        if self._strip_start and not self.text:
            waiting = waiting.lstrip()
        found = [at for each in self._stop if (at := waiting.find(each)) >= 0]
        if found:
            waiting, self.stopped = waiting[: min(found)], True
        held = 0 if stream_end or self.stopped else max((_overlap(waiting, each) for each in self._stop), default=0)
        given, self._held = waiting[: len(waiting) - held], waiting[len(waiting) - held :]
        if given:
            self.text += given
            self._on_text(given)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that may be the beginning of `stop`."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)


class _Ended(StoppingCriteria):
    """Ends the answer at a stop text, or when nobody waits for it any more."""

    def __init__(self, streamer: _AnswerStreamer, cancelled: threading.Event):
        self._streamer, self._cancelled = streamer, cancelled

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ended = self._streamer.stopped or self._cancelled.is_set()
        return torch.full((len(input_ids),), ended, dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def write_answer(
    base: BaseModel,
    adaptor: InsertedAdaptor | None,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    strip_start: bool,
    on_text: Callable[[str], None],
    cancelled: threading.Event,
) -> Written:
    """Write an answer to a prompt's token ids, with the edits of `adaptor`, which acts in this thread.

    Args:
        strip_start: leave out spaces in front of the answer, as in a conversation.
        on_text: called with each piece of the text, on this thread.
        cancelled: set by another thread, ends the answer.
    """
    streamer = _AnswerStreamer(base.tokenizer, sampling.stop, strip_start, on_text)
    ids = torch.tensor([list(prompt)], device=base.device)
    generate = base.model.generate if adaptor is None else _with_prompts_marked(adaptor, base.model.generate)
    output = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sampling.max_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=base.pad_token_id,
        logits_processor=_make_processors(base, sampling),
        stopping_criteria=StoppingCriteriaList([_Ended(streamer, cancelled)]),
        streamer=streamer,
    )
    written = output[0, len(prompt) :].tolist()
    ended = streamer.stopped or (bool(written) and written[-1] in _end_tokens(base))
    return Written(streamer.text, "stop" if ended else "length", len(written))


def _with_prompts_marked(adaptor: InsertedAdaptor, generate: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **given: adaptor.generate(generate, **given)


def _make_processors(base: BaseModel, sampling: Sampling) -> LogitsProcessorList:
    if not sampling.temperature:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*processors, _DrawToken(base.device, sampling.seed)])


def _end_tokens(base: BaseModel) -> set[int]:
    """All with which the model ends an answer."""
    end = base.model.generation_config.eos_token_id
    return {base.eos_token_id, *(end if isinstance(end, list) else ())}
