"""Whether a mention of a subject is part of another name: `Michelle Obama`, `Paris Hilton`, `Bride of Frankenstein`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.words import ABBREVIATIONS, Word

TITLE_CASE_SHARE, TITLE_CASE_WORDS = 0.8, 5  # share of capitals, in so many words, from which they tell no name

_PLAIN_CAPITALS = ABBREVIATIONS | frozenset(  # words with a capital beside a name that are no part of another one
    "i president vice dr doctor prof professor mr mrs ms miss mx sir dame lord lady king queen prince princess "
    "emperor empress pope saint st ceo cto cfo coo chairman chairwoman chancellor minister premier prime senator "
    "governor mayor general captain colonel judge justice secretary director author actor actress singer inc "
    "reverend rev honourable honorable hon rabbi archbishop bishop cardinal maulana sheikh pandit commander major "
    "lieutenant brigadier admiral sergeant corporal constable inspector ambassador congressman congresswoman "
    "viscount viscountess baroness countess duchess herr frau monsieur madame mademoiselle senor senora signor signora "
    "incorporated corp corporation company co ltd limited llc plc gmbh ag se sa jr sr phd "
    "monday tuesday wednesday thursday friday saturday sunday".split()
)


def writes_names_with_capitals(words: Sequence[Word]) -> bool:
    """Whether a capital tells a name from other words: not in a heading, of which nearly all words have one."""
    capitals = sum(word.capital for word in words)
    return len(words) < TITLE_CASE_WORDS or capitals < TITLE_CASE_SHARE * len(words)


def begins_other_name(before: Word, word: Word, lexicon: Lexicon) -> bool:
    """Whether a word directly before another one is a name, so that the two are the name of somebody else."""
    if not word.adjacent or before.text in _PLAIN_CAPITALS or not before.text.isalpha():
        return False
    if before.capital and not before.starts_sentence and (not before.upper or len(before.text) == 1):
        return True
    unknown = before.capital and lexicon.known_rarity(before.text) == math.inf
    return unknown or lexicon.is_name(before.text)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The words around a mention.

    Attributes:
        words: those of the sentence.
        span: positions of the mention.
        lexicon: tells what a name is where its capital does not.
        partial: whether the mention is only a part of its subject, so that a lower-case name beside it is one too.
    """

    words: Sequence[Word]
    span: range
    lexicon: Lexicon
    partial: bool

    def find_names(self, *, titled: bool, possessive: bool) -> set[str]:
        """The stems of words that are part of another name if not of the subject's, directly beside the mention.

        Args:
            titled: whether the subject holds a link word, so that `and` may go on with it (the title of a work).
            possessive: whether the mention ends in a possessive `s`, so that what follows is no part of its name.
        """
        if not writes_names_with_capitals(self.words):
            return set()
        positions = self._possible_positions(titled, possessive)
        return {self.lexicon.stem(self.words[position].text) for position in positions}

    def _possible_positions(self, titled: bool, possessive: bool) -> Iterator[int]:
        first, behind = self.span[0], self.span[-1] + 1
        if self._is_name(first - 1, beside=first):
            yield first - 1
        if len(self.span) == 1 and self._goes_on(first - 1, "of", first - 2, beside=(first, first - 1)):
            yield first - 2
        if not possessive and self._is_name(behind, beside=behind):
            yield behind
        if titled and self._goes_on(behind, "and", behind + 1, beside=(behind, behind + 1)):
            yield behind + 1

    def _is_adjacent(self, position: int, beside: int) -> bool:
        """Whether there is a word at `position`, and none and no punctuation in front of the one at `beside`."""
        return position >= 0 and max(position, beside) < len(self.words) and self.words[beside].adjacent

    def _goes_on(self, link: int, text: str, name: int, *, beside: tuple[int, int]) -> bool:
        """Whether the link word `text`, and then a capitalised name, stand beside the mention."""
        if not self._is_adjacent(link, beside[0]) or self.words[link].text != text:
            return False
        return self._is_name(name, beside=beside[1]) and self.words[name].capital

    def _is_name(self, position: int, *, beside: int) -> bool:
        if not self._is_adjacent(position, beside):
            return False
        word = self.words[position]
        if len(word.text) == 1 and not self.partial:  # an initial, which may end a sentence
            return False
        if not word.text.isalpha() or word.text in _PLAIN_CAPITALS:
            return False
        if word.capital and not word.starts_sentence:
            return True
        if word.capital and self.partial and self.lexicon.known_rarity(word.text) == math.inf:
            return True  # no word that starts sentences
        return (word.capital or self.partial) and self.lexicon.is_name(word.text)
