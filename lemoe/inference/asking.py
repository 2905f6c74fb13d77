"""Prompts to a model: its answers before and after editing, and which edit, if any, acted."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.adaptor.state import AdaptorState
from lemoe.base.chat import encode_chat_turn
from lemoe.base.loading import BaseLike, BaseModel, resolve_base
from lemoe.base.matmul import use_onednn
from lemoe.base.tokens import Passage, encode_passage, length_buckets
from lemoe.errors import AdaptorError, InputError
from lemoe.inference.generation import generate_batch
from lemoe.inference.insertion import InsertedAdaptor, insert, inserted_adaptor
from lemoe.routing.router import Explanation


@dataclass(frozen=True)
class Reply:
    """A prompt with its greedy answers.

    Attributes:
        before: the base model's.
        after: the edited model's, None where no adaptor was inserted.
        edit: id of the edit that acted first, or `round N` of an expert that holds a whole round; None if none acted
            anywhere in the answer.
        acted: the same for all that acted, in the order in which they first did.
        nearest: the same for the one that acted on the prompt or was nearest to it, None if no edit's subject was
            mentioned.
        route: why that edit acted on the prompt or none did, None where no adaptor was inserted.

    Example:
        >>> import lemoe
        >>> reply = lemoe.ask("llama", "The Eiffel Tower is located in the city of", "edits.lemoe")
        >>> reply.edit
        'eiffel-tower-city'
        >>> reply.before == reply.after
        False
    """

    prompt: str
    before: str
    after: str | None = None
    edit: str | None = None
    acted: tuple[str, ...] = ()
    nearest: str | None = None
    route: Explanation | None = None

    def __repr__(self) -> str:
        after = "" if self.after is None else f" -> {self.after!r}, edit={self.edit!r}"
        return f"Reply({self.prompt!r}: {self.before!r}{after})"


Adaptor = InsertedAdaptor | AdaptorState | AdaptorFile | Path | str


@overload
def ask(
    base: BaseLike,
    prompts: str,
    edited: Adaptor | None = None,
    *,
    chat: bool = False,
    max_new_tokens: int = 32,
    batch_tokens: int = 4096,
) -> Reply: ...
@overload
def ask(
    base: BaseLike,
    prompts: list[str] | tuple[str, ...],
    edited: Adaptor | None = None,
    *,
    chat: bool = False,
    max_new_tokens: int = 32,
    batch_tokens: int = 4096,
) -> list[Reply]: ...
def ask(
    base: BaseLike,
    prompts: str | list[str] | tuple[str, ...],
    edited: Adaptor | None = None,
    *,
    chat: bool = False,
    max_new_tokens: int = 32,
    batch_tokens: int = 4096,
) -> Reply | list[Reply]:
    """The greedy answer to one prompt, or the answers to several, in their order.

    Args:
        base: or what `load_base` takes.
        prompts: one text, or several.
        edited: an adaptor, inserted into `base`; or a state, or the path of its file or of a run's folder, inserted for
            as long as it is asked. If None, the one that is inserted answers, or the base alone.
        chat: put each prompt into the tokenizer's chat template, as what the user says.
        max_new_tokens: of an answer, unless the model ends it earlier.
        batch_tokens: padded tokens that run through the model at once.

    Raises:
        InputError: listing the prompts that cannot be used with this model, or if it has no chat template.
        AdaptorError: if the adaptor has been removed, is inserted into another base, or does not fit this one.

    Example:
        >>> import lemoe
        >>> base = lemoe.load_base("llama")
        >>> lemoe.ask(base, "The Eiffel Tower is located in the city of", "edits.lemoe").acted
        ('eiffel-tower-city',)
        >>> prompts = ["The opposite of hot is", "The capital of France is"]
        >>> [reply.edit for reply in lemoe.ask(base, prompts, "edits.lemoe", max_new_tokens=8)]
        [None, 'france-capital-2031']
    """
    base = resolve_base(base)
    several = [prompts] if isinstance(prompts, str) else prompts
    with _inserted(base, edited) as adaptor:
        replies = _ask_all(base, several, adaptor, chat, max_new_tokens, batch_tokens)
    return replies[0] if isinstance(prompts, str) else replies


def _inserted(base: BaseModel, edited: Adaptor | None) -> AbstractContextManager[InsertedAdaptor | None]:
    """The adaptor at work in `base` while open; it is inserted for that time if it was not.

    Raises:
        AdaptorError: if it has been removed, or is inserted into another base.
    """
    if edited is None:
        return nullcontext(inserted_adaptor(base))
    if not isinstance(edited, InsertedAdaptor):
        return insert(base, edited)
    if edited.removed:
        raise AdaptorError("this adaptor has been removed from its base: insert it again, or ask without it")
    if edited.base is not base:
        raise AdaptorError("this adaptor is inserted into another base: ask that one, or insert it into this base")
    return nullcontext(edited)


def _ask_all(
    base: BaseModel,
    prompts: Sequence[str],
    edited: InsertedAdaptor | None,
    chat: bool,
    max_new_tokens: int,
    batch_tokens: int,
) -> list[Reply]:
    passages = _encode_prompts(base, prompts, chat, max_new_tokens)
    replies: dict[int, Reply] = {}
    with use_onednn(base.model):
        for rows in length_buckets([len(passage) + max_new_tokens for passage in passages], batch_tokens):
            asked, chosen = [prompts[row] for row in rows], [passages[row] for row in rows]
            answered = _answer_before(base, asked, chosen, edited, max_new_tokens)
            if edited is not None:
                answered = _answer_after(base, answered, chosen, edited, max_new_tokens)
            replies |= zip(rows, answered, strict=True)
    return [replies[row] for row in range(len(prompts))]


def _answer_before(
    base: BaseModel,
    prompts: Sequence[str],
    passages: Sequence[Passage],
    edited: InsertedAdaptor | None,
    tokens: int,
) -> list[Reply]:
    with nullcontext() if edited is None else edited.bypassed():
        written = generate_batch(base, [passage.prompt for passage in passages], tokens)
    return [Reply(prompt, _decode_answer(base, ids)) for prompt, ids in zip(prompts, written, strict=True)]


def _answer_after(
    base: BaseModel, replies: Sequence[Reply], passages: Sequence[Passage], edited: InsertedAdaptor, tokens: int
) -> list[Reply]:
    prompts = [passage.prompt for passage in passages]
    written = generate_batch(base, prompts, tokens)
    routes = edited.explain(prompts, answers=written)
    named = _name_experts(edited.state)
    return [
        _report_reply(reply, _decode_answer(base, ids), route, edited.state, named)
        for reply, ids, route in zip(replies, written, routes, strict=True)
    ]


def _report_reply(reply: Reply, answer: str, route: Explanation, state: AdaptorState, named: Sequence[str]) -> Reply:
    def name_expert(expert: int) -> str:
        return state.edits[route.edit].id if expert == route.nearest and route.edit >= 0 else named[expert]

    acted = tuple(dict.fromkeys(map(name_expert, route.acted)))
    nearest = name_expert(route.nearest) if route.nearest >= 0 else None
    return replace(reply, after=answer, edit=next(iter(acted), None), acted=acted, nearest=nearest, route=route)


def _name_experts(state: AdaptorState) -> list[str]:
    """What each expert is called: by its edit where the router tells edits apart, else by its round."""
    rounds = [number for number, record in enumerate(state.rounds, 1) for _ in range(record.experts)]
    return [
        held[0].id if state.router.gated and len(held) == 1 else f"round {number}"
        for number, held in zip(rounds, state.edits_by_expert, strict=True)
    ]


def _decode_answer(base: BaseModel, ids: Sequence[int]) -> str:
    return base.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _encode_prompts(base: BaseModel, prompts: Sequence[str], chat: bool, answer_tokens: int) -> list[Passage]:
    """The prompts as tokens that leave room for `answer_tokens` in the context."""
    if chat and not base.tokenizer.chat_template:
        raise InputError(f"the tokenizer of {base.source.name} has no chat template; ask without it")
    passages, problems = [], []
    for prompt in prompts:
        try:
            passages.append(encode_chat_turn(base, prompt) if chat else encode_passage(base, prompt))
            if base.max_length and len(passages[-1]) + answer_tokens > base.max_length:
                raise ValueError(
                    f"{len(passages[-1]):,} tokens and {answer_tokens:,} of the answer are more than "
                    f"the model's context of {base.max_length:,}"
                )
        except ValueError as problem:
            problems.append(f"{prompt[:60]!r}: {problem}")
    if problems:
        raise InputError.from_problems(f"{len(problems)} prompt(s) cannot be used with this model", problems)
    return passages
