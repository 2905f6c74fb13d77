"""Edits that repeat or contradict each other: found before training, since a model cannot hold two answers."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lemoe.data.edits import Edit

SIMILARITY_THRESHOLD = 0.6  # Jaccard similarity of the content words from which two questions contradict
COMPARED = 1000  # later edits about its subject that each edit is compared with

_WORD = re.compile(r"\w+")
_STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "to",
        "for",
        "from",
        "by",
        "with",
        "and",
        "or",
        "as",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "do",
        "does",
        "did",
        "has",
        "have",
        "had",
        "what",
        "which",
        "who",
        "whom",
        "whose",
        "when",
        "where",
        "why",
        "how",
        "that",
        "this",
        "it",
        "its",
        "s",
    ]
)

Relation = Literal["duplicate", "superseded", "contradiction"]


@dataclass(frozen=True)
class Conflict:
    """Two edits that cannot both be kept, or may not both be meant.

    `duplicate`: the same question with the same target; one is enough.
    `superseded`: the same question, another target; the later edit wins.
    `contradiction`: similar questions about one subject, other targets; both are trained, and should be checked.
    """

    relation: Relation
    earlier: str
    later: str


def find_conflicts(edits: Sequence[Edit]) -> list[Conflict]:
    """All conflicts among `edits`, each with the nearest later edit, in the file's order.

    For contradictions, an edit is compared with the next `COMPARED` edits about its subject.
    """
    by_subject: dict[str, list[int]] = defaultdict(list)
    for index, edit in enumerate(edits):
        by_subject[normalise_question(edit.subject or edit.prompt)].append(index)
    conflicts = []
    for members in by_subject.values():
        if len(members) > 1:
            found = _find_subject_conflicts([edits[index] for index in members])
            conflicts += [(members[position], conflict) for position, conflict in found]
    return [conflict for _, conflict in sorted(conflicts, key=lambda pair: pair[0])]


def redundant_edit_ids(conflicts: Sequence[Conflict]) -> set[str]:
    """Ids of the edits that need no training: duplicates and superseded ones."""
    return {conflict.earlier for conflict in conflicts if conflict.relation != "contradiction"}


@dataclass(frozen=True)
class _ComparedEdit:
    """What is compared of an edit: its normalised question and target, and the question's content words."""

    prompt: str
    target: str
    content: frozenset[str]


def _find_subject_conflicts(edits: Sequence[Edit]) -> Iterator[tuple[int, Conflict]]:
    """The conflicts among edits about one subject, each with the index of the earlier edit.

    A later edit with the same question takes precedence over contradictions between the two.
    """
    compared = [
        _ComparedEdit(normalise_question(edit.prompt), normalise_question(edit.target), _content_words(edit))
        for edit in edits
    ]
    last_asked: dict[str, int] = {}
    for index in reversed(range(len(edits))):
        mine = compared[index]
        later = last_asked.get(mine.prompt)
        relation: Relation = "contradiction"
        if later is not None:
            relation = "duplicate" if compared[later].target == mine.target else "superseded"
        else:
            following = range(index + 1, min(index + 1 + COMPARED, len(edits)))
            later = next((other for other in following if _is_contradiction(mine, compared[other])), None)
        if later is not None:
            yield index, Conflict(relation, edits[index].id, edits[later].id)
        last_asked[mine.prompt] = index


def _is_contradiction(one: _ComparedEdit, other: _ComparedEdit) -> bool:
    return one.target != other.target and _jaccard_similarity(one.content, other.content) >= SIMILARITY_THRESHOLD


def _jaccard_similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard similarity of the content words of two questions."""
    shared = len(one & other)
    union = len(one) + len(other) - shared
    return shared / union if union else 1.0


def _content_words(edit: Edit) -> frozenset[str]:
    subject = set(_WORD.findall(normalise_question(edit.subject or "")))
    words = _WORD.findall(normalise_question(edit.prompt))
    return frozenset(word for word in words if word not in subject | _STOP_WORDS)


def normalise_question(text: str) -> str:
    """`text` case-folded, with single spaces and no closing punctuation; equal results are the same question."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.rstrip("?.! ") or folded
