"""The words of stored subjects, found by the imperfect forms in which a text may have them."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from itertools import takewhile

from lemoe.routing.anchor.words import Word, needs_exact_match, one_edit_apart

MISSPELLABLE_LETTERS = 5  # letters from which a word may be misspelt
CACHED_WORDS = 1 << 16  # words of texts whose keys are kept


class Vocabulary:
    """Stored words, which a text may have misspelt, shortened or lengthened (nicknames), or as an initial.

    A word of a text has keys: the whole stored words that it may mean, `j.` for all that the initial j may mean, and
    `jo*` for all that begin with these two letters, which are too many to be listed.
    """

    def __init__(self) -> None:
        self._words: dict[str, tuple[str, ...]] = {}
        self._sorted: list[str] = []
        self._by_half: dict[str, list[str]] = defaultdict(list)
        self._cache: dict[tuple[str, bool], set[str]] = {}  # by a word of a text, and whether it has a capital

    def add(self, word: str) -> tuple[str, ...]:
        """The keys under which a word is to be stored; adds it if it is new."""
        keys = self._words.get(word)
        if keys is None:
            self._cache.clear()
            keys = self._words[word] = (word, f"{word[0]}.", f"{word[:2]}*") if len(word) > 1 else (word,)
            if len(word) >= MISSPELLABLE_LETTERS:
                for half in _half_keys(word, len(word)):
                    self._by_half[half].append(word)
        return keys

    def matching_keys(self, read: Word) -> set[str]:
        """The keys of all stored words that a word of a text may mean."""
        cached = self._cache.get((read.text, read.capital))
        if cached is None:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()
            cached = self._cache[read.text, read.capital] = set(self._generate_keys(read.text, read.capital))
        return cached

    def _generate_keys(self, word: str, capital: bool) -> Iterator[str]:
        if needs_exact_match(word):
            return
        if capital:
            yield from (word[:length] for length in range(1, len(word)) if word[:length] in self._words)
            if len(word) == 1:
                yield f"{word}."
            elif len(word) == 2:
                yield f"{word}*"
            else:
                yield from self._find_longer_words(word)
        if len(word) >= MISSPELLABLE_LETTERS:
            yield from self._find_misspelt_words(word)

    def _find_longer_words(self, word: str) -> Iterator[str]:
        """Stored words that begin with `word`."""
        if len(self._sorted) != len(self._words):
            self._sorted = sorted(self._words)
        first = bisect_left(self._sorted, word)
        indices = range(first, len(self._sorted))
        return takewhile(lambda longer: longer.startswith(word), (self._sorted[index] for index in indices))

    def _find_misspelt_words(self, word: str) -> Iterator[str]:
        """Stored words one edit apart from `word`: one half of such a word is unchanged in it."""
        for length in (len(word) - 1, len(word), len(word) + 1):
            for half in _half_keys(word, length):
                for stored in self._by_half.get(half, ()):
                    if one_edit_apart(stored, word):
                        yield stored


def _half_keys(word: str, length: int) -> tuple[str, str]:
    """Keys, taken from `word`, of a stored word of `length` letters: its first half; its first letter and last half."""
    middle = (length + 1) // 2
    return f"{length}{word[:middle]}<", f"{length}{word[0]}>{word[len(word) - (length - middle) :]}"
