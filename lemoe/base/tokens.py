"""Prompts and targets as token ids, and batches of them without padding waste."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.data.edits import Edit
from lemoe.errors import InputError

if TYPE_CHECKING:
    from lemoe.base.loading import BaseModel

TOKENISED = 1000  # passages whose texts go to the tokenizer at a time


@dataclass(frozen=True)
class Passage:
    """Token ids of a prompt and of the target that follows it."""

    prompt: tuple[int, ...]
    target: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads to predict the target: all but its last token, which nothing comes after."""
        return self.prompt + self.target[:-1]


def encode(base: "BaseModel", prompt: str, target: str | None = None) -> Passage:
    """Tokenise a prompt and the target that continues it after one space.

    Raises:
        ValueError: if there is nothing to predict from or to predict, if the passage is longer than the context,
            or if the prompt's tokens are no prefix of prompt + target (then the model would never meet, in use,
            the context it was taught in).
    """
    ids = base.tokenizer(_written(prompt, target)).input_ids
    return _passage(base, target, *map(tuple, ids))


def _written(prompt: str, target: str | None) -> list[str]:
    """The texts whose tokens make a passage: the prompt, and the prompt with its target."""
    prompt = prompt.rstrip(" \t")
    joint = "" if prompt.endswith("\n") else " "
    return [prompt] if target is None else [prompt, prompt + joint + target.strip()]


def _passage(base: "BaseModel", target: str | None, start: tuple[int, ...], full: tuple[int, ...] = ()) -> Passage:
    if not start:
        raise ValueError("the prompt gives no tokens")
    if target is None:
        return within_context(base, Passage(start))
    if full[: len(start)] != start:
        raise ValueError("the tokens of the prompt are not a prefix of the tokens of prompt + target")
    if len(full) == len(start):
        raise ValueError(f"the target {target!r} gives no tokens")
    return within_context(base, Passage(start, full[len(start) :]))


def within_context(base: "BaseModel", passage: Passage) -> Passage:
    """The passage itself.

    Raises:
        ValueError: if it is longer than the model's context.
    """
    if base.max_length and len(passage) > base.max_length:
        raise ValueError(f"{len(passage):,} tokens, more than the model's context of {base.max_length:,}")
    return passage


def encode_all(base: "BaseModel", texts: Iterable[tuple[str, str, str | None]]) -> list[Passage]:
    """Tokenise `(place, prompt, target)` triples.

    Raises:
        InputError: listing every text that cannot be used, by its place.
    """
    passages, problems = [], []
    waiting = iter(texts)
    while part := list(islice(waiting, TOKENISED)):
        written = [_written(prompt, target) for _, prompt, target in part]
        ids = iter(base.tokenizer([text for pair in written for text in pair]).input_ids)
        for (place, _, target), pair in zip(part, written, strict=True):
            try:
                passages.append(_passage(base, target, *map(tuple, islice(ids, len(pair)))))
            except ValueError as problem:
                problems.append(f"{place}: {problem}")
    if problems:
        raise InputError.listing(f"{len(problems)} text(s) cannot be used with this model", problems)
    return passages


def encode_edits(base: "BaseModel", edits: Sequence[Edit]) -> list[Passage]:
    """Token ids of each edit's prompt and target.

    Raises:
        InputError: listing the edits that cannot be used with this model.
    """
    return encode_all(base, ((f"edit {edit.id}", edit.prompt, edit.target) for edit in edits))


@dataclass(frozen=True, eq=False)
class Batch(TensorEquality):
    """Right-padded passages.

    Attributes:
        rows: index of each passage in the sequence that was batched.
        ids, mask: `[batch, seq]`, what is read.
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
    def of(
        cls, passages: Sequence[Passage], rows: Sequence[int], pad: int, device: torch.device, width: int | None = None
    ) -> "Batch":
        """The passages `rows`, padded to the longest or to `width` columns."""
        chosen = [passages[row] for row in rows]
        width = width or max(len(passage.read) for passage in chosen)
        ids = torch.full((len(chosen), width), pad)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for index, passage in enumerate(chosen):
            ids[index, : len(passage.read)] = torch.tensor(passage.read)
            mask[index, : len(passage.read)] = 1
        spots = [
            (index, len(passage.prompt) + offset - 1, token)
            for index, passage in enumerate(chosen)
            for offset, token in enumerate(passage.target)
        ]
        target_rows, target_columns, labels = torch.tensor(spots, dtype=torch.long).reshape(-1, 3).unbind(1)
        lengths = torch.tensor([len(passage.prompt) for passage in chosen])
        tensors = (ids, mask, lengths, target_rows, target_columns, labels)
        return cls(tuple(rows), *(tensor.to(device) for tensor in tensors))


LANES = 16  # columns that attention adds up side by side; any other width changes how it rounds


def steady_width(longest: int, limit: int | None = None) -> int:
    """Columns for texts of at most `longest` tokens, so that what one gives does not depend on the others, to the bit.

    A multiple of `LANES`, with some padding, since a batch without any takes another way through attention; `limit` is
    the model's context.
    """
    width = (longest // LANES + 1) * LANES
    return width if limit is None else max(longest, min(width, limit))


PASS = 24  # padded tokens whose cost equals that of one more pass over the weights


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
        together = [index for length in distinct[start:end] for index in members[length]]
        size = max(1, max_tokens // distinct[start])
        groups += [together[first : first + size] for first in range(0, len(together), size)]
    return groups


def _cheapest_cuts(counts: Sequence[tuple[int, int]]) -> list[int]:
    """Where to cut `(length, how many)`, longest first, so that padded tokens and passes cost the least."""
    cost, cut = [0.0] + [math.inf] * len(counts), [0] * (len(counts) + 1)
    for start, (longest, _) in enumerate(counts):
        rows = 0
        for end in range(start + 1, len(counts) + 1):
            rows += counts[end - 1][1]
            total = cost[start] + longest * rows + PASS
            if total < cost[end]:
                cost[end], cut[end] = total, start
    cuts = [len(counts)]
    while cuts[-1]:
        cuts.append(cut[cuts[-1]])
    return cuts[::-1]


FEW = 8  # rows that a matrix product should not be split below


def replay_buckets(lengths: Sequence[int], starts: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of texts in batches that run again and again from the first of their `starts` on.

    Texts of like length stand together, then those whose starts lie close.
    """
    return [part for bucket in length_buckets(lengths, max_tokens) for part in _split_by_start(bucket, lengths, starts)]


def _split_by_start(bucket: Sequence[int], lengths: Sequence[int], starts: Sequence[int]) -> list[list[int]]:
    """The bucket whole, or in two where that saves a sixth of the columns that run again."""
    order = sorted(bucket, key=lambda index: starts[index])
    width = max(lengths[index] for index in order)
    whole = len(order) * (width - starts[order[0]])

    def cost(cut: int) -> int:
        return cut * (width - starts[order[0]]) + (len(order) - cut) * (width - starts[order[cut]])

    cut = min(range(FEW, len(order) - FEW + 1), key=cost, default=0)
    return [order[:cut], order[cut:]] if cut and cost(cut) * 6 <= whole * 5 else [order]
