"""Which relation of the bank a question asks for, by its words: naive Bayes, with none of them as a possible answer.

A word says most where it tells relations apart that a base model reads as nearly the same: `father` and `mother`,
`employer` and `occupation`, `follows` and `followed by`. A question whose words mark no relation says nothing.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.routing.anchor.words import split_words, stem_word

Vector = NDArray[numpy.float32]
Values = NDArray[numpy.float64]
MIN_WORDINGS = 2  # of the bank that a term must occur in
SMOOTHING = 1.0  # wordings of each relation that have a term as often as all do
ABSENT = -1.0  # nats of a term that no wording of a relation has
TEMPER = 0.5  # by which nats are multiplied, since terms of one question depend on each other
UNKNOWN, UNKNOWN_SHARE = 2.0, 3.0  # nats of a question of no relation of the bank, which counts as so many relations
CACHED_SUMS = 4096  # questions whose sums are kept, of some 800 bytes each
MIN_AGREEMENT = 0.02  # of two profiles, as a multiple of what two questions of any relations have


def list_terms(words: Sequence[str]) -> list[str]:
    """What is counted of a question: its words, their stems, and each two that follow each other."""
    unique = list(dict.fromkeys(words))
    stems = [stem_word(word) for word in unique]
    return [term for position in range(len(unique)) for term in _terms_at(unique, stems, position)]


def _terms_at(words: Sequence[str], stems: Sequence[str], position: int) -> Iterator[str]:
    """The terms that a word adds to those of the words before it."""
    word, stemmed = words[position], stems[position]
    yield word
    if stemmed not in stems[:position]:
        yield f"~{stemmed}"
    if position:
        yield f"{words[position - 1]} {word}"


@lru_cache(1 << 15)
def _hash_term(term: str) -> int:
    return int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "big", signed=True)


@lru_cache(1 << 14)
def _hash_terms(template: str) -> tuple[int, ...]:
    """The terms of a wording with `{}` in the place of its subject."""
    return tuple(map(_hash_term, list_terms(split_words(template.replace("{}", " ")))))


@dataclass(frozen=True, eq=False)
class RelationWords(TensorEquality):
    """How far terms mark relations, one entry for each pair that occurs.

    Attributes:
        terms: `[entries]`, hash of a term, ascending.
        relations: `[entries]`, number of a relation.
        ratios: `[entries]`, nats by which the term is likelier in a wording of the relation than in any.
    """

    terms: Tensor
    relations: Tensor
    ratios: Tensor

    @classmethod
    def from_wordings(cls, templates: Sequence[str], relations: Sequence[int]) -> "RelationWords":
        """Count the terms of wordings, each with `{}` in the place of its subject, and the number of its relation."""
        by_term: dict[int, Counter[int]] = defaultdict(Counter)
        for template, relation in zip(templates, relations, strict=True):
            for term in _hash_terms(template):
                by_term[term][relation] += 1
        wordings = numpy.bincount(numpy.array(relations, numpy.intp))
        entries: list[tuple[int, int, float]] = []
        for term, found in by_term.items():
            total = sum(found.values())
            if total >= MIN_WORDINGS:
                share = total / len(templates)
                marked = numpy.array(list(found))
                likelihood = (numpy.array(list(found.values())) + SMOOTHING * share) / (wordings[marked] + SMOOTHING)
                ratios = numpy.log(likelihood / share).tolist()
                entries += zip([term] * len(marked), marked.tolist(), ratios, strict=True)
        terms, numbers, values = zip(*sorted(entries), strict=True) if entries else ((), (), ())
        return cls(
            torch.tensor(terms, dtype=torch.int64),
            torch.tensor(numbers, dtype=torch.int32),
            torch.tensor(values, dtype=torch.float32),
        )

    @cached_property
    def count(self) -> int:
        """Number of relations that a term marks."""
        return int(self.relations.max()) + 1 if len(self.relations) else 0

    def profile(self, words: Sequence[str]) -> Vector:
        """`[relations + 1]`, how likely the question of these words asks for each relation, and for none of them."""
        nats = numpy.empty(self.count + 1, numpy.float32)
        numpy.multiply(self._sum_terms(tuple(dict.fromkeys(words))), numpy.float32(TEMPER), out=nats[:-1])
        nats[-1] = UNKNOWN
        nats -= nats.max()
        shares: Vector = numpy.exp(nats, out=nats)
        shares[-1] *= UNKNOWN_SHARE
        shares /= numpy.add.reduce(shares)
        return shares

    def _sum_terms(self, words: tuple[str, ...]) -> Vector:
        """`[relations]`, nats of all terms of different words; cached, since a question mostly grows by a word."""
        found = self._sums.get(words)
        if found is None:
            if len(self._sums) >= CACHED_SUMS:
                self._sums.clear()
            known = self._sums.get(words[:-1])
            first = 0 if known is None else len(words) - 1
            found = numpy.zeros(self.count, numpy.float32) if known is None else known.copy()
            stems = [stem_word(word) for word in words]
            for position in range(first, len(words)):
                for term in _terms_at(words, stems, position):
                    if (row := self._row(term)) is not None:
                        found += row
            self._sums[words] = found
        return found

    @cached_property
    def _sums(self) -> dict[tuple[str, ...], Vector]:
        """The sums of the questions that were met."""
        return {}

    def evidence(self, words: Sequence[str]) -> Vector:
        """`[relations]`, nats by which these words speak for each relation; 0 where they ask for none of the bank."""
        profile = self.profile(words)
        evidence: Vector = numpy.log(profile[:-1] * self.count + profile[-1])
        return evidence

    def _row(self, term: str) -> Vector | None:
        """`[relations]`, nats of a term in each; None for one that was not counted."""
        number = _hash_term(term)
        row = self._rows.get(number)
        if row is None and (span := self._spans.get(number)) is not None:
            ratios = self.ratios[span].numpy()
            row = numpy.full(self.count, ABSENT, numpy.float32)
            row[self.relations[span].numpy()] = numpy.maximum(ratios, ABSENT)
            row = self._rows[number] = row * _weigh_term(ratios, self.count)
        return row

    @cached_property
    def _rows(self) -> dict[int, Vector]:
        """The rows of the terms that were met."""
        return {}

    @cached_property
    def _spans(self) -> dict[int, slice]:
        """The entries of each term."""
        terms, starts = numpy.unique(self.terms.numpy(), return_index=True)
        ends = [*starts[1:].tolist(), len(self.terms)]
        return dict(zip(terms.tolist(), map(slice, starts.tolist(), ends), strict=True))


def _weigh_term(ratios: Vector, relations: int) -> numpy.float32:
    """How much a term tells: 1 if it occurs in one relation alone, 0 if in all alike (log-entropy: Dumais 1991)."""
    shares = numpy.exp(ratios) / numpy.exp(ratios).sum()
    return numpy.float32(1 + (shares * numpy.log(shares)).sum() / numpy.log(max(relations, 2)))


def bound_nats(relations: int) -> tuple[float, float]:
    """The least and the most that `RelationProfiles.compare` can give where words mark one of so many relations."""
    least = math.log(MIN_AGREEMENT) + math.log(MIN_AGREEMENT / (1 + MIN_AGREEMENT))
    return least, math.log(max(relations, 1) + MIN_AGREEMENT)


class RelationProfiles:
    """Which relation the words of each of many questions mark, to be compared with others."""

    __slots__ = ("_known", "_lengths", "_marked")

    def __init__(self, profiles: Vector):
        """Of `profiles` `[questions, relations + 1]`."""
        self._marked, self._known = profiles[:, :-1].astype(numpy.float64), 1 - profiles[:, -1].astype(numpy.float64)
        self._lengths = numpy.sqrt((self._marked**2).sum(1))

    def compare(self, read: Vector) -> Values:
        """`[questions]`, nats by which each asks for the relation of `read` `[relations + 1]`.

        Above 0 for the same relation, below for another one, and near 0 as far as one of the two asks for none of the
        bank: how much more they agree than two questions of any relations do, less what they lack to the agreement of
        two that are as vague. Birth date and birthplace agree far more than any two, and far less than two birth dates.
        """
        marked, known = read[:-1].astype(numpy.float64), 1 - float(read[-1])
        agreement, both = self._marked @ marked, self._known * known
        share = agreement / numpy.maximum(self._lengths * math.sqrt(marked @ marked), 1e-12)
        nats = numpy.log(agreement * len(marked) / numpy.maximum(both, 1e-12) + MIN_AGREEMENT)
        nats += numpy.log((share + MIN_AGREEMENT) / (1 + MIN_AGREEMENT))
        return both * nats
