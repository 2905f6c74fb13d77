"""Recognising a stored subject in running text: out of order, misspelt, abbreviated, or one letter still missing."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from typing import NamedTuple

from lemoe.anchor.lexicon import Lexicon
from lemoe.anchor.vocabulary import LONG, Vocabulary
from lemoe.anchor.words import Word, one_edit_apart, rigid, split_words

COVERAGE = 0.75  # share of the subject's weight that must be present
PLAIN = 8.0  # a capitalised subject lighter than this must be read with a capital
SHORT = 3  # letters below which a word that may still grow is no evidence of its own
NEAR = 6  # words between which two words of a subject are looked for
INITIAL, NICKNAME, MISSPELT = 0.75, 0.7, 0.9  # credit for an imperfect word


@dataclass(frozen=True, slots=True)
class Mention:
    """Where a subject stands: the share of its weight that is there, and the positions of its words."""

    coverage: float
    positions: frozenset[int]


class Window(NamedTuple):
    """The words around a place of a sentence: the stem of each by its position, all stems, and all first letters."""

    stems: dict[int, str]
    present: frozenset[str]
    initials: frozenset[str]


class Sentence:
    """The words that were read of a sentence, in which many subjects are looked for; `growing`: the last may go on."""

    __slots__ = ("_lexicon", "_windows", "growing", "words")

    def __init__(self, words: Sequence[Word], lexicon: Lexicon, *, growing: bool = False):
        self.words = words
        self.growing = growing
        self._lexicon = lexicon
        self._windows: dict[tuple[int, int], Window] = {}

    def window(self, at: int, count: int) -> Window:
        """What stands around position `at`, as far as a mention of `count` words that holds it may reach."""
        known = self._windows.get((at, count))
        if known is None:
            reach = range(max(0, at - count - 1), min(len(self.words), at + count + 2))
            stems = {position: self._lexicon.stem(self.words[position].text) for position in reach}
            initials = frozenset(self.words[position].text[0] for position in reach)
            known = self._windows[at, count] = Window(stems, frozenset(stems.values()), initials)
        return known


class Subject:
    """A subject's folded words with their stems, by which subjects are told apart, and weights."""

    __slots__ = (
        "_lexicon",
        "_stem_set",
        "capital",
        "initials",
        "joined",
        "patience",
        "rigid",
        "stems",
        "total",
        "weights",
        "words",
    )

    def __init__(self, text: str, lexicon: Lexicon):
        self.words = tuple(split_words(text))
        self.stems = tuple(map(lexicon.stem, self.words))
        self.weights = tuple(max(lexicon.rarity(word), 0.05) for word in self.words)
        self.total = sum(self.weights)
        self.capital = text != text.lower()
        self.joined = "".join(self.words)
        self.initials = "".join(word[0] for word in self.words)
        self.rigid = tuple(map(rigid, self.words))
        count = len(self.words)
        self.patience = count + 1 if count > 2 else 1  # words after one of it within which the rest may follow
        self._lexicon = lexicon
        self._stem_set = frozenset(self.stems)

    def find(self, sentence: Sentence) -> Mention | None:
        """The fullest mention in a whole sentence."""
        found = [
            mention
            for at in range(len(sentence.words))
            if self._starts(sentence.words, at) and (mention := self.at(sentence, at))
        ]
        return max(found, key=lambda mention: mention.coverage, default=None)

    def _starts(self, words: Sequence[Word], at: int) -> bool:
        word = words[at].text
        stemmed = self._lexicon.stem(word) in self._stem_set
        return stemmed or word == self.joined or (at > 0 and words[at - 1].text + word == self.joined)

    def ending(self, sentence: Sentence) -> Mention | None:
        """The mention that the last word belongs to; one too short to be told apart counts beside the one before."""
        last = len(sentence.words) - 1
        if sentence.growing and len(sentence.words[last].text) < SHORT and last:
            found = self.at(sentence, last - 1)
            return found if found and last in found.positions else None
        return self.at(sentence, last)

    def at(self, sentence: Sentence, at: int) -> Mention | None:
        """The mention that holds position `at`."""
        words = sentence.words
        word = words[at].text
        if sentence.growing and at == len(words) - 1 and len(word) < SHORT:
            return None
        if word == self.joined:
            return self._whole(words, (at,))
        if at > 0 and words[at - 1].text + word == self.joined:  # one word written as two, or two as one
            return self._whole(words, (at - 1, at))
        return self._in_window(sentence, at)

    def _whole(self, words: Sequence[Word], used: Sequence[int]) -> Mention | None:
        return Mention(1.0, frozenset(used)) if self._capital_fits(words, used) else None

    def may_hold(self, word: Word) -> bool:
        """Whether a word that was read counts for any of the subject's."""
        if word.text[0] not in self.initials:
            return False
        last = len(self.words) - 1
        return self._lexicon.stem(word.text) in self._stem_set or any(
            _credit(stored, word.text, word.capital, place == last) for place, stored in enumerate(self.words)
        )

    def _in_window(self, sentence: Sentence, at: int) -> Mention | None:
        words, count = sentence.words, len(self.words)
        window = sentence.window(at, count)
        if not self._may_cover(window):
            return None
        exact = self._exact_words(words, window.stems, at)
        if exact is None:
            return None
        score, used, missing = exact
        if count > 1:
            unfinished = len(words) - 1 if sentence.growing else -1
            score += self._lenient_words(words, window.stems, used, missing, at, unfinished)
        if score < COVERAGE * self.total or at not in used:
            return None
        first, last = min(used), max(used)
        if last - first > count + 2 or not self._capital_fits(words, sorted(used)):
            return None
        return Mention(score / self.total, frozenset(range(first, last + 1)))

    def _may_cover(self, window: Window) -> bool:
        """A quick bound: could the window reach the coverage at all?"""
        initials = window.initials if len(self.words) > 1 else ()
        possible = 0.0
        for weight, stemmed, initial in zip(self.weights, self.stems, self.initials, strict=True):
            if stemmed in window.present or initial in initials:
                possible += weight
        return possible >= COVERAGE * self.total

    def _exact_words(
        self, words: Sequence[Word], stems: dict[int, str], at: int
    ) -> tuple[float, set[int], list[int]] | None:
        """Weight and positions of the words that are there, and the indices of those that are not."""
        score, used, missing = 0.0, set[int](), list[int]()
        for index, stemmed in enumerate(self.stems):
            strict = self.rigid[index]
            places = [
                position
                for position, there in stems.items()
                if position not in used
                and there == stemmed
                and not (strict and words[position].text != self.words[index])
            ]
            if places:
                used.add(min(places, key=lambda position: abs(position - at)))
                score += self.weights[index]
            elif strict:
                return None
            else:
                missing.append(index)
        return score, used, missing

    def _lenient_words(
        self,
        words: Sequence[Word],
        window: Iterable[int],
        used: set[int],
        missing: Sequence[int],
        at: int,
        unfinished: int,
    ) -> float:
        """Credit for missing words that stand there abbreviated or misspelt; their places join `used`."""
        score = 0.0
        for index in missing:
            last = index == len(self.words) - 1
            credits = {
                position: credit
                for position in window
                if position not in used
                and position != unfinished
                and (credit := _credit(self.words[index], words[position].text, words[position].capital, last))
            }
            if credits:
                best = max(credits, key=lambda position: (credits[position], -abs(position - at)))
                used.add(best)
                score += credits[best] * self.weights[index]
        return score

    def _capital_fits(self, words: Sequence[Word], used: Sequence[int]) -> bool:
        """A capitalised subject of common words must be read with a capital that is not the sentence's own."""
        if not self.capital or self.total >= PLAIN:
            return True
        inside = any(words[position].capital and not words[position].first for position in used)
        return inside or all(words[position].capital for position in used)


@lru_cache(1 << 16)
def _credit(stored: str, word: str, capital: bool, last: bool) -> float:
    """How far a word that was read stands for the subject's (`last`) word `stored`: initial, misspelling, nickname."""
    if stored[0] != word[0] or rigid(stored) or rigid(word):
        return 0.0
    if len(stored) == 1 or len(word) == 1:
        return INITIAL if capital and not last else 0.0
    if min(len(stored), len(word)) >= LONG and one_edit_apart(stored, word):
        return MISSPELT
    if capital and (stored.startswith(word) or word.startswith(stored)):
        return NICKNAME
    return 0.0


class SubjectIndex:
    """Subjects by the pairs of words of which every mention holds one, so that a look-up touches only likely ones."""

    def __init__(self, lexicon: Lexicon):
        self.subjects: list[Subject] = []
        self._lexicon = lexicon
        self._vocabulary = Vocabulary()
        self._numbers: dict[tuple[str, ...], int] = {}
        self._alone: dict[str, list[int]] = defaultdict(list)  # by a word that is enough by itself
        self._pairs: dict[str, Postings] = defaultdict(_postings)  # by two stems, the lesser first
        self._beside: dict[str, Postings] = defaultdict(_postings)  # by a stem and a key of another word near it

    def add(self, text: str) -> int:
        """The number of the subject `text`, stored if it is new."""
        subject = Subject(text, self._lexicon)
        known = self._numbers.setdefault(subject.stems, len(self.subjects))
        if known == len(self.subjects):
            self.subjects.append(subject)
            self._store(subject, known)
        return known

    def near(self, words: Sequence[Word]) -> Sequence[int]:
        """Numbers of the subjects that the last word of `words` may complete."""
        hits = [numbers for numbers in self._hits(words) if numbers]
        if len(hits) < 2:
            return hits[0] if hits else []
        return sorted(set[int]().union(*hits))

    def _store(self, subject: Subject, number: int) -> None:
        """Under each word, or two that must be read near each other, of which every mention has one."""
        stems, weights = subject.stems, subject.weights
        order = sorted(range(len(stems)), key=lambda index: -weights[index])
        enough = COVERAGE * subject.total
        if weights[order[0]] >= enough:
            self._alone[stems[order[0]]].append(number)
        if 1 < len(stems) <= 3:
            self._alone[subject.joined].append(number)
        two = _two_of_these(order, weights, enough)
        for first, second in {_in_order(stems[one], stems[other]) for one, other in combinations(two, 2)}:
            self._pairs[first][second].append(number)
        imperfect = {*permutations(two, 2), *_may_be_imperfect(subject, order, enough)}
        for word, stemmed in {(subject.words[index], stems[other]) for index, other in imperfect}:
            if not rigid(word):
                for key in self._vocabulary.add(word):
                    self._beside[stemmed][key].append(number)

    def _hits(self, words: Sequence[Word]) -> Iterator[Sequence[int]]:
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


Postings = dict[str, list[int]]


def _postings() -> Postings:
    return defaultdict(list)


def _shared(postings: Postings, keys: set[str]) -> Iterator[Sequence[int]]:
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
