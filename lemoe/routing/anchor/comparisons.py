"""The question read, compared with those of all anchors of one subject: pair by pair, or, if they are many, as arrays.

Both ways give the same numbers, bit for bit: sums run in the order of the words, and similarities are the same dot
products.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from lemoe.routing.anchor.lexicon import Lexicon, Vector
from lemoe.routing.anchor.questions import MIN_EVIDENCE, Comparison, Question, StoredQuestion

VECTORISED_FROM = 16  # anchors of one subject from which arrays are faster; see `tests/benchmarks/speed.py crowd`
CACHED_VALUES = 1 << 23  # values that the cached arrays of all subjects may have together

Values = NDArray[numpy.float64]
MatchedWeights = Sequence[float] | Values  # matched weight of each anchor's question


class Comparisons(ABC):
    """The comparisons of one question with each anchor of a subject; an anchor's index is that in `numbers`."""

    def __init__(self, numbers: Sequence[int]):
        self.numbers = numbers  # the anchors' numbers in the gate, ascending

    @abstractmethod
    def comparison_with(self, index: int) -> Comparison:
        """The comparison with one anchor."""

    @abstractmethod
    def best_index(self, threshold: float) -> int | None:
        """The index of the anchor with the best fit among those of at most this conflict; the latest of several."""

    @abstractmethod
    def nearest_index(self) -> int | None:
        """The index of the anchor with the least conflict; the first of several."""

    @abstractmethod
    def most_matched(self, before: MatchedWeights | None) -> MatchedWeights:
        """The matched weight of each anchor's question, now or `before`, whichever is higher."""

    def fit_of(self, number: int) -> float | None:
        """The fit of the anchor of this number; None if it is not one of the subject's."""
        if number < 0:
            return None
        index = bisect_left(self.numbers, number)
        found = index < len(self.numbers) and self.numbers[index] == number
        return self.comparison_with(index).fit if found else None


class PairwiseComparisons(Comparisons):
    """Comparisons made pair by pair; most subjects have one anchor only."""

    def __init__(self, numbers: Sequence[int], compared: Sequence[Comparison]):
        super().__init__(numbers)
        self._compared = compared

    def comparison_with(self, index: int) -> Comparison:
        return self._compared[index]

    def best_index(self, threshold: float) -> int | None:
        in_scope = [
            index for index, each in enumerate(self._compared) if each.enough_evidence and each.conflict <= threshold
        ]
        if len(in_scope) < 2:
            return in_scope[0] if in_scope else None
        return max(in_scope, key=lambda index: (round(self._compared[index].fit, 3), index))

    def nearest_index(self) -> int | None:
        if len(self._compared) == 1:
            return 0
        return min(range(len(self._compared)), key=lambda index: self._compared[index].conflict, default=None)

    def most_matched(self, before: MatchedWeights | None) -> MatchedWeights:
        if before is None:
            return [each.matched for each in self._compared]
        return [max(each.matched, earlier) for each, earlier in zip(self._compared, before, strict=True)]


class VectorisedComparisons(Comparisons):
    """Comparisons as arrays: `conflict`, `fit`, `matched` and `enough_evidence`, each `[anchors]`."""

    def __init__(
        self,
        numbers: Sequence[int],
        conflict: Values,
        fit: Values,
        matched: Values,
        enough_evidence: NDArray[numpy.bool_],
    ):
        super().__init__(numbers)
        self._conflict, self._fit, self._matched, self._enough_evidence = conflict, fit, matched, enough_evidence

    def comparison_with(self, index: int) -> Comparison:
        conflict, fit, matched = (float(values[index]) for values in (self._conflict, self._fit, self._matched))
        return Comparison(conflict, fit, matched, bool(self._enough_evidence[index]))

    def best_index(self, threshold: float) -> int | None:
        in_scope = numpy.flatnonzero(self._enough_evidence & (self._conflict <= threshold))
        if not len(in_scope):
            return None
        fits = self._fit[in_scope]
        best_fit = round(float(fits.max()), 3)
        candidates = in_scope[fits > best_fit - 0.001][::-1].tolist()
        return next(index for index in candidates if round(float(self._fit[index]), 3) == best_fit)

    def nearest_index(self) -> int | None:
        return int(self._conflict.argmin())

    def most_matched(self, before: MatchedWeights | None) -> MatchedWeights:
        return self._matched if before is None else numpy.maximum(self._matched, before)


class ArrayCache:
    """A least-recently-used cache of arrays with at most `max_values` values together; the last put always stays."""

    def __init__(self, max_values: int = CACHED_VALUES):
        self._arrays: OrderedDict[Hashable, tuple[NDArray[Any], ...]] = OrderedDict()
        self._max_values = max_values
        self._size = 0

    def get(self, key: Hashable) -> tuple[NDArray[Any], ...] | None:
        found = self._arrays.get(key)
        if found is not None:
            self._arrays.move_to_end(key)
        return found

    def put(self, key: Hashable, arrays: tuple[NDArray[Any], ...]) -> None:
        self._arrays[key] = arrays
        self._size += sum(array.size for array in arrays)
        while self._size > self._max_values and len(self._arrays) > 1:
            _, evicted = self._arrays.popitem(last=False)
            self._size -= sum(array.size for array in evicted)


class QuestionTable:
    """The questions of many anchors of one subject as arrays: all words in one row, and where each anchor's begin.

    A word that was read is compared once with the distinct words of all questions, and the result is cached, so that a
    sentence that grows by a word costs one comparison more.
    """

    def __init__(self, numbers: Sequence[int], asked: Iterable[StoredQuestion], lexicon: Lexicon, cache: ArrayCache):
        self._numbers = numbers
        self._lexicon = lexicon
        self._cache = cache
        columns: dict[str, int] = {"": 0}  # an empty question has the empty word, which is similar to no other
        words: list[int] = []
        weights: list[float] = []
        starts, totals, fronts = [], [], []
        answers: dict[str, list[int]] = {}
        for index, stored in enumerate(asked):
            question = stored.question
            starts.append(len(words))
            words += [columns.setdefault(word, len(columns)) for word in question.words or ("",)]
            weights += question.weights or (0.0,)
            totals.append(float(question.total_weight))
            fronts.append(stored.front_share)
            for stemmed in stored.answer_stems:
                answers.setdefault(stemmed, []).append(index)
        self._distinct = tuple(columns)[1:]
        self._words, self._starts = numpy.array(words, numpy.intp), numpy.array(starts, numpy.intp)
        self._anchor_of_word = numpy.repeat(numpy.arange(len(starts)), numpy.diff([*starts, len(words)]))
        self._weights, self._totals = numpy.array(weights), numpy.array(totals)
        self._front_shares = numpy.array(fronts)
        self._anchors_by_answer = {stemmed: numpy.array(indices, numpy.intp) for stemmed, indices in answers.items()}
        self._columns_by_stem: dict[str, list[int]] = {}
        for column, word in enumerate(self._distinct, 1):
            self._columns_by_stem.setdefault(lexicon.stem(word), []).append(column)

    def compare(self, read: Question) -> VectorisedComparisons:
        """All anchors' questions against the question read; see `lemoe.routing.anchor.questions.compare_questions`."""
        count = len(self._totals)
        most_similar = numpy.zeros(len(self._distinct) + 1)
        total_read, matched_read = numpy.full(count, float(read.total_weight)), numpy.zeros(count)
        for word, stemmed, weight in zip(read.words, read.stems, read.weights, strict=True):
            similarities, best = self._compare_word(word)
            numpy.maximum(most_similar, similarities, out=most_similar)
            gained = weight * best
            answered = self._anchors_by_answer.get(stemmed)
            if answered is not None:
                total_read[answered] -= weight
                gained[answered] = 0.0
            matched_read += gained
        total = self._totals
        gathered = numpy.bincount(self._anchor_of_word, self._weights * most_similar[self._words], count)
        matched: Values = numpy.asarray(gathered, numpy.float64)
        conflict = numpy.minimum(total - matched, total_read - matched_read) / (1 + matched + matched_read)
        fit = (matched + 1) / (total + 1) + (matched_read + 1) / (total_read + 1)
        shares = self._front_shares
        enough_evidence = (shares < 0.5) | ((total_read > 0) & (total_read >= MIN_EVIDENCE * total * shares))
        return VectorisedComparisons(self._numbers, conflict, fit, matched, enough_evidence)

    def _compare_word(self, word: str) -> tuple[NDArray[Any], ...]:
        """Similarities of a word to each distinct word, and to each anchor's most similar word."""
        cached = self._cache.get((self, word))
        if cached is None:
            similarities = numpy.zeros(len(self._distinct) + 1)
            similarities[1:] = self._lexicon.vector_similarities(word, self._word_vectors())
            similarities[self._columns_by_stem.get(self._lexicon.stem(word), [])] = 1.0
            cached = similarities, numpy.maximum.reduceat(similarities[self._words], self._starts)
            self._cache.put((self, word), cached)
        return cached

    def _word_vectors(self) -> Vector:
        """Vectors `[words, hidden]` of the distinct words."""
        cached = self._cache.get(self)
        if cached is None:
            if self._distinct:
                cached = (numpy.stack([self._lexicon.word_vector(word) for word in self._distinct]),)
            else:
                cached = (numpy.zeros((0, len(self._lexicon.word_vector(""))), numpy.float32),)
            self._cache.put(self, cached)
        return cached[0]
