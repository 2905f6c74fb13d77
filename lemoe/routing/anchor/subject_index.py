"""An inverted index of stored subjects, by words of which every mention has one, or two near each other."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.neighbours import begins_other_name
from lemoe.routing.anchor.subjects import MIN_COVERAGE, SURNAME_WORDS, Subject
from lemoe.routing.anchor.vocabulary import Vocabulary
from lemoe.routing.anchor.word_forms import MISSPELT
from lemoe.routing.anchor.words import Word, needs_exact_match

PAIR_WINDOW = 6  # words before a word among which another one of its subject is looked for
ENDING_WORDS = 4  # last words, by which a subject in a script without spaces is looked up
MAX_SUBJECT_WORDS = 256  # a longer subject is not indexed, since pairs of words grow with their square

Posting = int | Sequence[int]  # numbers of subjects; a bare one for the most keys, which saves their lists
Postings = dict[str, int | list[int]]


class SubjectIndex:
    """Subjects by words and pairs of words of which every mention has one, so that a look-up gives few candidates.

    A subject without a word (`!!!`, an emoji) or of more than `MAX_SUBJECT_WORDS` gets a number but is never found.
    """

    def __init__(self, lexicon: Lexicon):
        self.subjects: list[Subject] = []
        self._lexicon = lexicon
        self._vocabulary = Vocabulary()
        self._numbers: dict[tuple[str, ...], int] = {}
        self._by_word: Postings = {}  # by the stem of a word that can be a mention by itself
        self._by_surname: Postings = {}  # by a rare last word
        self._by_imperfect_word: Postings = {}  # by such a word itself
        self._by_joined: Postings = {}  # by all of its few words, written as one
        self._by_ending: Postings = {}  # by its last words, in a script without spaces
        self._by_pair: dict[str, Postings] = defaultdict(dict)  # by two stems, in alphabetical order
        self._by_imperfect_pair: dict[str, Postings] = defaultdict(dict)  # by a stem and another word's key

    def add(self, text: str) -> int:
        """The number of the subject `text`, stored if it is new."""
        subject = Subject(text, self._lexicon)
        number = self._numbers.setdefault(subject.stems, len(self.subjects))
        if number == len(self.subjects):
            self.subjects.append(subject)
            if 0 < len(subject.stems) <= MAX_SUBJECT_WORDS:
                self._index_subject(subject, number)
        return number

    def find_candidates(self, words: Sequence[Word]) -> list[int]:
        """Numbers of the subjects of which the last word of `words` may complete a mention."""
        numbers: set[int] = set()
        for posting in self._find_postings(words):
            if isinstance(posting, int):
                numbers.add(posting)
            else:
                numbers.update(posting)
        return sorted(numbers)

    def _index_subject(self, subject: Subject, number: int) -> None:
        """Store a subject by words, and pairs of words near each other, so that every mention has one of these."""
        if subject.contiguous:
            _add_posting(self._by_ending, " ".join(subject.words[-ENDING_WORDS:]), number)
            return
        order = sorted(range(len(subject.stems)), key=lambda index: -subject.weights[index])
        self._index_words(subject, number, order[0])
        self._index_pairs(subject, number, order)

    def _index_words(self, subject: Subject, number: int, heaviest: int) -> None:
        """Store a subject by what can be a mention in one word: all of it, its heaviest word, or its surname."""
        min_weight, weight = MIN_COVERAGE * subject.total_weight, subject.weights[heaviest]
        if len(subject.words) <= 3:
            _add_posting(self._by_joined, subject.joined, number)
        if 0 <= subject.surname < SURNAME_WORDS:
            _add_posting(self._by_surname, subject.words[-1], number)
        if weight >= min_weight:
            for stemmed in {spelling[heaviest] for spelling in subject.spellings}:
                _add_posting(self._by_word, stemmed, number)
        if MISSPELT * weight >= min_weight and not subject.exact[heaviest]:
            _add_posting(self._by_imperfect_word, self._vocabulary.add(subject.words[heaviest])[0], number)

    def _index_pairs(self, subject: Subject, number: int, order: Sequence[int]) -> None:
        """Store a subject by pairs of words near each other, of which a mention has one if not one word is enough."""
        stems, min_weight = subject.stems, MIN_COVERAGE * subject.total_weight
        heavy = _words_needed_in_pairs(order, subject.weights, min_weight)
        indices = set(combinations(heavy, 2))
        if subject.surname > 0:  # which is not looked up by itself behind a first name
            before = subject.surname - 1 if subject.surname < SURNAME_WORDS else 0
            indices.add((before, subject.surname))
        pairs = {_sort_pair(spelling[one], spelling[other]) for spelling in subject.spellings for one, other in indices}
        for first, second in pairs:
            _add_posting(self._by_pair[first], second, number)
        imperfect = {*permutations(heavy, 2), *_imperfect_pairs(subject, order, min_weight)}
        for word, stemmed in {(subject.words[index], stems[other]) for index, other in imperfect}:
            if not needs_exact_match(word):
                for key in self._vocabulary.add(word):
                    _add_posting(self._by_imperfect_pair[stemmed], key, number)

    def _find_postings(self, words: Sequence[Word]) -> Iterator[Posting]:
        word = words[-1]
        stemmed = self._lexicon.stem(word.text)
        yield from self._find_whole(words, stemmed)
        if len(words) < 2:
            return
        yield self._by_joined.get(words[-2].text + word.text, ())
        own_postings, keys = self._by_imperfect_pair.get(stemmed), self._vocabulary.matching_keys(word)
        for before in words[-PAIR_WINDOW - 1 : -1]:
            other = self._lexicon.stem(before.text)
            first, second = _sort_pair(stemmed, other)
            if pairs := self._by_pair.get(first):
                yield pairs.get(second, ())
            if own_postings:
                yield from _shared_postings(own_postings, self._vocabulary.matching_keys(before))
            if keys and (other_postings := self._by_imperfect_pair.get(other)):
                yield from _shared_postings(other_postings, keys)

    def _find_whole(self, words: Sequence[Word], stemmed: str) -> Iterator[Posting]:
        """Subjects of which the last word, of this stem, may be a mention by itself, or ends one without spaces."""
        word = words[-1]
        yield self._by_word.get(stemmed, ())
        yield self._by_joined.get(word.text, ())
        if len(words) < 2 or not begins_other_name(words[-2], word, self._lexicon):
            yield self._by_surname.get(word.text, ())
            if word.text.endswith("s"):
                yield self._by_surname.get(word.text[:-1], ())
        if self._by_imperfect_word:
            for similar in map(self._vocabulary.similar_words, words[-2:]):  # the last but one is whole only now
                yield from _shared_postings(self._by_imperfect_word, similar)
        if self._by_ending:
            yield from self._find_endings(words)

    def _find_endings(self, words: Sequence[Word]) -> Iterator[Posting]:
        last = [word.text for word in words[-ENDING_WORDS:]]
        for first in range(len(last)):
            yield self._by_ending.get(" ".join(last[first:]), ())


def _add_posting(postings: Postings, key: str, number: int) -> None:
    stored = postings.get(key)
    if stored is None:
        postings[key] = number
    elif isinstance(stored, int):
        postings[key] = [stored, number]
    else:
        stored.append(number)


def _shared_postings(postings: Postings, keys: frozenset[str]) -> Iterator[Posting]:
    """The postings of any of the keys; iterates over the keys or the postings, whichever are fewer."""
    return map(postings.__getitem__, keys & postings.keys())


def _sort_pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)


def _imperfect_pairs(subject: Subject, order: Sequence[int], min_weight: float) -> Iterator[tuple[int, int]]:
    """Each heavy word, which may be misspelt or abbreviated, with any other of some weight, which is then whole."""
    rest = subject.total_weight
    for index in order:
        yield from ((index, other) for other, weight in enumerate(subject.weights) if other != index and weight >= 1.0)
        rest -= subject.weights[index]
        if rest < min_weight:
            break


def _words_needed_in_pairs(order: Sequence[int], weights: Sequence[float], min_weight: float) -> Sequence[int]:
    """The fewest of the heaviest words of which a mention must have two; none where one may be enough."""
    rest = sum(weights)
    for count, index in enumerate(order, 1):
        rest -= weights[index]
        if count > 1 and weights[order[0]] + rest < min_weight:
            return order[:count]
    return ()
