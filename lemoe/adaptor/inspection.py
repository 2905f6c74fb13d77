"""What an adaptor file holds, read without trusting it; and whether it is intact."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.adaptor.state import AdaptorState, TaughtEdit, check_base
from lemoe.data.counting import format_count
from lemoe.data.edits import Edit, combine_digests
from lemoe.errors import AdaptorError
from lemoe.routing.anchor.anchors import Anchors
from lemoe.routing.anchor.gate import Anchor

if TYPE_CHECKING:
    from lemoe.base.loading import BaseModel

MAX_LISTED = 20  # edits named in an error


@dataclass(frozen=True)
class Inspection:
    """An adaptor file, described.

    Attributes:
        path: of the file.
        size: bytes.
        sha256: of the whole file.
        tool: the version that wrote it.
        state: what it holds.
        edit_count: how many edits it was taught.
        superseded: edits that a later one supersedes, each with that one.
    """

    path: Path
    size: int
    sha256: str
    tool: str
    state: AdaptorState
    edit_count: int
    superseded: tuple[tuple[TaughtEdit, TaughtEdit], ...]

    @property
    def missed_edits(self) -> list[TaughtEdit]:
        """The edits that failed the final reliability check of their round."""
        missed_ids = [set(record.missed or ()) for record in self.state.rounds]
        return [edit for edit in self.state.edits if edit.id in missed_ids[edit.round - 1]]


def inspect_adaptor(path: Path | str) -> Inspection:
    """Describe an adaptor file, or the one in a run's folder; every tensor is checked on the way.

    Raises:
        AdaptorError: if it is not a valid adaptor; see `load_adaptor`.
    """
    file = AdaptorFile(path)
    state = file.load()
    content = file.path.read_bytes()
    return Inspection(
        path=file.path,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        tool=file.tool,
        state=state,
        edit_count=sum(len(record.edits) for record in state.rounds),
        superseded=tuple(state.superseded_edits),
    )


def verify_adaptor(found: Inspection, base: "BaseModel | None" = None) -> list[str]:
    """Check a file's records, and with `base` whether it fits; the checks that passed, one line each.

    Raises:
        AdaptorError: listing the rounds whose records contradict themselves; or if `base` is not the adaptor's.
    """
    problems = []
    for number, record in enumerate(found.state.rounds, 1):
        if combine_digests(record.edits) != record.edits_sha256:
            problems.append(f"round {number}: the digests of its edits do not give its hash")
        if len(record.ids) != len(record.edits):
            problems.append(f"round {number}: {len(record.ids)} names for {len(record.edits)} edits")
    problems += [
        f"{edit.label}: its text is not what it teaches, by its digest" for edit in _find_mismatched_texts(found.state)
    ]
    if len({record.id for record in found.state.rounds}) < len(found.state.rounds):
        problems.append("a round is stored twice")
    if problems:
        raise AdaptorError("\n  ".join([f"{found.path}: its records contradict themselves:", *problems]))
    checked = [
        "the file is as it was written, by its SHA-256",
        "every tensor has the shape and type that the records say, and finite values",
        f"the records of {format_count(len(found.state.rounds), 'round')} fit their edits",
    ]
    if base is not None:
        check_base(base, found.state)
        _check_tokens(found, base)
        checked.append(f"made for {base.source.name}: edited FFN and tokenizer are the same")
    return checked


def _pair_with_anchors(state: AdaptorState) -> list[tuple[TaughtEdit, Anchor]]:
    """Each edit with its anchor; empty if the method stores no anchors."""
    return list(zip(state.edits, state.router.anchors, strict=True)) if isinstance(state.router, Anchors) else []


def _find_mismatched_texts(state: AdaptorState) -> list[TaughtEdit]:
    """The edits whose text does not have their digest."""
    return [
        edit
        for edit, anchor in _pair_with_anchors(state)
        if edit.prompt
        and edit.digest
        not in [Edit(edit.prompt, edit.target, subject, id=edit.id).digest for subject in (anchor.subject, "")]
    ]


def _check_tokens(found: Inspection, base: "BaseModel") -> None:
    """Refuse texts that differ from the anchors' tokens, by which the gate decides."""
    from lemoe.base.tokens import Passage, encode_passage

    problems = []
    for edit, anchor in _pair_with_anchors(found.state):
        if edit.prompt:
            passage = None
            with suppress(ValueError):
                passage = encode_passage(base, edit.prompt, edit.target)
            if passage != Passage(anchor.prompt, anchor.target):
                problems.append(f"{edit.label}: its text is not what its anchor holds")
    if problems:
        raise AdaptorError("\n  ".join([f"{found.path}: its records contradict its anchors:", *problems[:MAX_LISTED]]))


def decode_texts(found: Inspection, base: "BaseModel") -> Inspection:
    """The description with the edits' texts as the anchors' tokens give them, where the records have none."""

    def decode_tokens(tokens: tuple[int, ...]) -> str:
        return str(base.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    anchors = [anchor for _, anchor in _pair_with_anchors(found.state)]
    rounds, start = [], 0
    for record in found.state.rounds:
        own = anchors[start : start + len(record.edits)]
        start += len(record.edits)
        if own and not record.prompts:
            prompts, targets = (
                tuple(map(decode_tokens, texts)) for texts in ([a.prompt for a in own], [a.target for a in own])
            )
            record = replace(record, prompts=prompts, targets=targets)
        rounds.append(record)
    state = replace(found.state, rounds=tuple(rounds))
    return replace(found, state=state, superseded=tuple(state.superseded_edits))
