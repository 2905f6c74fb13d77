"""Edits that repeat or contradict each other: found before training, since a model cannot hold two answers."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lemoe.edits import Edit

NEAR_SAME = 0.6  # share of content words that two questions about one subject have in common

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
    `contradiction`: near-same questions about one subject, other targets; both are trained, and should be looked at.
    """

    relation: Relation
    earlier: str
    later: str


def find_conflicts(edits: Sequence[Edit]) -> list[Conflict]:
    """All conflicts among `edits`, each with its nearest later counterpart, in the file's order."""
    by_subject: dict[str, list[int]] = defaultdict(list)
    for index, edit in enumerate(edits):
        by_subject[question(edit.subject or edit.prompt)].append(index)
    conflicts = []
    for members in by_subject.values():
        for place, earlier in enumerate(members):
            found = [c for later in members[place + 1 :] if (c := _compare(edits[earlier], edits[later]))]
            if found:  # the same question asked again settles it, whatever stands between
                conflicts.append((earlier, min(found, key=lambda conflict: conflict.relation == "contradiction")))
    return [conflict for _, conflict in sorted(conflicts, key=lambda pair: pair[0])]


def left_out(conflicts: Sequence[Conflict]) -> set[str]:
    """Ids of the edits that need no training: duplicates and superseded ones."""
    return {conflict.earlier for conflict in conflicts if conflict.relation != "contradiction"}


def _compare(earlier: Edit, later: Edit) -> Conflict | None:
    same_target = question(earlier.target) == question(later.target)
    if question(earlier.prompt) == question(later.prompt):
        return Conflict("duplicate" if same_target else "superseded", earlier.id, later.id)
    if not same_target and _likeness(earlier, later) >= NEAR_SAME:
        return Conflict("contradiction", earlier.id, later.id)
    return None


def _likeness(first: Edit, second: Edit) -> float:
    """Jaccard likeness of the content words of two questions, their subject left out."""
    one, other = _content(first), _content(second)
    return len(one & other) / len(one | other) if one | other else 1.0


def _content(edit: Edit) -> frozenset[str]:
    subject = set(_WORD.findall(question(edit.subject or "")))
    return frozenset(word for word in _WORD.findall(question(edit.prompt)) if word not in subject | _STOP_WORDS)


def question(text: str) -> str:
    """`text` in one case, with spaces and the closing stop evened out; texts with one key ask the same."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip("?.! ")
