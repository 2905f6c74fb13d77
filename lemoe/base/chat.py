"""A prompt as the user's turn of a conversation, by the tokenizer's own chat template."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lemoe.base.tokens import Passage, check_context_length
from lemoe.data.conversation import Turn

if TYPE_CHECKING:
    from lemoe.base.loading import BaseModel


def encode_chat_turn(base: "BaseModel", prompt: str, before: Sequence[Turn] = ()) -> Passage:
    """Tokenise a conversation whose last turn is the user's `prompt`, up to where the model answers.

    Args:
        before: the turns before it, the system prompt among them; left out where the template does not take them.

    Raises:
        ValueError: if the tokenizer has no chat template, if the template cannot render a user turn, or if the
            passage is longer than the context.
    """
    question = ("user", prompt)
    try:
        ids = encode_conversation(base, (*before, question))
    except ValueError:
        if not before:
            raise
        ids = encode_conversation(base, (question,))
    return check_context_length(base, Passage(ids))


def encode_conversation(base: "BaseModel", turns: Sequence[Turn]) -> tuple[int, ...]:
    """The token ids of a conversation, up to where the model answers, however long.

    Raises:
        ValueError: if the tokenizer has no chat template, or the template cannot render these turns.
    """
    if not base.tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        encoded = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError as problem:
        raise ValueError(f"the chat template cannot be used: {problem}") from None
    return tuple(encoded["input_ids"])
