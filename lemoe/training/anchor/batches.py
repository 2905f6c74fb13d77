"""The texts of a round of preset `anchor`, after the frozen pass: answers to learn, and questions to stay silent on."""

import random
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from lemoe.base.chat import encode_turn
from lemoe.base.equality import TensorEquality
from lemoe.base.frozen import Below, FrozenBatch, run_below
from lemoe.base.loading import BaseModel
from lemoe.base.structure import FFNSite
from lemoe.base.tensors import rms_normalise
from lemoe.base.tokens import Batch, Passage, encode, encode_all, replay_buckets
from lemoe.data.edits import Edit
from lemoe.routing.anchor.anchors import build_gate
from lemoe.routing.anchor.gate import Anchor
from lemoe.routing.anchor.route import Route
from lemoe.settings import Settings
from lemoe.training.anchor.examples import other_questions, rewordings

DECISIVE = 3.0  # weight of a question's last token among those on which an expert shall stay silent


@dataclass(frozen=True, eq=False)
class Teaching(TensorEquality):
    """A frozen batch of texts that end in an answer: one row for each, for the expert `owners` `[batch]`.

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
        return rms_normalise(self.frozen.inputs)


@dataclass(frozen=True, eq=False)
class Silence(TensorEquality):
    """Texts on which an expert shall stay silent: its normalised inputs, owners `[batch]`, weights `[batch, seq]`."""

    normal: Tensor
    owners: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Lessons:
    """All texts of a round after the frozen pass.

    Attributes:
        own: the edits' prompts, and those of their rephrases that are to be trained on.
        variants: made-up rewordings, by kind.
        silences: other questions.
        edits: how many edits they teach.
    """

    own: list[Teaching]
    variants: list[list[Teaching]]
    silences: list[Silence]
    edits: int


@dataclass(frozen=True)
class Text:
    """A text of the round: the edit it is made for, its tokens, and the column at which that edit's expert acts."""

    edit: int
    passage: Passage
    start: int


class LessonMaker:
    """Makes a round's texts, runs the frozen pass over them once, and gives lessons from it."""

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
        owners: Sequence[int] | None = None,
    ):
        """The texts of `edits`, for experts of their own, or for those at `owners`, one for each edit."""
        self._base, self._site, self._layer, self._settings = base, site, layer, settings
        self._edits, self._passages, self._anchors, self._rng = edits, passages, anchors, rng
        self._owners = range(len(edits)) if owners is None else owners
        self._gates = [build_gate(base, [anchor], settings) for anchor in anchors]

    def lessons(self, experts: Collection[int] | None = None) -> Lessons:
        """The lessons of all experts, or of those at `experts`."""
        own, *kinds, silent = [
            [number for number in group if experts is None or self._owner(number) in experts] for group in self._groups
        ]
        return Lessons(
            [self._teaching(rows) for rows in self._rows(own)],
            [[self._teaching(rows) for rows in self._rows(kind)] for kind in kinds],
            [self._silence(rows) for rows in self._rows(silent)],
            len({self._texts[number].edit for number in own}),
        )

    def _owner(self, number: int) -> int:
        """The expert that a text is for."""
        return self._owners[self._texts[number].edit]

    @cached_property
    def _made(self) -> list[list[Text]]:
        """Own prompts, rewordings by kind, other questions."""
        own = [self._answered(place, passage) for place, passage in enumerate(self._passages)]
        if self._settings.train_rephrases:
            own += self._rephrases()
        turns = [self._turns()] if self._settings.variants and self._base.tokenizer.chat_template else []
        return [own, *self._rewordings(), *turns, self._other_questions()]

    @cached_property
    def _texts(self) -> list[Text]:
        return [text for group in self._made for text in group]

    @cached_property
    def _groups(self) -> list[range]:
        """The numbers of the texts of each group."""
        ends = accumulate(map(len, self._made))
        return [range(end - len(group), end) for group, end in zip(self._made, ends, strict=True)]

    @cached_property
    def _below(self) -> Below:
        """All texts, run once."""
        return run_below(
            self._base,
            self._site,
            self._layer,
            [text.passage for text in self._texts],
            self._settings.batch_tokens,
            whole=any(text.start for text in self._texts),
        )

    def _rewordings(self) -> list[list[Text]]:
        """By kind."""
        edits, settings = self._edits, self._settings
        texts = rewordings(edits, settings.variants, self._rng)
        usable = [self._usable([(text, edit.target) for text in own]) for own, edit in zip(texts, edits, strict=True)]
        return [
            [self._answered(place, own[kind]) for place, own in enumerate(usable) if kind < len(own)]
            for kind in range(max(map(len, usable), default=0))
        ]

    def _turns(self) -> list[Text]:
        """Own prompts as what the user says in a conversation.

        The answer is the target's tokens behind a space, as in all other texts: the same word without one is often
        split otherwise, and an expert hardly learns both.
        """
        turns = []
        for place, (edit, passage) in enumerate(zip(self._edits, self._passages, strict=True)):
            with suppress(ValueError):
                said = encode_turn(self._base, edit.prompt)
                turns.append(self._answered(place, Passage(said.prompt, passage.target)))
        return turns

    def _rephrases(self) -> list[Text]:
        """The user's own; one that cannot be used is the user's to mend."""
        places = [place for place, edit in enumerate(self._edits) for _ in edit.rephrases]
        texts = [(f"rephrase of edit {e.id}", p.prompt, e.target) for e in self._edits for p in e.rephrases]
        return [self._answered(*pair) for pair in zip(places, encode_all(self._base, texts), strict=True)]

    def _other_questions(self) -> list[Text]:
        gate = build_gate(self._base, self._anchors, self._settings)
        return [
            Text(place, passage, self._start(place, passage))
            for place in range(len(self._edits))
            for passage in self._usable(
                [
                    (text, None)
                    for text in other_questions(gate, self._edits, place, self._settings.negatives, self._rng)
                ]
            )
        ]

    def _usable(self, texts: Sequence[tuple[str, str | None]]) -> list[Passage]:
        """The passages of made-up texts; one that this tokenizer or context cannot take is left out."""
        passages = []
        for text, target in texts:
            with suppress(ValueError):
                passages.append(encode(self._base, text, target))
        return passages

    def _answered(self, place: int, passage: Passage) -> Text:
        """A text with the token that ends an answer behind its target."""
        ended = Passage(passage.prompt, (*passage.target, self._base.end_token))
        return Text(place, ended, self._start(place, ended))

    def _start(self, place: int, passage: Passage) -> int:
        """Where the gate opens on a text, in use; at the prompt's last token where it would not open at all."""
        route = Route(self._gates[place])
        for column, token in enumerate(passage.prompt):
            if route.push(token).edit >= 0:
                return column
        return len(passage.prompt) - 1

    def _rows(self, numbers: Sequence[int]) -> list[list[int]]:
        """The texts `numbers` in batches."""
        lengths = [len(self._texts[number].passage.read) for number in numbers]
        starts = [self._texts[number].start for number in numbers]
        buckets = replay_buckets(lengths, starts, self._settings.batch_tokens)
        return [[numbers[place] for place in bucket] for bucket in buckets]

    def _batch(self, rows: Sequence[int]) -> tuple[Batch, int, Tensor, Tensor]:
        """The texts `rows` as a batch, the first column at which an expert acts, and, from there, `[batch, seq]`, bool:
        where it does; and the expert that each text is for, `[batch]`.
        """
        device, texts = self._base.device, self._texts
        batch = Batch.of([text.passage for text in texts], rows, self._base.pad_token, device)
        starts = torch.tensor([texts[row].start for row in rows], device=device)
        first = min(texts[row].start for row in rows)
        columns = torch.arange(first, batch.ids.shape[1], device=device)
        active = (columns >= starts.unsqueeze(1)) & batch.mask[:, first:].bool()
        return batch, first, active, torch.tensor([self._owner(row) for row in rows], device=device)

    def _teaching(self, rows: Sequence[int]) -> Teaching:
        batch, first, active, owners = self._batch(rows)
        lengths = torch.tensor([len(self._texts[row].passage.target) for row in rows], device=self._base.device)
        last = batch.prompt_lengths + lengths - 2
        return Teaching(
            frozen=self._below.freeze(batch, first),
            owners=owners,
            active=active,
            ends=batch.target_columns == last[batch.target_rows],
            weights=1.0 / lengths[batch.target_rows],
        )

    def _silence(self, rows: Sequence[int]) -> Silence:
        batch, first, active, owners = self._batch(rows)
        columns = torch.arange(first, batch.ids.shape[1], device=self._base.device)
        last = columns == batch.prompt_lengths.unsqueeze(1) - 1
        weights = torch.where(last, DECISIVE, 1.0) * active
        inputs = self._below.inputs[self._below.at(batch, first)]
        return Silence(rms_normalise(inputs), owners, weights / weights.sum(1, keepdim=True))
