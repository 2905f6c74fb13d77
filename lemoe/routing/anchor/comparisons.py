"""The question read, compared with those of all anchors of one subject: pair by pair, or, if they are many, as arrays.

Both ways give the same numbers, bit for bit: sums run in the order of the words, and similarities are the same dot
products.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
from numpy.typing import NDArray

from lemoe.routing.anchor.lexicon import Lexicon, Vector
from lemoe.routing.anchor.questions import (
    KINDS,
    MIN_EVIDENCE,
    MIN_SAME_WORDS,
    MORE_WORDS,
    Comparison,
    Question,
    StoredQuestion,
    ask_for_other_kinds,
)

VECTORISED_FROM = 16  # anchors of one subject from which arrays are faster; see `tests/benchmarks/speed.py crowd`
CACHED_VALUES = 1 << 23  # values that the cached arrays of all subjects may have together

Values = NDArray[numpy.float64]
Indices = NDArray[numpy.intp]
Flags = NDArray[numpy.bool_]


@dataclass(frozen=True, eq=False)
class Comparisons:
    """One question, compared with each anchor of a subject; an anchor's index is that in `numbers`.

    Attributes:
        numbers: the anchors' numbers in the gate, ascending.
        words, meaning: what words and the base model's reading say.
        score: `[anchors]`, see `Comparison`.
        rank: `[anchors]`, by which one is chosen among those for which the gate opens.
        evidence: `[anchors]`, what must rise for the gate to open again.
    """

    numbers: Sequence[int]
    words: "WordComparisons"
    meaning: "MeaningComparisons"
    score: Values
    rank: Values
    evidence: Values

    def comparison_with(self, index: int) -> Comparison:
        """The comparison with one anchor."""
        return self.words.comparison_with(index)._replace(
            meaning=float(self.meaning.ratio[index]), score=float(self.score[index])
        )

    def best_index(self) -> int | None:
        """The index of the anchor of the highest rank among those that are in scope; the latest of several."""
        in_scope = numpy.flatnonzero(self.words.enough_evidence & (self.score >= 0))
        if len(in_scope) < 2:
            return int(in_scope[0]) if len(in_scope) else None
        ranks = self.rank[in_scope]
        best = round(float(ranks.max()), 3)
        candidates = in_scope[ranks > best - 0.001][::-1].tolist()
        return next(index for index in candidates if round(float(self.rank[index]), 3) == best)

    def nearest_index(self) -> int | None:
        """The index of the anchor of the highest score; the first of several."""
        return int(self.score.argmax()) if len(self.score) else None

    def index_of(self, number: int) -> int | None:
        """The index of the anchor of this number; None if it is not one of the subject's."""
        index = bisect_left(self.numbers, number)
        return index if number >= 0 and index < len(self.numbers) and self.numbers[index] == number else None


@dataclass(frozen=True, eq=False)
class WordComparisons:
    """What words say of each anchor of a subject, each `[anchors]`; see `Comparison`."""

    conflict: Values
    fit: Values
    matched: Values
    unread: Values
    read_weight: Values
    enough_evidence: Flags
    substituted: Flags
    clash: Flags

    @cached_property
    def heard(self) -> Values:
        """From 0 to 1, how much was read that asks anything at all."""
        heard = -numpy.maximum(self.read_weight, 0.0)
        numpy.exp(heard, out=heard)
        return numpy.subtract(1, heard, out=heard)

    def comparison_with(self, index: int) -> Comparison:
        """The comparison with one anchor."""
        return Comparison(
            conflict=float(self.conflict[index]),
            fit=float(self.fit[index]),
            matched=float(self.matched[index]),
            unread=float(self.unread[index]),
            read_weight=float(self.read_weight[index]),
            enough_evidence=bool(self.enough_evidence[index]),
            substituted=bool(self.substituted[index]),
            clash=bool(self.clash[index]),
        )

    @classmethod
    def from_pairs(cls, compared: Sequence[Comparison]) -> "WordComparisons":
        """Of comparisons made pair by pair."""
        values = numpy.array([each[:8] for each in compared]).reshape(-1, 8).T
        return cls(*values[:5], *values[5:].astype(numpy.bool_))


@dataclass(frozen=True, eq=False)
class MeaningComparisons:
    """What the base model's reading and the bank of questions say of each anchor of a subject, each `[anchors]`.

    Attributes:
        ratio: log-likelihood ratio (nats) of both asking the same.
        profile: likeness, -1 to 1, to the same relations that were fitted.
        relation: nats by which words mark the same relation; see `lemoe.routing.anchor.relation_words`.
    """

    ratio: Values
    profile: Values
    relation: Values

    @classmethod
    def none(cls, anchors: int) -> "MeaningComparisons":
        """Where nothing but words was read."""
        return cls(*numpy.zeros((3, anchors)))


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


class QuestionTable(ABC):
    """The questions of many anchors of one subject as arrays."""

    def __init__(self, asked: Sequence[StoredQuestion]):
        self._totals = numpy.array([float(stored.question.total_weight) for stored in asked])
        answers: dict[str, list[int]] = {}
        for index, stored in enumerate(asked):
            for stemmed in stored.answer_stems:
                answers.setdefault(stemmed, []).append(index)
        self._anchors_by_answer = {stemmed: numpy.array(indices, numpy.intp) for stemmed, indices in answers.items()}
        self._clashes = {
            kind: numpy.array([ask_for_other_kinds(stored.question.kind, kind) for stored in asked], numpy.bool_)
            for kind in KINDS
        }
        self._unspecific = numpy.array([stored.question.unspecific for stored in asked], numpy.bool_)
        self._stem_numbers: dict[str, int] = {}
        self._by_length = self._number_stems([stored.question.frame for stored in asked])

    def _number_stems(self, questions: Sequence[Sequence[str]]) -> dict[int, tuple[Indices, Indices]]:
        """By number of words: the indices of the questions that have as many, and their stems as numbers."""
        rows: dict[int, list[list[int]]] = {}
        indices: dict[int, list[int]] = {}
        for index, stems in enumerate(questions):
            numbers = [self._stem_numbers.setdefault(stemmed, len(self._stem_numbers)) for stemmed in stems]
            rows.setdefault(len(stems), []).append(numbers)
            indices.setdefault(len(stems), []).append(index)
        return {length: (numpy.array(indices[length]), numpy.array(rows[length])) for length in rows}

    def compare(self, read: Question) -> WordComparisons:
        """All anchors' questions against the question read; see `lemoe.routing.anchor.questions`."""
        total, total_read = self._totals, numpy.full(len(self._totals), float(read.total_weight))
        for stemmed, weight in zip(read.stems, read.weights, strict=True):
            if (answered := self._anchors_by_answer.get(stemmed)) is not None:
                total_read[answered] -= weight
        matched, matched_read = self._match(read)
        both = 1 + matched + matched_read
        return WordComparisons(
            conflict=numpy.minimum(total - matched, total_read - matched_read) / both,
            fit=(matched + 1) / (total + 1) + (matched_read + 1) / (total_read + 1),
            matched=matched,
            unread=(total - matched) / both,
            read_weight=total_read,
            enough_evidence=self._have_enough(total_read) & (self._unspecific | (not read.bare)),
            substituted=self._find_substituted(read.frame),
            clash=self._clashes[read.kind],
        )

    @abstractmethod
    def _match(self, read: Question) -> tuple[Values, Values]:
        """Matched weight `[anchors]` of each anchor's question, and of the question read."""

    @abstractmethod
    def _have_enough(self, total_read: Values) -> Flags:
        """`[anchors]`, whether enough was read to decide."""

    def _find_substituted(self, stems: Sequence[str]) -> Flags:
        """`[anchors]`, whether a question is the same but for one word; see `are_one_word_apart`."""
        substituted = numpy.zeros(len(self._totals), numpy.bool_)
        read = numpy.array([self._stem_numbers.get(stemmed, -1) for stemmed in stems])
        for length in range(len(stems) - MORE_WORDS, len(stems) + MORE_WORDS + 1):
            compared = min(length, len(stems))
            if compared >= MIN_SAME_WORDS and length in self._by_length:
                indices, numbers = self._by_length[length]
                substituted[indices] = (numbers[:, :compared] != read[:compared]).sum(1) == 1
        return substituted


class StemTable(QuestionTable):
    """Words are alike where they share a stem: `compare_stems` of many anchors."""

    def __init__(self, asked: Sequence[StoredQuestion]):
        super().__init__(asked)
        found: dict[str, tuple[list[int], list[float]]] = {}
        for index, stored in enumerate(asked):
            for stemmed, weight in stored.question.weight_by_stem.items():
                indices, weights = found.setdefault(stemmed, ([], []))
                indices.append(index)
                weights.append(weight)
        self._by_stem = {
            stemmed: (numpy.array(indices, numpy.intp), numpy.array(weights))
            for stemmed, (indices, weights) in found.items()
        }

    def _match(self, read: Question) -> tuple[Values, Values]:
        matched, matched_read = numpy.zeros((2, len(self._totals)))
        for stemmed in read.weight_by_stem:
            if stemmed in self._by_stem:
                anchors, weights = self._by_stem[stemmed]
                matched[anchors] += weights
        for stemmed, weight in zip(read.stems, read.weights, strict=True):
            if stemmed in self._by_stem:
                matched_read[self._by_stem[stemmed][0]] += weight
        return matched, matched_read

    def _have_enough(self, total_read: Values) -> Flags:
        return total_read > 0


class WordTable(QuestionTable):
    """Words are alike as far as their vectors are: `compare_questions` of many anchors.

    All words of the questions stand in one row. A word that was read is compared once with the distinct ones of them.
    The result is cached, so that a sentence that grows by a word costs one comparison more.
    """

    def __init__(self, asked: Sequence[StoredQuestion], lexicon: Lexicon, cache: ArrayCache):
        super().__init__(asked)
        self._lexicon = lexicon
        self._cache = cache
        columns: dict[str, int] = {"": 0}  # an empty question has the empty word, which is similar to no other
        words: list[int] = []
        weights: list[float] = []
        starts: list[int] = []
        for stored in asked:
            question = stored.question
            starts.append(len(words))
            words += [columns.setdefault(word, len(columns)) for word in question.words or ("",)]
            weights += question.weights or (0.0,)
        self._distinct = tuple(columns)[1:]
        self._words, self._starts = numpy.array(words, numpy.intp), numpy.array(starts, numpy.intp)
        self._anchor_of_word = numpy.repeat(numpy.arange(len(starts)), numpy.diff([*starts, len(words)]))
        self._weights = numpy.array(weights)
        self._front_shares = numpy.array([stored.front_share for stored in asked])
        self._columns_by_stem: dict[str, list[int]] = {}
        for column, word in enumerate(self._distinct, 1):
            self._columns_by_stem.setdefault(lexicon.stem(word), []).append(column)

    def _match(self, read: Question) -> tuple[Values, Values]:
        count = len(self._totals)
        most_similar, matched_read = numpy.zeros(len(self._distinct) + 1), numpy.zeros(count)
        for word, stemmed, weight in zip(read.words, read.stems, read.weights, strict=True):
            similarities, best = self._compare_word(word)
            numpy.maximum(most_similar, similarities, out=most_similar)
            gained = weight * best
            if (answered := self._anchors_by_answer.get(stemmed)) is not None:
                gained[answered] = 0.0
            matched_read += gained
        gathered = numpy.bincount(self._anchor_of_word, self._weights * most_similar[self._words], count)
        return numpy.asarray(gathered, numpy.float64), matched_read

    def _have_enough(self, total_read: Values) -> Flags:
        needed = MIN_EVIDENCE * self._totals * self._front_shares
        enough: Flags = (self._front_shares < 0.5) | ((total_read > 0) & (total_read >= needed))
        return enough

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
