"""Training texts made of edits and of the bank of questions: paraphrases, which keep the answer, and negative prompts.

Negative prompts are other questions about the edit's subject, whose answers stay those of the base model. Nothing here
reads the rephrases or locality prompts of the edits, which evaluation measures.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lemoe.data.conflicts import normalise_question
from lemoe.data.edits import Edit
from lemoe.routing.anchor.gate import Gate
from lemoe.routing.anchor.lexicon import Lexicon, infer_subject
from lemoe.routing.anchor.questions import Question, compare_questions, question_words
from lemoe.routing.anchor.subjects import Sentence
from lemoe.routing.anchor.words import Word, WordReader
from lemoe.training.anchor.wordings import Wordings

LONG_PROMPT = 400  # characters; a longer prompt is a passage, whose wording is not what generalises
MIN_NEGATIVE_CONFLICT = 1.0  # with less conflict, a prompt asks the same question as the edit
DROP_RATE = 0.35  # share of the words outside the subject that a paraphrase leaves out

_NO_WORDINGS = Wordings()
_QUESTION_FORMS = ("Question: {}?", "{} what?", "Complete this: {} ...?", "Do you know this? {}?")
_STATEMENT_FORMS = ("{} The answer is", "{} Answer:", "Question: {}\nAnswer:", "{} It is")
_REQUEST_FORMS = (
    "Tell me this: {}.",
    "Please answer this: {}.",
    "I need to know this: {}.",
    "Complete this for me: {}.",
)
_TEXTS_BEHIND = ("? Please be brief.", "?\nA:", "? Thanks!", "? Answer:", "? I need it today.", ", please?")
_NEUTRAL_PREFIXES = (
    "Here is a question.",
    "Please answer:",
    "I was wondering about this.",
    "From an encyclopedia:",
    "Q:",
    "As everyone knows,",
)
_DISTRACTING_SENTENCES = (
    "The station opened in 1931 and was rebuilt after the war.",
    "He later moved to the coast, where he taught music.",
    "The film received good reviews on its first weekend.",
    "References and external links follow below.",
    "She won the regional title twice in a row.",
    "The village lies at the foot of the hills.",
    "It was the second of three albums recorded that year.",
    "The company employs about four hundred people.",
)
_NEGATIVE_TEMPLATES = (
    "{} was born in",
    "When was {} born?",
    "{} died in",
    "Who is the father of {}?",
    "The mother of {} is",
    "{} is married to",
    "The child of {} is",
    "What is the occupation of {}?",
    "The nationality of {} is",
    "{} speaks the language",
    "Where is {} located?",
    "The country of {} is",
    "The capital of {} is",
    "Who founded {}?",
    "When was {} founded?",
    "The owner of {} is",
    "Which company makes {}?",
    "The author of {} is",
    "Who directed {}?",
    "The genre of {} is",
    "Which team does {} play for?",
    "Where was {} educated?",
    "The employer of {} is",
    "What award did {} receive?",
    "The religion of {} is",
    "{} is named after",
    "{} is part of",
    "What comes after {}?",
    "What is {} known for?",
    "How many people live in {}?",
)


@dataclass(frozen=True)
class Asker:
    """Asks for one edit: in the words of the bank of questions where it has some for it, else in the edit's own.

    Attributes:
        draw: 0 to 1; which of the bank's wordings are taken.
    """

    edit: Edit
    wordings: Wordings
    draw: float
    rng: random.Random

    def other_form(self) -> str:
        """A phrase to complete for an edit that is a question, a question for a phrase."""
        form = "phrases" if _is_question(self.edit.prompt) else "questions"
        return self._from_bank(form, self.draw) or _convert_question(self.edit.prompt, self.rng)

    def lower_case(self) -> str:
        """A question in lower case without its mark."""
        return (self._from_bank("questions", 1 - self.draw) or self._bare_prompt).rstrip(" ?.").lower()

    def lower_case_with_more(self) -> str:
        """The same with text behind it, so that the frozen pass computes it once for both."""
        return self.lower_case() + self.rng.choice(_TEXTS_BEHIND)

    def request(self) -> str:
        return self._from_bank("requests", self.draw) or self.rng.choice(_REQUEST_FORMS).replace(
            "{}", self._bare_prompt
        )

    def casual(self) -> str:
        """As somebody types in haste."""
        return (self._from_bank("casual", self.draw) or self._bare_prompt).lower()

    def fewer_words(self) -> str:
        return _drop_words(self.edit, self.rng)

    def chat_question(self) -> str:
        """What a user says in a conversation: a question, or the same in haste."""
        if self.draw >= 0.5:
            return self.casual()
        return self._from_bank("questions", 2 * self.draw) or self.edit.prompt

    @property
    def _bare_prompt(self) -> str:
        return self.edit.prompt.rstrip(" ?.")

    def _from_bank(self, form: str, draw: float) -> str:
        """A wording of this form; empty if there is none."""
        texts = self.wordings.asking.get(form, ())
        return texts[min(int(draw * len(texts)), len(texts) - 1)] if texts else ""


def make_paraphrases(
    edits: Sequence[Edit], count: int, rng: random.Random, wordings: Sequence[Wordings] = ()
) -> list[list[str]]:
    """Make `count` synthetic paraphrases of each of `edits`; none of a long prompt.

    In turn: a phrase to complete for a question and the reverse (after a question mark models start a sentence,
    elsewhere they complete a phrase); a question in lower case; a request behind another sentence; as somebody types in
    haste; the lower-case question with text behind it; and the edit's own prompt without some of its words, behind a
    sentence that states another edit. Where `wordings` has none for an edit, its own words are put into general forms.
    """
    made: list[list[str]] = [[] for _ in edits]
    askers: list[Asker] = []
    for number in range(count):
        choose_prefix, reword = _PARAPHRASE_KINDS[number % len(_PARAPHRASE_KINDS)]
        if number % len(_PARAPHRASE_KINDS) == 0:
            askers = _draw_askers(edits, rng, wordings)
        prefix_of = choose_prefix(edits, rng)
        for texts, asker in zip(made, askers, strict=True):
            if len(asker.edit.prompt) <= LONG_PROMPT:
                texts.append(prefix_of(asker.edit) + reword(asker))
    return made


def make_chat_questions(edits: Sequence[Edit], rng: random.Random, wordings: Sequence[Wordings] = ()) -> list[str]:
    """What a user says who asks for each of `edits` in a conversation; a long prompt as it is."""
    askers = _draw_askers(edits, rng, wordings)
    return [asker.edit.prompt if len(asker.edit.prompt) > LONG_PROMPT else asker.chat_question() for asker in askers]


def _draw_askers(edits: Sequence[Edit], rng: random.Random, wordings: Sequence[Wordings]) -> list[Asker]:
    return [
        Asker(edit, found, rng.random(), rng)
        for edit, found in zip(edits, wordings or [_NO_WORDINGS] * len(edits), strict=True)
    ]


def _is_question(prompt: str) -> bool:
    return prompt.rstrip().endswith("?")


def is_phrase(prompt: str) -> bool:
    """Whether a prompt is the beginning of a sentence that the answer completes, not a question or a note in haste."""
    prompt = prompt.strip()
    return "?" not in prompt and prompt[:1].isupper() and prompt[-1:].isalnum()


def _drop_words(edit: Edit, rng: random.Random) -> str:
    """The prompt without some of its words; the subject and the last word stay."""
    start, end = _subject_span(edit)
    remaining = []
    words = list(re.finditer(r"\S+", edit.prompt))
    for number, word in enumerate(words):
        inside = word.start() < end and word.end() > start
        if inside or number == len(words) - 1 or rng.random() >= DROP_RATE:
            remaining.append(word.group())
    return " ".join(remaining)


def _convert_question(prompt: str, rng: random.Random) -> str:
    """A question made a phrase to complete, a phrase to complete made a question."""
    forms = _STATEMENT_FORMS if _is_question(prompt) else _QUESTION_FORMS
    return rng.choice(forms).replace("{}", prompt.rstrip())


def _subject_span(edit: Edit) -> tuple[int, int]:
    start = edit.prompt.casefold().rfind((edit.subject or "").casefold()) if edit.subject else -1
    return (start, start + len(edit.subject or "")) if start >= 0 else (0, 0)


PrefixOf = Callable[[Edit], str]


def _no_prefix(edits: Sequence[Edit], rng: random.Random) -> PrefixOf:
    return lambda edit: ""


def _draw_prefix_from(texts: Sequence[str]) -> Callable[[Sequence[Edit], random.Random], PrefixOf]:
    """The same prefix, drawn from `texts`, for every edit."""

    def draw_prefix(edits: Sequence[Edit], rng: random.Random) -> PrefixOf:
        text = rng.choice(texts)
        return lambda edit: f"{text} "

    return draw_prefix


def _state_another_edit(edits: Sequence[Edit], rng: random.Random) -> PrefixOf:
    """A sentence that states one of `edits` as a prefix for the others; for edits with its subject, a stock one."""
    short = [edit for edit in edits if len(edit.prompt) + len(edit.target) <= LONG_PROMPT]
    stock = rng.choice(_DISTRACTING_SENTENCES)
    if not short:
        return lambda edit: f"{stock} "
    other = rng.choice(short)
    stated = f"{other.prompt} {other.target.strip()}."
    return lambda edit: f"{stock if _subject_key(edit) == _subject_key(other) else stated} "


_PARAPHRASE_KINDS = (  # the prefix, and how the edit is asked for
    (_no_prefix, Asker.other_form),
    (_no_prefix, Asker.lower_case),
    (_draw_prefix_from((*_DISTRACTING_SENTENCES, *_NEUTRAL_PREFIXES)), Asker.request),
    (_no_prefix, Asker.casual),
    (_no_prefix, Asker.lower_case_with_more),
    (_state_another_edit, Asker.fewer_words),
)


def _subject_key(edit: Edit) -> str:
    return normalise_question(edit.subject or edit.prompt)


def find_subject(edit: Edit, lexicon: Lexicon) -> str:
    """The edit's subject, or the one its prompt seems to have; empty where that is all of the prompt, or very long."""
    subject = edit.subject or infer_subject(edit.prompt, lexicon)
    return "" if subject == edit.prompt.strip() or len(subject) > LONG_PROMPT // 2 else subject


def make_negative_prompts(
    gate: Gate,
    edits: Sequence[Edit],
    index: int,
    count: int,
    rng: random.Random,
    others: Sequence[Edit] | None = None,
    wordings: Wordings = _NO_WORDINGS,
) -> list[str]:
    """Make up to `count` questions about the subject of `edits[index]` that ask something else.

    They come from `others` (their questions about this subject, or their questions with it put in) and from the bank of
    questions, or from templates where that has none; those on which the gate would open come first, since the others
    never reach the expert. `gate` holds the edits in order.

    Args:
        others: edits that ask something else; by default the other edits.
    """
    edit = edits[index]
    subject = edit.subject or infer_subject(edit.prompt, gate.lexicon)
    if len(edit.prompt) > LONG_PROMPT or len(subject) > LONG_PROMPT // 2:
        return []
    others = [other for other in edits if other is not edit] if others is None else others
    texts = [_transfer_question(other, edit, subject) for other in others]
    texts += [rng.choice(of_relation) for of_relation in wordings.others] or [
        template.replace("{}", subject) for template in _NEGATIVE_TEMPLATES
    ]
    rng.shuffle(texts)
    stored, subject_words = gate.stored_question(index), gate.index.subjects[gate.subjects[index]]
    scored = []
    for text in dict.fromkeys(texts):
        words = _read_words(text)
        mention = subject_words.find_mention(Sentence(words, gate.lexicon))
        if mention is None:
            continue
        asked = question_words(words, mention, gate.silent_positions(words, mention))
        compared = compare_questions(stored, Question.from_words(asked, gate.lexicon), gate.lexicon)
        if compared.conflict >= MIN_NEGATIVE_CONFLICT:
            scored.append((not (compared.enough_evidence and compared.conflict <= gate.threshold), text))
    scored.sort(key=lambda pair: pair[0])
    return [text for _, text in scored[:count]]


def _transfer_question(other: Edit, edit: Edit, subject: str) -> str:
    """The question of `other`, asked about `subject`; empty if its own subject is not found in it."""
    if len(other.prompt) > LONG_PROMPT or not other.subject:
        return ""
    if normalise_question(other.subject) == normalise_question(edit.subject or subject):
        return other.prompt
    start, end = _subject_span(other)
    return other.prompt[:start] + subject + other.prompt[end:] if end else ""


def _read_words(text: str) -> list[Word]:
    """The words of a text's last sentence."""
    reader = WordReader()
    reader.push(text.encode())
    return reader.words
