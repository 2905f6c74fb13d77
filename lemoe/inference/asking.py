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
        edit: id of the edit that acted first, or `round N` of an expert that holds a whole round; None if none acted
            anywhere in the answer.
        acted: the same for all that acted, in the order in which they first did.
        nearest: the same for the one that acted on the prompt or was nearest to it, None if no edit's subject was
            mentioned.
        route: why that edit acted on the prompt or none did, None where no adaptor was inserted.
    """

    prompt: str
    before: str
    after: str | None = None
    edit: str | None = None
    acted: tuple[str, ...] = ()
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
