"""Mentions of a stored subject in running text: as people write names, and with a word still growing."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from lemoe.routing.anchor.lexicon import LINK_WORDS, Lexicon
from lemoe.routing.anchor.neighbours import Surroundings
from lemoe.routing.anchor.word_forms import INITIAL, WordForm, find_word_form
from lemoe.routing.anchor.words import Word, is_unspaced, needs_exact_match, split_words

MIN_COVERAGE = 0.75  # share of the subject's weight that a mention must have, unless it is a surname
MIN_GROWING_LETTERS = 3  # letters from which a word that may still grow counts by itself
EXACT_LETTERS = 3  # letters up to which a whole subject must be read exactly
MIN_SURNAME_LETTERS, MIN_SURNAME_RARITY = 4, 4.0  # of the last word of a name that may stand for all of it,
SURNAME_WORDS = 3  # which has so many words at most; a longer one needs its first word too
STRICT_LETTERS = 5  # letters up to which a word that is one token is another word, and no misspelling

_ARTICLES = frozenset("the a an".split())
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue"})
_WRITTEN_WORD = re.compile(r"[^\W_]+")
_WHOLE = WordForm(1.0)


@dataclass(frozen=True, slots=True)
class Mention:
    """A mention of a subject, as evidence.

    Attributes:
        coverage: share of the subject's weight that was read; imperfect words count for less.
        positions: those of its words in the sentence.
        lowered: whether the subject is written with a capital, and this without one.
        misspelt: number of its words that were read with a typing error.
        neighbour: whether a word of another name stands directly beside it.
    """

    coverage: float
    positions: frozenset[int]
    lowered: bool = False
    misspelt: int = 0
    neighbour: bool = False

    @property
    def strength(self) -> tuple[bool, float, int, bool]:
        """By which the best of several mentions of a subject in a sentence is chosen."""
        return not self.neighbour, self.coverage, -self.misspelt, not self.lowered


class Window(NamedTuple):
    """The words around a position of a sentence.

    Attributes:
        positions: those of the words.
        positions_by_stem: those of each stem.
        starts: the first letter of each word, its first two and the two behind the first.
    """

    positions: range
    positions_by_stem: dict[str, list[int]]
    starts: set[str]


class Sentence:
    """The words read of a sentence, in which many subjects are looked for; `growing`: the last word may still grow."""

    __slots__ = ("_lexicon", "_names_beside", "_windows", "growing", "words")

    def __init__(self, words: Sequence[Word], lexicon: Lexicon, *, growing: bool = False):
        self.words = words
        self.growing = growing
        self._lexicon = lexicon
        self._windows: dict[tuple[int, int], Window] = {}
        self._names_beside: dict[tuple[int, int, bool, bool, bool], set[str]] = {}

    @property
    def unfinished(self) -> int:
        """Position of the word that may still grow, -1 for none."""
        return len(self.words) - 1 if self.growing else -1

    def names_beside(self, span: range, partial: bool, titled: bool, possessive: bool) -> set[str]:
        """The stems of other names beside the mention at `span`: see `Surroundings.find_names`."""
        key = (span[0], span[-1], partial, titled, possessive)
        cached = self._names_beside.get(key)
        if cached is None:
            beside = Surroundings(self.words, span, self._lexicon, partial)
            cached = self._names_beside[key] = beside.find_names(titled=titled, possessive=possessive)
        return cached

    def window(self, centre: int, count: int) -> Window:
        """The words around position `centre` that a mention of `count` words may include beside it."""
        cached = self._windows.get((centre, count))
        if cached is None:
            positions = range(max(0, centre - count - 1), min(len(self.words), centre + count + 2))
            by_stem: dict[str, list[int]] = {}
            for position in positions:
                by_stem.setdefault(self._lexicon.stem(self.words[position].text), []).append(position)
            starts = set[str]()
            for position in positions:
                text = self.words[position].text
                starts.update((text[0], text[:2], text[1:3]))
            cached = self._windows[centre, count] = Window(positions, by_stem, starts)
        return cached


class ReadWords:
    """The words of a subject that were read: the form of each, by its index, and its position in the sentence."""

    __slots__ = ("forms", "positions")

    def __init__(self) -> None:
        self.forms: dict[int, WordForm] = {}
        self.positions: dict[int, int] = {}

    def add(self, index: int, position: int, form: WordForm = _WHOLE) -> None:
        self.forms[index] = form
        self.positions[index] = position

    def weight(self, weights: Sequence[float]) -> float:
        return sum(form.credit * weights[index] for index, form in self.forms.items())


class Subject:
    """A subject: its folded words with their weights, and their stems, by which subjects are told apart."""

    __slots__ = (
        "_lexicon",
        "capitalised",
        "capitals",
        "contiguous",
        "exact",
        "joined",
        "links",
        "max_gap",
        "spellings",
        "stems",
        "surname",
        "titled",
        "total_weight",
        "upper",
        "weights",
        "words",
    )

    def __init__(self, text: str, lexicon: Lexicon):
        self.words = tuple(split_words(text))
        self.stems = tuple(map(lexicon.stem, self.words))
        respelt = tuple(map(lexicon.stem, split_words(text.translate(_UMLAUTS))))
        self.spellings = (self.stems,) if respelt in (self.stems, ()) else (self.stems, respelt)
        self.weights = tuple(max(lexicon.rarity(word), 0.05) for word in self.words)
        self.total_weight = sum(self.weights)
        self.capitals = _find_capitals(text, len(self.words))
        self.capitalised = any(self.capitals)
        self.joined = "".join(self.words)
        short = len(self.joined) <= EXACT_LETTERS
        self.upper = short and text == text.upper()  # an acronym: "Us" is not "US"
        self.contiguous = any(map(is_unspaced, self.words))  # found only whole, as its characters are common words
        self.exact = tuple(short or needs_exact_match(word) for word in self.words)
        links = tuple(word in LINK_WORDS for word in self.words)
        self.links = links if not all(links) else (False,) * len(links)
        self.titled = any(self.links)  # maybe the title of a work, which may go on with "and"
        count = len(self.words)
        self.max_gap = count + 1 if count > 2 else 1  # words after one of its own within which the rest may follow
        self._lexicon = lexicon
        self.surname = count - 1 if self._has_surname() else -1

    def _has_surname(self) -> bool:
        """Whether its last word may stand for all of it: a rare one of several words with a capital."""
        if len(self.words) < 2 or not all(self.capitals):
            return False
        word = self.words[-1]
        rarity = self._lexicon.known_rarity(word)
        rare = rarity >= MIN_SURNAME_RARITY and (self._lexicon.is_name(word) or rarity == math.inf)
        return rare and len(word) >= MIN_SURNAME_LETTERS and word.isalpha() and not self.exact[-1]

    def find_mention(self, sentence: Sentence) -> Mention | None:
        """The strongest mention in a whole sentence."""
        positions = range(len(sentence.words))
        found = [mention for position in positions if (mention := self.mention_at(sentence, position))]
        return max(found, key=lambda mention: mention.strength, default=None)

    def mention_at_end(self, sentence: Sentence) -> Mention | None:
        """The mention that the last word belongs to; a growing word of few letters counts with the word before."""
        last = len(sentence.words) - 1
        if last and any(word[:-1] == sentence.words[last - 1].text for word in self.words):
            return self.mention_at(sentence, last - 1)  # its last letter might still have come till now
        if last and sentence.growing and self._is_too_short(sentence.words[last].text):
            found = self.mention_at(sentence, last - 1)
            return found if found and last in found.positions else None
        return self.mention_at(sentence, last)

    def mention_at(self, sentence: Sentence, position: int) -> Mention | None:
        """The mention that includes `position`."""
        word = sentence.words[position].text
        if position == sentence.unfinished and self._is_too_short(word):
            return None
        if self.contiguous:
            read = self._read_run(sentence, position)
            return self._describe(sentence, read) if read and len(read.forms) == len(self.words) else None
        if word == self.joined:
            return self._describe_joined(sentence, position, position)
        if position and len(self.words) != 2 and sentence.words[position - 1].text + word == self.joined:
            return self._describe_joined(sentence, position - 1, position)
        if not self._may_cover(sentence.window(position, len(self.words))):
            return self._describe(sentence, self._read_surname(sentence, position))
        for read in (self._read_run(sentence, position), self._read_scattered(sentence, position)):
            if read and read.weight(self.weights) >= MIN_COVERAGE * self.total_weight:
                return self._describe(sentence, read)
        return self._describe(sentence, self._read_surname(sentence, position))

    def _is_too_short(self, word: str) -> bool:
        """Whether a growing word tells nothing yet."""
        return len(word) < MIN_GROWING_LETTERS and word != self.joined

    def may_contain(self, word: Word) -> bool:
        """Whether a word of a text may be one of the subject's, be it imperfect."""
        if self._lexicon.stem(word.text) in self.stems:
            return True
        return any(self._find_form(index, word) for index in range(len(self.words)))

    def _is_word(self, index: int, word: Word) -> bool:
        """Whether a word of a text is the subject's word, with another ending at most."""
        if self.exact[index] or self.contiguous:
            return word.text == self.words[index]
        stemmed = self._lexicon.stem(word.text)
        return stemmed == self.stems[index] or stemmed == self.spellings[-1][index]

    def _is_word_at(self, sentence: Sentence, index: int, position: int) -> bool:
        """Whether the subject's word stands at `position`; its beginning is not yet it: `Mar` of Mars and of Maria."""
        word, stored = sentence.words[position], self.words[index]
        beginning = position == sentence.unfinished and word.text != stored and stored.startswith(word.text)
        return not beginning and self._is_word(index, word)

    def _find_form(self, index: int, word: Word, *, growing: bool = False) -> WordForm | None:
        """The imperfect form of one of the subject's words that a word of a text is."""
        if self.contiguous or self.exact[index]:
            return None
        stored = self.words[index]
        form = find_word_form(stored, word.text, word.capital, index == len(self.words) - 1)
        if form is None or (growing and (not form.is_similar or stored.startswith(word.text))):
            return None
        return None if form.is_similar and self._is_another_word(word.text, stored) else form

    def _is_another_word(self, word: str, stored: str) -> bool:
        """Whether a word like one of the subject's is known as another one, not as a rarer spelling of a long one."""
        rarity = self._lexicon.known_rarity(word)
        if rarity == math.inf:
            return False
        return len(word) <= STRICT_LETTERS or rarity <= self._lexicon.known_rarity(stored)

    def _may_cover(self, window: Window) -> bool:
        """Whether the window could reach the coverage at all: a quick upper bound."""
        possible = 0.0
        for weight, stemmed, word in zip(self.weights, self.stems, self.words, strict=True):
            if stemmed in window.positions_by_stem or not window.starts.isdisjoint(_possible_starts(word)):
                possible += weight
        return possible >= MIN_COVERAGE * self.total_weight

    def _read_run(self, sentence: Sentence, position: int) -> ReadWords | None:
        """The subject's words in order and side by side, one of them at `position`; an article in front may be missing.

        None where another word is missing.
        """
        best: ReadWords | None = None
        for index in range(len(self.words)):
            if self._read_form(sentence, index, position):
                read = self._read_aligned(sentence, position - index)
                if read and (best is None or read.weight(self.weights) > best.weight(self.weights)):
                    best = read
        return best

    def _read_aligned(self, sentence: Sentence, start: int) -> ReadWords | None:
        read = ReadWords()
        for index, word in enumerate(self.words):
            form = self._read_form(sentence, index, start + index)
            if form:
                read.add(index, start + index, form)
            elif index or word not in _ARTICLES:
                return None
        return read

    def _read_form(self, sentence: Sentence, index: int, position: int) -> WordForm | None:
        """The form in which one of the subject's words stands at `position`."""
        if not 0 <= position < len(sentence.words):
            return None
        if self._is_word_at(sentence, index, position):
            return _WHOLE
        return self._find_form(index, sentence.words[position], growing=position == sentence.unfinished)

    def _read_scattered(self, sentence: Sentence, centre: int) -> ReadWords | None:
        """The subject's words near `centre`, one of them there, in any order and with others between them.

        Its link words (`of`) count only directly beside one of its other words, as in the subject. None where a word is
        missing that must match exactly.
        """
        count = len(self.words)
        if count == 1:
            return None
        window = sentence.window(centre, count)
        read, missing = ReadWords(), list[int]()
        for index, stemmed in enumerate(self.stems):
            if self.links[index]:
                continue
            used = read.positions.values()
            near = window.positions_by_stem.get(stemmed, ())
            positions = [p for p in near if p not in used and self._is_word_at(sentence, index, p)]
            if positions:
                read.add(index, min(positions, key=lambda position: abs(position - centre)))
            elif self.exact[index]:
                return None
            else:
                missing.append(index)
        self._read_imperfect(sentence, window.positions, centre, missing, read)
        self._read_links(sentence, read)
        used = read.positions.values()
        return read if centre in used and max(used) - min(used) <= count + 2 else None

    def _read_imperfect(
        self, sentence: Sentence, positions: range, centre: int, missing: Sequence[int], read: ReadWords
    ) -> None:
        """Add the missing words that were read abbreviated or misspelt."""
        for index in missing:
            used = read.positions.values()
            forms = {
                position: form
                for position in positions
                if position not in used
                and position != sentence.unfinished
                and (form := self._find_form(index, sentence.words[position]))
                and (form.credit != INITIAL or not {position - 1, position + 1}.isdisjoint(used))
            }
            if forms:
                best = max(forms, key=lambda position: (forms[position].credit, -abs(position - centre)))
                read.add(index, best, forms[best])

    def _read_links(self, sentence: Sentence, read: ReadWords) -> None:
        """Add the link words that stand between, in front of or behind words that were read just as in the subject."""
        known = sorted(read.positions)
        for index in (index for index, link in enumerate(self.links) if link):
            before = [other for other in known if other < index][-1:]
            behind = [other for other in known if other > index][:1]
            places = {read.positions[other] + index - other for other in before + behind}
            position = places.pop() if len(places) == 1 else -1
            if 0 <= position < len(sentence.words) and self._is_word(index, sentence.words[position]):
                read.add(index, position)

    def _read_surname(self, sentence: Sentence, position: int) -> ReadWords | None:
        """The last word of a name at `position`, with those of its other words that stand in front of it.

        Of a long name that is its first word at least: what stands between the two may be missing.
        """
        index = self.surname
        if index < 0 or sentence.words[position].text not in (self.words[index], f"{self.words[index]}s"):
            return None
        read = ReadWords()
        read.add(index, position)
        while index and position and self._is_word(index - 1, sentence.words[position - 1]):
            index, position = index - 1, position - 1
            read.add(index, position)
        if len(self.words) <= SURNAME_WORDS or 0 in read.forms:
            return read
        if not position or not self._is_word(0, sentence.words[position - 1]):
            return None
        read.add(0, position - 1)
        return read

    def _describe_joined(self, sentence: Sentence, first: int, last: int) -> Mention:
        """The mention of a whole subject in words that are divided otherwise than its own."""
        used = range(first, last + 1)
        return self._make_mention(sentence, 1.0, used, used, 0)

    def _describe(self, sentence: Sentence, read: ReadWords | None) -> Mention | None:
        if read is None:
            return None
        misspelt = sum(form.misspelt for form in read.forms.values())
        coverage = read.weight(self.weights) / self.total_weight
        used = read.positions.values()
        capitals = [position for index, position in read.positions.items() if self.capitals[index]]
        return self._make_mention(sentence, coverage, range(min(used), max(used) + 1), capitals, misspelt)

    def _make_mention(
        self, sentence: Sentence, coverage: float, span: range, capitals: Sequence[int], misspelt: int
    ) -> Mention:
        """The mention at `span`, of whose words those at `capitals` have a capital in the subject."""
        lowered = self.capitalised and not self._has_capital(sentence.words, capitals or span)
        neighbour = self._has_neighbour(sentence, span, coverage)
        return Mention(coverage, frozenset(span), lowered, misspelt, neighbour)

    def look_behind(self, sentence: Sentence, mention: Mention) -> Mention:
        """A mention that ends one or two words before the last one, which may be part of another name."""
        span = range(min(mention.positions), max(mention.positions) + 1)
        neighbour = self._has_neighbour(sentence, span, mention.coverage)
        return mention if neighbour == mention.neighbour else replace(mention, neighbour=neighbour)

    def _has_neighbour(self, sentence: Sentence, span: range, coverage: float) -> bool:
        last = sentence.words[span[-1]].text
        possessive = last.endswith("s") and last[:-1] in self.words
        names = sentence.names_beside(span, coverage < MIN_COVERAGE, self.titled, possessive)
        return not names.issubset(self.stems)

    def _has_capital(self, words: Sequence[Word], positions: Sequence[int]) -> bool:
        """Whether words have a capital that is not only their sentence's first; an acronym's must be all capitals."""
        if self.upper:
            return all(words[position].upper for position in positions)
        inside = any(words[position].capital and not words[position].starts_sentence for position in positions)
        return inside or all(words[position].capital for position in positions)


@lru_cache(1 << 16)
def _possible_starts(word: str) -> tuple[str, ...]:
    """What an imperfect form of a word starts with, or has behind its first letter: see `Window.starts`."""
    return word[0], word[1:3], word[:2], word[1::-1]


def _find_capitals(text: str, count: int) -> tuple[bool, ...]:
    """Which of a subject's `count` words have a capital; all or none where its text is divided otherwise."""
    written = _WRITTEN_WORD.findall(text)
    if len(written) != count:
        return (text != text.lower(),) * count
    return tuple(word != word.lower() for word in written)
