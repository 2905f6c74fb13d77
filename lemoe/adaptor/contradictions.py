"""Adaptors whose edits contradict each other in other words: found as they are stacked, by what their files hold."""

from collections.abc import Sequence
from dataclasses import replace

from lemoe.adaptor.state import AdaptorState, TaughtEdit
from lemoe.data.counting import format_count
from lemoe.data.edits import Edit
from lemoe.routing.anchor.anchors import Anchors
from lemoe.routing.anchor.contradictions import AskedQuestion, Contradiction, find_contradictions
from lemoe.routing.anchor.lexicon import guess_subject

MAX_NOTED = 20  # pairs that may contradict each other and are named one by one
EditPair = tuple[TaughtEdit, TaughtEdit]


def update_contradicted(state: AdaptorState, sources: Sequence[int]) -> AdaptorState:
    """The state, in which edits supersede those of an earlier source that they contradict for certain.

    Args:
        sources: of each round; ascending.
    """
    found = [(pair.earlier, pair.later) for pair in _find_contradictions(state, sources) if pair.certain]
    if not found:
        return state
    assert isinstance(state.router, Anchors)
    return replace(state, router=state.router.with_updates(found))


def possible_contradictions(state: AdaptorState, sources: Sequence[int]) -> tuple[EditPair, ...]:
    """Edits that both answer although they may contradict each other: one of an earlier source, and the later one.

    Args:
        sources: of each round; ascending.
    """
    found = _find_contradictions(state, sources)
    if not found:
        return ()
    edits, superseded = state.edits, state.router.superseded()
    return tuple(
        (edits[pair.earlier], edits[pair.later])
        for pair in found
        if pair.earlier not in superseded and pair.later not in superseded
    )


def split_sources(state: AdaptorState, continued: int) -> list[int]:
    """The source of each round where those after the first `continued` were taught on top of them."""
    return [int(number >= continued) for number in range(len(state.rounds))]


def contradiction_notes(pairs: Sequence[EditPair]) -> list[str]:
    """The messages about edits that may contradict each other, up to `MAX_NOTED` of them."""
    notes = [
        f"edit {later.label} of round {later.round} may contradict {earlier.label} of round {earlier.round}: the "
        "questions are alike, and both answer"
        for earlier, later in pairs[:MAX_NOTED]
    ]
    more = len(pairs) - len(notes)
    return [*notes, f"{format_count(more, 'more edit')} may contradict earlier ones"] if more else notes


def conflicts_with(start: AdaptorState, edits: Sequence[Edit], anchors: Anchors) -> list[EditPair]:
    """The edits of `start` that would be superseded by new `edits` with these `anchors`, each with every such edit."""
    assert isinstance(start.router, Anchors)
    router, before = Anchors.stack([(start.router, []), (anchors, [])]), len(start.edits)
    fresh = [TaughtEdit(each.id, each.digest, each.prompt, each.target, len(start.rounds) + 1) for each in edits]
    both = [*start.edits, *fresh]
    superseded = start.router.superseded()
    asked = {anchor.prompt: number for number, anchor in enumerate(start.router.anchors) if number not in superseded}
    pairs = {
        (asked[each.prompt], number) for number, each in enumerate(anchors.anchors, before) if each.prompt in asked
    }
    found = _compare_edits(router, both, [int(number >= before) for number in range(len(both))])
    pairs |= {(pair.earlier, pair.later) for pair in found if pair.certain and pair.earlier not in superseded}
    return [(both[earlier], both[later]) for earlier, later in sorted(pairs)]


def _find_contradictions(state: AdaptorState, sources: Sequence[int]) -> list[Contradiction]:
    """The contradictions between edits of rounds of different sources."""
    if not isinstance(state.router, Anchors) or state.router.meaning is None or len(set(sources)) < 2:
        return []
    return _compare_edits(state.router, state.edits, [sources[edit.round - 1] for edit in state.edits])


def _compare_edits(router: Anchors, edits: Sequence[TaughtEdit], sources: Sequence[int]) -> list[Contradiction]:
    """The contradictions between edits of different sources; none where words alone decide."""
    if router.meaning is None:
        return []
    questions = [
        AskedQuestion(edit.prompt, edit.target, anchor.subject or guess_subject(edit.prompt), keys)
        for edit, anchor, keys in zip(edits, router.anchors, router.split_keys(), strict=True)
    ]
    return find_contradictions(router.meaning, questions, sources, router.superseded())
