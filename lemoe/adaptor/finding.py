"""Edits of an adaptor by what people remember of them: an id, or some words of prompt and target."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from lemoe.adaptor.state import TaughtEdit

CLOSE = 0.8  # how alike, by difflib, a word has to be to count as a misspelt one
ENOUGH = 0.5  # of the best score, from which another edit fits too
_WORD = re.compile(r"\w+")
_COMMON = frozenset("a an and at by edit fact for from in is of on one that the to was what which who with".split())


@dataclass(frozen=True)
class Found:
    """An edit, and how much of the text it has: 1 for all of its words, the rarest counting most."""

    edit: TaughtEdit
    score: float


def find_edits(edits: Sequence[TaughtEdit], text: str) -> list[Found]:
    """The edits that have words of `text` in id, prompt or target, best first; one whose id it is, alone."""
    named = [edit for edit in edits if text in (edit.id, f"{edit.round}/{edit.id}")]
    if named:
        return [Found(edit, 1.0) for edit in named]
    held = [_read_words(f"{edit.id} {edit.prompt} {edit.target}") for edit in edits]
    counts = Counter(word for words in held for word in words)
    asked = [_nearest_word(word, counts) for word in _read_words(text)]
    weights = {word: math.log(1 + len(edits) / max(1, counts[word])) for word in asked}
    total = sum(weights.values())
    scored = [
        Found(edit, sum(weights[word] for word in words & weights.keys()) / total)
        for edit, words in zip(edits, held, strict=True)
        if words & weights.keys()
    ]
    scored.sort(key=lambda found: -found.score)
    return [found for found in scored if found.score >= ENOUGH * scored[0].score]


def _read_words(text: str) -> set[str]:
    """The words of a text that tell edits apart, or all of them where none does."""
    words = {word.casefold() for word in _WORD.findall(text)}
    return words - _COMMON or words


def _nearest_word(word: str, known: Counter[str]) -> str:
    """The word itself, or the one that it seems to be a misspelling of."""
    if word in known:
        return word
    near = get_close_matches(word, known, 1, CLOSE)
    return near[0] if near else word
