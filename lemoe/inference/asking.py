"""Prompts and conversations to a model: its answers before and after editing, and which edit, if any, acted."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.adaptor.state import AdaptorState
from lemoe.base.chat import encode_chat_turn, encode_conversation
from lemoe.base.loading import BaseLike, BaseModel, resolve_base
from lemoe.base.matmul import use_onednn
from lemoe.base.tokens import Passage, check_context_length, encode_passage, length_buckets, refuse_texts
from lemoe.data.conversation import Conversation
from lemoe.errors import AdaptorError, InputError
from lemoe.inference.generation import Tokens, generate_batch
from lemoe.inference.insertion import InsertedAdaptor, insert, inserted_adaptor
from lemoe.routing.router import Explanation


@dataclass(frozen=True)
class Reply:
    """A prompt with its greedy answers.

    Attributes:
        prompt: what was asked; of a conversation, what the user says last.
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


@dataclass(frozen=True)
class Answer:
    """What the edited model writes; the attributes are those of `Reply`, with the answer as `text`."""

    text: str
    acted: tuple[str, ...] = ()
    nearest: str | None = None
    route: Explanation | None = None


Adaptor = InsertedAdaptor | AdaptorState | AdaptorFile | Path | str
Prompt = str | Conversation
Prompts = list[str] | list[Conversation] | list[Prompt] | tuple[Prompt, ...]


@overload
def ask(
    base: BaseLike,
    prompts: Prompt,
    edited: Adaptor | None = None,
    *,
    chat: bool = False,
    max_new_tokens: int = 32,
    batch_tokens: int = 4096,
) -> Reply: ...
@overload
def ask(
    base: BaseLike,
    prompts: Prompts,
    edited: Adaptor | None = None,
    *,
    chat: bool = False,
    max_new_tokens: int = 32,
    batch_tokens: int = 4096,
) -> list[Reply]: ...
def ask(
    base: BaseLike,
    prompts: Prompt | Prompts,
    edited: Adaptor | None = None,
    *,
    chat: bool = False,
    max_new_tokens: int = 32,
    batch_tokens: int = 4096,
) -> Reply | list[Reply]:
    """The greedy answer to one prompt, or the answers to several, in their order.

    Args:
        base: or what `load_base` takes.
        prompts: one text or conversation, or several.
        edited: an adaptor, inserted into `base`; or a state, or the path of its file or of a run's folder, inserted for
            as long as it is asked. If None, the one that is inserted answers, or the base alone.
        chat: put each text into the tokenizer's chat template, as what the user says; conversations are in any case.
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
    several = [prompts] if isinstance(prompts, str | Conversation) else prompts
    with _inserted(base, edited) as adaptor:
        replies = _ask_all(base, several, adaptor, chat, max_new_tokens, batch_tokens)
    return replies[0] if isinstance(prompts, str | Conversation) else replies


def find_problem(base: BaseModel, prompt: Prompt, *, chat: bool = False, max_new_tokens: int = 32) -> str | None:
    """Why `ask` would refuse this prompt; None if it takes it."""
    try:
        _encode_prompt(base, prompt, chat, max_new_tokens)
    except ValueError as problem:
        return str(problem)
    return None


def write_answers(
    base: BaseModel, prompts: Sequence[Tokens], edited: InsertedAdaptor | None, tokens: int
) -> list[Answer]:
    """The edited model's greedy answers to prompts (token ids) in one batch; the base's where there is no adaptor."""
    written = generate_batch(base, prompts, tokens)
    texts = [_decode_answer(base, ids) for ids in written]
    if edited is None:
        return [Answer(text) for text in texts]
    routes = edited.explain(prompts, answers=written)
    named = _name_experts(edited.state)
    return [_report_answer(*each, edited.state, named) for each in zip(texts, routes, strict=True)]


def write_base_answers(
    base: BaseModel, prompts: Sequence[Tokens], edited: InsertedAdaptor | None, tokens: int
) -> list[str]:
    """The base's greedy answers to prompts (token ids) in one batch, whatever is inserted."""
    with nullcontext() if edited is None else edited.bypassed():
        return [_decode_answer(base, ids) for ids in generate_batch(base, prompts, tokens)]


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
    prompts: Sequence[Prompt],
    edited: InsertedAdaptor | None,
    chat: bool,
    max_new_tokens: int,
    batch_tokens: int,
) -> list[Reply]:
    passages = _encode_prompts(base, prompts, chat, max_new_tokens)
    replies: dict[int, Reply] = {}
    with use_onednn(base.model):
        for rows in length_buckets([len(passage) + max_new_tokens for passage in passages], batch_tokens):
            asked = [passages[row].prompt for row in rows]
            before = write_base_answers(base, asked, edited, max_new_tokens)
            after = [None] * len(rows) if edited is None else write_answers(base, asked, edited, max_new_tokens)
            texts = [prompt if isinstance(prompt, str) else prompt.prompt for prompt in map(prompts.__getitem__, rows)]
            replies |= zip(rows, map(_make_reply, texts, before, after), strict=True)
    return [replies[row] for row in range(len(prompts))]


def _make_reply(prompt: str, before: str, after: Answer | None) -> Reply:
    if after is None:
        return Reply(prompt, before)
    return Reply(prompt, before, after.text, next(iter(after.acted), None), after.acted, after.nearest, after.route)


def _report_answer(text: str, route: Explanation, state: AdaptorState, named: Sequence[str]) -> Answer:
    def name_expert(expert: int) -> str:
        return state.edits[route.edit].id if expert == route.nearest and route.edit >= 0 else named[expert]

    acted = tuple(dict.fromkeys(map(name_expert, route.acted)))
    return Answer(text, acted, name_expert(route.nearest) if route.nearest >= 0 else None, route)


def _name_experts(state: AdaptorState) -> list[str]:
    """What each expert is called: by its edit where the router tells edits apart, else by its round."""
    rounds = [number for number, record in enumerate(state.rounds, 1) for _ in range(record.experts)]
    return [
        held[0].id if state.router.gated and len(held) == 1 else f"round {number}"
        for number, held in zip(rounds, state.edits_by_expert, strict=True)
    ]


def _decode_answer(base: BaseModel, ids: Sequence[int]) -> str:
    return base.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _encode_prompts(base: BaseModel, prompts: Sequence[Prompt], chat: bool, answer_tokens: int) -> list[Passage]:
    """The prompts as tokens that leave room for `answer_tokens` in the context."""
    if chat and not base.tokenizer.chat_template:
        raise InputError(f"the tokenizer of {base.source.name} has no chat template; ask without it")
    passages, problems = [], []
    for prompt in prompts:
        try:
            passages.append(_encode_prompt(base, prompt, chat, answer_tokens))
        except ValueError as problem:
            text = prompt if isinstance(prompt, str) else prompt.prompt
            problems.append(f"{text[:60]!r}: {problem}")
    if problems:
        raise refuse_texts("prompt", problems)
    return passages


def _encode_prompt(base: BaseModel, prompt: Prompt, chat: bool, answer_tokens: int) -> Passage:
    if isinstance(prompt, Conversation):
        passage = check_context_length(base, Passage(encode_conversation(base, prompt.turns)))
    else:
        passage = encode_chat_turn(base, prompt) if chat else encode_passage(base, prompt)
    if base.max_length and len(passage) + answer_tokens > base.max_length:
        raise ValueError(
            f"{len(passage):,} tokens and {answer_tokens:,} of the answer are more than "
            f"the model's context of {base.max_length:,}"
        )
    return passage
