"""Stored subjects, found by the words of which every mention holds one, or two near each other."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.subjects import COVERAGE, Subject
from lemoe.routing.anchor.vocabulary import Vocabulary
from lemoe.routing.anchor.words import Word, rigid

NEAR = 6  # words between which two words of a subject are looked for
MOST_WORDS = 256  # of a subject that is looked for; pairs of words grow with their square


Posting = int | Sequence[int]  # numbers of subjects; most keys have one alone, for which a list would be a waste
Postings = dict[str, int | list[int]]


class SubjectIndex:
    """Subjects by the pairs of words of which every mention holds one, so that a look-up touches only likely ones.

    A subject without a word (`!!!`, an emoji) or of more than `MOST_WORDS` has a number and is never found.
    """

    def __init__(self, lexicon: Lexicon):
        self.subjects: list[Subject] = []
        self._lexicon = lexicon
        self._vocabulary = Vocabulary()
        self._numbers: dict[tuple[str, ...], int] = {}
        self._alone: Postings = {}  # by a word that is enough by itself
        self._pairs: dict[str, Postings] = defaultdict(dict)  # by two stems, the lesser first
        self._beside: dict[str, Postings] = defaultdict(dict)  # by a stem and a key of another word near it

    def add(self, text: str) -> int:
        """The number of the subject `text`, stored if it is new."""
        subject = Subject(text, self._lexicon)
        known = self._numbers.setdefault(subject.stems, len(self.subjects))
        if known == len(self.subjects):
            self.subjects.append(subject)
            if 0 < len(subject.stems) <= MOST_WORDS:
                self._store(subject, known)
        return known

    def near(self, words: Sequence[Word]) -> list[int]:
        """Numbers of the subjects that the last word of `words` may complete."""
        numbers: set[int] = set()
        for hit in self._hits(words):
            if isinstance(hit, int):
                numbers.add(hit)
            else:
                numbers.update(hit)
        return sorted(numbers)

    def _store(self, subject: Subject, number: int) -> None:
        """Under each word, or two that must be read near each other, of which every mention has one."""
        stems, weights = subject.stems, subject.weights
        order = sorted(range(len(stems)), key=lambda index: -weights[index])
        enough = COVERAGE * subject.total
        if weights[order[0]] >= enough:
            _post(self._alone, stems[order[0]], number)
        if 1 < len(stems) <= 3:
            _post(self._alone, subject.joined, number)
        two = _two_of_these(order, weights, enough)
        for first, second in {_in_order(stems[one], stems[other]) for one, other in combinations(two, 2)}:
            _post(self._pairs[first], second, number)
        imperfect = {*permutations(two, 2), *_may_be_imperfect(subject, order, enough)}
        for word, stemmed in {(subject.words[index], stems[other]) for index, other in imperfect}:
            if not rigid(word):
                for key in self._vocabulary.add(word):
                    _post(self._beside[stemmed], key, number)

    def _hits(self, words: Sequence[Word]) -> Iterator[Posting]:
        word = words[-1]
        stemmed = self._lexicon.stem(word.text)
        yield self._alone.get(stemmed, ())
        if len(words) < 2:
            return
        yield self._alone.get(words[-2].text + word.text, ())
        mine, keys = self._beside.get(stemmed), self._vocabulary.keys(word)
        for before in words[-NEAR - 1 : -1]:
            other = self._lexicon.stem(before.text)
            first, second = _in_order(stemmed, other)
            if pairs := self._pairs.get(first):
                yield pairs.get(second, ())
            if mine:
                yield from _shared(mine, self._vocabulary.keys(before))
            if keys and (theirs := self._beside.get(other)):
                yield from _shared(theirs, keys)


def _post(postings: Postings, key: str, number: int) -> None:
    there = postings.get(key)
    if there is None:
        postings[key] = number
    elif isinstance(there, int):
        postings[key] = [there, number]
    else:
        there.append(number)


def _shared(postings: Postings, keys: set[str]) -> Iterator[Posting]:
    """What stands under any of the keys; goes through those or through the postings, whichever are fewer."""
    return map(postings.__getitem__, keys & postings.keys())


def _in_order(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)


def _may_be_imperfect(subject: Subject, order: Sequence[int], enough: float) -> Iterator[tuple[int, int]]:
    """Each heavy word that may be misspelt or abbreviated, with any other of some weight that then stands whole."""
    rest = subject.total
    for index in order:
        yield from ((index, other) for other, weight in enumerate(subject.weights) if other != index and weight >= 1.0)
        rest -= subject.weights[index]
        if rest < enough:
            break


def _two_of_these(order: Sequence[int], weights: Sequence[float], enough: float) -> Sequence[int]:
    """The fewest heaviest words of which a mention must hold two; none where one may be enough."""
    rest = sum(weights)
    for count, index in enumerate(order, 1):
        rest -= weights[index]
        if count > 1 and weights[order[0]] + rest < enough:
            return order[:count]
    return ()
