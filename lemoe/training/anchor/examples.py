"""Training texts made from an edit file alone: rewordings that keep the answer, other questions that keep the base's.

Nothing here sees a rephrase or a locality prompt, unless `train_rephrases` asks for the user's own rephrases.
"""

import random
import re
from collections.abc import Callable, Sequence

from lemoe.data.conflicts import question
from lemoe.data.edits import Edit
from lemoe.routing.anchor.gate import Gate
from lemoe.routing.anchor.lexicon import infer_subject
from lemoe.routing.anchor.questions import Question, around, compare
from lemoe.routing.anchor.subjects import Sentence
from lemoe.routing.anchor.words import Reader, Word

LONG_PROMPT = 400  # characters; a longer prompt is a passage, whose wording is not what generalises
SAME_QUESTION = 1.0  # conflict below which another template asks what the edit asks
DROPPED = 0.35  # share of the words outside the subject that a rewording leaves out

_AS_QUESTION = ("Question: {}?", "{} what?", "Complete this: {} ...?", "Do you know this? {}?")
_AS_STATEMENT = ("{} The answer is", "{} Answer:", "Question: {}\nAnswer:", "{} It is")
_NEUTRAL = (
    "Here is a question.",
    "Please answer:",
    "I was wondering about this.",
    "From an encyclopedia:",
    "Q:",
    "As everyone knows,",
)
_SENTENCES = (
    "The station opened in 1931 and was rebuilt after the war.",
    "He later moved to the coast, where he taught music.",
    "The film received good reviews on its first weekend.",
    "References and external links follow below.",
    "She won the regional title twice in a row.",
    "The village lies at the foot of the hills.",
    "It was the second of three albums recorded that year.",
    "The company employs about four hundred people.",
)
_OTHER_QUESTIONS = (
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


def rewordings(edits: Sequence[Edit], count: int, rng: random.Random) -> list[list[str]]:
    """For each of `edits`, `count` other texts that end in its question; none for a long one.

    By turns: words outside the subject dropped, a distracting sentence in front (another edit's, or a stock one), a
    question made a statement or the reverse (models end the turn after a question mark, start a phrase elsewhere), a
    neutral opening, and several of these together. Edits share an opening where they can, so that it is read once.
    """
    made: list[list[str]] = [[] for _ in edits]
    for number in range(count):
        choose_opening, worded = _KINDS[number % len(_KINDS)]
        opening = choose_opening(edits, rng)
        for place, edit in enumerate(edits):
            if len(edit.prompt) <= LONG_PROMPT:
                made[place].append(opening(edit) + worded(edit, rng))
    return made


def _dropped(edit: Edit, rng: random.Random) -> str:
    """The prompt without some of its words; the subject and the last word stay."""
    start, end = _subject_span(edit)
    kept = []
    words = list(re.finditer(r"\S+", edit.prompt))
    for number, word in enumerate(words):
        inside = word.start() < end and word.end() > start
        if inside or number == len(words) - 1 or rng.random() >= DROPPED:
            kept.append(word.group())
    return " ".join(kept)


def _turned(prompt: str, rng: random.Random) -> str:
    """A question so that a phrase follows, a phrase to complete as a question."""
    stripped = prompt.rstrip()
    forms = _AS_STATEMENT if stripped.endswith("?") else _AS_QUESTION
    return rng.choice(forms).replace("{}", stripped)


def _subject_span(edit: Edit) -> tuple[int, int]:
    start = edit.prompt.casefold().rfind((edit.subject or "").casefold()) if edit.subject else -1
    return (start, start + len(edit.subject or "")) if start >= 0 else (0, 0)


Opening = Callable[[Edit], str]


def _nothing(edits: Sequence[Edit], rng: random.Random) -> Opening:
    return lambda edit: ""


def _one_of(texts: Sequence[str]) -> Callable[[Sequence[Edit], random.Random], Opening]:
    """The same text, drawn from `texts`, in front of every edit."""

    def draw(edits: Sequence[Edit], rng: random.Random) -> Opening:
        text = rng.choice(texts)
        return lambda edit: f"{text} "

    return draw


def _another_edit(edits: Sequence[Edit], rng: random.Random) -> Opening:
    """A sentence that states one of `edits`, for the others; for those on its subject, a stock one."""
    short = [edit for edit in edits if len(edit.prompt) + len(edit.target) <= LONG_PROMPT]
    stock = rng.choice(_SENTENCES)
    if not short:
        return lambda edit: f"{stock} "
    other = rng.choice(short)
    stated = f"{other.prompt} {other.target.strip()}."
    return lambda edit: f"{stock if _subject_key(edit) == _subject_key(other) else stated} "


_KINDS = (  # what stands in front, and how the prompt is worded
    (_nothing, _dropped),
    (_another_edit, lambda edit, rng: edit.prompt),
    (_nothing, lambda edit, rng: _turned(edit.prompt, rng)),
    (_one_of(_SENTENCES), _dropped),
    (_one_of(_NEUTRAL), lambda edit, rng: _turned(_dropped(edit, rng), rng)),
    (_another_edit, _dropped),
)


def _subject_key(edit: Edit) -> str:
    return question(edit.subject or edit.prompt)


def other_questions(gate: Gate, edits: Sequence[Edit], place: int, count: int, rng: random.Random) -> list[str]:
    """Up to `count` questions about the subject of `edits[place]` that ask something else.

    They come from the round's other edits (their questions about this subject, or their templates with it put in) and
    from stock questions; those that the gate would let through come first, since the others never reach the expert.
    `gate` holds the edits in order.
    """
    edit = edits[place]
    subject = edit.subject or infer_subject(edit.prompt, gate.lexicon)
    if len(edit.prompt) > LONG_PROMPT or len(subject) > LONG_PROMPT // 2:
        return []
    texts = [_about(other, edit, subject) for other in edits if other is not edit]
    texts += [template.replace("{}", subject) for template in _OTHER_QUESTIONS]
    rng.shuffle(texts)
    stored, about = gate.prepared(place), gate.index.subjects[gate.subjects[place]]
    scored = []
    for text in dict.fromkeys(texts):
        words = _read(text)
        mention = about.find(Sentence(words, gate.lexicon))
        if mention is None:
            continue
        compared = compare(stored, Question.of(around(words, mention), gate.lexicon), gate.lexicon)
        if compared.conflict >= SAME_QUESTION:
            scored.append((not (compared.enough and compared.conflict <= gate.threshold), text))
    scored.sort(key=lambda pair: pair[0])
    return [text for _, text in scored[:count]]


def _about(other: Edit, edit: Edit, subject: str) -> str:
    """The question of `other`, asked about `subject`; empty if its own subject cannot be told apart."""
    if len(other.prompt) > LONG_PROMPT or not other.subject:
        return ""
    if question(other.subject) == question(edit.subject or subject):
        return other.prompt
    start, end = _subject_span(other)
    return other.prompt[:start] + subject + other.prompt[end:] if end else ""


def _read(text: str) -> list[Word]:
    """The last sentence of a text."""
    reader = Reader()
    reader.push(text.encode())
    return reader.words
