"""Stored anchors: the tokens by which edits are recognised, as tensors that stack by concatenation."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, islice, pairwise
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor

from lemoe.errors import AdaptorError
from lemoe.routing.anchor.gate import Anchor, Gate
from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.read_prefixes import PADDING, Ids, Prefix, ReadPrefixes, cells_of
from lemoe.routing.anchor.route import SHUT, Reading, Route
from lemoe.routing.router import (
    Explanation,
    Host,
    Lineage,
    LiveRouter,
    Router,
    RouterSettings,
    Routing,
    Sequences,
    offsets_hold,
)

REMEMBERED = 64 << 20  # bytes of sequences that were read and may be read on; 10,000 sentences of 40 words


@dataclass(frozen=True)
class Anchors(Router):
    """The anchors of each expert, in order: one, or, of an expert that edits share, several.

    Of two anchors that ask the same, the later wins.
    """

    method = "anchor"
    gated = True

    groups: tuple[tuple[Anchor, ...], ...]

    @classmethod
    def of_each(cls, anchors: Sequence[Anchor]) -> "Anchors":
        """Anchors of which each has an expert of its own."""
        return cls(tuple((anchor,) for anchor in anchors))

    @cached_property
    def anchors(self) -> tuple[Anchor, ...]:
        """All of them; an anchor's place is the number of its edit."""
        return tuple(anchor for group in self.groups for anchor in group)

    @property
    def owners(self) -> list[int]:
        """The expert of each anchor."""
        return [expert for expert, group in enumerate(self.groups) for _ in group]

    def tensors(self) -> dict[str, Tensor]:
        """Token ids end to end with offsets `[edits + 1]`; subjects as UTF-8 bytes, empty where inferred."""
        anchors = self.anchors
        return {
            **_packed("anchors.prompt", [anchor.prompt for anchor in anchors], torch.int32),
            **_packed("anchors.target", [anchor.target for anchor in anchors], torch.int32),
            **_packed("anchors.subject", [(anchor.subject or "").encode() for anchor in anchors], torch.uint8),
        }

    @classmethod
    def expected(
        cls, settings: RouterSettings, hidden: int, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
        edits = sum(lineage.edits for lineage in lineages)
        for name, dtype in _STORED:
            offsets = tensors.get(f"{name}_offsets")
            total = int(offsets.flatten()[-1]) if offsets is not None and offsets.numel() else 0
            shapes[name] = ((total,), dtype)
            shapes[f"{name}_offsets"] = ((edits + 1,), torch.int64)
        return shapes

    @classmethod
    def from_tensors(
        cls, settings: RouterSettings, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> "Anchors":
        prompts, targets, subjects = (_unpacked(name, tensors) for name, _ in _STORED)
        if not all(prompts):
            raise ValueError("anchors.prompt: an anchor without tokens")
        anchors = (
            Anchor(prompt, target, bytes(subject).decode("utf-8") or None)
            for prompt, target, subject in zip(prompts, targets, subjects, strict=True)
        )
        return cls(tuple(tuple(islice(anchors, lineage.edits)) for lineage in lineages))

    def select(self, experts: Sequence[int]) -> "Anchors":
        return Anchors(tuple(self.groups[index] for index in experts))

    @classmethod
    def stack(cls, parts: "Sequence[tuple[Anchors, Sequence[Lineage]]]") -> "Anchors":
        return cls(tuple(group for part, _ in parts for group in part.groups))

    def superseded(self) -> dict[int, int]:
        """Anchors with the very prompt of a later one."""
        return dict(self._superseded)

    @cached_property
    def _superseded(self) -> dict[int, int]:
        anchors = self.anchors
        latest = {anchor.prompt: number for number, anchor in enumerate(anchors)}
        return {
            number: latest[anchor.prompt] for number, anchor in enumerate(anchors) if latest[anchor.prompt] != number
        }

    def live(self, base: Host, settings: RouterSettings) -> "LiveAnchors":
        return LiveAnchors(base, self, settings)


_STORED = (("anchors.prompt", torch.int32), ("anchors.target", torch.int32), ("anchors.subject", torch.uint8))


def _packed(name: str, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    offsets = numpy.fromiter(accumulate(map(len, rows), initial=0), numpy.int64, len(rows) + 1)
    values = torch.empty(int(offsets[-1]), dtype=dtype)
    values.numpy()[:] = numpy.fromiter(chain.from_iterable(rows), values.numpy().dtype, len(values))
    return {name: values, f"{name}_offsets": torch.from_numpy(offsets)}


def _unpacked(name: str, tensors: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    values, offsets = tensors[name].numpy(), tensors[f"{name}_offsets"]
    if not offsets_hold(offsets, len(values)) or bool((values < 0).any()):
        raise ValueError(f"{name}: offsets or ids out of order or range")
    shared: dict[int, int] = {}  # one object for each id, however often it stands there
    rows = (values[start:end].tolist() for start, end in pairwise(offsets.tolist()))
    return [tuple(shared.setdefault(value, value) for value in row) for row in rows]


def build_gate(base: Host, anchors: Sequence[Anchor], settings: RouterSettings) -> Gate:
    """A gate over `anchors`, with the thresholds of `settings`."""
    gate = Gate(lexicon_of(base), threshold=settings.gate_conflict, slack=settings.gate_slack)
    with _uncollected():
        for anchor in anchors:
            gate.add(anchor)
    return gate


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage while open: among millions of small objects that all stay, it takes half of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


_lexicons: "WeakKeyDictionary[Host, Lexicon]" = WeakKeyDictionary()


def lexicon_of(base: Host) -> Lexicon:
    """The lexicon of a base model, made once."""
    if base not in _lexicons:
        _lexicons[base] = Lexicon(base)
    return _lexicons[base]


class LiveAnchors(LiveRouter):
    """Reads every sequence token by token; its memory is the tokens themselves, so a route depends on nothing else.

    Beside each token stands the name of what was read up to there, which is remembered for a while, so that decoding
    reads each token once.
    """

    def __init__(self, base: Host, anchors: Anchors, settings: RouterSettings, *, remembered: int = REMEMBERED):
        """Anchors at work in `base`.

        Args:
            remembered: bytes of sequences that are remembered; those of the last call are in any case.

        Raises:
            AdaptorError: if the anchors hold tokens that the base model does not know.
        """
        known = len(base.embedding.weight)
        if any(max((*anchor.prompt, *anchor.target)) >= known for anchor in anchors.anchors):
            raise AdaptorError("the adaptor's anchors hold tokens that the base model does not know")
        self.gate = build_gate(base, anchors.anchors, settings)
        for number in anchors.superseded():
            self.gate.retire(number)
        self.device = base.device
        self._owners = {SHUT.edit: -1, **dict(enumerate(anchors.owners))}
        self._prefixes = ReadPrefixes(self.gate, remembered)

    def route(self, sequences: Sequences) -> tuple[Routing, Tensor]:
        if sequences.ids is None:
            raise AdaptorError("preset `anchor` routes by tokens: call the model with input_ids, not inputs_embeds")
        ids: Ids = sequences.ids.masked_fill(~sequences.mask, PADDING).to("cpu", torch.int32).numpy()
        prefixes = self._resume(sequences.memory, len(ids))
        starts = [prefix.name for prefix in prefixes]
        before = [prefix.copy() for prefix in prefixes if prefix.columns] if ids.shape[1] > 1 else []
        rows = [prefix.read(new) for prefix, new in zip(prefixes, ids, strict=True)]
        self._prefixes.keep([*before, *prefixes])
        cells = torch.from_numpy(cells_of(ids, starts, [prefix.name for prefix in prefixes]))
        acting = [[self._owners[reading.edit] for reading in row] for row in rows]
        experts = torch.tensor(acting, device=self.device).unsqueeze(-1)
        ends = _last_columns(sequences.prompt.expand_as(sequences.mask))
        explained = tuple(self._explanation(row[end]) for row, end in zip(rows, ends, strict=True))
        memory = cells.to(self.device).unsqueeze(1)
        return Routing(experts, torch.ones_like(experts, dtype=torch.float32), explained), memory

    def _resume(self, memory: Tensor | None, count: int) -> list[Prefix]:
        """Each sequence, read to the end of its memory; what was not forgotten is not read again."""
        if memory is None:
            return [self._prefixes.resume(None) for _ in range(count)]
        last: Ids = memory[:, 0, -1].cpu().numpy()
        found = (self._prefixes.resume_at(cells, memory.shape[2]) for cells in last)
        return [
            prefix if prefix is not None else self._prefixes.resume(memory[row, 0].cpu().numpy())
            for row, prefix in enumerate(found)
        ]

    def explain(self, prompts: Sequence[Sequence[int]]) -> list[Explanation]:
        """Why each prompt (token ids) takes its route; nothing of it is remembered."""
        return [self._explanation(self.reading(prompt)) for prompt in prompts]

    def reading(self, prompt: Sequence[int]) -> Reading:
        """How the gate stands at the end of a prompt."""
        route = Route(self.gate)
        reading = SHUT
        for token in prompt:
            reading = route.push(token)
        return reading

    def _explanation(self, reading: Reading) -> Explanation:
        return Explanation(
            expert=self._owners[reading.edit],
            weight=float(reading.edit >= 0),
            scope=reading.scope,
            nearest=self._owners[reading.nearest],
            coverage=reading.coverage,
            conflict=reading.conflict,
            fit=reading.fit,
            edit=reading.nearest,
        )


def _last_columns(prompt: Tensor) -> list[int]:
    """The last column of each row's prompt `[batch, seq]`; the last of all where none is marked."""
    columns = torch.arange(1, prompt.shape[1] + 1, device=prompt.device)
    last: list[int] = ((prompt * columns).amax(1) - 1).tolist()
    return last
