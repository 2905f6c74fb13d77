"""How people ask for an edit: in the words of the relation of the bank of questions that is nearest to it in meaning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy

from lemoe.data.question_bank import ENGLISH_FORMS, REMARK, read_question_bank
from lemoe.routing.anchor.meaning import Keys, Meaning, Vector

MIN_RELATION_RATIO = 8.0  # nats by which a relation of the bank must ask the same as an edit, to lend it its wordings
MAX_OTHER_RATIO = 2.0  # nats up to which a question asks something else than an edit
NEAR_RELATIONS = 24  # relations nearest to an edit, among those that ask something else, of which its negatives are


@dataclass(frozen=True)
class Wordings:
    """Templates, with `{}` in the place of the subject, that ask for an edit and that ask something else about it.

    Attributes:
        asking: by form of the bank; empty where no relation of the bank is near enough.
        others: questions and phrases of other relations, nearest first, one tuple for each relation.
    """

    asking: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: tuple[tuple[str, ...], ...] = ()


def choose_wordings(meaning: Meaning | None, keys: Sequence[Vector]) -> list[Wordings]:
    """The wordings for each edit, by its keys `[keys, rank]`."""
    relations = _english_templates()
    if meaning is None or len(meaning.cohort) != len(relations):
        return [Wordings() for _ in keys]
    cohort = Keys(meaning, meaning.cohort.numpy())
    return [_choose_by_ratio(relations, cohort.compare(key[0])) for key in keys]


def _choose_by_ratio(relations: Sequence[tuple[str, Mapping[str, tuple[str, ...]]]], ratios: Vector) -> Wordings:
    order = numpy.argsort(-ratios, kind="stable")
    kind, nearest = relations[order[0]]
    asking = nearest if ratios[order[0]] >= MIN_RELATION_RATIO else {}
    near = [number for number in order if ratios[number] <= MAX_OTHER_RATIO]
    alike = [number for number in near if relations[number][0] == kind] if asking else near
    others = tuple(_key_forms(relations[number][1]) for number in alike[:NEAR_RELATIONS])
    return Wordings(asking, others)


def _key_forms(forms: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return (*forms["questions"], *forms["phrases"])


@cache
def _english_templates() -> tuple[tuple[str, Mapping[str, tuple[str, ...]]], ...]:
    """Kind of subject and templates by form of each relation, in the bank's order, which is that of a fit's cohort."""
    relations: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {}
    for wording in read_question_bank():
        if wording.relation != REMARK and wording.form in ENGLISH_FORMS:
            _, forms = relations.setdefault(wording.relation, (wording.kind, {}))
            forms[wording.form] = (*forms.get(wording.form, ()), wording.template)
    return tuple(relations.values())
