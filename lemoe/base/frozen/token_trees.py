"""Texts that begin alike, side by side: what they have in common goes through the model once.

Texts are laid out as trees of tokens, in which every distinct beginning is one node. A token attends to its own
ancestors alone, so that it meets just what it would meet in its text by itself (token trees, as in speculative
decoding).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.base.tokens import LANES

DENSE = 512  # pairs of tokens whose attention costs as much as one more token through the layers


@dataclass
class Tree:
    """The tokens of some texts, parents before children; `parents` holds -1 for a first token."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def grow(self, line: list[int], rest: Sequence[int]) -> list[int]:
        """Add the tokens `rest` behind the nodes `line`; returns the nodes of the whole text."""
        first = len(self.tokens)
        self.tokens += rest
        self.parents += [line[-1] if line else -1, *range(first, first + len(rest))][: len(rest)]
        return [*line, *range(first, first + len(rest))]


@dataclass(frozen=True)
class Forest:
    """Trees, and where each text stands: its tree and the nodes of its tokens."""

    trees: list[Tree]
    places: list[tuple[int, list[int]]]

    @classmethod
    def of(cls, texts: Sequence[tuple[int, ...]], shared: bool = True, groups: Sequence[int] | None = None) -> "Forest":
        """Lay `texts` out; each in a tree of its own unless `shared`, and never with one of another group.

        Texts of one group that begin differently share a tree too (with several roots), where that saves padding.
        """
        member = groups or [0] * len(texts)
        spared = 0 if groups is None else LANES // 2
        trees: list[Tree] = []
        places: dict[int, tuple[int, list[int]]] = {}
        before: tuple[int, ...] = ()
        line: list[int] = []
        group = None
        for index in sorted(range(len(texts)), key=lambda index: (member[index], texts[index])):
            text = texts[index]
            line = line[: _alike(before, text)]
            together = shared and member[index] == group and _pays(len(trees[-1]), len(text), len(line), spared)
            group = member[index]
            if not together:
                trees.append(Tree())
                line = []
            line = trees[-1].grow(line, text[len(line) :])
            places[index] = (len(trees) - 1, line)
            before = text
        return cls(trees, [places[index] for index in range(len(texts))])


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens two texts have in common from the start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def _pays(size: int, length: int, alike: int, spared: int) -> bool:
    """Whether a text saves more, by what it shares with a tree, than the tree's other tokens cost its attention.

    `spared` are the columns of padding that one tree less saves.
    """
    grown = size + length - alike
    return alike + spared > (grown**2 - size**2 - length**2) / DENSE


@dataclass(frozen=True, eq=False)
class Rows(TensorEquality):
    """Trees as a batch.

    Attributes:
        ids, positions: `[batch, nodes]`, tokens and how many come before them in their texts.
        sees: `[batch, nodes, nodes]`, bool: a node's ancestors and itself; padding sees itself.
    """

    ids: Tensor
    positions: Tensor
    sees: Tensor

    @classmethod
    def of(cls, trees: Sequence[Tree], pad: int, device: torch.device, width: int | None = None) -> "Rows":
        """The trees, padded to the largest or to `width` columns."""
        width = width or max(map(len, trees))
        ids = np.full((len(trees), width), pad)
        sees = np.tile(np.eye(width, dtype=bool), (len(trees), 1, 1))
        for row, tree in enumerate(trees):
            ids[row, : len(tree)] = tree.tokens
            for node, parent in enumerate(tree.parents):
                if parent >= 0:
                    sees[row, node] |= sees[row, parent]
        positions = sees.sum(-1) - 1
        return cls(*(torch.from_numpy(array).to(device) for array in (ids, positions, sees)))

    def mask(self, dtype: torch.dtype) -> Tensor:
        """`[batch, 1, nodes, nodes]`, to be added to attention scores."""
        hidden = torch.zeros(self.sees.shape, dtype=dtype, device=self.sees.device)
        return hidden.masked_fill_(~self.sees, torch.finfo(dtype).min).unsqueeze(1)
