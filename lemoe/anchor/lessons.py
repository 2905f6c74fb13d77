"""The texts of a round of preset `anchor`, after the frozen pass: answers to learn, and questions to stay silent on."""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lemoe.anchor.anchors import build_gate
from lemoe.anchor.examples import other_questions, rewordings
from lemoe.anchor.gate import Anchor, Route
from lemoe.edits import Edit
from lemoe.experts import rms_normal
from lemoe.frozen import FrozenBatch, ffn_inputs, freeze
from lemoe.models import BaseModel
from lemoe.settings import Settings
from lemoe.structure import FFNSite
from lemoe.tokens import Batch, Passage, encode, encode_all, replay_buckets

DECISIVE = 3.0  # weight of a question's last token among those on which an expert shall stay silent


@dataclass(frozen=True)
class Teaching:
    """A frozen batch of texts that end in an answer: one row for each, of the edit `owners` `[batch]`.

    `active` `[batch, seq]`: where the expert acts, from the frozen batch's first column on. `ends` `[targets]`: which
    labels end an answer. `weights` `[targets]`: of each label, so that every text counts the same.
    """

    frozen: FrozenBatch
    owners: Tensor
    active: Tensor
    ends: Tensor
    weights: Tensor

    @cached_property
    def normal(self) -> Tensor:
        """`[batch, seq, hidden]`, what experts read."""
        return rms_normal(self.frozen.inputs)

    def of(self, chosen: Tensor) -> "Teaching | None":
        """The rows of the edits `chosen` `[edits]`, bool; None if there are none."""
        rows = chosen[self.owners].nonzero().squeeze(1)
        if not len(rows):
            return None
        targets = torch.isin(self.frozen.batch.target_rows, rows)
        return Teaching(
            self.frozen.take(rows), self.owners[rows], self.active[rows], self.ends[targets], self.weights[targets]
        )


@dataclass(frozen=True)
class Silence:
    """Texts on which an expert shall stay silent: its normalised inputs, owners `[batch]`, weights `[batch, seq]`."""

    normal: Tensor
    owners: Tensor
    weights: Tensor

    def of(self, chosen: Tensor) -> "Silence | None":
        """The rows of the edits `chosen` `[edits]`, bool; None if there are none."""
        rows = chosen[self.owners]
        return Silence(self.normal[rows], self.owners[rows], self.weights[rows]) if bool(rows.any()) else None


@dataclass(frozen=True)
class Lessons:
    """All texts of a round after the frozen pass: own prompts, rewordings by kind, and other questions."""

    own: list[Teaching]
    variants: list[list[Teaching]]
    silences: list[Silence]

    def of(self, chosen: Tensor) -> "Lessons":
        """The lessons of the edits `chosen` `[edits]`, bool."""
        return Lessons(
            [kept for teaching in self.own if (kept := teaching.of(chosen))],
            [[kept for teaching in kind if (kept := teaching.of(chosen))] for kind in self.variants],
            [quiet for silence in self.silences if (quiet := silence.of(chosen))],
        )


class LessonMaker:
    """Makes a round's texts and runs the frozen pass over them."""

    def __init__(
        self,
        base: BaseModel,
        site: FFNSite,
        layer: int,
        settings: Settings,
        edits: Sequence[Edit],
        passages: Sequence[Passage],
        anchors: Sequence[Anchor],
        rng: random.Random,
    ):
        self._base, self._site, self._layer, self._settings = base, site, layer, settings
        self._edits, self._passages, self._anchors, self._rng = edits, passages, anchors, rng
        self._gates = [build_gate(base, [anchor], settings) for anchor in anchors]

    def lessons(self) -> Lessons:
        everyone = range(len(self._edits))
        own = self._teachings([(place, self._passages[place]) for place in everyone])
        return Lessons(own, self._variants(), self._silences())

    def _variants(self) -> list[list[Teaching]]:
        edits, settings = self._edits, self._settings
        texts = rewordings(edits, settings.variants, self._rng)
        usable = [self._usable([(text, edit.target) for text in own]) for own, edit in zip(texts, edits, strict=True)]
        if settings.train_rephrases:
            rephrased = self._rephrases()
            usable = [[*own, *theirs] for own, theirs in zip(usable, rephrased, strict=True)]
        kinds = [
            [(place, own[kind]) for place, own in enumerate(usable) if kind < len(own)]
            for kind in range(max(map(len, usable), default=0))
        ]
        return [self._teachings(rows) for rows in kinds]

    def _rephrases(self) -> list[list[Passage]]:
        """The user's own; one that cannot be used is the user's to mend."""
        return [
            encode_all(self._base, ((f"rephrase of edit {e.id}", p.prompt, e.target) for p in e.rephrases))
            for e in self._edits
        ]

    def _usable(self, texts: Sequence[tuple[str, str | None]]) -> list[Passage]:
        """The passages of made-up texts; one that this tokenizer or context cannot take is left out."""
        passages = []
        for text, target in texts:
            with suppress(ValueError):
                passages.append(encode(self._base, text, target))
        return passages

    def _teachings(self, rows: Sequence[tuple[int, Passage]]) -> list[Teaching]:
        """Frozen batches of passages, each with the token that ends an answer behind its target."""
        ended = [self._ended(passage) for _, passage in rows]
        owners = [place for place, _ in rows]
        starts = self._starts(owners, ended)
        buckets = replay_buckets(ended, starts, self._settings.batch_tokens)
        return [self._teaching(owners, ended, starts, bucket) for bucket in buckets]

    def _ended(self, passage: Passage) -> Passage:
        full = self._base.max_length is not None and len(passage) >= self._base.max_length
        return passage if full else Passage(passage.prompt, (*passage.target, self._base.end_token))

    def _teaching(
        self, owners: Sequence[int], ended: Sequence[Passage], starts: Sequence[int], bucket: Sequence[int]
    ) -> Teaching:
        base = self._base
        batch = Batch.of(ended, bucket, base.pad_token, base.device)
        lengths = torch.tensor([len(ended[index].target) for index in bucket], device=base.device)
        last = batch.prompt_lengths + lengths - 2
        first, active = self._active(batch, [starts[index] for index in bucket])
        return Teaching(
            frozen=freeze(base, self._site, self._layer, batch, first),
            owners=torch.tensor([owners[index] for index in bucket], device=base.device),
            active=active,
            ends=batch.target_columns == last[batch.target_rows],
            weights=1.0 / lengths[batch.target_rows],
        )

    def _active(self, batch: Batch, starts: Sequence[int]) -> tuple[int, Tensor]:
        """The first column at which an expert acts, and from there `[batch, seq]`, bool: where it does."""
        first = min(starts)
        columns = torch.arange(first, batch.ids.shape[1], device=self._base.device)
        return first, (columns >= torch.tensor(starts, device=self._base.device).unsqueeze(1)) & batch.mask[
            :, first:
        ].bool()

    def _starts(self, owners: Sequence[int], passages: Sequence[Passage]) -> list[int]:
        return [self._start(place, passage) for place, passage in zip(owners, passages, strict=True)]

    def _start(self, place: int, passage: Passage) -> int:
        """Where the gate opens on a text, in use; at the prompt's last token where it would not open at all."""
        route = Route(self._gates[place])
        for column, token in enumerate(passage.prompt):
            if route.push(token).edit >= 0:
                return column
        return len(passage.prompt) - 1

    def _silences(self) -> list[Silence]:
        base, edits = self._base, self._edits
        gate = build_gate(base, self._anchors, self._settings)
        count = self._settings.negatives
        rows = [
            (place, passage)
            for place in range(len(edits))
            for passage in self._usable(
                [(text, None) for text in other_questions(gate, edits, place, count, self._rng)]
            )
        ]
        owners, passages = [place for place, _ in rows], [passage for _, passage in rows]
        starts = self._starts(owners, passages)
        return [
            self._silence(owners, passages, starts, bucket)
            for bucket in replay_buckets(passages, starts, self._settings.batch_tokens)
        ]

    def _silence(
        self, owners: Sequence[int], passages: Sequence[Passage], starts: Sequence[int], bucket: Sequence[int]
    ) -> Silence:
        base = self._base
        batch = Batch.of(passages, bucket, base.pad_token, base.device)
        first, active = self._active(batch, [starts[index] for index in bucket])
        last = torch.arange(first, batch.ids.shape[1], device=base.device) == batch.prompt_lengths.unsqueeze(1) - 1
        weights = torch.where(last, DECISIVE, 1.0) * active
        return Silence(
            rms_normal(ffn_inputs(base, self._site, batch, first)),
            torch.tensor([owners[index] for index in bucket], device=base.device),
            weights / weights.sum(1, keepdim=True),
        )
