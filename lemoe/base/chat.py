"""A prompt as the user's turn of a conversation, by the tokenizer's own chat template."""

from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lemoe.base.tokens import Passage, check_context_length

if TYPE_CHECKING:
    from lemoe.base.loading import BaseModel


def encode_chat_turn(base: "BaseModel", prompt: str) -> Passage:
    """Tokenise a conversation whose one turn is `prompt`, up to where the model answers.

    Raises:
        ValueError: if the tokenizer has no chat template, if the template cannot render a single user turn, or if the
            passage is longer than the context.
    """
    if not base.tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    messages = [{"role": "user", "content": prompt}]
    try:
        encoded = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError as problem:
        raise ValueError(f"the chat template cannot be used: {problem}") from None
    return check_context_length(base, Passage(tuple(encoded["input_ids"])))
