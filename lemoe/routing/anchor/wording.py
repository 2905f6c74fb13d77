"""How a question is worded: what must be equal, beside its meaning, for two wordings to be one question for certain.

Meaning alone does not tell `father` from `mother`, nor `follows` from `is followed by`. So two wordings count as one
only if they have the same content words, by their stems, on the same side of the subject, and the same words that say
what is asked of them: when or where, by or of. No base model is needed.
"""

from typing import NamedTuple

from lemoe.routing.anchor.words import split_words, stem_word

_ARTICLES = frozenset("the a an".split())
_NAMES = frozenset("name names".split())
_NEUTRAL = frozenset("is are was were be been being s and or that this it its what which who whom whose".split())
_FILLERS = _ARTICLES | _NAMES | frozenset("do does did has have had will would can".split())
_FILLERS |= frozenset("current currently now today please tell me".split())
_LOCATING = frozenset("in on at".split())
_ROLES = _LOCATING | frozenset("to for from by with of as when where why how".split())


class Wording(NamedTuple):
    """What is asked about a subject, in which words; equal wordings ask the same.

    Attributes:
        content: stems of the content words, and whether each stands behind the subject.
        roles: the prepositions and question words that say what is asked of them; where there is no content, articles,
            helping verbs and the like too.
    """

    content: frozenset[tuple[str, bool]]
    roles: frozenset[str]


def read_wording(prompt: str, target: str, subject: str) -> Wording | None:
    """The wording of a prompt; None where its subject is not written as it is stored.

    `X's CEO` is `the CEO of X`, and `X was founded by` is `who founded X`. Whether `in` asks for a time or a place, the
    target tells, by having digits or not.
    """
    words, name = split_words(prompt), split_words(subject)
    starts = [start for start in range(len(words) - len(name) + 1) if words[start : start + len(name)] == name]
    if not name or not starts:
        return None
    before, after = _strip_link(words[: starts[-1]]), words[starts[-1] + len(name) :]
    others = {*before, *after}
    behind = not _is_possessive(prompt, subject)
    content = {(stem, False) for stem in _content_stems(before)} | {(stem, behind) for stem in _content_stems(after)}
    roles = (_ROLES & others) - ({"of"} if _NAMES & others else set())
    if roles & _LOCATING:
        roles = (roles - _LOCATING) | {"when" if has_digits(target) else "where"}
    if not content:
        roles |= _FILLERS & others
    elif "by" in roles and all(is_behind for _, is_behind in content):
        content, roles = {(stem, False) for stem, _ in content}, roles - {"by"}
    return Wording(frozenset(content), frozenset(roles))


def has_digits(text: str) -> bool:
    """Whether a text is, or holds, a number or a date."""
    return any(char.isdigit() for char in text)


def _is_possessive(prompt: str, subject: str) -> bool:
    """Whether a subject is followed by an apostrophe: `Ada's`, `the Falks'`."""
    written = prompt.casefold().replace("’", "'")
    return f"{subject.casefold()}'" in written


def _strip_link(words: list[str]) -> list[str]:
    """The words in front of a subject, without its article and the `of` that links it."""
    while words and words[-1] in _ARTICLES:
        words = words[:-1]
    return words[:-1] if words[-1:] == ["of"] else words


def _content_stems(words: list[str]) -> set[str]:
    return {stem_word(word) for word in words if word not in _NEUTRAL | _ROLES | _FILLERS}
