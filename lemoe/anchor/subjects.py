"""Recognising a stored subject in running text: out of order, misspelt, abbreviated, or one letter still missing."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lemoe.anchor.lexicon import Lexicon
from lemoe.anchor.words import Word, one_edit_apart, rigid, split_words

COVERAGE = 0.75  # share of the subject's weight that must be present
PLAIN = 8.0  # a capitalised subject lighter than this must be read with a capital
INITIAL, NICKNAME, MISSPELT = 0.75, 0.7, 0.9  # credit for an imperfect word


@dataclass(frozen=True)
class Mention:
    """Where a subject stands: the share of its weight that is there, and the positions of its words."""

    coverage: float
    positions: frozenset[int]


class Subject:
    """A subject's folded words with their stems and weights."""

    def __init__(self, text: str, lexicon: Lexicon):
        self.words = split_words(text)
        self.stems = [lexicon.stem(word) for word in self.words]
        self.weights = [max(lexicon.rarity(word), 0.05) for word in self.words]
        self.total = sum(self.weights)
        self.capital = any(char.isupper() for char in text)
        self.joined = "".join(self.words)
        self.rigid = [rigid(word) for word in self.words]
        self._lexicon = lexicon
        self._stem_set = frozenset(self.stems)

    @property
    def key(self) -> tuple[str, ...]:
        """Subjects with one key are one."""
        return tuple(self.stems)

    def find(self, words: Sequence[Word]) -> Mention | None:
        """The fullest mention in a whole sentence."""
        found = [
            mention
            for at, word in enumerate(words)
            if self._starts(words, at, word) and (mention := self.at(words, at, growing=False))
        ]
        return max(found, key=lambda mention: mention.coverage, default=None)

    def _starts(self, words: Sequence[Word], at: int, word: Word) -> bool:
        stemmed = self._lexicon.stem(word.text) in self._stem_set
        return stemmed or word.text == self.joined or (at > 0 and words[at - 1].text + word.text == self.joined)

    def at(self, words: Sequence[Word], at: int, *, growing: bool) -> Mention | None:
        """The mention that holds position `at`; `growing` says that the last word may not be whole yet."""
        if growing and at == len(words) - 1 and len(words[at].text) < 3:
            return None
        for used in ((at,), (at - 1, at)):  # one word written as two, or two as one
            if used[0] >= 0 and "".join(words[position].text for position in used) == self.joined:
                return Mention(1.0, frozenset(used)) if self._capital_fits(words, used) else None
        return self._in_window(words, at, growing)

    def _in_window(self, words: Sequence[Word], at: int, growing: bool) -> Mention | None:
        count = len(self.words)
        window = range(max(0, at - count - 1), min(len(words), at + count + 2))
        stems = {position: self._lexicon.stem(words[position].text) for position in window}
        if not self._may_cover(words, stems):
            return None
        exact = self._exact_words(words, stems, at)
        if exact is None:
            return None
        score, used, missing = exact
        if count > 1:
            unfinished = len(words) - 1 if growing else -1
            score += self._lenient_words(words, window, used, missing, at, unfinished)
        if score < COVERAGE * self.total or at not in used:
            return None
        first, last = min(used), max(used)
        if last - first > count + 2 or not self._capital_fits(words, sorted(used)):
            return None
        return Mention(score / self.total, frozenset(range(first, last + 1)))

    def _may_cover(self, words: Sequence[Word], stems: dict[int, str]) -> bool:
        """A quick bound: could the window reach the coverage at all?"""
        present = set(stems.values())
        initials = {words[position].text[0] for position in stems}
        several = len(self.words) > 1
        possible = sum(
            weight
            for weight, stemmed, word in zip(self.weights, self.stems, self.words, strict=True)
            if stemmed in present or (several and word[0] in initials)
        )
        return possible >= COVERAGE * self.total

    def _exact_words(
        self, words: Sequence[Word], stems: dict[int, str], at: int
    ) -> tuple[float, set[int], list[int]] | None:
        """Weight and positions of the words that are there, and the indices of those that are not."""
        score, used, missing = 0.0, set[int](), list[int]()
        for index, stemmed in enumerate(self.stems):
            strict = self.rigid[index]
            places = [
                position
                for position, there in stems.items()
                if position not in used
                and there == stemmed
                and not (strict and words[position].text != self.words[index])
            ]
            if places:
                used.add(min(places, key=lambda position: abs(position - at)))
                score += self.weights[index]
            elif strict:
                return None
            else:
                missing.append(index)
        return score, used, missing

    def _lenient_words(
        self, words: Sequence[Word], window: range, used: set[int], missing: Sequence[int], at: int, unfinished: int
    ) -> float:
        """Credit for missing words that stand there abbreviated or misspelt; their places join `used`."""
        score = 0.0
        for index in missing:
            last = index == len(self.words) - 1
            credits = {
                position: credit
                for position in window
                if position not in used
                and position != unfinished
                and (credit := _credit(self.words[index], words[position], last=last))
            }
            if credits:
                best = max(credits, key=lambda position: (credits[position], -abs(position - at)))
                used.add(best)
                score += credits[best] * self.weights[index]
        return score

    def _capital_fits(self, words: Sequence[Word], used: Sequence[int]) -> bool:
        """A capitalised subject of common words must be read with a capital that is not the sentence's own."""
        if not self.capital or self.total >= PLAIN:
            return True
        inside = any(words[position].capital and not words[position].first for position in used)
        return inside or all(words[position].capital for position in used)


def _credit(stored: str, read: Word, *, last: bool) -> float:
    """How far `read` stands for the subject's word `stored`: an initial, a misspelling, a nickname."""
    word = read.text
    if stored[0] != word[0] or rigid(stored) or rigid(word):
        return 0.0
    if len(stored) == 1 or len(word) == 1:
        return INITIAL if read.capital and not last else 0.0
    if min(len(stored), len(word)) >= 5 and one_edit_apart(stored, word):
        return MISSPELT
    if read.capital and (stored.startswith(word) or word.startswith(stored)):
        return NICKNAME
    return 0.0


class SubjectIndex:
    """Subjects by the words that a mention cannot all miss (prefix filtering): a look-up touches only likely ones."""

    def __init__(self, lexicon: Lexicon):
        self.subjects: list[Subject] = []
        self._lexicon = lexicon
        self._numbers: dict[tuple[str, ...], int] = {}
        self._by_key: dict[str, list[int]] = defaultdict(list)

    def add(self, text: str) -> int:
        """The number of the subject `text`, stored if it is new."""
        subject = Subject(text, self._lexicon)
        if subject.key not in self._numbers:
            number = self._numbers[subject.key] = len(self.subjects)
            self.subjects.append(subject)
            for key in sorted(set(self._stored_keys(subject))):
                self._by_key[key].append(number)
        return self._numbers[subject.key]

    def near(self, words: Sequence[Word]) -> list[int]:
        """Numbers of the subjects that the last word of `words` may complete."""
        keys = self._read_keys(words)
        return sorted({number for key in keys for number in self._by_key.get(key, ())})

    def _stored_keys(self, subject: Subject) -> Iterator[str]:
        order = sorted(range(len(subject.words)), key=lambda index: -subject.weights[index])
        rest = subject.total
        for index in order:
            yield subject.stems[index]
            if not subject.rigid[index]:  # a misspelt heavy word beside another word of the subject
                for other in range(len(subject.words)):
                    if other != index and subject.weights[other] >= 1.0:
                        yield f"{subject.words[index][0]}|{subject.stems[other]}"
            rest -= subject.weights[index]
            if rest < COVERAGE * subject.total:
                break
        if 1 < len(subject.words) <= 3:
            yield subject.joined

    def _read_keys(self, words: Sequence[Word]) -> Iterator[str]:
        word = words[-1].text
        stemmed = self._lexicon.stem(word)
        yield stemmed
        if len(words) > 1:
            yield words[-2].text + word
        for before in words[-4:-1]:
            yield f"{before.text[0]}|{stemmed}"
            yield f"{word[0]}|{self._lexicon.stem(before.text)}"
