"""Prompts to a model: its answers before and after editing, and which edit, if any, acted."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from lemoe.adaptor.state import AdaptorState
from lemoe.base.chat import encode_chat_turn
from lemoe.base.loading import BaseModel
from lemoe.base.matmul import use_onednn
from lemoe.base.tokens import Passage, encode_passage, length_buckets
from lemoe.errors import InputError
from lemoe.inference.generation import generate_batch
from lemoe.inference.insertion import InsertedAdaptor
from lemoe.routing.router import Explanation


@dataclass(frozen=True)
class Reply:
    """A prompt with its greedy answers.

    Attributes:
        before: the base model's.
        after: the edited model's, None where no adaptor was inserted.
        edit: id of the edit that acted, or `round N` of an expert that holds a whole round; None if none acted.
        nearest: the same for the one that acted or was nearest, None if no edit's subject was mentioned.
        route: why that edit acted or none did, None where no adaptor was inserted.
    """

    prompt: str
    before: str
    after: str | None = None
    edit: str | None = None
    nearest: str | None = None
    route: Explanation | None = None


def ask(
    base: BaseModel,
    prompts: Sequence[str],
    edited: InsertedAdaptor | None = None,
    *,
    chat: bool = False,
    max_new_tokens: int = 32,
    batch_tokens: int = 4096,
) -> list[Reply]:
    """Greedy answers to `prompts`, in their order.

    Args:
        edited: the adaptor inserted into `base`; without one, the base alone answers.
        chat: put each prompt into the tokenizer's chat template, as what the user says.
        max_new_tokens: of an answer, unless the model ends it earlier.
        batch_tokens: padded tokens that run through the model at once.

    Raises:
        InputError: listing the prompts that cannot be used with this model, or if it has no chat template.
    """
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
        return [
            Reply(prompt, text) for prompt, text in zip(prompts, _generate_texts(base, passages, tokens), strict=True)
        ]


def _answer_after(
    base: BaseModel, replies: Sequence[Reply], passages: Sequence[Passage], edited: InsertedAdaptor, tokens: int
) -> list[Reply]:
    routes = edited.explain([passage.prompt for passage in passages])
    names = _name_nearest(edited.state, routes)
    return [
        replace(reply, after=text, edit=name if route.expert >= 0 else None, nearest=name, route=route)
        for reply, text, route, name in zip(
            replies, _generate_texts(base, passages, tokens), routes, names, strict=True
        )
    ]


def _name_nearest(state: AdaptorState, routes: Sequence[Explanation]) -> list[str | None]:
    """What acted or was nearest on each route: the edit, or the round where an expert holds several edits."""
    edits = state.edits
    rounds = [number for number, record in enumerate(state.rounds, 1) for _ in range(record.experts)]
    return [
        edits[route.edit].id if route.edit >= 0 else f"round {rounds[route.nearest]}" if route.nearest >= 0 else None
        for route in routes
    ]


def _generate_texts(base: BaseModel, passages: Sequence[Passage], tokens: int) -> list[str]:
    written = generate_batch(base, [passage.prompt for passage in passages], tokens)
    return [base.tokenizer.decode(list(ids), skip_special_tokens=True).strip() for ids in written]


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
