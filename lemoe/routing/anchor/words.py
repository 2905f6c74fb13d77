"""From token bytes to words and sentences, one token at a time, so that a route never depends on later tokens."""

import codecs
import re
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

_BASE_LETTERS = str.maketrans(
    {"ł": "l", "ø": "o", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe", "ß": "ss", "’": "'", "ʼ": "'", "ʻ": "'"}
)
_SUFFIXES = (("ies", "y"), ("ied", "y"), ("ing", ""), ("ed", ""), ("es", "e"), ("s", ""))
ABBREVIATIONS = frozenset(
    "dr mr mrs ms st jr sr prof rev hon capt lt col gen gov sen rep cmdr maj no mt ft sgt".split()
)
_ASCII_WORD = re.compile("[a-z0-9]+(?:(?<=[a-z])[+#]+)?")
_SIGNS = frozenset("+#")  # directly behind a letter, part of its word: C++, C#
_UNSPACED = re.compile(  # scripts without spaces, and Hangul, in which particles are written on to a name
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]"
)
_ROMAN_NUMERAL = re.compile(r"^(?=[ivxl])(l?x{0,3})(ix|iv|v?i{0,3})$")


def fold_text(text: str) -> str:
    """Casefold and strip diacritics."""
    text = unicodedata.normalize("NFKD", text.casefold()).casefold()
    return text if text.isascii() else "".join(c for c in text if not unicodedata.combining(c)).translate(_BASE_LETTERS)


@lru_cache(4096)
def _fold_char(char: str) -> str:
    """The folded letters and digits of one character; empty if it belongs to no word."""
    return "".join(filter(_belongs_to_word, fold_text(char))) if _belongs_to_word(char) else ""


def _belongs_to_word(char: str) -> bool:
    return char.isalnum() or is_unspaced(char)


def is_unspaced(word: str) -> bool:
    """Whether a word is one character of a script without spaces: Han, Kana, Hangul, Thai, Lao, Khmer, Burmese."""
    return not word.isascii() and _UNSPACED.match(unicodedata.normalize("NFC", word)) is not None


def _goes_on(word: str, unspaced: bool) -> bool:
    """Whether letters directly behind a word are part of it; `unspaced`: whether they are of an unspaced script."""
    return word[-1] not in _SIGNS and not unspaced


@lru_cache(1 << 16)
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
    """The folded words of a text, the same that a `WordReader` gives.

    A word is a run of letters and digits, with the signs of `C++` and `C#`; or one character of an unspaced script.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    words: list[str] = []
    growing = False
    for char in text:
        letters = _fold_char(char)
        if letters and growing and _goes_on(words[-1], is_unspaced(char)):
            words[-1] += letters
        elif letters:
            words.append(letters)
        elif growing and char in _SIGNS and not words[-1][-1].isdigit():
            words[-1] += char
            continue
        growing = bool(letters and not is_unspaced(char)) or (growing and bool(unicodedata.combining(char)))
    return words


@lru_cache(1 << 16)
def needs_exact_match(word: str) -> bool:
    """Whether a subject's word must match exactly: numbers, and Roman numerals of two letters or more."""
    return any(c.isdigit() for c in word) or (len(word) > 1 and _ROMAN_NUMERAL.match(word) is not None)


def one_edit_apart(first: str, second: str) -> bool:
    """Whether the edit distance of two words is at most one, two neighbouring letters swapped being one edit."""
    if len(first) > len(second):
        first, second = second, first
    if len(second) - len(first) > 1:
        return False
    same = 0
    while same < len(first) and first[same] == second[same]:
        same += 1
    if len(first) < len(second):
        return first[same:] == second[same + 1 :]
    swapped = first[same : same + 2] == second[same : same + 2][::-1] and first[same + 2 :] == second[same + 2 :]
    return swapped or first[same + 1 :] == second[same + 1 :]


@dataclass(slots=True)
class Word:
    """A folded word.

    Attributes:
        capital: whether it has a capital anywhere (`iPhone`), or starts with a digit.
        starts_sentence: whether it is the first of its sentence, or of what stands behind a colon.
        upper: whether all its letters are capitals.
        adjacent: whether nothing but spaces, a hyphen or a stop that ends no sentence parts it from the word before.
    """

    text: str
    capital: bool
    starts_sentence: bool
    upper: bool = False
    adjacent: bool = False


class _Run(NamedTuple):
    """Letters and digits that belong together, or one other character.

    Attributes:
        folded: what they add to a word; empty for a character that belongs to none.
        begins_high: whether the first is a capital or a digit.
        any_upper: whether one of them is a capital.
        all_upper: whether all of them are.
        unspaced: whether it is a character of an unspaced script.
    """

    text: str
    folded: str
    begins_high: bool
    any_upper: bool
    all_upper: bool
    unspaced: bool


@lru_cache(1 << 16)
def _split_runs(text: str) -> tuple[_Run, ...]:
    """Runs of ASCII letters and digits, and every other character by itself."""
    return tuple(map(_make_run, _ASCII_RUN_OR_CHARACTER.findall(text)))


_ASCII_RUN_OR_CHARACTER = re.compile(r"[A-Za-z0-9]+|[\s\S]")


def _make_run(text: str) -> _Run:
    first, upper = text[0], [char.isupper() for char in text]
    folded = text.lower() if len(text) > 1 else _fold_char(text)
    return _Run(text, folded, upper[0] or first.isdigit(), any(upper), all(upper), is_unspaced(first))


class WordReader:
    """Splits a stream of token bytes into the words of the current sentence; the last word may still grow.

    A newline ends a sentence, and so does `.`, `?` or `!` before a space and a capital (after `?` and `!`, before any
    word), which is known only when the next word starts. The full stop of an initial or a known abbreviation does not.
    """

    def __init__(self) -> None:
        self.words: list[Word] = []
        self.growing = False
        self._adjacent = False  # what was read behind the last word does not part it from the next one
        self._behind_colon = False
        self._undecoded = b""  # the beginning of a character
        self._sentence_end = 0  # 0: no sentence end read, 1: its punctuation mark, 2: the mark and a space
        self._ends_surely = False  # the mark was not `.`, which abbreviations use too

    def copy(self) -> "WordReader":
        """A reader in the same state, independent of this one."""
        other = object.__new__(WordReader)
        other.__dict__.update(self.__dict__)
        other.words = self.words[:]
        if self.words:  # the only one that may still change
            other.words[-1] = replace(self.words[-1])
        return other

    def push(self, token: bytes) -> bool:
        """Read one token's bytes.

        Returns:
            whether a new sentence began with it.
        """
        new_sentence = False
        for run in _split_runs(self._decode(token)):
            if run.folded:
                new_sentence |= self._read_letters(run)
            elif self.growing and run.text in _SIGNS and not self.words[-1].text[-1].isdigit():
                self.words[-1].text += run.text
            elif not (unicodedata.combining(run.text) and self.growing):
                self._read_separator(run.text)
        return new_sentence

    def _decode(self, token: bytes) -> str:
        """The characters that are whole with these bytes."""
        data = self._undecoded + token if self._undecoded else token
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._undecoded = data[used:]
        return text

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

    def _read_letters(self, run: _Run) -> bool:
        new_sentence = self._sentence_end == 2 and not self.growing and (run.begins_high or self._ends_surely)
        if new_sentence:
            self.words = []
        if self.growing and _goes_on(self.words[-1].text, run.unspaced):
            last = self.words[-1]
            last.text += run.folded
            last.capital |= run.any_upper
            last.upper &= run.all_upper
        else:
            starts, adjacent = not self.words or self._behind_colon, self._adjacent and bool(self.words)
            self.words.append(Word(run.folded, run.begins_high or run.any_upper, starts, run.all_upper, adjacent))
            self._behind_colon = False
        self.growing = not run.unspaced
        self._adjacent = True
        self._sentence_end = 0
        return new_sentence

    def _read_separator(self, char: str) -> None:
        if char in ".?!。？！":
            abbreviation = char == "." and self._ends_abbreviation()
            self._sentence_end, self._ends_surely = (0, False) if abbreviation else (1, char != ".")
            self._adjacent &= char == "."  # until a space follows
        elif char == "\n":
            self._sentence_end, self._ends_surely = 2, True
        elif char.isspace():
            self._adjacent &= self._sentence_end == 0
            self._sentence_end = 2 if self._sentence_end else 0
        elif char not in "\"')]}”’" and self._sentence_end == 1:
            self._sentence_end = 0
        self._behind_colon |= char in ":："
        self._adjacent &= char.isspace() or char in "-.'’"
        self.growing = False

    def _ends_abbreviation(self) -> bool:
        if not self.growing:
            return False
        word = self.words[-1]
        return len(word.text) == 1 or (word.capital and word.text in ABBREVIATIONS)
