"""What an adaptor file holds, read without trusting it; and whether it is whole."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lemoe.adaptor import AdaptorState, Taught, check_base
from lemoe.checkpoint import AdaptorFile
from lemoe.edits import digest_over
from lemoe.errors import AdaptorError

if TYPE_CHECKING:
    from lemoe.models import BaseModel


@dataclass(frozen=True)
class Inspection:
    """An adaptor file, described.

    Attributes:
        path: of the file.
        size: bytes.
        sha256: of the whole file.
        tool: the version that wrote it.
        state: what it holds.
        edits: how many it was taught.
        replaced: edits that a later one supersedes, each with that one.
    """

    path: Path
    size: int
    sha256: str
    tool: str
    state: AdaptorState
    edits: int
    replaced: tuple[tuple[Taught, Taught], ...]


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
        edits=sum(len(record.edits) for record in state.rounds),
        replaced=tuple(state.replaced),
    )


def verify(found: Inspection, base: "BaseModel | None" = None) -> list[str]:
    """What was checked, one line each.

    Raises:
        AdaptorError: listing the rounds whose records contradict themselves; or if `base` is not the adaptor's.
    """
    problems = []
    for number, record in enumerate(found.state.rounds, 1):
        if digest_over(record.edits) != record.edits_sha256:
            problems.append(f"round {number}: the digests of its edits do not give its hash")
        if len(record.ids) != len(record.edits):
            problems.append(f"round {number}: {len(record.ids)} names for {len(record.edits)} edits")
    if len({record.id for record in found.state.rounds}) < len(found.state.rounds):
        problems.append("a round is there twice")
    if problems:
        raise AdaptorError("\n  ".join([f"{found.path}: its records contradict themselves:", *problems]))
    checked = [
        "the file is as it was written, by its SHA-256",
        "every tensor has the shape and type that the records say, and finite values",
        f"the records of {len(found.state.rounds)} round(s) fit their edits",
    ]
    if base is not None:
        check_base(base, found.state)
        checked.append(f"made for {base.source.name}: edited FFN and tokenizer are the same")
    return checked
