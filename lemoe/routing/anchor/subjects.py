"""Recognising a stored subject in running text: out of order, misspelt, abbreviated, or one letter still missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.vocabulary import LONG
from lemoe.routing.anchor.words import Word, one_edit_apart, rigid, split_words

COVERAGE = 0.75  # share of the subject's weight that must be present
PLAIN = 8.0  # a capitalised subject lighter than this must be read with a capital
SHORT = 3  # letters below which a word that may still grow is no evidence of its own
INITIAL, NICKNAME, MISSPELT = 0.75, 0.7, 0.9  # credit for an imperfect word


@dataclass(frozen=True, slots=True)
class Mention:
    """Where a subject stands: the share of its weight that is there, and the positions of its words."""

    coverage: float
    positions: frozenset[int]


class Window(NamedTuple):
    """The words around a place of a sentence: their positions, the positions of each stem, and all first letters."""

    reach: range
    places: dict[str, list[int]]
    initials: set[str]


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
            places: dict[str, list[int]] = {}
            for position in reach:
                places.setdefault(self._lexicon.stem(self.words[position].text), []).append(position)
            initials = {self.words[position].text[0] for position in reach}
            known = self._windows[at, count] = Window(reach, places, initials)
        return known


class Subject:
    """A subject's folded words with their stems, by which subjects are told apart, and weights."""

    __slots__ = (
        "_lexicon",
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
        stemmed = self._lexicon.stem(word) in self.stems
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
        return self._lexicon.stem(word.text) in self.stems or any(
            _credit(stored, word.text, word.capital, place == last) for place, stored in enumerate(self.words)
        )

    def _in_window(self, sentence: Sentence, at: int) -> Mention | None:
        words, count = sentence.words, len(self.words)
        window = sentence.window(at, count)
        if not self._may_cover(window):
            return None
        exact = self._exact_words(words, window, at)
        if exact is None:
            return None
        score, used, missing = exact
        if count > 1:
            unfinished = len(words) - 1 if sentence.growing else -1
            score += self._lenient_words(words, window.reach, used, missing, at, unfinished)
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
            if stemmed in window.places or initial in initials:
                possible += weight
        return possible >= COVERAGE * self.total

    def _exact_words(self, words: Sequence[Word], window: Window, at: int) -> tuple[float, set[int], list[int]] | None:
        """Weight and positions of the words that are there, and the indices of those that are not."""
        score, used, missing = 0.0, set[int](), list[int]()
        for index, stemmed in enumerate(self.stems):
            strict = self.rigid[index]
            places = [
                position
                for position in window.places.get(stemmed, ())
                if position not in used and not (strict and words[position].text != self.words[index])
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
        window: range,
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
