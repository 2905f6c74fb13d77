"""The router of preset `anchor`: its stored anchors as tensors, which stack by concatenation, and its live gate."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, islice, pairwise
from threading import Lock
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.errors import AdaptorError
from lemoe.routing.anchor.gate import Anchor, Gate
from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.meaning import PREFIX, Meaning, Vector
from lemoe.routing.anchor.route import SHUT, GateState, Route
from lemoe.routing.anchor.route_cache import (
    NAMED_CELLS,
    PADDING,
    Ids,
    Past,
    RouteCache,
    RoutedPrefix,
    build_cells,
    join_projections,
    name_cells,
)
from lemoe.routing.router import (
    Explanation,
    Host,
    Lineage,
    LiveRouter,
    Router,
    RouterSettings,
    Routing,
    Sequences,
    are_valid_offsets,
)

CACHE_BYTES = 64 << 20  # of the routes of sequences that may be continued: about 10,000 sentences of 40 words


@dataclass(frozen=True, eq=False)
class Anchors(TensorEquality, Router):
    """The anchors of each expert, in order: one, or several for an expert that edits share.

    Of two anchors with the same question, the later takes precedence.

    Attributes:
        groups: the anchors of each expert.
        meaning: how the base model tells what questions mean; None where words alone decide.
        keys: `[keys, rank]`, what the anchors' questions mean: of each its own prompt, then its rephrases.
        key_counts: how many of them each anchor has; empty without `meaning`.
        updates: pairs of anchors by number, ascending: of the same question in other words, the later was taught on top
            of the earlier, with another target (`lemoe.routing.anchor.contradictions`).
    """

    method = "anchor"
    gated = True

    groups: tuple[tuple[Anchor, ...], ...]
    meaning: Meaning | None = None
    keys: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    key_counts: tuple[int, ...] = ()
    updates: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_anchors(
        cls, anchors: Sequence[Anchor], meaning: Meaning | None = None, keys: Sequence[Vector] = ()
    ) -> "Anchors":
        """Anchors that each have an expert of their own; `keys`: of each, `[keys, rank]`."""
        groups = tuple((anchor,) for anchor in anchors)
        if meaning is None:
            return cls(groups)
        return cls(groups, meaning, torch.from_numpy(numpy.concatenate(keys)), tuple(map(len, keys)))

    @property
    def layer_read(self) -> int | None:
        return None if self.meaning is None else int(self.meaning.layer)

    @cached_property
    def anchors(self) -> tuple[Anchor, ...]:
        """All anchors; the index of an anchor is the number of its edit."""
        return tuple(anchor for group in self.groups for anchor in group)

    @property
    def anchor_experts(self) -> list[int]:
        """The expert of each anchor, as an index."""
        return [expert for expert, group in enumerate(self.groups) for _ in group]

    def tensors(self) -> dict[str, Tensor]:
        """Token ids, concatenated, with offsets `[edits + 1]`; subjects as UTF-8 bytes, empty where inferred; keys."""
        anchors = self.anchors
        tensors = {
            **_pack_rows("anchors.prompt", [anchor.prompt for anchor in anchors], torch.int32),
            **_pack_rows("anchors.target", [anchor.target for anchor in anchors], torch.int32),
            **_pack_rows("anchors.subject", [(anchor.subject or "").encode() for anchor in anchors], torch.uint8),
        }
        if self.meaning is None:
            return tensors
        offsets = torch.from_numpy(numpy.fromiter(accumulate(self.key_counts, initial=0), numpy.int64))
        if self.updates:
            tensors["anchors.updates"] = torch.tensor(self.updates)
        return {**tensors, "anchors.keys": self.keys, "anchors.keys_offsets": offsets, **self.meaning.tensors()}

    @classmethod
    def expected_tensors(
        cls, settings: RouterSettings, hidden: int, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
        edits = sum(lineage.edits for lineage in lineages)
        for name, dtype in _STORED_TENSORS:
            offsets = tensors.get(f"{name}_offsets")
            total = int(offsets.flatten()[-1]) if offsets is not None and offsets.numel() else 0
            shapes[name] = ((total,), dtype)
            shapes[f"{name}_offsets"] = ((edits + 1,), torch.int64)
        if any(name.startswith((PREFIX, "anchors.keys")) for name in tensors):
            shapes |= _expected_of_meaning(hidden, edits, tensors)
        return shapes

    @classmethod
    def from_tensors(
        cls, settings: RouterSettings, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> "Anchors":
        prompts, targets, subjects = (_unpack_rows(name, tensors) for name, _ in _STORED_TENSORS)
        if not all(prompts):
            raise ValueError("anchors.prompt: an anchor without tokens")
        anchors = (
            Anchor(prompt, target, bytes(subject).decode("utf-8") or None)
            for prompt, target, subject in zip(prompts, targets, subjects, strict=True)
        )
        groups = tuple(tuple(islice(anchors, lineage.edits)) for lineage in lineages)
        meaning = Meaning.from_tensors(tensors)
        if meaning is None:
            return cls(groups)
        keys, offsets = tensors["anchors.keys"], tensors["anchors.keys_offsets"]
        counts = offsets.diff()
        if not are_valid_offsets(offsets, len(keys)) or bool((counts < 1).any()):
            raise ValueError("anchors.keys_offsets: out of order, or an anchor without a key")
        if int(meaning.layer) < 0:
            raise ValueError("meaning.layer: below 0")
        if bool((meaning.marked < 0).any()):
            raise ValueError("meaning.marked: below 0")
        return cls(groups, meaning, keys, tuple(counts.tolist()), _unpack_updates(tensors, len(prompts)))

    def select(self, experts: Sequence[int]) -> "Anchors":
        groups = tuple(self.groups[index] for index in experts)
        if self.meaning is None:
            return Anchors(groups)
        anchor_ends = list(accumulate(map(len, self.groups), initial=0))
        chosen = [number for index in experts for number in range(anchor_ends[index], anchor_ends[index + 1])]
        key_ends = list(accumulate(self.key_counts, initial=0))
        rows = [row for number in chosen for row in range(key_ends[number], key_ends[number + 1])]
        counts = tuple(self.key_counts[number] for number in chosen)
        return Anchors(groups, self.meaning, self.keys[rows], counts, self._select_updates(chosen))

    def _select_updates(self, chosen: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The pairs of which both anchors are `chosen`, by their new numbers."""
        if not self.updates:
            return ()
        numbers = {number: index for index, number in enumerate(chosen)}
        return tuple(
            (numbers[earlier], numbers[later])
            for earlier, later in self.updates
            if earlier in numbers and later in numbers
        )

    @classmethod
    def stack(cls, parts: "Sequence[tuple[Anchors, Sequence[Lineage]]]") -> "Anchors":
        groups = tuple(group for part, _ in parts for group in part.groups)
        first = parts[0][0].meaning
        for part, _ in parts[1:]:
            if (first is None) != (part.meaning is None):
                raise AdaptorError("one adaptor routes by meaning, another by words alone; train one of them anew")
            if first is not None and part.meaning is not None and not first.is_close_to(part.meaning):
                raise AdaptorError(
                    "these adaptors read questions in different ways (fitted in another precision or by another "
                    "version of lemoe): train the later one on top of the earlier, with `start`"
                )
        if first is None:
            return cls(groups)
        keys = torch.cat([part.keys for part, _ in parts])
        counts = tuple(count for part, _ in parts for count in part.key_counts)
        starts = accumulate((len(part.anchors) for part, _ in parts), initial=0)
        updates = tuple(
            (start + earlier, start + later)
            for (part, _), start in zip(parts, starts, strict=False)
            for earlier, later in part.updates
        )
        return cls(groups, first, keys, counts, updates)

    def with_updates(self, found: Iterable[tuple[int, int]]) -> "Anchors":
        """The same anchors with these `updates` too."""
        return replace(self, updates=tuple(sorted({*self.updates, *found})))

    def superseded(self) -> dict[int, int]:
        """Anchors that a later one with the same prompt, or one that updates them, supersedes: earlier to latest."""
        return dict(self._superseded)

    @cached_property
    def _superseded(self) -> dict[int, int]:
        anchors = self.anchors
        latest = {anchor.prompt: number for number, anchor in enumerate(anchors)}
        found = {
            number: latest[anchor.prompt] for number, anchor in enumerate(anchors) if latest[anchor.prompt] != number
        }
        for earlier, later in self.updates:
            found[earlier] = max(later, found.get(earlier, later))
        for number in sorted(found, reverse=True):
            found[number] = found.get(found[number], found[number])
        return dict(sorted(found.items()))

    def split_keys(self) -> Sequence[Vector]:
        """The keys of each anchor, `[keys, rank]`."""
        return [part.numpy() for part in self.keys.split(self.key_counts)] if self.key_counts else ()

    def to_live(self, base: Host, settings: RouterSettings) -> "LiveAnchors":
        return LiveAnchors(base, self, settings)


_STORED_TENSORS = (("anchors.prompt", torch.int32), ("anchors.target", torch.int32), ("anchors.subject", torch.uint8))


def _unpack_updates(tensors: Mapping[str, Tensor], anchors: int) -> tuple[tuple[int, int], ...]:
    """The pairs of `Anchors.updates`."""
    if "anchors.updates" not in tensors:
        return ()
    pairs = tuple((earlier, later) for earlier, later in tensors["anchors.updates"].tolist())
    if list(pairs) != sorted(set(pairs)) or not all(0 <= earlier < later < anchors for earlier, later in pairs):
        raise ValueError("anchors.updates: numbers out of order or range")
    return pairs


def _expected_of_meaning(
    hidden: int, edits: int, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shapes and types of the tensors of an adaptor that routes by meaning."""
    directions, offsets = tensors.get(f"{PREFIX}directions"), tensors.get("anchors.keys_offsets")
    rank = directions.shape[-1] if directions is not None and directions.dim() else 0
    cohort = tensors.get(f"{PREFIX}cohort")
    relations = cohort.shape[0] if cohort is not None and cohort.dim() else 0
    terms = tensors.get(f"{PREFIX}terms")
    entries = len(terms) if terms is not None and terms.dim() else 0
    keys = int(offsets.flatten()[-1]) if offsets is not None and offsets.numel() else 0
    updates = tensors.get("anchors.updates")
    pairs = {} if updates is None else {"anchors.updates": ((len(updates) if updates.dim() else 0, 2), torch.int64)}
    return {
        **pairs,
        "anchors.keys": ((keys, rank), torch.float32),
        "anchors.keys_offsets": ((edits + 1,), torch.int64),
        **Meaning.expected_tensors(hidden, rank, relations, entries),
    }


def _pack_rows(name: str, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    offsets = numpy.fromiter(accumulate(map(len, rows), initial=0), numpy.int64, len(rows) + 1)
    values = torch.empty(int(offsets[-1]), dtype=dtype)
    values.numpy()[:] = numpy.fromiter(chain.from_iterable(rows), values.numpy().dtype, len(values))
    return {name: values, f"{name}_offsets": torch.from_numpy(offsets)}


def _unpack_rows(name: str, tensors: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    values, offsets = tensors[name].numpy(), tensors[f"{name}_offsets"]
    if not are_valid_offsets(offsets, len(values)) or bool((values < 0).any()):
        raise ValueError(f"{name}: offsets or ids out of order or range")
    shared: dict[int, int] = {}  # one int object for each id, however often it occurs: saves memory
    rows = (values[start:end].tolist() for start, end in pairwise(offsets.tolist()))
    return [tuple(shared.setdefault(value, value) for value in row) for row in rows]


def build_gate(
    base: Host,
    anchors: Sequence[Anchor],
    settings: RouterSettings,
    meaning: Meaning | None = None,
    keys: Sequence[Vector] = (),
) -> Gate:
    """A gate over `anchors`, with the thresholds of `settings`; by `meaning` too, if `keys` are given with it."""
    gate = Gate(
        get_lexicon(base),
        threshold=settings.gate_conflict,
        slack=settings.gate_slack,
        meaning=meaning,
        probability=settings.gate_probability,
    )
    with _pause_garbage_collection():
        for number, anchor in enumerate(anchors):
            gate.add(anchor, keys[number] if meaning is not None else None)
    return gate


@contextmanager
def _pause_garbage_collection() -> Iterator[None]:
    """Pause garbage collection: with millions of small objects that all stay, it takes half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


_lexicons: "WeakKeyDictionary[Host, Lexicon]" = WeakKeyDictionary()


def get_lexicon(base: Host) -> Lexicon:
    """The lexicon of a base model, built once."""
    if base not in _lexicons:
        _lexicons[base] = Lexicon(base)
    return _lexicons[base]


class LiveAnchors(LiveRouter):
    """The anchors' gate at work: reads every sequence token by token.

    Its memory of a sequence is the tokens themselves, so that a route depends on nothing else, and names of prefixes,
    whose routes are cached for a while, so that decoding reads each token once.
    """

    def __init__(self, base: Host, anchors: Anchors, settings: RouterSettings, *, cache_bytes: int = CACHE_BYTES):
        """Anchors at work in `base`.

        Args:
            cache_bytes: of the cached routes; those of the last call always stay.

        Raises:
            AdaptorError: if the anchors have tokens outside the base model's vocabulary.
        """
        vocabulary = len(base.embedding.weight)
        if any(max((*anchor.prompt, *anchor.target)) >= vocabulary for anchor in anchors.anchors):
            raise AdaptorError("the adaptor's anchors hold tokens that the base model does not know")
        self.meaning = anchors.meaning
        self.layer_read = anchors.layer_read
        self.gate = build_gate(base, anchors.anchors, settings, self.meaning, anchors.split_keys())
        for number in anchors.superseded():
            self.gate.retire(number)
        self.device = base.device
        self._experts = {SHUT.edit: -1, **dict(enumerate(anchors.anchor_experts))}
        self._route_cache = RouteCache(self.gate, cache_bytes)
        self._lock = Lock()

    def __deepcopy__(self, memo: dict[int, object]) -> "LiveAnchors":
        """For a copy of the model: the same gate, which no route changes, and routes of its own."""
        copied = object.__new__(LiveAnchors)
        copied.__dict__ |= self.__dict__
        copied._route_cache = RouteCache(self.gate, self._route_cache.max_bytes)
        copied._lock = Lock()
        return copied

    def route(self, sequences: Sequences) -> tuple[Routing, Tensor | None]:
        if sequences.ids is None:
            raise AdaptorError("preset `anchor` routes by tokens: call the model with input_ids, not inputs_embeds")
        ids: Ids = sequences.ids.masked_fill(~sequences.mask, PADDING).to("cpu", torch.int32).numpy()
        projected = self.project(sequences.hidden)
        with self._lock:  # routes share what the gate caches
            if sequences.starts is None:
                past = sequences.memory
                pasts = [None] * len(ids) if past is None else list(past.numpy())
                rows, named = self._read_on(ids, projected, pasts)
                memory = torch.from_numpy(join_projections(named, projected))
            else:
                rows, memory = self._read_packed(ids, projected, sequences.starts), None
        acting = [[self._experts[state.edit] for state in row] for row in rows]
        experts = torch.tensor(acting, device=self.device).unsqueeze(-1)
        ends = _last_prompt_columns(sequences.prompt.expand_as(sequences.mask))
        explained = tuple(self._explain_state(row[end]) for row, end in zip(rows, ends, strict=True))
        return Routing(experts, torch.ones_like(experts, dtype=torch.float32), explained), memory

    def extend(self, ids: Ids, projected: Vector | None, past: Past | None) -> tuple[list[int], Ids]:
        """Read on in one sequence, as `route` does in a batch.

        Args:
            ids: `[seq]`, new tokens.
            projected: `[seq, rank]`, what the base model makes of them (`project`), if meaning counts.
            past: the memory of the tokens before these, or None at the start.

        Returns:
            the expert that acts at each new token, -1 for none, and the first `NAMED_CELLS` of their memory `[seq, k]`,
            all but `projected`.
        """
        with self._lock:
            rows, named = self._read_on(ids[None], None if projected is None else projected[None], [past])
        return [self._experts[state.edit] for state in rows[0]], named[0]

    @property
    def memory_width(self) -> int:
        """Numbers (int32) by which a token is remembered."""
        return NAMED_CELLS + (self.meaning.rank if self.meaning else 0)

    def _read_on(
        self, ids: Ids, projected: Vector | None, pasts: Sequence[Past | None]
    ) -> tuple[list[list[GateState]], Ids]:
        """The gate's states along new tokens `[batch, seq]`, and their memory `[batch, seq, k]` without `projected`."""
        prefixes = [self._route_cache.resume(past) for past in pasts]
        starts = [prefix.name for prefix in prefixes]
        before = [prefix.copy() for prefix in prefixes if prefix.columns] if ids.shape[1] > 1 else []
        rows = [
            prefix.read(new, None if projected is None else projected[row])
            for row, (prefix, new) in enumerate(zip(prefixes, ids, strict=True))
        ]
        self._route_cache.store([*before, *prefixes])
        cells = build_cells(ids)
        name_cells(cells, starts, [prefix.name for prefix in prefixes])
        return rows, cells

    def _read_packed(self, ids: Ids, projected: Vector | None, starts: Tensor) -> list[list[GateState]]:
        """The gate's states along rows `[batch, seq]` in which other sequences begin at `starts`."""
        rows = []
        for row, begins in enumerate(starts.tolist()):
            bounds = [0, *(column for column, begin in enumerate(begins) if begin), len(begins)]
            spans = [slice(start, end) for start, end in pairwise(bounds)]
            read = (
                RoutedPrefix(Route(self.gate)).read(ids[row, span], None if projected is None else projected[row, span])
                for span in spans
            )
            rows.append(list(chain.from_iterable(read)))
        return rows

    def project(self, hidden: Tensor | None) -> Vector | None:
        """What the base model makes of each token, `[..., rank]`, by its states; None where meaning does not count.

        Raises:
            AdaptorError: if meaning counts and there are no states.
        """
        if self.meaning is None:
            return None
        if hidden is None:
            raise AdaptorError(f"this adaptor reads the states that enter decoder layer {self.layer_read}")
        return self.meaning.project(hidden).cpu().numpy()

    def explain(self, prompts: Sequence[Sequence[int]], hidden: Sequence[Tensor] | None = None) -> list[Explanation]:
        """Why each prompt (token ids) takes its route, with its states `[seq, hidden]`; nothing of it is cached."""
        states = [None] * len(prompts) if hidden is None else hidden
        return [self._explain_state(self.final_state(*each)) for each in zip(prompts, states, strict=True)]

    def final_state(self, prompt: Sequence[int], hidden: Tensor | None = None) -> GateState:
        """The gate's state at the end of a prompt, whose states are `hidden` `[seq, hidden]`."""
        route = Route(self.gate)
        state = SHUT
        projected = self.project(hidden)
        for column, token in enumerate(prompt):
            state = route.push(token, None if projected is None else projected[column])
        return state

    def _explain_state(self, state: GateState) -> Explanation:
        return Explanation(
            expert=self._experts[state.edit],
            weight=float(state.edit >= 0),
            scope=state.scope,
            nearest=self._experts[state.nearest],
            coverage=state.coverage,
            conflict=state.conflict,
            fit=state.fit,
            meaning=state.meaning,
            probability=self.gate.decision.probability(state.score) if state.nearest >= 0 else 0.0,
            edit=state.nearest,
        )


def _last_prompt_columns(prompt: Tensor) -> list[int]:
    """The last column of each row's prompt `[batch, seq]`; the last column of all where no prompt is marked."""
    columns = torch.arange(1, prompt.shape[1] + 1, device=prompt.device)
    last: list[int] = ((prompt * columns).amax(1) - 1).tolist()
    return last
