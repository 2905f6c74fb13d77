"""From evidence to a decision: how likely a text asks for an edit, from its subject, its words and its meaning.

One logistic regression for each base model, fitted on the bank of questions (`lemoe.routing.anchor.fitting`); without
one, words alone decide, by how far they conflict.
"""

import math
from abc import ABC, abstractmethod

import numpy
from numpy.typing import NDArray

from lemoe.routing.anchor.meaning import SUBJECT_FEATURES
from lemoe.routing.anchor.subjects import Mention, Subject

MAX_RATIO = 20.0  # log-likelihood ratios (nats) beyond which more is no further evidence
LIGHT_WEIGHT = 8.0  # a subject of less weight is made of common words

Values = NDArray[numpy.float64]


def subject_features(subject: Subject, mention: Mention, amount: float) -> tuple[float, ...]:
    """`SUBJECT_FEATURES` of a mention; `amount`: the weight of the question's tokens."""
    lightness = max(0.0, 1 - subject.total_weight / LIGHT_WEIGHT)
    return (
        1.0,
        math.log1p(amount),
        1 - mention.coverage,
        float(mention.lowered),
        lightness * mention.lowered,
        float(mention.misspelt),
        float(mention.neighbour),
    )


def question_features(meaning: Values, conflict: Values, fit: Values, matched: Values) -> Values:
    """`QUESTION_FEATURES` `[features, anchors]` of comparisons `[anchors]`."""
    ratio = numpy.clip(meaning, -MAX_RATIO, MAX_RATIO)
    return numpy.stack([ratio, numpy.log1p(numpy.maximum(conflict, 0)), fit, numpy.log1p(numpy.maximum(matched, 0))])


Judgement = tuple[Values, Values, Values]


class Decision(ABC):
    """Judges comparisons.

    Attributes:
        margin: by which the evidence must rise for the gate to open again.
        shut_below: score of the active anchor below which the gate shuts.
    """

    margin: float
    shut_below: float

    def probability(self, score: float) -> float:
        """That an edit is asked for, by its score."""
        return 1 / (1 + math.exp(-score))

    @abstractmethod
    def judge(
        self, subject: tuple[float, ...], meaning: Values, conflict: Values, fit: Values, matched: Values
    ) -> Judgement:
        """Score, rank and evidence `[anchors]` of comparisons; see `Comparisons`. `subject`: `SUBJECT_FEATURES`."""


class WordDecision(Decision):
    """Words alone decide: a question may conflict up to `threshold`, and the best fit is chosen."""

    margin = 1e-6
    shut_below = -math.inf

    def __init__(self, threshold: float):
        self._threshold = threshold

    def judge(
        self, subject: tuple[float, ...], meaning: Values, conflict: Values, fit: Values, matched: Values
    ) -> Judgement:
        return self._threshold - conflict, fit, matched


class FittedDecision(Decision):
    """Log odds by fitted weights, above those of `probability`; the likeliest is chosen."""

    margin = 0.25
    shut_below = -1.5

    def __init__(self, weights: Values, probability: float):
        self._subject, self._question = weights[: len(SUBJECT_FEATURES)], weights[len(SUBJECT_FEATURES) :]
        self._threshold = math.log(probability / (1 - probability))

    def probability(self, score: float) -> float:
        return super().probability(score + self._threshold)

    def judge(
        self, subject: tuple[float, ...], meaning: Values, conflict: Values, fit: Values, matched: Values
    ) -> Judgement:
        common = float(self._subject @ numpy.array(subject)) - self._threshold
        score: Values = self._question @ question_features(meaning, conflict, fit, matched) + common
        return score, score, score
