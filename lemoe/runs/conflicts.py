"""Edits that ask what the adaptor to continue answers already: refused, or left out, before anything is trained."""

from collections.abc import Sequence

from lemoe.adaptor.contradictions import conflicts_with
from lemoe.adaptor.merging import OnConflict, refuse_conflicts
from lemoe.adaptor.state import AdaptorState
from lemoe.base.loading import BaseModel
from lemoe.base.tokens import encode_edits
from lemoe.data.edits import Edit
from lemoe.errors import InputError
from lemoe.routing.anchor.anchors import Anchors, build_gate
from lemoe.routing.anchor.gate import Anchor
from lemoe.routing.anchor.keys import embed_prompts
from lemoe.routing.anchor.meaning import Meaning
from lemoe.runs.progress import ProgressCallback
from lemoe.settings import Settings


def resolve_conflicts(
    base: BaseModel,
    new: Sequence[Edit],
    start: AdaptorState,
    settings: Settings,
    on_conflict: OnConflict,
    progress: ProgressCallback,
) -> list[Edit]:
    """The `new` edits that are taught on top of `start`: all, or, with `on_conflict` keep, those that nothing answers.

    Raises:
        AdaptorError: with `on_conflict` error, listing the edits that would be superseded.
        InputError: if none remains.
    """
    if on_conflict in ("latest", "both") or not isinstance(start.router, Anchors):
        return list(new)
    found = conflicts_with(start, new, _preview_anchors(base, new, start.router.meaning, settings))
    if found and on_conflict == "error":
        refuse_conflicts(found)
    for earlier, later in found:
        progress.note(f"edit {later.label} is left out: {earlier.label} of round {earlier.round} answers its question")
    answered = {later.digest for _, later in found}
    if remaining := [edit for edit in new if edit.digest not in answered]:
        return remaining
    raise InputError(
        f"the adaptor to continue answers the questions of all {len(new)} edits; there is nothing to teach"
    )


def _preview_anchors(base: BaseModel, new: Sequence[Edit], meaning: Meaning | None, settings: Settings) -> Anchors:
    """The anchors that these edits will have; of the keys, only those of their own prompts."""
    anchors = [
        Anchor(passage.prompt, passage.target, edit.subject)
        for edit, passage in zip(new, encode_edits(base, new), strict=True)
    ]
    if meaning is None:
        return Anchors.from_anchors(anchors)
    prompts = [anchor.prompt for anchor in anchors]
    gate = build_gate(base, anchors, settings)
    keys = embed_prompts(base, meaning, gate, prompts, range(len(anchors)), settings.batch_tokens)
    return Anchors.from_anchors(anchors, meaning, [key[None] for key in keys])
