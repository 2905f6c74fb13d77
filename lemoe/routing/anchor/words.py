"""From token bytes to words and sentences, one token at a time, so that a route never depends on later tokens."""

import codecs
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache, partial

_BASE_LETTERS = str.maketrans(
    {"ł": "l", "ø": "o", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe", "ß": "ss", "’": "'", "ʼ": "'", "ʻ": "'"}
)
_SUFFIXES = (("ies", "y"), ("ied", "y"), ("ing", ""), ("ed", ""), ("es", "e"), ("s", ""))
_ABBREVIATIONS = frozenset("dr mr mrs ms st jr sr prof rev capt lt col gen no mt ft sgt".split())
_ASCII_WORD = re.compile("[a-z0-9]+")
_ROMAN_NUMERAL = re.compile(r"^(?=[ivxl])(l?x{0,3})(ix|iv|v?i{0,3})$")


def fold_text(text: str) -> str:
    """Casefold and strip diacritics."""
    text = unicodedata.normalize("NFKD", text.casefold()).casefold()
    return text if text.isascii() else "".join(c for c in text if not unicodedata.combining(c)).translate(_BASE_LETTERS)


@lru_cache(4096)
def _fold_char(char: str) -> str:
    """The folded letters and digits of one character; empty if it belongs to no word."""
    return "".join(c for c in fold_text(char) if c.isalnum()) if char.isalnum() else ""


def stem_word(word: str) -> str:
    """A light stemmer for plurals, -ed and -ing; short words and words with digits pass through."""
    if len(word) <= 3 or not word.isalpha():
        return word
    for suffix, replacement in _SUFFIXES:
        length = len(word) - len(suffix)
        if word.endswith(suffix) and length >= 3 and not (suffix == "s" and word[-2] in "sui"):
            word = word[:length] + replacement
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
        word = word[:-1]
    return word[:-1] if len(word) > 4 and word.endswith("e") else word


def split_words(text: str) -> list[str]:
    """The folded words of a text: runs of letters and digits, the same that a `WordReader` gives."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    words: list[str] = []
    growing = False
    for char in text:
        letters = _fold_char(char)
        if letters and growing:
            words[-1] += letters
        elif letters:
            words.append(letters)
        growing = bool(letters) or (growing and bool(unicodedata.combining(char)))
    return words


@lru_cache(1 << 16)
def needs_exact_match(word: str) -> bool:
    """Whether a subject's word must match exactly: numbers, and Roman numerals of two letters or more."""
    return any(c.isdigit() for c in word) or (len(word) > 1 and _ROMAN_NUMERAL.match(word) is not None)


def one_edit_apart(first: str, second: str) -> bool:
    """Whether two words have an edit distance of at most one."""
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
    """A folded word; `capital`: whether it starts with a capital or a digit."""

    text: str
    capital: bool
    starts_sentence: bool


_new_decoder = partial(codecs.getincrementaldecoder("utf-8"), "replace")


class WordReader:
    """Splits a stream of token bytes into the words of the current sentence; the last word may still grow.

    A newline ends a sentence, and so does `.`, `?` or `!` before a space and a capital (after `?` and `!`, before any
    word), which is known only when the next word starts. The full stop of an initial or a known abbreviation does not.
    """

    def __init__(self) -> None:
        self.words: list[Word] = []
        self.growing = False
        self._decoder = _new_decoder()
        self._sentence_end = 0  # 0: no sentence end read, 1: its punctuation mark, 2: the mark and a space
        self._ends_surely = False  # the mark was not `.`, which abbreviations use too

    def copy(self) -> "WordReader":
        """A reader in the same state, independent of this one."""
        other = WordReader()
        other.words = self.words[:]
        if self.words:  # the only one that may still change
            last = self.words[-1]
            other.words[-1] = Word(last.text, last.capital, last.starts_sentence)
        other.growing = self.growing
        other._decoder.setstate(self._decoder.getstate())
        other._sentence_end, other._ends_surely = self._sentence_end, self._ends_surely
        return other

    def push(self, token: bytes) -> bool:
        """Read one token's bytes.

        Returns:
            whether a new sentence began with it.
        """
        new_sentence = False
        for char in self._decoder.decode(token):
            if letters := _fold_char(char):
                new_sentence |= self._read_letters(char, letters)
            elif not (unicodedata.combining(char) and self.growing):
                self._read_separator(char)
        return new_sentence

    def push_token(self, token: bytes) -> tuple[bool, range]:
        """Read one token's bytes.

        Returns:
            whether a new sentence began with it, and the positions of the words that it added letters to.
        """
        count, letters = len(self.words), len(self.words[-1].text) if self.words else 0
        began = self.push(token)
        if began:
            count = 0
        grown = count > 0 and len(self.words[count - 1].text) > letters
        return began, range(count - 1 if grown else count, len(self.words))

    def _read_letters(self, char: str, letters: str) -> bool:
        capital = char.isupper() or char.isdigit()
        new_sentence = self._sentence_end == 2 and not self.growing and (capital or self._ends_surely)
        if new_sentence:
            self.words = []
        if self.growing:
            self.words[-1].text += letters
        else:
            self.words.append(Word(letters, capital, not self.words))
            self.growing = True
        self._sentence_end = 0
        return new_sentence

    def _read_separator(self, char: str) -> None:
        if char in ".?!。？！":
            abbreviation = char == "." and self._ends_abbreviation()
            self._sentence_end, self._ends_surely = (0, False) if abbreviation else (1, char != ".")
        elif char == "\n":
            self._sentence_end, self._ends_surely = 2, True
        elif char.isspace():
            self._sentence_end = 2 if self._sentence_end else 0
        elif char not in "\"')]}”’" and self._sentence_end == 1:
            self._sentence_end = 0
        self.growing = False

    def _ends_abbreviation(self) -> bool:
        if not self.growing:
            return False
        word = self.words[-1]
        return len(word.text) == 1 or (word.capital and word.text in _ABBREVIATIONS)
