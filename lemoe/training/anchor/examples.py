"""Training texts made from an edit file alone: paraphrases, which keep the edit's answer, and negative prompts.

Negative prompts are other questions about the edit's subject, whose answers stay those of the base model. Nothing here
reads the rephrases or locality prompts of the edits, which evaluation measures.
"""

import random
import re
from collections.abc import Callable, Sequence

from lemoe.data.conflicts import normalise_question
from lemoe.data.edits import Edit
from lemoe.routing.anchor.gate import Gate
from lemoe.routing.anchor.lexicon import infer_subject
from lemoe.routing.anchor.questions import Question, compare_questions, question_words
from lemoe.routing.anchor.subjects import Sentence
from lemoe.routing.anchor.words import Word, WordReader
from lemoe.training.anchor.wordings import Wordings

LONG_PROMPT = 400  # characters; a longer prompt is a passage, whose wording is not what generalises
MIN_NEGATIVE_CONFLICT = 1.0  # with less conflict, a prompt asks the same question as the edit
DROP_RATE = 0.35  # share of the words outside the subject that a paraphrase leaves out

_QUESTION_FORMS = ("Question: {}?", "{} what?", "Complete this: {} ...?", "Do you know this? {}?")
_STATEMENT_FORMS = ("{} The answer is", "{} Answer:", "Question: {}\nAnswer:", "{} It is")
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


def make_paraphrases(
    edits: Sequence[Edit], count: int, rng: random.Random, wordings: Sequence[Wordings] = ()
) -> list[list[str]]:
    """Make `count` synthetic paraphrases of each of `edits`; none of a long prompt.
    """
    made: list[list[str]] = [[] for _ in edits]
    for number in range(count):
        choose_prefix, reword, behind = _PARAPHRASE_KINDS[number % len(_PARAPHRASE_KINDS)]
        prefix_of = choose_prefix(edits, rng)
        for index, edit in enumerate(edits):
            if len(edit.prompt) <= LONG_PROMPT:
                asked = wordings[index].asking if wordings else {}
                made[index].append(prefix_of(edit) + reword(edit, asked, rng) + (rng.choice(behind) if behind else ""))
    return made


def _is_question(text):
    return text.rstrip().endswith("?")


def _from_bank(form, edit, asked, rng):
    subject = edit.subject or ""
    pool = [t for t in asked.get(form, ()) if subject]
    if not pool: return None
    return rng.choice(pool).replace("{}", subject)


def ask_question(edit, asked, rng):
    return _from_bank("questions", edit, asked, rng) or (edit.prompt if _is_question(edit.prompt) else _convert_question(edit.prompt, rng))


def ask_phrase(edit, asked, rng):
    return _from_bank("phrases", edit, asked, rng) or (edit.prompt if not _is_question(edit.prompt) else _convert_question(edit.prompt, rng))


def ask_request(edit, asked, rng):
    return _from_bank("requests", edit, asked, rng) or rng.choice(_REQUEST_FORMS).replace("{}", edit.prompt.rstrip(" ?."))


def ask_casual(edit, asked, rng):
    return (_from_bank("casual", edit, asked, rng) or edit.prompt.rstrip(" ?.")).lower()


_REQUEST_FORMS = ("Tell me this: {}.", "Please answer this: {}.", "I need to know this: {}.", "Complete this for me: {}.")
_BEHIND = (" Please answer in one word.", " Be brief.", " Answer:", "\nA:", " I need it for a form.", " Thanks!")


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
    stripped = prompt.rstrip()
    forms = _STATEMENT_FORMS if stripped.endswith("?") else _QUESTION_FORMS
    return rng.choice(forms).replace("{}", stripped)


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


_PARAPHRASE_KINDS = (
    (_no_prefix, ask_question, ()),
    (_no_prefix, ask_casual, ()),
    (_state_another_edit, lambda edit, asked, rng: _drop_words(edit, rng), ()),
    (_no_prefix, ask_request, ()),
    (_no_prefix, ask_phrase, ()),
    (_draw_prefix_from(_DISTRACTING_SENTENCES), ask_question, ()),
    (_no_prefix, ask_question, _BEHIND),
    (_draw_prefix_from(_NEUTRAL_PREFIXES), lambda edit, asked, rng: _convert_question(_drop_words(edit, rng), rng), ()),
)


def _subject_key(edit: Edit) -> str:
    return normalise_question(edit.subject or edit.prompt)


def make_negative_prompts(gate: Gate, edits: Sequence[Edit], index: int, count: int, rng: random.Random) -> list[str]:
    """Make up to `count` questions about the subject of `edits[index]` that ask something else.

    They come from the round's other edits (their questions about this subject, or their questions with it put in) and
    from templates; those on which the gate would open come first, since the others never reach the expert. `gate` holds
    the edits in order.
    """
    edit = edits[index]
    subject = edit.subject or infer_subject(edit.prompt, gate.lexicon)
    if len(edit.prompt) > LONG_PROMPT or len(subject) > LONG_PROMPT // 2:
        return []
    texts = [_transfer_question(other, edit, subject) for other in edits if other is not edit]
    texts += [template.replace("{}", subject) for template in _NEGATIVE_TEMPLATES]
    rng.shuffle(texts)
    stored, subject_words = gate.stored_question(index), gate.index.subjects[gate.subjects[index]]
    scored = []
    for text in dict.fromkeys(texts):
        words = _read_words(text)
        mention = subject_words.find_mention(Sentence(words, gate.lexicon))
        if mention is None:
            continue
        compared = compare_questions(
            stored, Question.from_words(question_words(words, mention), gate.lexicon), gate.lexicon
        )
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
