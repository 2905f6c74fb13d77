"""From evidence to a decision: how likely a text asks for an edit, from its subject, its words and its meaning.

One logistic regression for each base model, fitted on the bank of questions (`lemoe.routing.anchor.fitting`); without
one, words alone decide, by how far they conflict.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy

from lemoe.routing.anchor.comparisons import MeaningComparisons, Values, WordComparisons
from lemoe.routing.anchor.meaning import QUESTION_FEATURES, SUBJECT_FEATURES, Meaning
from lemoe.routing.anchor.relation_words import bound_nats
from lemoe.routing.anchor.subjects import MIN_COVERAGE, Mention, Subject

MAX_RATIO = 20.0  # log-likelihood ratios (nats) beyond which more is no further evidence
MAX_VOUCHED = 1.0  # score where all words of an edit's question were read
CLASH = -2.0  # score at most where an answer of another kind is asked for
MAX_EARLIER = 3.0  # score by which the sentence before can speak against an edit,
EARLIER_SHARE = 0.3  # of which so much counts however much was asked since
COMPLETE = 0.95  # coverage of a name of several words that was read whole; beside another it may be a longer form
DOUBTS = slice(1, None)  # of `SUBJECT_FEATURES`, those that speak against a mention
MARKED = [QUESTION_FEATURES.index(name) for name in ("relation", "overlap", "substituted")]  # of another relation
LIGHT_WEIGHT = 8.0  # a subject of less weight is made of common words


def subject_features(subject: Subject, mention: Mention) -> tuple[float, ...]:
    """`SUBJECT_FEATURES` of a mention."""
    lightness = max(0.0, 1 - subject.total_weight / LIGHT_WEIGHT)
    return (
        1.0,
        1 - mention.coverage,
        float(mention.lowered),
        lightness * mention.lowered,
        float(mention.misspelt),
        float(mention.neighbour),
        float(is_longer_form(subject, mention)),
    )


def is_longer_form(subject: Subject, mention: Mention) -> bool:
    """Whether a name of several words was read whole beside another: more likely its longer form than another name."""
    return mention.neighbour and len(subject.words) > 1 and mention.coverage > COMPLETE


def question_features(words: WordComparisons, meaning: MeaningComparisons) -> Values:
    """`QUESTION_FEATURES` `[features, anchors]` of comparisons.

    `overlap` is what the words that mark a relation and the likeness of profiles say twice. Nothing read is no
    agreement. Another word in the same frame is no other question as far as both mark the same relation.
    """
    features = numpy.empty((len(QUESTION_FEATURES), len(words.conflict)))
    ratio, profile, relation, overlap, contradiction, agreement, substituted = features
    numpy.minimum(numpy.maximum(meaning.ratio, -MAX_RATIO), MAX_RATIO, out=ratio)
    profile[:], relation[:] = meaning.profile, meaning.relation
    numpy.exp(-numpy.maximum(relation, 0.0), out=substituted)
    substituted *= words.substituted
    numpy.maximum(relation, 0.0, out=overlap)
    overlap *= profile
    numpy.log1p(words.conflict, out=contradiction)
    numpy.exp(-words.conflict, out=agreement)
    agreement *= words.heard
    return features


class Evidence(NamedTuple):
    """What was read of a subject, and of the questions of its edits.

    Attributes:
        subject: `SUBJECT_FEATURES` of the mention.
        words, meaning: the comparisons with each anchor.
        earlier: `[anchors]`, their scores by the sentence before; None if that did not mention the subject.
    """

    subject: tuple[float, ...]
    words: WordComparisons
    meaning: MeaningComparisons
    earlier: Values | None = None


Judgement = tuple[Values, Values, Values]


class Decision(ABC):
    """Judges comparisons.

    Attributes:
        margin: by which the evidence must rise for the gate to open again.
        shut_below: score of the active anchor below which the gate shuts.
    """

    margin: float
    shut_below: float

    def admits(self, subject: Subject, mention: Mention) -> bool:
        """Whether a mention is compared at all."""
        return True

    def remember(self, evidence: Values, before: Values | None) -> Values:
        """What the next evidence is compared with, from this and what was remembered `before`."""
        return evidence

    def probability(self, score: float) -> float:
        """That an edit is asked for, by its score."""
        return 1 / (1 + math.exp(-max(min(score, 500.0), -500.0)))

    @abstractmethod
    def judge(self, evidence: Evidence) -> Judgement:
        """Score, rank and evidence `[anchors]` of comparisons; see `Comparisons`."""


class WordDecision(Decision):
    """Words alone decide: a question may conflict up to `threshold`, and the best fit is chosen.

    Nothing weighs how sure a mention is, so that those in doubt do not count.
    """

    margin = 1e-6
    shut_below = -math.inf

    def __init__(self, threshold: float):
        self._threshold = threshold

    def admits(self, subject: Subject, mention: Mention) -> bool:
        plain = mention.lowered and subject.total_weight < LIGHT_WEIGHT
        part_of_name = mention.neighbour and not is_longer_form(subject, mention)
        return mention.coverage >= MIN_COVERAGE and not part_of_name and not plain

    def remember(self, evidence: Values, before: Values | None) -> Values:
        return evidence if before is None else numpy.maximum(evidence, before)

    def judge(self, evidence: Evidence) -> Judgement:
        return self._threshold - evidence.words.conflict, evidence.words.fit, evidence.words.matched


class FittedDecision(Decision):
    """Log odds by fitted weights, above those of `probability`; the likeliest is chosen.

    Where all that an edit asks for was read, word for word, this is enough: what a short or vague question means is too
    uncertain to contradict it. Where the sentence before asked something else about the subject, a sentence that asks
    little is most likely the answer to that.
    """

    margin = 0.25
    shut_below = 0.0

    def __init__(self, weights: Values, probability: float, relations: int):
        """A decision from `probability` on, by `weights` `[features]`; words mark one of so many `relations`."""
        self._subject: list[float] = weights[: len(SUBJECT_FEATURES)].tolist()
        self._question = weights[len(SUBJECT_FEATURES) :, None]
        self._threshold = math.log(probability / (1 - probability))
        self._most = _bound_questions(self._question[:, 0].tolist(), relations) - self._threshold

    def admits(self, subject: Subject, mention: Mention) -> bool:
        """Not where no question whatever could open the gate, as with most names that share a word with the subject."""
        found = self._weigh_subject(subject_features(subject, mention))
        return max(self._most + sum(found), MAX_VOUCHED + sum(found[DOUBTS])) >= 0

    def _weigh_subject(self, features: tuple[float, ...]) -> list[float]:
        return [weight * value for weight, value in zip(self._subject, features, strict=True)]

    def probability(self, score: float) -> float:
        return super().probability(score + self._threshold)

    def judge(self, evidence: Evidence) -> Judgement:
        words, earlier = evidence.words, evidence.earlier
        found = self._weigh_subject(evidence.subject)
        weighed = self._question * question_features(words, evidence.meaning)
        fitted = numpy.add.reduce(weighed)
        fitted += sum(found) - self._threshold
        vouched = numpy.minimum(numpy.add.reduce(weighed[MARKED]), 0.0)
        vouched += MAX_VOUCHED + sum(found[DOUBTS])
        vouched -= words.unread
        score: Values = numpy.maximum(fitted, vouched)
        numpy.minimum(score, CLASH, out=score, where=words.clash)
        if earlier is not None:
            fading = 1 - (1 - EARLIER_SHARE) * words.heard
            score += fading * numpy.minimum(numpy.maximum(earlier, -MAX_EARLIER), 0.0)
        return score, score, numpy.where(words.enough_evidence, score, -numpy.inf)


def _bound_questions(weights: Sequence[float], relations: int) -> float:
    """The most that `QUESTION_FEATURES` can add to a score with these weights."""
    meaning, profile, relation, overlap, contradiction, agreement, substituted = weights
    if contradiction > 0:
        return math.inf
    marked = bound_nats(relations)
    likest = max(
        profile * alike + relation * nats + overlap * alike * max(nats, 0.0)
        for alike in (-1.0, 1.0)
        for nats in (0.0, *marked)
    )
    return abs(meaning) * MAX_RATIO + likest + max(agreement, 0.0) + max(substituted, 0.0)


def choose_decision(meaning: Meaning | None, threshold: float, probability: float) -> Decision:
    """From `probability` on by all evidence, or, without `meaning`, up to `threshold` by words alone."""
    if meaning is None:
        return WordDecision(threshold)
    return FittedDecision(meaning.weights.double().numpy(), probability, meaning.relation_words.count)
