"""Synthetic edits by the million: real questions about made-up names."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from lemoe.data.edits import Edit, Probe

GROWTH = 0.75  # distinct words grow with the number of names to this power; .83 to .93 among ZsRE's subjects
COMMON = 50  # a word's frequency goes with 1 / (rank + this): the first is in every hundred and seventieth name


def make_renamed_edits(
    edits: Sequence[Edit], count: int, *, crowded: bool = False, again: float = 0.0, seed: int = 0
) -> Iterator[Edit]:
    """`count` edits: real ones with another subject of as many words (two at least).

    Words are as frequent as in real names, the most frequent ones of real subjects first; there are as many as so many
    names have, blends of two real words where those do not suffice.

    Args:
        crowded: only words of real subjects, each as frequent as the other, however many names are made of them.
        again: share of edits about a subject that has one already; the others have a new one each.
    """
    rng = random.Random(seed)
    usable = [edit for edit in edits if edit.subject and edit.subject in edit.prompt and edit.rephrases]
    subjects = {edit.subject: None for edit in usable}
    seen = Counter(word for subject in subjects for word in (subject or "").split() if _is_name(word))
    words = sorted(seen, key=lambda word: (-seen[word], word))
    if not crowded:
        words = _extend_words(words, round(len(words) * (count / len(subjects)) ** GROWTH), rng)
    weights = list(accumulate(1.0 if crowded else 1 / (rank + COMMON) for rank in range(len(words))))
    names: dict[str, None] = {}
    asked: list[str] = []
    while len(asked) < count:
        edit = rng.choice(usable)
        name = " ".join(rng.choices(words, cum_weights=weights, k=max(2, len((edit.subject or "").split()))))
        if asked and rng.random() < again:
            name = rng.choice(asked)
        elif name in names:
            continue
        names[name] = None
        asked.append(name)
        yield _rename_subject(edit, name, f"made-{len(asked)}")


def make_crowded_edits(edits: Sequence[Edit], count: int, name: str = "Marie Curie", seed: int = 0) -> list[Edit]:
    """`count` edits of one subject: real questions about it, told apart by one to three words of other questions."""
    rng = random.Random(seed)
    usable = [edit for edit in edits if edit.subject and edit.subject in edit.prompt and edit.rephrases]
    texts = (edit.prompt.replace(edit.subject or "", "") for edit in usable)
    words = sorted({word for text in texts for word in text.strip("?. ").split() if len(word) > 3 and word.islower()})
    made: dict[str, Edit] = {}
    while len(made) < count:
        edit = _rename_subject(rng.choice(usable), name, f"made-{len(made) + 1}")
        asked = edit.prompt.split()
        for _ in range(rng.randint(1, 3)):
            asked.insert(rng.randrange(len(asked) + 1), rng.choice(words))
        if name in (prompt := " ".join(asked)):
            made.setdefault(prompt, replace(edit, prompt=prompt))
    return list(made.values())


def _is_name(word: str) -> bool:
    return word[:1].isupper() and word.isalpha() and len(word) > 4


def _extend_words(words: list[str], count: int, rng: random.Random) -> list[str]:
    """The first `count` of `words`, blends of two behind them where there are fewer."""
    known = dict.fromkeys(words[: max(count, COMMON)])
    while len(known) < count:
        one, other = rng.choice(words), rng.choice(words)
        known.setdefault(one[: len(one) // 2 + 1] + other[len(other) // 2 :])
    return list(known)


def _rename_subject(edit: Edit, name: str, id_: str) -> Edit:
    def replace_subject(text: str) -> str:
        return text.replace(edit.subject or "", name)

    rephrases = tuple(Probe(replace_subject(probe.prompt), probe.target, probe.kind) for probe in edit.rephrases)
    return replace(
        edit,
        id=id_,
        subject=name,
        prompt=replace_subject(edit.prompt),
        rephrases=rephrases,
        portability=(),
        generation=(),
    )
