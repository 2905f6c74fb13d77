"""Stacking adaptors of one base into one, and taking out what shall not be there: nothing is trained again."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from lemoe.adaptor.checkpoint import MATRICES, AdaptorFile, matrices_of, write_adaptor
from lemoe.adaptor.state import AdaptorState, RoundRecord, Taught, stack
from lemoe.adaptor.tensor_file import PIECE, Entry
from lemoe.base.tensors import DTYPES
from lemoe.data.files import check_free, remove_scratch
from lemoe.errors import AdaptorError, InputError

OnConflict = Literal["latest", "error", "keep"]
SHOWN = 20  # conflicts named in an error
PREFIX = 6  # hexadecimal digits, at least, of a round's id or an edit's digest that name it
DIGITS = 12  # of an edit's digest where a message names it so


class Part(Protocol):
    """What is stacked: a state whose experts may have shapes alone, and their values row by row."""

    state: AdaptorState

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of one of the experts' matrices."""
        ...


class _Held:
    """A state that is in memory, as a part of a stack."""

    def __init__(self, state: AdaptorState):
        self.state = replace(state, experts=state.experts.outline())
        self._matrices = matrices_of(state)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        return self._matrices[name][start:end]


@dataclass(frozen=True)
class Merged:
    """What a merge gives.

    Attributes:
        state: the stacked adaptor; unless it was read, its experts have shapes, and their values are in the file.
        repeated: rounds that came more than once, and count once.
        dropped: edits that were taken out because they were named.
        kept_out: with `on_conflict` keep, edits that an earlier adaptor answers already, each with that one.
        size: of the file, bytes; 0 if none was written.
    """

    state: AdaptorState
    repeated: int
    dropped: tuple[Taught, ...]
    kept_out: tuple[tuple[Taught, Taught], ...]
    size: int


def merge(
    paths: Sequence[Path | str],
    output: Path | str | None,
    *,
    on_conflict: OnConflict = "latest",
    drop: Sequence[str] = (),
    dtype: str | None = None,
    overwrite: bool = False,
) -> Merged:
    """Stack the adaptor files `paths`, in order, and write the result to `output`; equal rounds count once.

    Experts are copied from file to file, so that memory holds the anchors of all and a piece of one expert.

    Args:
        output: None writes nothing.
        on_conflict: where edits of several adaptors answer the same question, let the `latest` answer (the others
            stay in the file and are listed in `AdaptorState.replaced`), take it as an `error`, or `keep` the earliest
            and leave the others out.
        drop: rounds, by number in the stack or by the start of their id, and edits, by id or by the start of their
            digest, to take out; `round:` and `edit:` in front tell them apart, and `ROUND/` in front of an edit says
            of which round it is.
        dtype: in which experts are stored; as they are if None.

    Raises:
        AdaptorError: if a file is not a valid adaptor, or bases, layers or methods differ, all listed; or if edits
            supersede each other and `on_conflict` is `error`; or if what is to be dropped cannot be.
        InputError: if nothing, or several things, have the name of what is to be dropped.
        OutputError: if the output exists or cannot be written.
    """
    if output is not None:
        check_free(Path(output), overwrite=overwrite)
    files, merged = _merged(paths, on_conflict, drop, dtype)
    if output is None:
        return merged
    remove_scratch(Path(output).parent, Path(output).name)
    write_adaptor(merged.state, _matrices(files, merged.state), output, overwrite=overwrite)
    return replace(merged, size=Path(output).stat().st_size)


def read_merged(
    paths: Sequence[Path | str],
    *,
    on_conflict: OnConflict = "latest",
    drop: Sequence[str] = (),
    dtype: str | None = None,
) -> Merged:
    """The stack that `merge` writes, read into memory; see there."""
    files, merged = _merged(paths, on_conflict, drop, dtype)
    read = {name: torch.cat(list(entry.parts())) for name, entry in _matrices(files, merged.state).items()}
    up, down, gate = (read.get(name) for name in MATRICES)
    assert up is not None
    assert down is not None
    experts = replace(merged.state.experts, up=up, down=down, gate=gate)
    return replace(merged, state=replace(merged.state, experts=experts))


def write_stack(
    parts: Sequence[AdaptorState | AdaptorFile], path: Path | str, *, overwrite: bool = False
) -> AdaptorState:
    """Stack states and files, in order, into the file `path`; experts of files are copied piece by piece.

    Returns:
        the stack; its experts have shapes, and their values are in the file.

    Raises:
        AdaptorError: if the parts cannot be stacked, or a file is not as it was written.
        OutputError: if the output exists and `overwrite` is not given, or cannot be written.
    """
    for part in parts:
        if isinstance(part, AdaptorFile):
            part.check_whole()
    there: list[Part] = [_Held(part) if isinstance(part, AdaptorState) else part for part in parts]
    state = stack([part.state for part in there])
    write_adaptor(state, _matrices(there, state), path, overwrite=overwrite)
    return state


def _merged(
    paths: Sequence[Path | str], on_conflict: OnConflict, drop: Sequence[str], dtype: str | None
) -> tuple[list[AdaptorFile], Merged]:
    """The files, and their stack without its experts' values."""
    files = [AdaptorFile(path) for path in paths]
    for file in files:
        file.check_whole()
    state, kept_out = _stacked(files, paths, on_conflict)
    numbers = _numbers_by_id(state, drop)
    named = sorted({expert for name in drop for expert in _named(state, name, numbers)})
    dropped: tuple[Taught, ...] = ()
    if named:
        taught = state.taught
        dropped = tuple(edit for expert in named for edit in taught[expert])
        state = state.without(named)
    if dtype:
        state = replace(state, experts=state.experts.stored_as(DTYPES[dtype]))
    rounds = [record.id for file in files for record in file.state.rounds]
    return files, Merged(state, len(rounds) - len(set(rounds)), dropped, kept_out, 0)


def _matrices(parts: Sequence[Part], state: AdaptorState) -> dict[str, Entry]:
    """The experts' matrices of a stack, where they are."""
    sources = list(_sources(parts, state))
    return {name: _streamed(name, matrix, sources) for name, matrix in matrices_of(state).items()}


def _stacked(
    files: Sequence[AdaptorFile], paths: Sequence[Path | str], on_conflict: OnConflict
) -> tuple[AdaptorState, tuple[tuple[Taught, Taught], ...]]:
    """The stack of all files, and what `keep` left out of it."""
    try:
        merged = stack([file.state for file in files])
        if on_conflict == "latest":
            return merged, ()
        merged = files[0].state
        kept_out: list[tuple[Taught, Taught]] = []
        conflicts: list[tuple[Taught, Taught]] = []
        for file in files[1:]:
            before = len(merged.edits)
            merged = stack([merged, file.state])
            while fresh := [(old, new) for old, new in merged.router.superseded().items() if old < before <= new]:
                edits = merged.edits
                conflicts += [(edits[old], edits[new]) for old, new in fresh]
                kept_out += [(edits[new], edits[old]) for old, new in fresh]
                if on_conflict == "error":
                    break
                merged = merged.without(merged.holders([new for _, new in fresh]))
    except AdaptorError as error:
        names = "".join(f"\n  adaptor {number} is {path}" for number, path in enumerate(paths, 1))
        raise AdaptorError(f"{error}{names}") from None
    if conflicts and on_conflict == "error":
        pairs = [f"edit {earlier.label} asks what {later.label} answers anew" for earlier, later in conflicts]
        raise AdaptorError("\n  ".join([f"{len(conflicts)} edit(s) would be superseded:", *pairs[:SHOWN]]))
    return merged, tuple(kept_out)


def _named(state: AdaptorState, name: str, numbers: Mapping[str, list[int]]) -> list[int]:
    """The experts of the round or of the edit that `name` means; `numbers` of the edits with each id."""
    kind, _, rest = name.partition(":")
    rounds = _rounds_named(state, rest if kind == "round" else name) if kind != "edit" else []
    edits = _edits_named(state, rest if kind == "edit" else name, numbers) if kind != "round" else []
    if rounds and edits:
        raise InputError(f"--drop {name}: a round and an edit have this name; write round:{name} or edit:{name}")
    if not rounds and not edits:
        raise InputError(
            f"--drop {name}: no such round (1 to {len(state.rounds)}, or {PREFIX} digits of its id) and no such edit"
        )
    if len(rounds) > 1:
        raise InputError(f"--drop {name}: {len(rounds)} rounds have ids that start like this; give more digits")
    _check_one_edit(state, name, edits)
    return state.holders(edits) or list(state.spans[rounds[0]])


def _rounds_named(state: AdaptorState, name: str) -> list[int]:
    if name.isdecimal() and 1 <= int(name) <= len(state.rounds):
        return [int(name) - 1]
    if len(name) < PREFIX:
        return []
    return [place for place, record in enumerate(state.rounds) if record.id.startswith(name)]


def _edits_named(state: AdaptorState, name: str, numbers: Mapping[str, list[int]]) -> list[int]:
    """The numbers of the edits of this id; if there are none, of those that `ROUND/ID` or a digest's start names."""
    if name in numbers:
        return numbers[name]
    edits = state.edits
    round_, slash, rest = name.partition("/")
    rounds = [place + 1 for place in _rounds_named(state, round_)] if slash else []
    if named := [number for number in numbers.get(rest, ()) if edits[number].round in rounds]:
        return named
    digest = rest if slash else name
    if len(digest) < PREFIX or (slash and not rounds):
        return []
    return [
        number
        for number, edit in enumerate(edits)
        if edit.digest.startswith(digest) and (not slash or edit.round in rounds)
    ]


def _check_one_edit(state: AdaptorState, name: str, numbers: Sequence[int]) -> None:
    """Refuse a name that several edits have, with the names that tell them apart."""
    edits = state.edits
    named = [edits[number] for number in numbers]
    if len({(edit.round, edit) for edit in named}) < 2:
        return
    rounds = Counter((edit.round, edit.id) for edit in named)
    lines = []
    for edit in named:
        own = edit.id if rounds[edit.round, edit.id] == 1 else edit.digest[:DIGITS]
        lines.append(f"edit:{edit.round}/{own} is {edit.label}")
    raise InputError.listing(f"--drop {name}: {len(named)} edits have this name; say which, or name each:", lines)


def _numbers_by_id(state: AdaptorState, drop: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the edits with each id that a name to drop may mean, found in one pass."""
    names = {part for name in drop for part in (name, name.partition(":")[2])}
    names |= {name.partition("/")[2] for name in names}
    numbers: dict[str, list[int]] = {}
    for number, edit in enumerate(state.edits if drop else ()):
        if edit.id in names:
            numbers.setdefault(edit.id, []).append(number)
    return numbers


Source = tuple[Part, int, int]  # a part, and its rows from, to


def _streamed(name: str, matrix: Tensor, sources: Sequence[Source]) -> Entry:
    """The matrix `name` of a stack, to be copied from its sources in pieces."""
    rows = max(1, PIECE // max(1, matrix.shape[1] * matrix.dtype.itemsize))

    def parts() -> Iterator[Tensor]:
        for part, start, end in sources:
            for first in range(start, end, rows):
                yield _finite(name, part.rows(name, first, min(end, first + rows)), matrix.dtype)

    return Entry(matrix.dtype, tuple(matrix.shape), parts)


def _finite(name: str, part: Tensor, dtype: torch.dtype) -> Tensor:
    stored = part.to(dtype)
    if not bool(stored.isfinite().all()):
        raise AdaptorError(f"{name}: holds values too large for {str(dtype).removeprefix('torch.')}")
    return stored


def _sources(parts: Sequence[Part], state: AdaptorState) -> Iterator[Source]:
    """Where the neurons of each expert of a stack are, neighbours together."""
    homes: dict[str, tuple[Part, RoundRecord, range]] = {}
    for part in parts:
        for record, span in zip(part.state.rounds, part.state.spans, strict=True):
            homes.setdefault(record.id, (part, record, span))
    run: Source | None = None
    for record in state.rounds:
        part, there, span = homes[record.id]
        for expert in _experts_in(record, there, span):
            start, end = (int(part.state.experts.offsets[index]) for index in (expert, expert + 1))
            if run and run[0] is part and run[2] == start:
                run = (part, run[1], end)
                continue
            if run:
                yield run
            run = (part, start, end)
    if run:
        yield run


def _experts_in(record: RoundRecord, stored: RoundRecord, span: range) -> Iterator[int]:
    """The record's experts, which are some of those `stored`, in the same order: each is known by its edits."""
    numbers = iter(zip(_names_by_expert(stored), span, strict=True))
    for edits in _names_by_expert(record):
        yield next(expert for there, expert in numbers if there == edits)


def _names_by_expert(record: RoundRecord) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Ids and digests of the edits that each expert of a round holds."""
    return ((record.ids[part.start : part.stop], record.edits[part.start : part.stop]) for part in record.parts)
