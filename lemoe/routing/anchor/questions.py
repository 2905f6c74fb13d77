"""Questions: the words around a mention of a subject, and whether two questions ask the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lemoe.routing.anchor.lexicon import LINK_WORDS, Lexicon
from lemoe.routing.anchor.subjects import Mention
from lemoe.routing.anchor.words import Word

MIN_EVIDENCE = 0.02  # weight that must be read, as a share of the anchor's question
MIN_SAME_WORDS, MORE_WORDS = 3, 2  # words of questions that are the same but for one of them, and behind them
WORDS_BEFORE = 12  # words in front of a mention that belong to the question
DESCRIPTION_WORDS = 4  # at most, with `the`, of what describes a mention in front of it
_QUESTION_WORDS = frozenset("what which how when where who whom whose why".split())
_ASKED_FOR = {
    **dict.fromkeys("when year date day month many much".split(), "amount"),
    **dict.fromkeys("where city town country place state continent who whom whose".split(), "name"),
}  # by a question word, or by the word behind `what`, `which` or `how`
KINDS = ("", *sorted(set(_ASKED_FOR.values())))  # of answers; see `Question`
_FIRST_WORDS = 3  # of a question, among which is the word that asks: `tell me when`
_AUXILIARIES = frozenset("is s are was were be been has have had do does did".split())  # none asks for something else
_ARTICLES = frozenset(("a", "an", "the"))


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a subject: the words around its mention.

    Attributes:
        words, stems, weights: each word, once.
        frame: the stems, all auxiliaries as one: `was` for `is` asks for nothing else.
        kind: what kind of answer its first words ask for, an amount (or time) or a name; empty where they say neither.
        bare: whether it has nothing but auxiliaries and articles: a sentence that has asked for nothing yet.
        unspecific: whether it has nothing but them and question words: `what is` asks for whatever there is to say.
        total_weight: the sum of the weights.
        weight_by_stem: the sum for each stem.
    """

    words: tuple[str, ...]
    stems: tuple[str, ...]
    weights: tuple[float, ...]
    frame: tuple[str, ...]
    kind: str
    bare: bool
    unspecific: bool
    total_weight: float
    weight_by_stem: dict[str, float]

    @classmethod
    def from_words(cls, words: Sequence[str], lexicon: Lexicon) -> "Question":
        """The question of these words."""
        unique = tuple(dict.fromkeys(words))
        weights, stems = tuple(map(lexicon.relation_weight, unique)), tuple(map(lexicon.stem, unique))
        by_stem: dict[str, float] = {}
        for stemmed, weight in zip(stems, weights, strict=True):
            by_stem[stemmed] = by_stem.get(stemmed, 0.0) + weight
        frame = tuple("is" if word in _AUXILIARIES else stem for word, stem in zip(unique, stems, strict=True))
        more = set(unique) - _AUXILIARIES - _ARTICLES
        bare, unspecific = not more, more <= _QUESTION_WORDS
        return cls(unique, stems, weights, frame, _find_kind(unique), bare, unspecific, sum(weights), by_stem)


def _find_kind(words: Sequence[str]) -> str:
    """What kind of answer the words of a question ask for; see `Question`."""
    for word, following in zip(words[:_FIRST_WORDS], (*words[1 : _FIRST_WORDS + 1], ""), strict=False):
        if word in _QUESTION_WORDS:
            return _ASKED_FOR.get(word) or _ASKED_FOR.get(following, "")
    return ""


def ask_for_other_kinds(kind: str, other: str) -> bool:
    """Whether two questions ask for answers of two kinds, so that none answers both: `when` and `where`."""
    return bool(kind and other) and kind != other


@dataclass(frozen=True, slots=True)
class StoredQuestion:
    """An anchor's question, the stems of its target, and the share of the question's weight in front of the subject."""

    question: Question
    answer_stems: frozenset[str]
    front_share: float


class Comparison(NamedTuple):
    """An anchor's question against the question read: see `compare_questions`.

    Attributes:
        conflict: 0 where nothing differs; unbounded.
        fit: matched share of both questions, 0 to 2.
        matched: matched weight of the anchor's question.
        unread: how much of the anchor's question was not read, as a part of `conflict`.
        read_weight: weight of what was read that is no part of the answer.
        enough_evidence: whether enough was read to decide.
        substituted: whether the two are the same but for one word.
        clash: whether the two ask for answers of two kinds.
        meaning: log-likelihood ratio (nats) of both asking the same; 0 where the gate compares words alone.
        score: log odds that the edit is asked for, above the threshold: the gate opens from 0.
    """

    conflict: float
    fit: float
    matched: float
    unread: float
    read_weight: float
    enough_evidence: bool
    substituted: bool = False
    clash: bool = False
    meaning: float = 0.0
    score: float = 0.0


def compare_questions(stored: StoredQuestion, read: Question, lexicon: Lexicon) -> Comparison:
    """How well the question read matches an anchor's question, and how far the two contradict each other.

    Each word counts by its weight times its similarity to the most similar word of the other side. With `t` the total
    and `m` the matched weight of a side, `conflict = min(t - m, t' - m') / (1 + m + m')` and
    `fit = (m + 1) / (t + 1) + (m' + 1) / (t' + 1)`: a side without content is no conflict. The words of the answer are
    no evidence on the side that was read, so that reading the answer changes nothing. Too little was read to decide if
    it is less than `MIN_EVIDENCE` of what stands in front of the anchor's subject, or auxiliaries and articles
    alone (`Oslo was the`) where the anchor asks for more.
    """
    asked, answer = stored.question, stored.answer_stems
    similarities = [list(map(lexicon.similarities_to(word).__getitem__, read.words)) for word in asked.words]
    best = [max(row, default=0.0) for row in similarities]
    best_read = list(map(max, zip(*similarities, strict=True))) if similarities else [0.0] * len(read.words)
    matched, matched_read, total_read = 0.0, 0.0, read.total_weight
    for weight, similarity in zip(asked.weights, best, strict=True):
        matched += weight * similarity
    for stemmed, weight, similarity in zip(read.stems, read.weights, best_read, strict=True):
        if stemmed in answer:
            total_read -= weight
        else:
            matched_read += weight * similarity
    needed = MIN_EVIDENCE * asked.total_weight * stored.front_share
    enough_evidence = stored.front_share < 0.5 or (total_read > 0 and total_read >= needed)
    return _conclude(asked, read, matched, matched_read, total_read, enough_evidence)


def compare_stems(stored: StoredQuestion, read: Question) -> Comparison:
    """The same, but words are alike where they share a stem, which holds for any base model, and not at all elsewhere.

    Any word is enough to decide, but for auxiliaries and articles.
    """
    asked, answer = stored.question.weight_by_stem, stored.answer_stems
    matched, matched_read, total_read = 0.0, 0.0, read.total_weight
    for stemmed in read.weight_by_stem:
        matched += asked.get(stemmed, 0.0)
    for stemmed, weight in zip(read.stems, read.weights, strict=True):
        if stemmed in asked:
            matched_read += weight
        elif stemmed in answer:
            total_read -= weight
    return _conclude(stored.question, read, matched, matched_read, total_read, total_read > 0)


def _conclude(
    asked: Question, read: Question, matched: float, matched_read: float, total_read: float, enough_evidence: bool
) -> Comparison:
    total, both = asked.total_weight, 1 + matched + matched_read
    conflict = min(total - matched, total_read - matched_read) / both
    fit = (matched + 1) / (total + 1) + (matched_read + 1) / (total_read + 1)
    enough_evidence &= asked.unspecific or not read.bare
    substituted = are_one_word_apart(asked.frame, read.frame)
    clash = ask_for_other_kinds(asked.kind, read.kind)
    return Comparison(conflict, fit, matched, (total - matched) / both, total_read, enough_evidence, substituted, clash)


def are_one_word_apart(frame: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two questions of at least `MIN_SAME_WORDS` words are the same but for one: `father` for `mother`.

    One of them may have up to `MORE_WORDS` more, since a question that is still being read has not ended.
    """
    length = min(len(frame), len(other))
    if length < MIN_SAME_WORDS or max(len(frame), len(other)) > length + MORE_WORDS:
        return False
    return sum(one != word for one, word in zip(frame, other, strict=False)) == 1


def question_words(words: Sequence[Word], mention: Mention, silent: frozenset[int]) -> list[str]:
    """The words of the question about a mention: `WORDS_BEFORE` before it, and all after it, but those at `silent`."""
    start = min(mention.positions) - WORDS_BEFORE
    return [word.text for position, word in enumerate(words) if position not in silent and position >= start]


def description_positions(words: Sequence[Word], mention: Mention) -> range:
    """Positions of what says directly in front of a mention what kind of thing it is: `the space probe` Calyx-7.

    That is `the` and few words that are no link words (`of`), with nothing between them.
    """
    end = position = min(mention.positions)
    while position and end - position < DESCRIPTION_WORDS and words[position].adjacent:
        position -= 1
        if words[position].text == "the" and end - position > 1:
            return range(position, end)
        if words[position].text in LINK_WORDS:
            break
    return range(0)
