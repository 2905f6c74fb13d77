"""Mentions of a stored subject in running text: reordered, misspelt, abbreviated, or with a word still growing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.vocabulary import MISSPELLABLE_LETTERS
from lemoe.routing.anchor.words import Word, needs_exact_match, one_edit_apart, split_words

MIN_COVERAGE = 0.75  # share of the subject's weight that a mention must have
PLAIN_WEIGHT = 8.0  # a capitalised subject of less weight must have a capital in the text too
MIN_GROWING_LETTERS = 3  # letters from which a word that may still grow counts by itself
INITIAL, NICKNAME, MISSPELT = 0.75, 0.7, 0.9  # share of its weight that an imperfect word counts


@dataclass(frozen=True, slots=True)
class Mention:
    """A mention of a subject: the share of its weight that was read, and the positions of its words in the sentence."""

    coverage: float
    positions: frozenset[int]
    lowered: bool = False
    misspelt: int = 0
    neighbour: bool = False


class Window(NamedTuple):
    """The words around a position of a sentence: their positions, those of each stem, and all first letters."""

    positions: range
    positions_by_stem: dict[str, list[int]]
    initials: set[str]


class Sentence:
    """The words read of a sentence, in which many subjects are looked for; `growing`: the last word may still grow."""

    __slots__ = ("_lexicon", "_windows", "growing", "words")

    def __init__(self, words: Sequence[Word], lexicon: Lexicon, *, growing: bool = False):
        self.words = words
        self.growing = growing
        self._lexicon = lexicon
        self._windows: dict[tuple[int, int], Window] = {}

    def window(self, centre: int, count: int) -> Window:
        """The words around position `centre` that a mention of `count` words may include beside it."""
        cached = self._windows.get((centre, count))
        if cached is None:
            positions = range(max(0, centre - count - 1), min(len(self.words), centre + count + 2))
            by_stem: dict[str, list[int]] = {}
            for position in positions:
                by_stem.setdefault(self._lexicon.stem(self.words[position].text), []).append(position)
            initials = {self.words[position].text[0] for position in positions}
            cached = self._windows[centre, count] = Window(positions, by_stem, initials)
        return cached


class Subject:
    """A subject: its folded words with their weights, and their stems, by which subjects are told apart."""

    __slots__ = (
        "_lexicon",
        "capitalised",
        "exact",
        "initials",
        "joined",
        "max_gap",
        "stems",
        "total_weight",
        "weights",
        "words",
    )

    def __init__(self, text: str, lexicon: Lexicon):
        self.words = tuple(split_words(text))
        self.stems = tuple(map(lexicon.stem, self.words))
        self.weights = tuple(max(lexicon.rarity(word), 0.05) for word in self.words)
        self.total_weight = sum(self.weights)
        self.capitalised = text != text.lower()
        self.joined = "".join(self.words)
        self.initials = "".join(word[0] for word in self.words)
        self.exact = tuple(map(needs_exact_match, self.words))
        count = len(self.words)
        self.max_gap = count + 1 if count > 2 else 1  # words after one of its own within which the rest may follow
        self._lexicon = lexicon

    def find_mention(self, sentence: Sentence) -> Mention | None:
        """The mention of the highest coverage in a whole sentence."""
        found = [
            mention
            for position in range(len(sentence.words))
            if self._has_word(sentence.words, position) and (mention := self.mention_at(sentence, position))
        ]
        return max(found, key=lambda mention: mention.coverage, default=None)

    def _has_word(self, words: Sequence[Word], position: int) -> bool:
        """Whether the word at `position` is one of the subject's, or all of it written as one word or as two."""
        word = words[position].text
        if self._lexicon.stem(word) in self.stems or word == self.joined:
            return True
        return position > 0 and words[position - 1].text + word == self.joined

    def mention_at_end(self, sentence: Sentence) -> Mention | None:
        """The mention that the last word belongs to; a growing word of few letters counts with the word before."""
        last = len(sentence.words) - 1
        if sentence.growing and len(sentence.words[last].text) < MIN_GROWING_LETTERS and last:
            found = self.mention_at(sentence, last - 1)
            return found if found and last in found.positions else None
        return self.mention_at(sentence, last)

    def mention_at(self, sentence: Sentence, position: int) -> Mention | None:
        """The mention that includes `position`."""
        words = sentence.words
        word = words[position].text
        if sentence.growing and position == len(words) - 1 and len(word) < MIN_GROWING_LETTERS:
            return None
        if word == self.joined:
            return self._whole_mention(words, (position,))
        if position > 0 and words[position - 1].text + word == self.joined:  # one word written as two, or two as one
            return self._whole_mention(words, (position - 1, position))
        return self._mention_in_window(sentence, position)

    def _whole_mention(self, words: Sequence[Word], used: Sequence[int]) -> Mention | None:
        return Mention(1.0, frozenset(used)) if self._capital_fits(words, used) else None

    def may_contain(self, word: Word) -> bool:
        """Whether a word of a text may be one of the subject's, be it imperfect."""
        if word.text[0] not in self.initials:
            return False
        last = len(self.words) - 1
        return self._lexicon.stem(word.text) in self.stems or any(
            _imperfect_credit(stored, word.text, word.capital, index == last) for index, stored in enumerate(self.words)
        )

    def _mention_in_window(self, sentence: Sentence, centre: int) -> Mention | None:
        words, count = sentence.words, len(self.words)
        window = sentence.window(centre, count)
        if not self._may_cover(window):
            return None
        exact = self._match_exact_words(words, window, centre)
        if exact is None:
            return None
        score, used, missing = exact
        if count > 1:
            unfinished = len(words) - 1 if sentence.growing else -1
            score += self._match_imperfect_words(words, window.positions, used, missing, centre, unfinished)
        if score < MIN_COVERAGE * self.total_weight or centre not in used:
            return None
        first, last = min(used), max(used)
        if last - first > count + 2 or not self._capital_fits(words, sorted(used)):
            return None
        return Mention(score / self.total_weight, frozenset(range(first, last + 1)))

    def _may_cover(self, window: Window) -> bool:
        """Whether the window could reach the coverage at all: a quick upper bound."""
        initials = window.initials if len(self.words) > 1 else ()
        possible = 0.0
        for weight, stemmed, initial in zip(self.weights, self.stems, self.initials, strict=True):
            if stemmed in window.positions_by_stem or initial in initials:
                possible += weight
        return possible >= MIN_COVERAGE * self.total_weight

    def _match_exact_words(
        self, words: Sequence[Word], window: Window, centre: int
    ) -> tuple[float, set[int], list[int]] | None:
        """Weight and positions of the words that were read, and the indices of those that are missing.

        None where a word is missing that must match exactly.
        """
        score, used, missing = 0.0, set[int](), list[int]()
        for index, stemmed in enumerate(self.stems):
            exact = self.exact[index]
            positions = [
                position
                for position in window.positions_by_stem.get(stemmed, ())
                if position not in used and not (exact and words[position].text != self.words[index])
            ]
            if positions:
                used.add(min(positions, key=lambda position: abs(position - centre)))
                score += self.weights[index]
            elif exact:
                return None
            else:
                missing.append(index)
        return score, used, missing

    def _match_imperfect_words(
        self,
        words: Sequence[Word],
        positions: range,
        used: set[int],
        missing: Sequence[int],
        centre: int,
        unfinished: int,
    ) -> float:
        """Weight of missing words that were read abbreviated or misspelt; adds their positions to `used`."""
        score = 0.0
        for index in missing:
            stored, last = self.words[index], index == len(self.words) - 1
            credits = {
                position: credit
                for position in positions
                if position not in used
                and position != unfinished
                and (credit := _imperfect_credit(stored, words[position].text, words[position].capital, last))
            }
            if credits:
                best = max(credits, key=lambda position: (credits[position], -abs(position - centre)))
                used.add(best)
                score += credits[best] * self.weights[index]
        return score

    def _capital_fits(self, words: Sequence[Word], used: Sequence[int]) -> bool:
        """Whether a capitalised subject of common words has a capital here too, other than the sentence's first."""
        if not self.capitalised or self.total_weight >= PLAIN_WEIGHT:
            return True
        inside = any(words[position].capital and not words[position].starts_sentence for position in used)
        return inside or all(words[position].capital for position in used)


@lru_cache(1 << 16)
def _imperfect_credit(stored: str, word: str, capital: bool, last: bool) -> float:
    """Share of its weight that a subject's (`last`) word counts if read as `word`: initial, misspelt, nickname."""
    if stored[0] != word[0] or needs_exact_match(stored) or needs_exact_match(word):
        return 0.0
    if len(stored) == 1 or len(word) == 1:
        return INITIAL if capital and not last else 0.0
    if min(len(stored), len(word)) >= MISSPELLABLE_LETTERS and one_edit_apart(stored, word):
        return MISSPELT
    if capital and (stored.startswith(word) or word.startswith(stored)):
        return NICKNAME
    return 0.0
