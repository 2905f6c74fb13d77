"""The training batches of a round of preset `anchor`, after the frozen pass: positives and negatives.

Positives are texts whose answer an expert learns; negatives are prompts on which it is trained to output zero.
"""

import random
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy
import torch
from torch import Tensor

from lemoe.base.chat import encode_chat_turn
from lemoe.base.equality import TensorEquality
from lemoe.base.frozen import FrozenBatch, PrefixActivations, compute_prefix_activations
from lemoe.base.loading import BaseModel
from lemoe.base.structure import FFNSite
from lemoe.base.tensors import rms_normalise
from lemoe.base.tokens import Batch, Passage, encode_passage, encode_passages, replay_buckets
from lemoe.data.conversation import Turn
from lemoe.data.edits import Edit
from lemoe.routing.anchor.anchors import build_gate
from lemoe.routing.anchor.gate import Anchor, Gate
from lemoe.routing.anchor.keys import embed_prompts
from lemoe.routing.anchor.meaning import Meaning, Vector
from lemoe.routing.anchor.route import Route
from lemoe.settings import Settings
from lemoe.training.anchor.detectors import DETECTORS, FEW_EDITS, OTHER_QUESTIONS, SINK_PROMPT, is_sink
from lemoe.training.anchor.examples import (
    find_subject,
    is_phrase,
    make_chat_questions,
    make_negative_prompts,
    make_paraphrases,
)
from lemoe.training.anchor.wordings import Wordings, ask_the_same, choose_wordings

LONG_ANSWER = 24  # tokens of an answer from which only its beginning is taught, but after the edit's own prompts
WHOLE_KINDS = 1  # and so many of its paraphrases
END_WEIGHT = 0.5  # in the loss, at most, of the end of an answer of more than `DETECTORS` positions, as which it counts
LAST_TOKEN_WEIGHT = 3.0  # of a negative prompt's last token, which decides the answer; its other tokens weigh 1


CHAT_OPENINGS: Sequence[Sequence[Turn]] = (  # of conversations; half of them begin with the question
    (),
    (),
    (("system", "You answer questions."),),
    (("user", "Hi!"), ("assistant", "Hello! How can I help you?")),
)


@dataclass(frozen=True, eq=False)
class PositiveBatch(TensorEquality):
    """A frozen batch of texts that end in an answer, one per row.

    Attributes:
        owners: `[batch]`, the expert that each text trains.
        active: `[batch, seq]`, where the expert acts, from the frozen batch's first column on.
        silent: `[batch, seq]`, weights of the positions of phrases where it acts before the answer is due, 1 in sum for
            each; 0 elsewhere.
        firsts, ends: `[targets]`, which labels begin and which end an answer.
        weights: `[targets]`, of each label, so that every text counts the same, and a long answer's end besides.
    """

    frozen: FrozenBatch
    owners: Tensor
    active: Tensor
    silent: Tensor
    firsts: Tensor
    ends: Tensor
    weights: Tensor

    @cached_property
    def normalised_inputs(self) -> Tensor:
        """`[batch, seq, hidden]`, what experts read."""
        return rms_normalise(self.frozen.inputs)


@dataclass(frozen=True, eq=False)
class NegativeBatch(TensorEquality):
    """Prompts on which experts are trained to output zero, one per row.

    Attributes:
        normalised_inputs: `[batch, seq, hidden]`, what experts read.
        owners: `[batch]`, the expert that each prompt trains.
        weights: `[batch, seq]`, of each token; zero where the expert does not act.
    """

    normalised_inputs: Tensor
    owners: Tensor
    weights: Tensor


@dataclass(frozen=True)
class TrainingBatches:
    """All texts of a round after the frozen pass.

    Attributes:
        prompts: the edits' prompts, and the users' own rephrases where they are trained on.
        paraphrases: synthetic ones, by kind.
        negatives: other questions about the edits' subjects.
        edit_count: how many edits they are for.
    """

    prompts: list[PositiveBatch]
    paraphrases: list[list[PositiveBatch]]
    negatives: list[NegativeBatch]
    edit_count: int


@dataclass(frozen=True)
class TrainingText:
    """A text of the round.

    Attributes:
        edit: index of the edit it is made for.
        passage: its tokens.
        phrase: whether the answer completes a sentence.
        whole: whether the answer is there to its end.
    """

    edit: int
    passage: Passage
    phrase: bool = False
    whole: bool = True


class TrainingBatchBuilder:
    """Builds training batches from a round's edits.

    1. The texts: own prompts, synthetic paraphrases, prompts as chat turns, negative prompts.
    2. The frozen pass: all texts run once through the model.
    3. The gate of each edit, with what its own prompt (and rephrases) mean, and where it opens on each text.
    4. The batches, of all experts or, for a retry, of some; they reuse the frozen pass.
    """

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
        meaning: Meaning | None = None,
        owners: Sequence[int] | None = None,
    ):
        """Each edit trains an expert of its own, or the expert that `owners` gives for it.

        Args:
            meaning: how the gates tell what questions mean; None where words alone decide.
        """
        self._base, self._site, self._layer, self._settings = base, site, layer, settings
        self._edits, self._passages, self._anchors, self._rng = edits, passages, anchors, rng
        self._owners = range(len(edits)) if owners is None else owners
        self._meaning = meaning

    def build(self, experts: Collection[int] | None = None) -> TrainingBatches:
        """The batches of all experts, or of those with the indices `experts`."""
        prompts, *kinds, negatives = [
            [text for text in group if experts is None or self._owner_of_text(text) in experts]
            for group in self._group_ranges
        ]
        return TrainingBatches(
            [self._positive_batch(rows) for rows in self._bucket_texts(prompts)],
            [[self._positive_batch(rows) for rows in self._bucket_texts(kind)] for kind in kinds],
            [self._negative_batch(rows) for rows in self._bucket_texts(list(filter(self._opens_gate, negatives)))],
            len({self._texts[text].edit for text in prompts}),
        )

    @cached_property
    def keys(self) -> list[Vector]:
        """What each edit's questions mean, `[keys, rank]`: its own prompt, and the rephrases that are trained on."""
        meaning = self._meaning
        if meaning is None:
            return []
        gate = build_gate(self._base, self._anchors, self._settings)
        prompts, owners = [text.passage.prompt for text in self._own_texts], [text.edit for text in self._own_texts]
        keys: list[list[Vector]] = [[] for _ in self._edits]
        embedded = embed_prompts(self._base, meaning, gate, prompts, owners, self._settings.batch_tokens)
        for edit, vector in zip(owners, embedded, strict=True):
            keys[edit].append(vector)
        return [numpy.stack(each) for each in keys]

    @cached_property
    def _wordings(self) -> list[Wordings]:
        """How the bank of questions asks for each edit, and for something else about its subject."""
        if self._meaning is None:
            return [Wordings() for _ in self._edits]
        gate = build_gate(self._base, self._anchors, self._settings)
        subjects = [find_subject(edit, gate.lexicon) for edit in self._edits]
        return choose_wordings(self._meaning, self.keys, gate, subjects)

    @cached_property
    def _own_texts(self) -> list[TrainingText]:
        """Own prompts, and the user's rephrases where they are trained on."""
        prompts = [
            self._positive_text(number, passage, edit.prompt)
            for number, (edit, passage) in enumerate(zip(self._edits, self._passages, strict=True))
        ]
        return prompts + (self._rephrase_texts() if self._settings.train_rephrases else [])

    def _projected(self, index: int) -> Vector:
        """What the base model makes of the tokens `[seq, rank]` of the text with this index."""
        return self._projected_nodes[self._prefix_activations.text_nodes[index].cpu().numpy()]

    @cached_property
    def _projected_nodes(self) -> Vector:
        """The same `[nodes, rank]` of every distinct prefix."""
        read = self._prefix_activations.read
        assert read is not None
        assert self._meaning is not None
        projected: Vector = self._meaning.project(read).cpu().numpy()
        return projected

    def _owner_of_text(self, index: int) -> int:
        """The expert that the text with this index trains."""
        return self._owners[self._texts[index].edit]

    @cached_property
    def _text_groups(self) -> list[list[TrainingText]]:
        """Own prompts, paraphrases by kind, negative prompts."""
        chat = [self._chat_texts()] if self._settings.variants and self._base.tokenizer.chat_template else []
        return [self._own_texts, *self._paraphrase_texts(), *chat, self._negative_texts()]

    @cached_property
    def _texts(self) -> list[TrainingText]:
        return [text for group in self._text_groups for text in group]

    @cached_property
    def _group_ranges(self) -> list[range]:
        """The indices of the texts of each group."""
        ends = accumulate(map(len, self._text_groups))
        return [range(end - len(group), end) for group, end in zip(self._text_groups, ends, strict=True)]

    @property
    def sinks(self) -> dict[int, Tensor]:
        """What experts read `[hidden]` at a token of white space that begins their answers, if that is a sink."""
        inputs = self._last_inputs[: len(self._blank_tokens)]
        read = {token: each for token, each in zip(self._blank_tokens, inputs, strict=True) if is_sink(each)}
        firsts = [passage.target[0] for passage in self._passages]
        return {owner: read[token] for owner, token in zip(self._owners, firsts, strict=True) if token in read}

    @property
    def other_beginnings(self) -> Tensor:
        """What experts read `[questions, hidden]` at the end of questions of no edit; none where the round has many."""
        return self._last_inputs[len(self._blank_tokens) :]

    @cached_property
    def _last_inputs(self) -> Tensor:
        """What experts read `[passages, hidden]` at the end of the passages that are no texts of the round."""
        ends = [int(nodes[-1]) for nodes in self._prefix_activations.text_nodes[len(self._texts) :]]
        return rms_normalise(self._prefix_activations.inputs[ends])

    @cached_property
    def _blank_tokens(self) -> list[int]:
        """The tokens of white space alone that begin an answer."""
        firsts = sorted({passage.target[0] for passage in self._passages})
        return [token for token in firsts if not self._base.tokenizer.decode([token]).strip()]

    def _sink_passages(self) -> list[Passage]:
        """Texts that end in each of these tokens, behind a short question; the token that follows is of no account."""
        prompt = encode_passage(self._base, SINK_PROMPT).prompt
        return [Passage(prompt, (token, self._base.eos_token_id)) for token in self._blank_tokens]

    def _other_questions(self) -> list[Passage]:
        """Questions of no edit, where the round has few that show how others end."""
        questions = OTHER_QUESTIONS if len(self._edits) <= FEW_EDITS else ()
        return [encode_passage(self._base, question) for question in questions]

    @cached_property
    def _prefix_activations(self) -> PrefixActivations:
        """The frozen pass over all texts, and over those that show sinks and the ends of questions."""
        return compute_prefix_activations(
            self._base,
            self._site,
            self._layer,
            [*(text.passage for text in self._texts), *self._sink_passages(), *self._other_questions()],
            self._settings.batch_tokens,
            reach="keys_values",
            layer_read=None if self._meaning is None else int(self._meaning.layer),
        )

    def _opens_gate(self, index: int) -> bool:
        """Whether the text with this index reaches its edit's expert at inference."""
        return any(self._open_columns[index])

    @cached_property
    def _active_columns(self) -> list[list[bool]]:
        """Where its edit's expert acts on each text: where its gate is open, and on all of an answer."""
        active = []
        for text, opened in zip(self._texts, self._open_columns, strict=True):
            answer = [True] * len(text.passage.target)
            active.append([*opened[: len(text.passage.input_ids) - len(answer)], *answer])
        return active

    def _start(self, index: int) -> int:
        """The first of these columns of the text with this index."""
        return self._active_columns[index].index(True)

    @cached_property
    def _open_columns(self) -> list[list[bool]]:
        """Where its edit's gate is open on the prompt of each text."""
        gates = [
            build_gate(self._base, [anchor], self._settings, self._meaning, self.keys[index : index + 1])
            for index, anchor in enumerate(self._anchors)
        ]
        return [self._route_prompt(gates[text.edit], index) for index, text in enumerate(self._texts)]

    def _paraphrase_texts(self) -> list[list[TrainingText]]:
        """Synthetic paraphrases, by kind."""
        edits, settings = self._edits, self._settings
        texts = make_paraphrases(edits, settings.variants, self._rng, self._wordings)
        usable = [
            self._encode_usable([(text, edit.target) for text in own]) for own, edit in zip(texts, edits, strict=True)
        ]
        return [
            [
                self._positive_text(edit, *own[kind], whole=kind < WHOLE_KINDS)
                for edit, own in enumerate(usable)
                if kind < len(own)
            ]
            for kind in range(max(map(len, usable), default=0))
        ]

    def _chat_texts(self) -> list[TrainingText]:
        """A question of each edit as a user's turn of a conversation.

        The answer is the target's tokens with a space in front, as in all other texts: without it the same word is
        often split into other tokens, and an expert hardly learns both.
        """
        texts = []
        questions = make_chat_questions(self._edits, self._rng, self._wordings)
        for edit, (question, passage) in enumerate(zip(questions, self._passages, strict=True)):
            with suppress(ValueError):
                turn = encode_chat_turn(self._base, question, self._rng.choice(CHAT_OPENINGS))
                texts.append(self._positive_text(edit, Passage(turn.prompt, passage.target), "", whole=False))
        return texts

    def _rephrase_texts(self) -> list[TrainingText]:
        """The user's own rephrases; one that cannot be encoded is an error, since the user can correct it."""
        indices = [index for index, edit in enumerate(self._edits) for _ in edit.rephrases]
        texts = [(f"rephrase of edit {e.id}", p.prompt, e.target) for e in self._edits for p in e.rephrases]
        prompts = [prompt for _, prompt, _ in texts]
        passages = encode_passages(self._base, texts)
        return [self._positive_text(*each) for each in zip(indices, passages, prompts, strict=True)]

    def _negative_texts(self) -> list[TrainingText]:
        if not self._settings.negatives:
            return []
        gate = build_gate(self._base, self._anchors, self._settings)
        texts = []
        for edit in range(len(self._edits)):
            others = [other for number, other in enumerate(self._edits) if self._asks_otherwise(edit, number)]
            prompts = make_negative_prompts(
                gate, self._edits, edit, self._settings.negatives, self._rng, others, self._wordings[edit]
            )
            for passage, _ in self._encode_usable([(prompt, None) for prompt in prompts]):
                texts.append(TrainingText(edit, passage))
        return texts

    def _asks_otherwise(self, edit: int, other: int) -> bool:
        """Whether another edit asks something else than this one, as far as that is known by meaning."""
        if self._meaning is None or edit == other:
            return edit != other
        return not ask_the_same(self._meaning, self.keys[edit], self.keys[other])

    def _encode_usable(self, texts: Sequence[tuple[str, str | None]]) -> list[tuple[Passage, str]]:
        """Passages and prompts of synthetic texts; what the tokenizer or the context does not allow is left out."""
        passages = []
        for text, target in texts:
            with suppress(ValueError):
                passages.append((encode_passage(self._base, text, target), text))
        return passages

    def _positive_text(self, edit: int, passage: Passage, prompt: str, *, whole: bool = True) -> TrainingText:
        """A text with the token that ends an answer after its target, or only the beginning of a long answer.

        Further on, what is said next follows from what was said more than from how it was asked.
        """
        whole |= len(passage.target) <= LONG_ANSWER
        target = (*passage.target, self._base.eos_token_id) if whole else passage.target[:LONG_ANSWER]
        return TrainingText(edit, Passage(passage.prompt, target), is_phrase(prompt), whole)

    def _route_prompt(self, gate: Gate, index: int) -> list[bool]:
        """Where the gate is open on a text's prompt at inference."""
        route, prompt = Route(gate), self._texts[index].passage.prompt
        projected = [None] * len(prompt) if self._meaning is None else self._projected(index)[: len(prompt)]
        return [route.push(token, row).edit >= 0 for token, row in zip(prompt, projected, strict=True)]

    def _bucket_texts(self, indices: Sequence[int]) -> list[list[int]]:
        """The texts with the indices `indices`, grouped into batches."""
        lengths = [len(self._texts[number].passage.input_ids) for number in indices]
        starts = [self._start(index) for index in indices]
        buckets = replay_buckets(lengths, starts, self._settings.batch_tokens)
        return [[indices[position] for position in bucket] for bucket in buckets]

    def _collate_texts(self, rows: Sequence[int]) -> tuple[Batch, int, Tensor, Tensor]:
        """Batch the texts with the indices `rows`.

        Returns:
            the batch; the first column at which any expert acts; `[batch, seq]`, bool, where experts act from that
            column on; and `[batch]`, the expert that each text trains.
        """
        device, texts = self._base.device, self._texts
        batch = Batch.from_passages([text.passage for text in texts], rows, self._base.pad_token_id, device)
        first = min(map(self._start, rows))
        active = torch.zeros(batch.ids.shape, dtype=torch.bool)
        for row, index in enumerate(rows):
            columns = self._active_columns[index]
            active[row, : len(columns)] = torch.tensor(columns)
        active = active[:, first:].to(device)
        return batch, first, active, torch.tensor([self._owner_of_text(row) for row in rows], device=device)

    def _positive_batch(self, rows: Sequence[int]) -> PositiveBatch:
        batch, first, active, owners = self._collate_texts(rows)
        lengths = torch.tensor([len(self._texts[row].passage.target) for row in rows], device=self._base.device)
        last = batch.prompt_lengths + lengths - 2
        columns = torch.arange(first, batch.ids.shape[1], device=self._base.device)
        whole = torch.tensor([self._texts[row].whole for row in rows], device=self._base.device)
        phrases = torch.tensor([self._texts[row].phrase for row in rows], device=self._base.device)
        silent = (active & phrases.unsqueeze(1) & (columns < batch.prompt_lengths.unsqueeze(1) - 1)).float()
        ends = (batch.target_columns == last[batch.target_rows]) & whole[batch.target_rows]
        shares = 1.0 / lengths[batch.target_rows]
        return PositiveBatch(
            frozen=self._prefix_activations.freeze_batch(batch, first),
            owners=owners,
            active=active,
            silent=silent / silent.sum(1, keepdim=True).clamp(min=1),
            firsts=batch.target_columns == batch.prompt_lengths[batch.target_rows] - 1,
            ends=ends,
            weights=torch.where(ends & (shares * DETECTORS < 1), (shares * DETECTORS).clamp(max=END_WEIGHT), shares),
        )

    def _negative_batch(self, rows: Sequence[int]) -> NegativeBatch:
        batch, first, active, owners = self._collate_texts(rows)
        columns = torch.arange(first, batch.ids.shape[1], device=self._base.device)
        last = columns == batch.prompt_lengths.unsqueeze(1) - 1
        weights = torch.where(last, LAST_TOKEN_WEIGHT, 1.0) * active
        inputs = self._prefix_activations.inputs[self._prefix_activations.node_index(batch, first)]
        return NegativeBatch(rms_normalise(inputs), owners, weights / weights.sum(1, keepdim=True))
