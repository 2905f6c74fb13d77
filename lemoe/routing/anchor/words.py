"""From token ids to words and sentences, one token at a time, so that a route never depends on what comes later."""

import codecs
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache, partial

_LETTERS = str.maketrans(
    {"ł": "l", "ø": "o", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe", "ß": "ss", "’": "'", "ʼ": "'", "ʻ": "'"}
)
_ENDINGS = (("ies", "y"), ("ied", "y"), ("ing", ""), ("ed", ""), ("es", "e"), ("s", ""))
_ABBREVIATIONS = frozenset("dr mr mrs ms st jr sr prof rev capt lt col gen no mt ft sgt".split())
_ASCII_WORD = re.compile("[a-z0-9]+")
_ROMAN = re.compile(r"^(?=[ivxl])(l?x{0,3})(ix|iv|v?i{0,3})$")


def fold(text: str) -> str:
    """Casefold and strip diacritics."""
    text = unicodedata.normalize("NFKD", text.casefold()).casefold()
    return text if text.isascii() else "".join(c for c in text if not unicodedata.combining(c)).translate(_LETTERS)


@lru_cache(4096)
def _letters(char: str) -> str:
    """The folded letters and digits of one character; empty if it belongs to no word."""
    return "".join(c for c in fold(char) if c.isalnum()) if char.isalnum() else ""


def stem(word: str) -> str:
    """A light stemmer for plurals, -ed and -ing; short words and words with digits pass through."""
    if len(word) <= 3 or not word.isalpha():
        return word
    for ending, replacement in _ENDINGS:
        kept = len(word) - len(ending)
        if word.endswith(ending) and kept >= 3 and not (ending == "s" and word[-2] in "sui"):
            word = word[:kept] + replacement
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
        word = word[:-1]
    return word[:-1] if len(word) > 4 and word.endswith("e") else word


def split_words(text: str) -> list[str]:
    """The folded words of a text: runs of letters and digits, as a `Reader` reads them."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    words: list[str] = []
    growing = False
    for char in text:
        letters = _letters(char)
        if letters and growing:
            words[-1] += letters
        elif letters:
            words.append(letters)
        growing = bool(letters) or (growing and bool(unicodedata.combining(char)))
    return words


@lru_cache(1 << 16)
def rigid(word: str) -> bool:
    """Whether a subject's word must be met exactly: numbers, and Roman numerals of two letters or more."""
    return any(c.isdigit() for c in word) or (len(word) > 1 and _ROMAN.match(word) is not None)


def one_edit_apart(first: str, second: str) -> bool:
    """Edit distance at most one."""
    if len(first) > len(second):
        first, second = second, first
    if len(second) - len(first) > 1:
        return False
    same = 0
    while same < len(first) and first[same] == second[same]:
        same += 1
    rest = first[same + 1 :] if len(first) == len(second) else first[same:]
    return rest == second[same + 1 :]


@dataclass(slots=True)
class Word:
    """A folded word; `capital`: it began with a capital or a digit; `first`: it began its sentence."""

    text: str
    capital: bool
    first: bool


_decoder = partial(codecs.getincrementaldecoder("utf-8"), "replace")


class Reader:
    """The words of the sentence being read; the last one may still grow.

    A newline ends a sentence, and so does `.`, `?` or `!` before a space and a capital (after `?` and `!`, before any
    word), which is known only when the next word starts. Initials and a few abbreviations do not.
    """

    def __init__(self) -> None:
        self.words: list[Word] = []
        self.growing = False
        self._decoder = _decoder()
        self._stop = 0  # 0: none, 1: a stop was read, 2: a stop and space
        self._hard = False  # the stop was none that abbreviations use

    def copy(self) -> "Reader":
        other = Reader()
        other.words = self.words[:]
        if self.words:  # the only one that may still change
            last = self.words[-1]
            other.words[-1] = Word(last.text, last.capital, last.first)
        other.growing = self.growing
        other._decoder.setstate(self._decoder.getstate())
        other._stop, other._hard = self._stop, self._hard
        return other

    def push(self, piece: bytes) -> bool:
        """Read one token's bytes; returns whether a new sentence began with it."""
        fresh = False
        for char in self._decoder.decode(piece):
            if letters := _letters(char):
                fresh |= self._letter(char, letters)
            elif not (unicodedata.combining(char) and self.growing):
                self._other(char)
        return fresh

    def _letter(self, char: str, letters: str) -> bool:
        capital = char.isupper() or char.isdigit()
        fresh = self._stop == 2 and not self.growing and (capital or self._hard)
        if fresh:
            self.words = []
        if self.growing:
            self.words[-1].text += letters
        else:
            self.words.append(Word(letters, capital, not self.words))
            self.growing = True
        self._stop = 0
        return fresh

    def _other(self, char: str) -> None:
        if char in ".?!。？！":
            abbreviation = char == "." and self._abbreviated()
            self._stop, self._hard = (0, False) if abbreviation else (1, char != ".")
        elif char == "\n":
            self._stop, self._hard = 2, True
        elif char.isspace():
            self._stop = 2 if self._stop else 0
        elif char not in "\"')]}”’" and self._stop == 1:
            self._stop = 0
        self.growing = False

    def _abbreviated(self) -> bool:
        if not self.growing:
            return False
        word = self.words[-1]
        return len(word.text) == 1 or (word.capital and word.text in _ABBREVIATIONS)
