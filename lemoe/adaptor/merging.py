"""Merging adaptors of one base into one, and dropping rounds or edits from it: nothing is trained again."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn, Protocol

import torch
from torch import Tensor

from lemoe.adaptor.checkpoint import MATRICES, AdaptorFile, expert_matrices, write_adaptor
from lemoe.adaptor.contradictions import EditPair, possible_contradictions, split_sources, update_contradicted
from lemoe.adaptor.state import AdaptorState, RoundRecord, TaughtEdit, stack
from lemoe.adaptor.tensor_file import CHUNK_BYTES, TensorEntry
from lemoe.base.tensors import DTYPES
from lemoe.data.counting import format_count
from lemoe.data.files import check_overwrite, remove_scratch
from lemoe.errors import AdaptorError, InputError

OnConflict = Literal["latest", "error", "keep", "both"]
MAX_LISTED = 20  # conflicts named in an error
MIN_PREFIX = 6  # hexadecimal digits of a round's id or an edit's digest that a name must have
DIGEST_DIGITS = 12  # of an edit's digest in a message


class StackInput(Protocol):
    """A state to be stacked; its experts may have shapes only (`to_meta`), and their values are read by rows."""

    state: AdaptorState

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of one of the experts' matrices."""
        ...


class _InMemoryInput:
    """A state in memory, to be stacked."""

    def __init__(self, state: AdaptorState):
        self.state = replace(state, experts=state.experts.to_meta())
        self._matrices = expert_matrices(state)

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        return self._matrices[name][start:end]


@dataclass(frozen=True)
class MergeResult:
    """The outcome of a merge.

    Attributes:
        state: the stacked adaptor; after `merge_adaptors` its experts have shapes only, their values are in the file.
        repeated_rounds: rounds that came more than once, and count once.
        dropped: edits that were named in `drop`.
        kept_out: with `on_conflict` keep, edits that an earlier adaptor answers already, each with that one.
        possible: edits of different adaptors that both answer although they may contradict each other, the earlier
            first.
        size: of the file, bytes; 0 if none was written.
    """

    state: AdaptorState
    repeated_rounds: int
    dropped: tuple[TaughtEdit, ...]
    kept_out: tuple[EditPair, ...]
    possible: tuple[EditPair, ...]
    size: int

    def __repr__(self) -> str:
        return f"MergeResult({self.state.brief}, dropped={len(self.dropped)}, size={self.size})"


def merge_adaptors(
    paths: Sequence[Path | str],
    output: Path | str | None,
    *,
    on_conflict: OnConflict = "latest",
    drop: Sequence[str] = (),
    dtype: str | None = None,
    overwrite: bool = False,
) -> MergeResult:
    """Stack the adaptor files `paths`, in order, and write the result to `output`; equal rounds count once.

    Experts are copied from file to file, so that memory holds all anchors and one chunk of one expert.

    Args:
        output: None writes nothing.
        on_conflict: where edits of several adaptors answer the same question, by the same prompt or, for certain, in
            other words (`lemoe.routing.anchor.contradictions`), let the `latest` answer (the others stay in the file
            and are listed in `AdaptorState.superseded_edits`), raise an `error`, or `keep` the earliest and leave the
            others out. `both` lets `latest` answer the same prompt, and keeps what is asked in other words.
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
        check_overwrite(Path(output), overwrite=overwrite)
    files, merged = _stack_and_drop(paths, on_conflict, drop, dtype)
    if output is None:
        return merged
    remove_scratch(Path(output).parent, Path(output).name)
    write_adaptor(merged.state, _matrix_entries(files, merged.state), output, overwrite=overwrite)
    return replace(merged, size=Path(output).stat().st_size)


def merge_in_memory(
    paths: Sequence[Path | str],
    *,
    on_conflict: OnConflict = "latest",
    drop: Sequence[str] = (),
    dtype: str | None = None,
) -> MergeResult:
    """The stack that `merge_adaptors` writes, in memory; arguments and errors are the same."""
    files, merged = _stack_and_drop(paths, on_conflict, drop, dtype)
    read = {name: torch.cat(list(entry.read_chunks())) for name, entry in _matrix_entries(files, merged.state).items()}
    up, down, gate = (read.get(name) for name in MATRICES)
    assert up is not None
    assert down is not None
    experts = replace(merged.state.experts, up=up, down=down, gate=gate)
    return replace(merged, state=replace(merged.state, experts=experts))


def write_stack(
    parts: Sequence[AdaptorState | AdaptorFile], path: Path | str, *, continued: int = 0, overwrite: bool = False
) -> AdaptorState:
    """Stack states and files, in order, into the file `path`; experts of files are copied chunk by chunk.

    Args:
        continued: rounds, the first ones, on top of which the others were taught: later edits supersede those of them
            that they contradict.

    Returns:
        the stack; its experts have shapes only, their values are in the file.

    Raises:
        AdaptorError: if the parts cannot be stacked, or a file is not as it was written.
        OutputError: if the output exists and `overwrite` is not given, or cannot be written.
    """
    for part in parts:
        if isinstance(part, AdaptorFile):
            part.check_hash()
    inputs: list[StackInput] = [_InMemoryInput(part) if isinstance(part, AdaptorState) else part for part in parts]
    state = stack([part.state for part in inputs])
    state = update_contradicted(state, split_sources(state, continued))
    write_adaptor(state, _matrix_entries(inputs, state), path, overwrite=overwrite)
    return state


def _stack_and_drop(
    paths: Sequence[Path | str], on_conflict: OnConflict, drop: Sequence[str], dtype: str | None
) -> tuple[list[AdaptorFile], MergeResult]:
    """The files, and the stack of their rounds that are not dropped, without its experts' values."""
    files = [AdaptorFile(path) for path in paths]
    for file in files:
        file.check_hash()
    state, kept_out = _stack_files(files, paths, on_conflict)
    numbers = _numbers_by_id(state, drop)
    named = sorted({expert for name in drop for expert in _find_experts(state, name, numbers)})
    dropped: tuple[TaughtEdit, ...] = ()
    if named:
        held = state.edits_by_expert
        dropped = tuple(edit for expert in named for edit in held[expert])
        state = state.drop_experts(named)
    if dtype:
        state = replace(state, experts=state.experts.to_dtype(DTYPES[dtype]))
    rounds = [record.id for file in files for record in file.state.rounds]
    possible = possible_contradictions(state, _round_sources(state, files))
    return files, MergeResult(state, len(rounds) - len(set(rounds)), dropped, kept_out, possible, 0)


def _matrix_entries(parts: Sequence[StackInput], state: AdaptorState) -> dict[str, TensorEntry]:
    """The experts' matrices of a stack, to be read from its `parts`."""
    sources = list(_locate_neurons(parts, state))
    return {name: _stream_matrix(name, matrix, sources) for name, matrix in expert_matrices(state).items()}


def _stack_files(
    files: Sequence[AdaptorFile], paths: Sequence[Path | str], on_conflict: OnConflict
) -> tuple[AdaptorState, tuple[EditPair, ...]]:
    """The stack of all files, and what `keep` left out of it."""
    try:
        if on_conflict in ("error", "keep"):
            return _stack_apart(files, on_conflict)
        merged = stack([file.state for file in files])
        return merged if on_conflict == "both" else update_contradicted(merged, _round_sources(merged, files)), ()
    except AdaptorError as error:
        names = "".join(f"\n  adaptor {number} is {path}" for number, path in enumerate(paths, 1))
        raise AdaptorError(f"{error}{names}") from None


def _stack_apart(files: Sequence[AdaptorFile], on_conflict: OnConflict) -> tuple[AdaptorState, tuple[EditPair, ...]]:
    """The stack of files of which none supersedes an edit of another, and what was left out of it.

    Raises:
        AdaptorError: with `on_conflict` error, listing the edits that would be superseded.
    """
    merged = files[0].state
    kept_out: list[EditPair] = []
    for file in files[1:]:
        before, rounds = len(merged.edits), len(merged.rounds)
        merged = stack([merged, file.state])
        merged = update_contradicted(merged, split_sources(merged, rounds))
        while fresh := [(old, new) for old, new in merged.router.superseded().items() if old < before <= new]:
            edits = merged.edits
            kept_out += [(edits[new], edits[old]) for old, new in fresh]
            if on_conflict == "error":
                break
            merged = merged.drop_experts(merged.experts_holding({new for _, new in fresh}))
    if kept_out and on_conflict == "error":
        refuse_conflicts([(earlier, later) for later, earlier in kept_out])
    return merged, tuple(kept_out)


def refuse_conflicts(pairs: Sequence[EditPair]) -> NoReturn:
    """Refuse to let later edits supersede earlier ones.

    Raises:
        AdaptorError: listing both of each pair.
    """
    lines = [f"edit {earlier.label} is superseded by {later.label}" for earlier, later in pairs]
    raise AdaptorError("\n  ".join([f"{format_count(len(pairs), 'edit')} would be superseded:", *lines[:MAX_LISTED]]))


def _round_sources(state: AdaptorState, files: Sequence[AdaptorFile]) -> list[int]:
    """The index of the first of the files that holds each round of their stack."""
    first: dict[str, int] = {}
    for index, file in enumerate(files):
        for record in file.state.rounds:
            first.setdefault(record.id, index)
    return [first[record.id] for record in state.rounds]


def _find_experts(state: AdaptorState, name: str, numbers: Mapping[str, list[int]]) -> list[int]:
    """The experts of the round or of the edit that `name` means; `numbers` of the edits with each id."""
    kind, _, rest = name.partition(":")
    rounds = _find_rounds(state, rest if kind == "round" else name) if kind != "edit" else []
    edits = _find_edits(state, rest if kind == "edit" else name, numbers) if kind != "round" else []
    if rounds and edits:
        raise InputError(f"`drop` {name}: a round and an edit have this name; write round:{name} or edit:{name}")
    if not rounds and not edits:
        raise InputError(
            f"`drop` {name}: no such round (1 to {len(state.rounds)}, or {MIN_PREFIX} digits of its id), no such edit"
        )
    if len(rounds) > 1:
        raise InputError(f"`drop` {name}: {len(rounds)} rounds have ids that start like this; give more digits")
    _check_one_edit(state, name, edits)
    return state.experts_holding(edits) or list(state.expert_spans[rounds[0]])


def _find_rounds(state: AdaptorState, name: str) -> list[int]:
    if name.isdecimal() and 1 <= int(name) <= len(state.rounds):
        return [int(name) - 1]
    if len(name) < MIN_PREFIX:
        return []
    return [index for index, record in enumerate(state.rounds) if record.id.startswith(name)]


def _find_edits(state: AdaptorState, name: str, numbers: Mapping[str, list[int]]) -> list[int]:
    """The numbers of the edits with the id `name`; failing that, with that `ROUND/ID` or start of a digest."""
    if name in numbers:
        return numbers[name]
    edits = state.edits
    round_, slash, rest = name.partition("/")
    rounds = [index + 1 for index in _find_rounds(state, round_)] if slash else []
    if named := [number for number in numbers.get(rest, ()) if edits[number].round in rounds]:
        return named
    digest = rest if slash else name
    if len(digest) < MIN_PREFIX or (slash and not rounds):
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
        own = edit.id if rounds[edit.round, edit.id] == 1 else edit.digest[:DIGEST_DIGITS]
        lines.append(f"edit:{edit.round}/{own} is {edit.label}")
    raise InputError.from_problems(f"`drop` {name}: {len(named)} edits have this name; say which, or name each:", lines)


def _numbers_by_id(state: AdaptorState, drop: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the edits with each id that a name to drop may mean, found in one pass."""
    names = {part for name in drop for part in (name, name.partition(":")[2])}
    names |= {name.partition("/")[2] for name in names}
    numbers: dict[str, list[int]] = {}
    for number, edit in enumerate(state.edits if drop else ()):
        if edit.id in names:
            numbers.setdefault(edit.id, []).append(number)
    return numbers


SourceRows = tuple[StackInput, int, int]  # an input, and the range of its rows


def _stream_matrix(name: str, matrix: Tensor, sources: Sequence[SourceRows]) -> TensorEntry:
    """The matrix `name` of a stack, to be copied from its sources in chunks."""
    rows = max(1, CHUNK_BYTES // max(1, matrix.shape[1] * matrix.dtype.itemsize))

    def read_chunks() -> Iterator[Tensor]:
        for part, start, end in sources:
            for first in range(start, end, rows):
                yield _cast_finite(name, part.read_rows(name, first, min(end, first + rows)), matrix.dtype)

    return TensorEntry(matrix.dtype, tuple(matrix.shape), read_chunks)


def _cast_finite(name: str, part: Tensor, dtype: torch.dtype) -> Tensor:
    stored = part.to(dtype)
    if not bool(stored.isfinite().all()):
        raise AdaptorError(f"{name}: holds values too large for {str(dtype).removeprefix('torch.')}")
    return stored


def _locate_neurons(parts: Sequence[StackInput], state: AdaptorState) -> Iterator[SourceRows]:
    """The rows of each expert of a stack in its `parts`; adjacent rows are one range."""
    stored_rounds: dict[str, tuple[StackInput, RoundRecord, range]] = {}
    for part in parts:
        for record, span in zip(part.state.rounds, part.state.expert_spans, strict=True):
            stored_rounds.setdefault(record.id, (part, record, span))
    run: SourceRows | None = None
    for record in state.rounds:
        part, stored, span = stored_rounds[record.id]
        for expert in _match_experts(record, stored, span):
            start, end = (int(part.state.experts.offsets[index]) for index in (expert, expert + 1))
            if run and run[0] is part and run[2] == start:
                run = (part, run[1], end)
                continue
            if run:
                yield run
            run = (part, start, end)
    if run:
        yield run


def _match_experts(record: RoundRecord, stored: RoundRecord, span: range) -> Iterator[int]:
    """The record's experts, which are some of those `stored`, in the same order: each is recognised by its edits."""
    candidates = iter(zip(_edit_keys_by_expert(stored), span, strict=True))
    for edits in _edit_keys_by_expert(record):
        yield next(expert for keys, expert in candidates if keys == edits)


def _edit_keys_by_expert(record: RoundRecord) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Ids and digests of the edits that each expert of a round holds."""
    return ((record.ids[part.start : part.stop], record.edits[part.start : part.stop]) for part in record.edit_ranges)
