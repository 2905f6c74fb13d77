"""The imperfect forms in which a text may have a word of a stored subject, and what each counts."""

from functools import lru_cache
from typing import NamedTuple

from lemoe.routing.anchor.words import needs_exact_match, one_edit_apart

INITIAL, NICKNAME, MISSPELT, INFLECTED = 0.75, 0.7, 0.9, 0.9  # share of its weight that an imperfect word counts
MISSPELLABLE_LETTERS = 4  # letters from which a stored word may be misspelt
INFLECTABLE_LETTERS = 5  # letters from which a stored word may have another ending
MAX_ENDING = 3  # letters of an ending, or by which a nickname is longer

_DERIVATIONS = frozenset("n an ean ian i ni ese ish ic ist ism ite er r ia".split())  # Nigerian, Israeli, Londoner


class WordForm(NamedTuple):
    """How a subject's word was read.

    Attributes:
        credit: the share of its weight that it counts.
        misspelt: whether it has a typing error.
        is_similar: whether it is misspelt or inflected, and may as well be another word.
    """

    credit: float
    misspelt: bool = False
    is_similar: bool = False


@lru_cache(1 << 16)
def find_word_form(stored: str, word: str, capital: bool, last: bool) -> WordForm | None:
    """The imperfect form of a subject's (`last`) word: an initial, a nickname, with another ending, or misspelt."""
    if needs_exact_match(stored) or needs_exact_match(word):
        return None
    if capital and stored[0] == word[0]:
        if len(stored) == 1 or len(word) == 1:
            return None if last else WordForm(INITIAL)
        if stored.startswith(word) and not last:
            return WordForm(NICKNAME)
        ending = word[len(stored) :] if word.startswith(stored) else ""
        if 0 < len(ending) <= MAX_ENDING and ending not in _DERIVATIONS and ending != stored[-1]:
            if len(stored) >= INFLECTABLE_LETTERS:
                return WordForm(INFLECTED, is_similar=True)
            if not last:
                return WordForm(NICKNAME)
    if is_misspelling(stored, word):
        return WordForm(MISSPELT, misspelt=True, is_similar=True)
    return None


def is_misspelling(stored: str, word: str) -> bool:
    """Whether a word may be another one with a letter more, fewer or other, or with two neighbouring ones swapped."""
    if len(stored) < MISSPELLABLE_LETTERS or len(word) < MISSPELLABLE_LETTERS - 1 or not word.isalpha():
        return False
    derived = word.startswith(stored) and word[len(stored) :] in _DERIVATIONS and word[-1] != stored[-1]
    return not derived and one_edit_apart(stored, word)
