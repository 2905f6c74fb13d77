"""Prompts and targets as token ids, and batches of them without padding waste."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lemoe.errors import InputError

if TYPE_CHECKING:
    from lemoe.models import BaseModel


@dataclass(frozen=True)
class Passage:
    """Token ids of a prompt and of the target that follows it."""

    prompt: tuple[int, ...]
    target: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def encode(base: "BaseModel", prompt: str, target: str | None = None) -> Passage:
    """Tokenise a prompt and the target that continues it after one space.

    Raises:
        ValueError: if there is nothing to predict from or to predict, if the passage is longer than the context,
            or if the prompt's tokens are no prefix of prompt + target (then the model would never meet, in use,
            the context it was taught in).
    """
    prompt = prompt.rstrip(" \t")
    start = tuple(base.tokenizer(prompt).input_ids)
    if not start:
        raise ValueError("the prompt gives no tokens")
    if target is None:
        return _within_context(base, Passage(start))
    joint = "" if prompt.endswith("\n") else " "
    full = tuple(base.tokenizer(prompt + joint + target.strip()).input_ids)
    if full[: len(start)] != start:
        raise ValueError("the tokens of the prompt are not a prefix of the tokens of prompt + target")
    if len(full) == len(start):
        raise ValueError(f"the target {target!r} gives no tokens")
    return _within_context(base, Passage(start, full[len(start) :]))


def _within_context(base: "BaseModel", passage: Passage) -> Passage:
    if base.max_length and len(passage) > base.max_length:
        raise ValueError(f"{len(passage):,} tokens, more than the model's context of {base.max_length:,}")
    return passage


def encode_all(base: "BaseModel", texts: Iterable[tuple[str, str, str | None]]) -> list[Passage]:
    """Tokenise `(place, prompt, target)` triples.

    Raises:
        InputError: listing every text that cannot be used, by its place.
    """
    passages, problems = [], []
    for place, prompt, target in texts:
        try:
            passages.append(encode(base, prompt, target))
        except ValueError as problem:
            problems.append(f"{place}: {problem}")
    if problems:
        raise InputError.listing(f"{len(problems)} text(s) cannot be used with this model", problems)
    return passages


@dataclass(frozen=True)
class Batch:
    """Right-padded passages.

    Attributes:
        rows: index of each passage in the sequence that was batched.
        ids, mask: `[batch, seq]`.
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
    def of(cls, passages: Sequence[Passage], rows: Sequence[int], pad: int, device: torch.device) -> "Batch":
        chosen = [passages[row] for row in rows]
        width = max(map(len, chosen))
        ids = torch.full((len(chosen), width), pad)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for index, passage in enumerate(chosen):
            ids[index, : len(passage)] = torch.tensor(passage.prompt + passage.target)
            mask[index, : len(passage)] = 1
        spots = [
            (index, len(passage.prompt) + offset - 1, token)
            for index, passage in enumerate(chosen)
            for offset, token in enumerate(passage.target)
        ]
        target_rows, target_columns, labels = torch.tensor(spots, dtype=torch.long).reshape(-1, 3).unbind(1)
        lengths = torch.tensor([len(passage.prompt) for passage in chosen])
        tensors = (ids, mask, lengths, target_rows, target_columns, labels)
        return cls(tuple(rows), *(tensor.to(device) for tensor in tensors))

    def take(self, chosen: Tensor) -> "tuple[Batch, Tensor]":
        """The batch of some of its passages, `chosen` `[n]` in ascending order, and which targets are theirs."""
        kept = torch.isin(self.target_rows, chosen)
        batch = Batch(
            tuple(self.rows[index] for index in chosen.tolist()),
            self.ids[chosen],
            self.mask[chosen],
            self.prompt_lengths[chosen],
            torch.searchsorted(chosen, self.target_rows[kept].contiguous()),
            self.target_columns[kept],
            self.labels[kept],
        )
        return batch, kept


def length_buckets(lengths: Sequence[int], max_tokens: int, max_waste: float = 0.25) -> list[list[int]]:
    """Indices grouped by like length, longest group first, so that running out of memory happens at once.

    A group holds at most `max_tokens` padded tokens, and no member is shorter than the group's longest by more
    than `max_waste` of it (and four tokens).
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = []
    for index in order:
        group = groups[-1] if groups else []
        longest = lengths[group[0]] if group else 0
        fits = (len(group) + 1) * longest <= max_tokens
        alike = lengths[index] >= longest * (1 - max_waste) - 4
        if group and fits and alike:
            group.append(index)
        else:
            groups.append([index])
    return groups
