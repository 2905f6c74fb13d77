"""The words of stored subjects, found by the imperfect forms in which text may hold them."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from itertools import takewhile

from lemoe.routing.anchor.words import Word, one_edit_apart, rigid

LONG = 5  # letters from which a word may be misspelt
REMEMBERED = 1 << 16  # words


class Vocabulary:
    """Words that may be read misspelt, cut short to a nickname, grown from one, or as an initial.

    What was read becomes keys: whole stored words, `j.` for every word that may stand behind the initial j, and `jo*`
    for every word that begins so, since those are too many to be listed.
    """

    def __init__(self) -> None:
        self._words: dict[str, tuple[str, ...]] = {}
        self._in_order: list[str] = []
        self._halves: dict[str, list[str]] = defaultdict(list)
        self._known: dict[tuple[str, bool], set[str]] = {}

    def add(self, word: str) -> tuple[str, ...]:
        """The keys of a stored word, which is added if it is new."""
        keys = self._words.get(word)
        if keys is None:
            self._known.clear()
            keys = self._words[word] = (word, f"{word[0]}.", f"{word[:2]}*") if len(word) > 1 else (word,)
            if len(word) >= LONG:
                for half in _halves(word, len(word)):
                    self._halves[half].append(word)
        return keys

    def keys(self, read: Word) -> set[str]:
        """The keys of all stored words that a word that was read may stand for."""
        known = self._known.get((read.text, read.capital))
        if known is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            known = self._known[read.text, read.capital] = set(self._keys(read.text, read.capital))
        return known

    def _keys(self, word: str, capital: bool) -> Iterator[str]:
        if rigid(word):
            return
        if capital:
            yield from (word[:length] for length in range(1, len(word)) if word[:length] in self._words)
            if len(word) == 1:
                yield f"{word}."
            elif len(word) == 2:
                yield f"{word}*"
            else:
                yield from self._beginning(word)
        if len(word) >= LONG:
            yield from self._misspelt(word)

    def _beginning(self, word: str) -> Iterator[str]:
        if len(self._in_order) != len(self._words):
            self._in_order = sorted(self._words)
        first = bisect_left(self._in_order, word)
        places = range(first, len(self._in_order))
        return takewhile(lambda longer: longer.startswith(word), (self._in_order[place] for place in places))

    def _misspelt(self, word: str) -> Iterator[str]:
        """Stored words of which one half is whole in `word`, as it is if they are one edit apart."""
        for length in (len(word) - 1, len(word), len(word) + 1):
            for half in _halves(word, length):
                for stored in self._halves.get(half, ()):
                    if one_edit_apart(stored, word):
                        yield stored


def _halves(word: str, length: int) -> tuple[str, str]:
    """Of a stored word of so many letters: its first half, and its first letter with the last half, read in `word`."""
    middle = (length + 1) // 2
    return f"{length}{word[:middle]}<", f"{length}{word[0]}>{word[len(word) - (length - middle) :]}"
