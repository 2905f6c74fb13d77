"""A prompt as what the user says in a conversation, by the tokenizer's own chat template."""

from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lemoe.base.tokens import Passage, within_context

if TYPE_CHECKING:
    from lemoe.base.loading import BaseModel


def encode_turn(base: "BaseModel", prompt: str) -> Passage:
    """Tokenise a conversation up to where the model answers `prompt`.

    Raises:
        ValueError: if the tokenizer has no chat template, if the template cannot hold a lone question, or if the
            passage is longer than the context.
    """
    if not base.tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    turns = [{"role": "user", "content": prompt}]
    try:
        read = base.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    except TemplateError as problem:
        raise ValueError(f"the chat template cannot be used: {problem}") from None
    return within_context(base, Passage(tuple(read["input_ids"])))
