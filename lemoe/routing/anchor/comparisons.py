"""What was read, compared with what all anchors of one subject ask: one by one, or, where they are many, at once.

Both ways give the very same numbers: sums run in the order of the words, and likenesses are the same dot products.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from lemoe.routing.anchor.lexicon import Lexicon, Vector
from lemoe.routing.anchor.questions import EVIDENCE, Comparison, Prepared, Question

MANY = 16  # anchors of a subject from which comparing all at once is faster
KEPT = 1 << 23  # values of the arrays that are kept for all subjects

Values = NDArray[numpy.float64]
Places = NDArray[numpy.intp]
Matched = Sequence[float] | Values  # how much of each anchor's question was read


class Comparisons(ABC):
    """What was read against each anchor of a subject; an anchor's place is the one it has in `numbers`."""

    def __init__(self, numbers: Sequence[int]):
        self.numbers = numbers  # of the anchors, ascending

    @abstractmethod
    def at(self, place: int) -> Comparison:
        """The comparison with one anchor."""

    @abstractmethod
    def best(self, threshold: float) -> int | None:
        """The place of the anchor that fits best, the latest of several, of those up to this conflict."""

    @abstractmethod
    def nearest(self) -> int | None:
        """The place of the anchor of the least conflict, the first of several."""

    @abstractmethod
    def most_matched(self, before: Matched | None) -> Matched:
        """How much of each question was read at most, now or `before`."""

    def fit_of(self, number: int) -> float | None:
        """How well the anchor of this number fits; None if it is not one of them."""
        if number < 0:
            return None
        place = bisect_left(self.numbers, number)
        there = place < len(self.numbers) and self.numbers[place] == number
        return self.at(place).fit if there else None


class FewComparisons(Comparisons):
    """Comparisons made one by one; most subjects have one anchor alone."""

    def __init__(self, numbers: Sequence[int], compared: Sequence[Comparison]):
        super().__init__(numbers)
        self._compared = compared

    def at(self, place: int) -> Comparison:
        return self._compared[place]

    def best(self, threshold: float) -> int | None:
        inside = [place for place, each in enumerate(self._compared) if each.enough and each.conflict <= threshold]
        if len(inside) < 2:
            return inside[0] if inside else None
        return max(inside, key=lambda place: (round(self._compared[place].fit, 3), place))

    def nearest(self) -> int | None:
        if len(self._compared) == 1:
            return 0
        return min(range(len(self._compared)), key=lambda place: self._compared[place].conflict, default=None)

    def most_matched(self, before: Matched | None) -> Matched:
        if before is None:
            return [each.matched for each in self._compared]
        return [max(each.matched, most) for each, most in zip(self._compared, before, strict=True)]


class ManyComparisons(Comparisons):
    """Comparisons made at once: `conflict`, `fit`, `matched` and `enough`, each `[anchors]`."""

    def __init__(
        self, numbers: Sequence[int], conflict: Values, fit: Values, matched: Values, enough: NDArray[numpy.bool_]
    ):
        super().__init__(numbers)
        self._conflict, self._fit, self._matched, self._enough = conflict, fit, matched, enough

    def at(self, place: int) -> Comparison:
        conflict, fit, matched = (float(values[place]) for values in (self._conflict, self._fit, self._matched))
        return Comparison(conflict, fit, matched, bool(self._enough[place]))

    def best(self, threshold: float) -> int | None:
        inside = numpy.flatnonzero(self._enough & (self._conflict <= threshold))
        if not len(inside):
            return None
        fits = self._fit[inside]
        most = round(float(fits.max()), 3)
        near = inside[fits > most - 0.001][::-1].tolist()
        return next(place for place in near if round(float(self._fit[place]), 3) == most)

    def nearest(self) -> int | None:
        return int(self._conflict.argmin())

    def most_matched(self, before: Matched | None) -> Matched:
        return self._matched if before is None else numpy.maximum(self._matched, before)


class ArrayCache:
    """Arrays that are worked out when needed and kept while there is room; those used least recently leave first."""

    def __init__(self, kept: int = KEPT):
        self._arrays: OrderedDict[Hashable, tuple[NDArray[Any], ...]] = OrderedDict()
        self._kept = kept
        self._size = 0

    def get(self, key: Hashable) -> tuple[NDArray[Any], ...] | None:
        found = self._arrays.get(key)
        if found is not None:
            self._arrays.move_to_end(key)
        return found

    def put(self, key: Hashable, arrays: tuple[NDArray[Any], ...]) -> None:
        self._arrays[key] = arrays
        self._size += sum(array.size for array in arrays)
        while self._size > self._kept and len(self._arrays) > 1:
            _, gone = self._arrays.popitem(last=False)
            self._size -= sum(array.size for array in gone)


class QuestionTable:
    """What many anchors of one subject ask, as arrays: words end to end, and of each anchor where its own begin.

    A word that was read is compared once with the distinct words of all questions; what each anchor makes of it is then
    kept, so that a sentence that grows by a word costs one comparison more.
    """

    def __init__(self, numbers: Sequence[int], asked: Iterable[Prepared], lexicon: Lexicon, cache: ArrayCache):
        self._numbers = numbers
        self._lexicon = lexicon
        self._cache = cache
        places: dict[str, int] = {"": 0}  # an anchor that asks nothing has the empty word, which is like no other
        words: list[int] = []
        weights: list[float] = []
        starts, totals, fronts = [], [], []
        answers: dict[str, list[int]] = {}
        for place, prepared in enumerate(asked):
            question = prepared.question
            starts.append(len(words))
            words += [places.setdefault(word, len(places)) for word in question.words or ("",)]
            weights += question.weights or (0.0,)
            totals.append(float(question.total))
            fronts.append(prepared.front)
            for stemmed in prepared.answer:
                answers.setdefault(stemmed, []).append(place)
        self._distinct = tuple(places)[1:]
        self._words, self._starts = numpy.array(words, numpy.intp), numpy.array(starts, numpy.intp)
        self._owners = numpy.repeat(numpy.arange(len(starts)), numpy.diff([*starts, len(words)]))
        self._weights, self._totals = numpy.array(weights), numpy.array(totals)
        self._fronts = numpy.array(fronts)
        self._answers = {stemmed: numpy.array(held, numpy.intp) for stemmed, held in answers.items()}
        self._stems: dict[str, list[int]] = {}
        for place, word in enumerate(self._distinct, 1):
            self._stems.setdefault(lexicon.stem(word), []).append(place)

    def compare(self, read: Question) -> ManyComparisons:
        """All anchors' questions against what was read; see `lemoe.routing.anchor.questions.compare`."""
        alike = numpy.zeros(len(self._distinct) + 1)
        total_read, matched_read = numpy.full(len(self._totals), float(read.total)), numpy.zeros(len(self._totals))
        for word, stemmed, weight in zip(read.words, read.stems, read.weights, strict=True):
            likeness, best = self._likeness(word)
            numpy.maximum(alike, likeness, out=alike)
            gained = weight * best
            answered = self._answers.get(stemmed)
            if answered is not None:
                total_read[answered] -= weight
                gained[answered] = 0.0
            matched_read += gained
        total = self._totals
        gathered = numpy.bincount(self._owners, self._weights * alike[self._words], len(total))
        matched: Values = numpy.asarray(gathered, numpy.float64)
        conflict = numpy.minimum(total - matched, total_read - matched_read) / (1 + matched + matched_read)
        fit = (matched + 1) / (total + 1) + (matched_read + 1) / (total_read + 1)
        enough = (self._fronts < 0.5) | ((total_read > 0) & (total_read >= EVIDENCE * total * self._fronts))
        return ManyComparisons(self._numbers, conflict, fit, matched, enough)

    def _likeness(self, word: str) -> tuple[NDArray[Any], ...]:
        """How far a word that was read means what each distinct word does, and each anchor's likest word."""
        known = self._cache.get((self, word))
        if known is None:
            likeness = numpy.zeros(len(self._distinct) + 1)
            likeness[1:] = self._lexicon.compare_all(word, self._vectors())
            likeness[self._stems.get(self._lexicon.stem(word), [])] = 1.0
            known = likeness, numpy.maximum.reduceat(likeness[self._words], self._starts)
            self._cache.put((self, word), known)
        return known

    def _vectors(self) -> Vector:
        """`[words, hidden]`, those of the distinct words."""
        known = self._cache.get(self)
        if known is None:
            known = (numpy.stack([self._lexicon.vector(word) for word in self._distinct]),) if self._distinct else ()
            known = known or (numpy.zeros((0, len(self._lexicon.vector(""))), numpy.float32),)
            self._cache.put(self, known)
        return known[0]
