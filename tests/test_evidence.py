"""From evidence to a decision: nothing heard is no agreement, and what the sentence before says against an edit."""

import math

import numpy
import pytest
from numpy.typing import NDArray

from lemoe.routing.anchor.comparisons import MeaningComparisons, WordComparisons
from lemoe.routing.anchor.evidence import EARLIER_SHARE, MAX_EARLIER, Evidence, FittedDecision, question_features
from lemoe.routing.anchor.meaning import FEATURES, QUESTION_FEATURES, SUBJECT_FEATURES

Values = NDArray[numpy.float64]
FOUND = (1.0, *[0.0] * (len(SUBJECT_FEATURES) - 1))
UNREAD = 9.0  # of an edit's question, so that it does not vouch for itself


def read_words(heard: list[float], contradiction: float = 0.0) -> WordComparisons:
    """Comparisons with one anchor for each of `heard`."""
    ones = numpy.ones(len(heard))
    flags = numpy.zeros(len(heard), numpy.bool_)
    nothing = 0 * ones
    with numpy.errstate(divide="ignore"):
        weight = -numpy.log1p(-numpy.array(heard))  # of what is heard so far
    return WordComparisons(contradiction * ones, nothing, nothing, UNREAD * ones, weight, ~flags, flags)


def feature(name: str, words: WordComparisons) -> Values:
    meaning = MeaningComparisons.none(len(words.heard))
    values: Values = question_features(words, meaning)[QUESTION_FEATURES.index(name)]
    return values


def test_words_agree_as_far_as_anything_was_heard() -> None:
    assert feature("agreement", read_words([0.0, 0.25, 1.0])).tolist() == [0.0, 0.25, 1.0]
    assert feature("agreement", read_words([1.0], contradiction=2.0)) == pytest.approx(math.exp(-2))
    assert feature("contradiction", read_words([0.0, 1.0], contradiction=2.0)) == pytest.approx(math.log(3))


@pytest.fixture
def decision() -> FittedDecision:
    """Its score is 2 for all comparisons without further evidence."""
    weights = numpy.zeros(len(FEATURES))
    weights[FEATURES.index("bias")] = 2.0
    return FittedDecision(weights, 0.5)


def scores(decision: FittedDecision, heard: list[float], earlier: list[float] | None) -> list[float]:
    before = None if earlier is None else numpy.array(earlier)
    read = Evidence(FOUND, read_words(heard), MeaningComparisons.none(len(heard)), before)
    score, rank, evidence = decision.judge(read)
    assert score.tolist() == rank.tolist() == evidence.tolist()
    values: list[float] = score.tolist()
    return values


def test_a_sentence_that_asks_nothing_answers_what_was_asked_before(decision: FittedDecision) -> None:
    assert scores(decision, [0.0, 0.0], None) == [2.0, 2.0]
    assert scores(decision, [0.0, 0.0], [-2.5, 5.0]) == [-0.5, 2.0]


def test_the_sentence_before_counts_the_less_the_more_is_asked_since_and_never_speaks_for_an_edit(
    decision: FittedDecision,
) -> None:
    by_heard = [scores(decision, [heard], [-2.0])[0] for heard in (0.0, 0.3, 0.6, 1.0)]
    assert by_heard == sorted(by_heard)
    assert by_heard[0] == pytest.approx(0.0)
    assert by_heard[-1] == pytest.approx(2.0 - EARLIER_SHARE * 2.0)
    assert scores(decision, [0.0], [-100.0]) == scores(decision, [0.0], [-MAX_EARLIER]) == [2.0 - MAX_EARLIER]
