"""A conversation with a model, turn by turn, each answered with all that was said before it."""

from lemoe.base.chat import encode_conversation
from lemoe.base.loading import BaseModel
from lemoe.base.matmul import use_onednn
from lemoe.base.tokens import ContextLengthError, Passage, check_context_length, encode_passage
from lemoe.data.conversation import Conversation, Turn, check_text
from lemoe.errors import InputError
from lemoe.inference.asking import Answer, write_answers, write_base_answers
from lemoe.inference.insertion import InsertedAdaptor


class Chat:
    """A conversation with a base model, or with an adaptor inserted into it.

    Where the tokenizer has no chat template, each turn is a prompt of its own.

    Attributes:
        system: the system prompt; see `set_system`.
        turns: what was said, without the system prompt.
        last: the answer to the last turn, None before the first.
    """

    def __init__(
        self,
        base: BaseModel,
        edited: InsertedAdaptor | None = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
    ):
        """Begin a conversation; an answer has at most `max_new_tokens`, or as many as the context has room for.

        Raises:
            InputError: as `set_system`.
        """
        self.base, self.edited = base, edited
        self.system: str | None = None
        self.turns: tuple[Turn, ...] = ()
        self.last: Answer | None = None
        self._max_new_tokens = max_new_tokens
        self._asked: Passage | None = None
        self.set_system(system)

    @property
    def has_memory(self) -> bool:
        """Whether a turn is answered with those before it: the tokenizer has a chat template."""
        return bool(self.base.tokenizer.chat_template)

    def set_system(self, text: str | None) -> None:
        """Change the system prompt, from the next turn on; None for that of the chat template, if it has one.

        Raises:
            InputError: if there is no chat template, or it takes none.
        """
        if text is not None:
            try:
                encode_conversation(self.base, Conversation.from_prompt("Hello", check_text(text)).turns)
            except ValueError as problem:
                raise InputError(f"no system prompt can be given to {self.base.source.name}: {problem}") from None
        self.system = text

    def say(self, text: str) -> Answer:
        """The answer to what the user says next; a turn that fails is as if it had not been said.

        Raises:
            InputError: if the model cannot take it, or the conversation leaves no room for an answer.
        """
        asked = self._encode_turn(text)
        with use_onednn(self.base.model):
            (answer,) = write_answers(self.base, [asked.prompt], self.edited, self._room(asked))
        self._asked, self.last = asked, answer
        if self.has_memory:
            self.turns = (*self.turns, ("user", text), ("assistant", answer.text))
        return answer

    def answer_as_base(self) -> str | None:
        """What the base model answers to the last turn, with the same turns before it; None before the first."""
        if self._asked is None:
            return None
        with use_onednn(self.base.model):
            (text,) = write_base_answers(self.base, [self._asked.prompt], self.edited, self._room(self._asked))
        return text

    def forget(self) -> None:
        """Begin another conversation, with the same system prompt."""
        self.turns, self.last, self._asked = (), None, None

    def _encode_turn(self, text: str) -> Passage:
        try:
            asked = self._encode(check_text(text))
            if self._room(asked) < 1:
                raise ContextLengthError(f"{len(asked):,} tokens, which fill the model's context")
        except ContextLengthError as problem:
            said = f"with the {len(self.turns)} turns before, " if self.turns else ""
            raise InputError(f"{said}{problem}; begin another conversation, or say less") from None
        except ValueError as problem:
            raise InputError(f"{text[:60]!r}: {problem}") from None
        return asked

    def _encode(self, text: str) -> Passage:
        if not self.has_memory:
            return encode_passage(self.base, text)
        turns = Conversation((*self.turns, ("user", text))).with_system(self.system).turns
        return check_context_length(self.base, Passage(encode_conversation(self.base, turns)))

    def _room(self, asked: Passage) -> int:
        """Tokens that an answer may have."""
        longest = self.base.max_length
        return min(self._max_new_tokens, longest - len(asked)) if longest else self._max_new_tokens
