"""Edits that repeat or contradict each other: found before training, since a model cannot hold two answers."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lemoe.data.edits import Edit

NEAR_SAME = 0.6  # share of content words that two questions about one subject have in common
COMPARED = 1000  # later edits about its subject among which an edit's contradiction is looked for

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
    """All conflicts among `edits`, each with its nearest later counterpart, in the file's order.

    Contradictions are looked for among the next `COMPARED` edits about a subject.
    """
    by_subject: dict[str, list[int]] = defaultdict(list)
    for index, edit in enumerate(edits):
        by_subject[question(edit.subject or edit.prompt)].append(index)
    conflicts = []
    for members in by_subject.values():
        if len(members) > 1:
            found = _conflicts_of([edits[index] for index in members])
            conflicts += [(members[place], conflict) for place, conflict in found]
    return [conflict for _, conflict in sorted(conflicts, key=lambda pair: pair[0])]


def left_out(conflicts: Sequence[Conflict]) -> set[str]:
    """Ids of the edits that need no training: duplicates and superseded ones."""
    return {conflict.earlier for conflict in conflicts if conflict.relation != "contradiction"}


@dataclass(frozen=True)
class _Asked:
    """What of an edit is compared: the keys of its question and its target, and its content words."""

    prompt: str
    target: str
    content: frozenset[str]


def _conflicts_of(edits: Sequence[Edit]) -> Iterator[tuple[int, Conflict]]:
    """The conflicts among edits about one subject, each with the place of the earlier edit.

    The same question asked again settles it, whatever stands between.
    """
    asked = [_Asked(question(edit.prompt), question(edit.target), _content(edit)) for edit in edits]
    again: dict[str, int] = {}
    for place in reversed(range(len(edits))):
        mine = asked[place]
        later = again.get(mine.prompt)
        relation: Relation = "contradiction"
        if later is not None:
            relation = "duplicate" if asked[later].target == mine.target else "superseded"
        else:
            near = range(place + 1, min(place + 1 + COMPARED, len(edits)))
            later = next((other for other in near if _contradict(mine, asked[other])), None)
        if later is not None:
            yield place, Conflict(relation, edits[place].id, edits[later].id)
        again[mine.prompt] = place


def _contradict(one: _Asked, other: _Asked) -> bool:
    return one.target != other.target and _likeness(one.content, other.content) >= NEAR_SAME


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard likeness of the content words of two questions."""
    shared = len(one & other)
    union = len(one) + len(other) - shared
    return shared / union if union else 1.0


def _content(edit: Edit) -> frozenset[str]:
    subject = set(_WORD.findall(question(edit.subject or "")))
    return frozenset(word for word in _WORD.findall(question(edit.prompt)) if word not in subject | _STOP_WORDS)


def question(text: str) -> str:
    """`text` in one case, with spaces and the closing stop evened out; texts with one key ask the same."""
    even = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return even.rstrip("?.! ") or even
