"""How people ask about a subject: in the words of the relations of the bank of questions, by what an edit means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy

from lemoe.data.question_bank import ENGLISH_FORMS, KEY_FORMS, REMARK, read_question_bank
from lemoe.routing.anchor.gate import Gate
from lemoe.routing.anchor.meaning import Keys, Meaning, Vector

MIN_RELATION_RATIO = 9.0  # nats by which a relation of the bank must ask the same as an edit, to lend it its wordings,
MAX_OTHER_RATIO = 2.0  # and up to which a question asks something else
NEAR_RELATIONS = 24  # relations nearest to an edit, among those that ask something else, from which negatives come

Forms = Mapping[str, tuple[str, ...]]


class _Relation(NamedTuple):
    """A relation of the bank: its name, its kind of subject, and its English templates by form."""

    name: str
    kind: str
    forms: Forms


@dataclass(frozen=True)
class Wordings:
    """Texts about an edit's subject, in words of the bank.

    Attributes:
        asking: by form of the bank, texts that ask for the edit; empty where no relation of the bank is near enough.
        others: questions and phrases that ask something else, of one relation each, the nearest first.
    """

    asking: Forms = field(default_factory=dict)
    others: tuple[tuple[str, ...], ...] = ()


def choose_wordings(meaning: Meaning, keys: Sequence[Vector], gate: Gate, subjects: Sequence[str]) -> list[Wordings]:
    """The wordings for each edit, by its keys `[keys, rank]` and the words of its question; none without a subject.

    A fit on another bank than this one has no relations to compare with, so that there are none either.

    Args:
        gate: holds the edits in order.
    """
    relations, words = _english_relations(), meaning.relation_words
    if not len(meaning.cohort) == words.count == len(relations):
        return [Wordings() for _ in keys]
    cohort = Keys(meaning, meaning.cohort.numpy())
    by_name = sorted(range(len(relations)), key=lambda at: relations[at].name)
    ratios = numpy.zeros((len(keys), len(relations)), numpy.float32)
    ratios[:, by_name] = [words.evidence(gate.stored_question(number).question.words) for number in range(len(keys))]
    ratios += [cohort.compare(key[0]) for key in keys]
    return [
        _choose_by_ratio(relations, ratio, subject) if subject else Wordings()
        for ratio, subject in zip(ratios, subjects, strict=True)
    ]


def _choose_by_ratio(relations: Sequence[_Relation], ratios: Vector, subject: str) -> Wordings:
    """By the log-likelihood ratios `[relations]` of asking the same; the others are about the same kind of subject."""
    order = numpy.argsort(-ratios, kind="stable").tolist()
    nearest = relations[order[0]]
    known = bool(ratios[order[0]] >= MIN_RELATION_RATIO)
    others = [at for at in order if ratios[at] <= MAX_OTHER_RATIO and (not known or relations[at].kind == nearest.kind)]
    return Wordings(
        {form: _put_in(templates, subject) for form, templates in nearest.forms.items()} if known else {},
        tuple(_put_in(_key_templates(relations[at].forms), subject) for at in others[:NEAR_RELATIONS]),
    )


def _put_in(templates: Sequence[str], subject: str) -> tuple[str, ...]:
    return tuple(template.replace("{}", subject) for template in templates)


def _key_templates(forms: Forms) -> list[str]:
    return [template for form in KEY_FORMS for template in forms[form]]


@cache
def _english_relations() -> tuple[_Relation, ...]:
    """The relations in the bank's order, which is that of a fit's cohort; words number them by name."""
    relations: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {}
    for wording in read_question_bank():
        if wording.relation != REMARK and wording.form in ENGLISH_FORMS:
            _, forms = relations.setdefault(wording.relation, (wording.kind, {}))
            forms[wording.form] = (*forms.get(wording.form, ()), wording.template)
    return tuple(_Relation(name, kind, forms) for name, (kind, forms) in relations.items())


def ask_the_same(meaning: Meaning, one: Vector, other: Vector) -> bool:
    """Whether a question with the keys `other` may ask the same as an edit with the keys `one`, both `[keys, rank]`."""
    return bool(Keys(meaning, one).compare_all(other).max() > MAX_OTHER_RATIO)
