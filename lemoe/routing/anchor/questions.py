"""What is asked about a subject, and how far two questions are the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.subjects import Mention
from lemoe.routing.anchor.words import Word

EVIDENCE = 0.02  # share of what the anchor asks before its subject that must be read before deciding
WORDS_BEFORE = 12  # words in front of a mention that tell what is asked


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about a subject: the words around its mention, with their stems, weights and the weights' sum."""

    words: tuple[str, ...]
    stems: tuple[str, ...]
    weights: tuple[float, ...]
    total: float

    @classmethod
    def of(cls, words: Sequence[str], lexicon: Lexicon) -> "Question":
        unique = tuple(dict.fromkeys(words))
        weights = tuple(map(lexicon.relation_weight, unique))
        return cls(unique, tuple(map(lexicon.stem, unique)), weights, sum(weights))


@dataclass(frozen=True, slots=True)
class Prepared:
    """What an anchor asks, the stems of its target, and the share of its question that stands before the subject."""

    question: Question
    answer: frozenset[str]
    front: float


class Comparison(NamedTuple):
    """An anchor's question against what was read: see `compare`."""

    conflict: float
    fit: float
    matched: float
    enough: bool


def compare(stored: Prepared, read: Question, lexicon: Lexicon) -> Comparison:
    """How well what was read asks what the anchor asks.

    `conflict` is the weight that both sides hold beyond what they share, the lesser of the two, against what they
    share: a side without content is no conflict. The words of the answer are no evidence, so that reading it changes
    nothing.
    """
    asked, answer = stored.question, stored.answer
    total, total_read = asked.total, read.total
    alike = [list(map(lexicon.likeness(word).__getitem__, read.words)) for word in asked.words]
    best = [max(row, default=0.0) for row in alike]
    best_read = list(map(max, zip(*alike, strict=True))) if alike else [0.0] * len(read.words)
    matched = 0.0
    for weight, likeness in zip(asked.weights, best, strict=True):
        matched += weight * likeness
    matched_read = 0.0
    for stemmed, weight, likeness in zip(read.stems, read.weights, best_read, strict=True):
        if stemmed in answer:
            total_read -= weight
        else:
            matched_read += weight * likeness
    conflict = min(total - matched, total_read - matched_read) / (1 + matched + matched_read)
    fit = (matched + 1) / (total + 1) + (matched_read + 1) / (total_read + 1)
    enough = stored.front < 0.5 or (total_read > 0 and total_read >= EVIDENCE * total * stored.front)
    return Comparison(conflict, fit, matched, enough)


def around(words: Sequence[Word], mention: Mention) -> list[str]:
    """The words that tell what is asked about a mention: some before it and all behind."""
    start = min(mention.positions) - WORDS_BEFORE
    return [word.text for place, word in enumerate(words) if place not in mention.positions and place >= start]
