"""Whether a mention of a subject is part of another name: `Michelle Obama`, `Paris Hilton`, `Bride of Frankenstein`."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.words import ABBREVIATIONS, Word

TITLE_CASE_SHARE, TITLE_CASE_WORDS = 0.8, 5  # share of capitals, in so many words, from which they tell no name

_PLAIN_CAPITALS = ABBREVIATIONS | frozenset(  # words with a capital beside a name that are no part of another one
    "i president vice dr doctor prof professor mr mrs ms miss mx sir dame lord lady king queen prince princess "
    "emperor empress pope saint st ceo cto cfo coo chairman chairwoman chancellor minister premier prime senator "
    "governor mayor general captain colonel judge justice secretary director author actor actress singer inc "
    "incorporated corp corporation company co ltd limited llc plc gmbh ag se sa jr sr phd "
    "monday tuesday wednesday thursday friday saturday sunday".split()
)


def writes_names_with_capitals(words: Sequence[Word]) -> bool:
    """Whether a capital tells a name from other words: not in a heading, of which nearly all words have one."""
    capitals = sum(word.capital for word in words)
    return len(words) < TITLE_CASE_WORDS or capitals < TITLE_CASE_SHARE * len(words)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The words around a mention.

    Attributes:
        words: those of the sentence.
        span: positions of the mention.
        lexicon: tells what a name is where its capital does not.
        own: stems of the subject's words, which are no other name.
        partial: whether the mention is only a part of its subject, so that a lower-case name beside it is one too.
    """

    words: Sequence[Word]
    span: range
    lexicon: Lexicon
    own: Collection[str]
    partial: bool

    def has_name(self, *, titled: bool) -> bool:
        """Whether a word that is part of another name stands directly beside the mention.

        Args:
            titled: whether the subject holds a link word, so that `and` may go on with it (the title of a work).
        """
        first, behind = self.span[0], self.span[-1] + 1
        if self._is_name(first - 1, beside=first) or self._is_name(behind, beside=behind):
            return True
        if len(self.span) == 1 and self._is_word(first - 1, "of", beside=first):
            return self._is_name(first - 2, beside=first - 1) and self.words[first - 2].capital
        if titled and self._is_word(behind, "and", beside=behind):
            return self._is_name(behind + 1, beside=behind + 1) and self.words[behind + 1].capital
        return False

    def _is_adjacent(self, position: int, beside: int) -> bool:
        """Whether there is a word at `position`, and none and no punctuation in front of the one at `beside`."""
        return position >= 0 and max(position, beside) < len(self.words) and self.words[beside].adjacent

    def _is_word(self, position: int, text: str, *, beside: int) -> bool:
        return self._is_adjacent(position, beside) and self.words[position].text == text

    def _is_name(self, position: int, *, beside: int) -> bool:
        if not self._is_adjacent(position, beside):
            return False
        word = self.words[position]
        if len(word.text) == 1 and not self.partial:  # an initial, which may end a sentence
            return False
        if not word.text.isalpha() or word.text in _PLAIN_CAPITALS or self.lexicon.stem(word.text) in self.own:
            return False
        if word.capital and not word.starts_sentence:
            return True
        if word.capital and self.partial and self.lexicon.known_rarity(word.text) == math.inf:
            return True  # no word that starts sentences
        return (word.capital or self.partial) and self.lexicon.is_name(word.text)
