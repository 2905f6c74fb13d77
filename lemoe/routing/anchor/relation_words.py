"""Which relation of the bank a question asks for, by its words: naive Bayes, with none of them as a possible answer.

A word says most where it tells relations apart that a base model reads as nearly the same: `father` and `mother`,
`employer` and `occupation`, `follows` and `followed by`. A question whose words mark no relation says nothing.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

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
MIN_AGREEMENT = 0.02  # of two profiles, as a multiple of what two questions of any relations have


def list_terms(words: Sequence[str]) -> list[str]:
    """What is counted of a question: its words, their stems, and each two that follow each other."""
    unique = list(dict.fromkeys(words))
    pairs = [f"{one} {other}" for one, other in pairwise(unique)]
    return [*unique, *dict.fromkeys("~" + stem_word(word) for word in unique), *pairs]


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
        known = [row for term in list_terms(words) if (row := self._row(term)) is not None]
        nats = TEMPER * (numpy.sum(known, axis=0) if known else numpy.zeros(self.count, numpy.float32))
        nats = numpy.append(nats, UNKNOWN)
        shares = numpy.exp(nats - nats.max())
        shares[-1] *= UNKNOWN_SHARE
        profile: Vector = (shares / shares.sum()).astype(numpy.float32)
        return profile

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


def compare_profiles(profiles: Vector, read: Vector) -> Values:
    """`[questions]`, nats by which each of `profiles` `[questions, relations + 1]` asks for the relation of `read`.

    Above 0 for the same relation, below for another one, and near 0 as far as one of the two asks for none of the bank.
    """
    both = (1 - profiles[:, -1].astype(numpy.float64)) * (1 - float(read[-1]))
    shared = profiles[:, :-1].astype(numpy.float64) @ read[:-1].astype(numpy.float64)
    agreement = (len(read) - 1) * shared / numpy.maximum(both, 1e-12)
    compared: Values = both * numpy.log(agreement + MIN_AGREEMENT)
    return compared
