"""The words of stored subjects, found by the imperfect forms in which a text may have them."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from itertools import takewhile

from lemoe.routing.anchor.word_forms import MAX_ENDING, MISSPELLABLE_LETTERS, find_word_form, is_misspelling
from lemoe.routing.anchor.words import Word, needs_exact_match

CACHED_WORDS = 1 << 16  # words of texts whose keys are kept

Matches = tuple[frozenset[str], frozenset[str]]


class Vocabulary:
    """Stored words, which a text may have misspelt, inflected, shortened or lengthened (nicknames), or as an initial.

    A word of a text has keys: the whole stored words that it may mean, `j.` for all that the initial j may mean, and
    `jo*` for all that begin with these two letters, which are too many to be listed.
    """

    def __init__(self) -> None:
        self._words: dict[str, tuple[str, ...]] = {}
        self._sorted: list[str] = []
        self._by_part: dict[str, list[str]] = defaultdict(list)
        self._cache: dict[tuple[str, bool], Matches] = {}  # by a word of a text, and whether it has a capital

    def add(self, word: str) -> tuple[str, ...]:
        """The keys under which a word is to be stored; the first is the word itself. Adds it if it is new."""
        keys = self._words.get(word)
        if keys is None:
            self._cache.clear()
            keys = self._words[word] = (word, f"{word[0]}.", f"{word[:2]}*") if len(word) > 1 else (word,)
            if len(word) >= MISSPELLABLE_LETTERS and word.isalpha():
                for part in (*_half_keys(word, len(word)), f">{word[1:]}"):
                    self._by_part[part].append(word)
        return keys

    def matching_keys(self, read: Word) -> frozenset[str]:
        """The keys of all stored words that a word of a text may mean."""
        return self._find_matches(read)[0]

    def similar_words(self, read: Word) -> frozenset[str]:
        """The stored words that a word of a text may be by itself: misspelt, or with another ending."""
        return self._find_matches(read)[1]

    def _find_matches(self, read: Word) -> Matches:
        cached = self._cache.get((read.text, read.capital))
        if cached is None:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()
            cached = self._cache[read.text, read.capital] = self._collect_matches(read.text, read.capital)
        return cached

    def _collect_matches(self, word: str, capital: bool) -> Matches:
        if needs_exact_match(word):
            return frozenset(), frozenset()
        similar = set(self._find_misspelt_words(word))
        if capital:
            shorter = (word[:-letters] for letters in range(1, min(MAX_ENDING + 1, len(word))))
            similar.update(s for s in shorter if s in self._words and find_word_form(s, word, capital, False))
        return frozenset(similar.union(self._name_keys(word) if capital else ())), frozenset(similar)

    def _name_keys(self, word: str) -> Iterator[str]:
        """Keys of the names of which a capitalised word may be the initial or the start."""
        if len(word) == 1:
            yield f"{word}."
        elif len(word) == 2:
            yield f"{word}*"
        else:
            yield from self._find_longer_words(word)
        if len(word) > 1 and word[0] in self._words:
            yield word[0]

    def _find_longer_words(self, word: str) -> Iterator[str]:
        """Stored words that begin with `word`."""
        if len(self._sorted) != len(self._words):
            self._sorted = sorted(self._words)
        first = bisect_left(self._sorted, word)
        indices = range(first, len(self._sorted))
        return takewhile(lambda longer: longer.startswith(word), (self._sorted[index] for index in indices))

    def _find_misspelt_words(self, word: str) -> Iterator[str]:
        """Stored words one edit apart from `word`.

        Behind an edit of the first letter, all others are unchanged; else one half of the stored word is, unless the
        two letters at its middle are swapped.
        """
        if len(word) < MISSPELLABLE_LETTERS - 1 or not word.isalpha():
            return
        parts = {part for length in (len(word) - 1, len(word), len(word) + 1) for part in _half_keys(word, length)}
        candidates = {stored for part in (*parts, f">{word}", f">{word[1:]}") for stored in self._by_part.get(part, ())}
        candidates.update({word[1:], _swap_letters(word, 0), _swap_letters(word, (len(word) + 1) // 2 - 1)})
        yield from (stored for stored in candidates & self._words.keys() if is_misspelling(stored, word))


def _half_keys(word: str, length: int) -> tuple[str, str]:
    """Keys, taken from `word`, of a stored word of `length` letters: its first half; its first letter and last half."""
    middle = (length + 1) // 2
    return f"{length}{word[:middle]}<", f"{length}{word[0]}>{word[len(word) - (length - middle) :]}"


def _swap_letters(word: str, first: int) -> str:
    return word[:first] + word[first : first + 2][::-1] + word[first + 2 :]
