"""Prompts and targets as token ids, and batches of them without padding waste."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.data.counting import format_count
from lemoe.data.edits import Edit
from lemoe.errors import InputError

if TYPE_CHECKING:
    from lemoe.base.loading import BaseModel

TOKENIZER_CHUNK = 1000  # passages per call of the tokenizer


class ContextLengthError(ValueError):
    """More tokens than the model's context holds."""


@dataclass(frozen=True)
class Passage:
    """Token ids of a prompt and of the target that follows it."""

    prompt: tuple[int, ...]
    target: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)

    @property
    def input_ids(self) -> tuple[int, ...]:
        """The tokens that the model runs on to predict the target: all but the target's last."""
        return self.prompt + self.target[:-1]


def encode_passage(base: "BaseModel", prompt: str, target: str | None = None) -> Passage:
    """Tokenise a prompt and the target that continues it after one space.

    Raises:
        ValueError: if there is nothing to predict from or to predict, if the passage is longer than the context,
            or if the prompt's tokens are not a prefix of those of prompt + target (then the model would never see, in
            use, the tokens it was trained on).
    """
    ids = base.tokenizer(_build_texts(prompt, target)).input_ids
    return _build_passage(base, target, *map(tuple, ids))


def _build_texts(prompt: str, target: str | None) -> list[str]:
    """The texts whose tokens make a passage: the prompt, and the prompt with its target."""
    prompt = prompt.rstrip(" \t")
    joint = "" if prompt.endswith("\n") else " "
    return [prompt] if target is None else [prompt, prompt + joint + target.strip()]


def _build_passage(
    base: "BaseModel", target: str | None, start: tuple[int, ...], full: tuple[int, ...] = ()
) -> Passage:
    if not start:
        raise ValueError("the prompt gives no tokens")
    if target is None:
        return check_context_length(base, Passage(start))
    if full[: len(start)] != start:
        raise ValueError("the tokens of the prompt are not a prefix of the tokens of prompt + target")
    if len(full) == len(start):
        raise ValueError(f"the target {target!r} gives no tokens")
    return check_context_length(base, Passage(start, full[len(start) :]))


def check_context_length(base: "BaseModel", passage: Passage) -> Passage:
    """Return the passage.

    Raises:
        ContextLengthError: if it is longer than the model's context.
    """
    if base.max_length and len(passage) > base.max_length:
        raise ContextLengthError(f"{len(passage):,} tokens, more than the model's context of {base.max_length:,}")
    return passage


def encode_passages(base: "BaseModel", texts: Iterable[tuple[str, str, str | None]]) -> list[Passage]:
    """Tokenise `(label, prompt, target)` triples.

    Raises:
        InputError: listing every text that cannot be used, by its label.
    """
    passages, problems = [], []
    remaining = iter(texts)
    while chunk := list(islice(remaining, TOKENIZER_CHUNK)):
        pairs = [_build_texts(prompt, target) for _, prompt, target in chunk]
        ids = iter(base.tokenizer([text for pair in pairs for text in pair]).input_ids)
        for (label, _, target), pair in zip(chunk, pairs, strict=True):
            try:
                passages.append(_build_passage(base, target, *map(tuple, islice(ids, len(pair)))))
            except ValueError as problem:
                problems.append(f"{label}: {problem}")
    if problems:
        raise refuse_texts("text", problems)
    return passages


def refuse_texts(noun: str, problems: list[str]) -> InputError:
    """One error for all texts, called `noun`, that a model cannot take, by the problem of each."""
    return InputError.from_problems(f"{format_count(len(problems), noun)} cannot be used with this model", problems)


def encode_edits(base: "BaseModel", edits: Sequence[Edit]) -> list[Passage]:
    """Token ids of each edit's prompt and target.

    Raises:
        InputError: listing the edits that cannot be used with this model.
    """
    return encode_passages(base, ((f"edit {edit.id}", edit.prompt, edit.target) for edit in edits))


@dataclass(frozen=True, eq=False)
class Batch(TensorEquality):
    """Right-padded passages.

    Attributes:
        rows: index of each passage among those given to `from_passages`.
        ids, mask: `[batch, seq]`, token ids and attention mask.
        prompt_lengths: `[batch]`, tokens.
        target_rows, target_columns: `[targets]`, the positions whose logits predict a target token.
        labels: `[targets]`, those target tokens.
    """

    rows: tuple[int, ...]
    ids: Tensor
    mask: Tensor
    prompt_lengths: Tensor
    target_rows: Tensor
    target_columns: Tensor
    labels: Tensor

    @classmethod
    def from_passages(
        cls, passages: Sequence[Passage], rows: Sequence[int], pad: int, device: torch.device, width: int | None = None
    ) -> "Batch":
        """The passages `rows`, padded to the longest or to `width` columns."""
        chosen = [passages[row] for row in rows]
        width = width or max(len(passage.input_ids) for passage in chosen)
        ids = torch.full((len(chosen), width), pad)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for index, passage in enumerate(chosen):
            ids[index, : len(passage.input_ids)] = torch.tensor(passage.input_ids)
            mask[index, : len(passage.input_ids)] = 1
        targets = [
            (index, len(passage.prompt) + offset - 1, token)
            for index, passage in enumerate(chosen)
            for offset, token in enumerate(passage.target)
        ]
        target_rows, target_columns, labels = torch.tensor(targets, dtype=torch.long).reshape(-1, 3).unbind(1)
        lengths = torch.tensor([len(passage.prompt) for passage in chosen])
        tensors = (ids, mask, lengths, target_rows, target_columns, labels)
        return cls(tuple(rows), *(tensor.to(device) for tensor in tensors))


LANES = 16  # columns that attention sums side by side; widths that are no multiple round differently


def batch_invariant_width(longest: int, limit: int | None = None) -> int:
    """Padded width for texts of at most `longest` tokens, with which results do not depend on the batch, bit for bit.

    It is a multiple of `LANES` with at least one column of padding, since a batch without any runs another attention
    kernel; `limit` is the model's context.
    """
    width = (longest // LANES + 1) * LANES
    return width if limit is None else max(longest, min(width, limit))


PASS_COST = 24  # padded tokens that cost as much as one more forward pass


def length_buckets(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped by length, longest group first, so that running out of memory happens at once.

    A group holds at most `max_tokens` padded tokens. Groups are cut so that padding and the number of passes cost
    the least together.
    """
    members: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        members.setdefault(length, []).append(index)
    distinct = sorted(members, reverse=True)
    groups = []
    for start, end in pairwise(_cheapest_cuts([(length, len(members[length])) for length in distinct])):
        bucket = [index for length in distinct[start:end] for index in members[length]]
        size = max(1, max_tokens // distinct[start])
        groups += [bucket[first : first + size] for first in range(0, len(bucket), size)]
    return groups


def _cheapest_cuts(counts: Sequence[tuple[int, int]]) -> list[int]:
    """Where to cut `(length, count)` pairs, longest first, so that padded tokens and passes cost the least."""
    cost, cut = [0.0] + [math.inf] * len(counts), [0] * (len(counts) + 1)
    for start, (longest, _) in enumerate(counts):
        rows = 0
        for end in range(start + 1, len(counts) + 1):
            rows += counts[end - 1][1]
            total = cost[start] + longest * rows + PASS_COST
            if total < cost[end]:
                cost[end], cut[end] = total, start
    cuts = [len(counts)]
    while cuts[-1]:
        cuts.append(cut[cuts[-1]])
    return cuts[::-1]


MIN_SPLIT_ROWS = 8  # smaller batches make slow matmuls


def replay_buckets(lengths: Sequence[int], starts: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of texts in batches to be replayed, each from the smallest of its `starts` on.

    Texts are grouped by length, then by start.
    """
    return [part for bucket in length_buckets(lengths, max_tokens) for part in _split_by_start(bucket, lengths, starts)]


def _split_by_start(bucket: Sequence[int], lengths: Sequence[int], starts: Sequence[int]) -> list[list[int]]:
    """The bucket, or two halves of it if that saves a sixth of the columns to replay."""
    order = sorted(bucket, key=lambda index: starts[index])
    width = max(lengths[index] for index in order)
    whole = len(order) * (width - starts[order[0]])

    def split_cost(cut: int) -> int:
        return cut * (width - starts[order[0]]) + (len(order) - cut) * (width - starts[order[cut]])

    cut = min(range(MIN_SPLIT_ROWS, len(order) - MIN_SPLIT_ROWS + 1), key=split_cost, default=0)
    return [order[:cut], order[cut:]] if cut and split_cost(cut) * 6 <= whole * 5 else [order]
