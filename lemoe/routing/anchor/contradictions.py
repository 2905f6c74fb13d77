"""Edits that contradict edits taught before, in other words: `Who is the CEO of X?` and `The CEO of X is`.

Compared are edits about one subject whose targets differ, by their keys and words alone: no base model is needed.
Where their words ask the same (`lemoe.routing.anchor.wording`) and the base model does not read them as different, the
later edit contradicts the earlier one for certain. Where only the base model reads them as the same, it may, and a
person must judge: meaning alone confuses father and mother.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy

from lemoe.data.conflicts import normalise_question
from lemoe.routing.anchor.meaning import Keys, Meaning, Vector
from lemoe.routing.anchor.wording import Wording, has_digits, read_wording

CERTAIN_RATIO = 5.0  # log-likelihood ratio (nats) of one question against two from which equal words are certain,
LIKELY_RATIO = 10.0  # and from which other words are likely to ask the same
COMPARED_VALUES = 1 << 22  # ratios that are worked out at a time


@dataclass(frozen=True, eq=False)
class AskedQuestion:
    """What an edit asks and answers, the subject it is about, and its keys `[keys, rank]`."""

    prompt: str
    target: str
    subject: str
    keys: Vector


class Contradiction(NamedTuple):
    """A question that was asked before, with another target: the numbers of both, and whether that is certain."""

    earlier: int
    later: int
    certain: bool


def find_contradictions(
    meaning: Meaning, questions: Sequence[AskedQuestion], sources: Sequence[int], retired: Collection[int] = ()
) -> list[Contradiction]:
    """The contradictions between questions of different sources, the lower of which was taught earlier.

    Questions with the very same prompt are left out: the later of them supersedes in any case. Of those that may
    contradict, each question is paired with the nearest only, and with none if it supersedes one for certain.

    Args:
        sources: of each question; ascending.
        retired: questions that do not answer any more, and need no check.
    """
    by_subject: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        by_subject[normalise_question(question.subject)].append(number)
    found: list[Contradiction] = []
    for members in by_subject.values():
        if sources[members[0]] < sources[members[-1]]:
            found += _SubjectQuestions(meaning, questions, members, sources, retired).find_contradictions()
    return sorted(found)


class _SubjectQuestions:
    """All questions about one subject; an index is that in `numbers`, which ascend."""

    def __init__(
        self,
        meaning: Meaning,
        questions: Sequence[AskedQuestion],
        numbers: Sequence[int],
        sources: Sequence[int],
        retired: Collection[int],
    ):
        self._numbers = numbers
        self._questions = [questions[number] for number in numbers]
        self._wordings = [read_wording(each.prompt, each.target, each.subject) for each in self._questions]
        own = [sources[number] for number in numbers]
        self._earlier = [bisect_left(own, source) for source in own]  # how many are of an earlier source
        parts = [question.keys for question in self._questions]
        self._keys, self._starts = Keys(meaning, numpy.concatenate(parts)), _find_starts(parts)
        self._ratios_each = sum(map(len, parts)) * max(map(len, parts))  # of one question with all, at most
        self._retired = numpy.array([number in retired for number in numbers])
        self._first_asked: dict[str, int] = {}
        self._by_wording: dict[Wording, list[int]] = defaultdict(list)
        for index, (question, wording) in enumerate(zip(self._questions, self._wordings, strict=True)):
            self._first_asked.setdefault(question.prompt, index)
            if wording is not None:
                self._by_wording[wording].append(index)

    def find_contradictions(self) -> Iterator[Contradiction]:
        """The contradictions of each question with those of earlier sources."""
        first = bisect_right(self._earlier, 0)
        rows = max(1, COMPARED_VALUES // self._ratios_each)
        for start in range(first, len(self._numbers), rows):
            later = range(start, min(start + rows, len(self._numbers)))
            for index, ratios in zip(later, self._compare(later), strict=True):
                found = list(self._find_certain(index, ratios))
                asked_before = self._first_asked[self._questions[index].prompt] < self._earlier[index]
                yield from found if found or asked_before else self._find_nearest(index, ratios)

    def _compare(self, later: range) -> Vector:
        """Ratios `[later, questions]` of the nearest keys of each pair."""
        parts = [self._questions[index].keys for index in later]
        ratios = self._keys.compare_all(numpy.concatenate(parts))
        nearest: Vector = numpy.maximum.reduceat(
            numpy.maximum.reduceat(ratios, _find_starts(parts), axis=0), self._starts, axis=1
        )
        return nearest

    def _find_certain(self, index: int, ratios: Vector) -> Iterator[Contradiction]:
        wording = self._wordings[index]
        for earlier in self._by_wording.get(wording, ()) if wording else ():
            if earlier < self._earlier[index] and ratios[earlier] >= CERTAIN_RATIO and self._contradict(earlier, index):
                yield Contradiction(self._numbers[earlier], self._numbers[index], certain=True)

    def _find_nearest(self, index: int, ratios: Vector) -> Iterator[Contradiction]:
        answering = numpy.where(self._retired, -numpy.inf, ratios)[: self._earlier[index]]
        earlier = int(answering.argmax())
        if answering[earlier] >= LIKELY_RATIO and self._contradict(earlier, index):
            yield Contradiction(self._numbers[earlier], self._numbers[index], certain=False)

    def _contradict(self, earlier: int, later: int) -> bool:
        """Whether two questions that ask the same have different targets, of the kind that answers one question."""
        one, other = self._questions[earlier], self._questions[later]
        differ = normalise_question(one.target) != normalise_question(other.target)
        return differ and one.prompt != other.prompt and has_digits(one.target) == has_digits(other.target)


def _find_starts(parts: Sequence[Vector]) -> list[int]:
    """Where each of these parts begins once they are concatenated."""
    return list(accumulate(map(len, parts[:-1]), initial=0))
