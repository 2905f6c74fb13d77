"""Token trees: texts with a common prefix share its computation.

Texts are laid out as trees of tokens, in which every distinct prefix is one node. A token attends to its own ancestors
only, so that it sees what it would see in its text alone (as in speculative decoding).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.base.tokens import LANES

PAIRS_PER_TOKEN = 512  # pairs of tokens whose attention costs as much as one more token through the layers


@dataclass
class TokenTree:
    """The tokens of some texts, parents before children; `parents` holds -1 for a first token."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def append_tokens(self, path: list[int], rest: Sequence[int]) -> list[int]:
        """Append the tokens `rest` to the nodes `path`; returns the nodes of the whole text."""
        first = len(self.tokens)
        self.tokens += rest
        self.parents += [path[-1] if path else -1, *range(first, first + len(rest))][: len(rest)]
        return [*path, *range(first, first + len(rest))]


@dataclass(frozen=True)
class TokenForest:
    """Trees, and the location of each text: the index of its tree and the nodes of its tokens."""

    trees: list[TokenTree]
    locations: list[tuple[int, list[int]]]

    @classmethod
    def from_texts(
        cls, texts: Sequence[tuple[int, ...]], shared: bool = True, groups: Sequence[int] | None = None
    ) -> "TokenForest":
        """Lay `texts` out; each in a tree of its own unless `shared`, and never with one of another group.

        Texts of one group without a common prefix share a tree too (with several roots), where that saves padding.
        """
        group_of = groups or [0] * len(texts)
        saved_padding = 0 if groups is None else LANES // 2
        trees: list[TokenTree] = []
        locations: dict[int, tuple[int, list[int]]] = {}
        previous: tuple[int, ...] = ()
        path: list[int] = []
        group = None
        for index in sorted(range(len(texts)), key=lambda index: (group_of[index], texts[index])):
            text = texts[index]
            path = path[: _common_prefix_length(previous, text)]
            same_group = shared and group_of[index] == group
            group = group_of[index]
            if not (same_group and _sharing_pays(len(trees[-1]), len(text), len(path), saved_padding)):
                trees.append(TokenTree())
                path = []
            path = trees[-1].append_tokens(path, text[len(path) :])
            locations[index] = (len(trees) - 1, path)
            previous = text
        return cls(trees, [locations[index] for index in range(len(texts))])


def _common_prefix_length(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Tokens in the longest common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def _sharing_pays(size: int, length: int, prefix: int, saved_padding: int) -> bool:
    """Whether putting a text in a tree saves more tokens than the wider attention costs.

    Args:
        size, length, prefix: tokens of the tree, of the text, and of their common prefix.
        saved_padding: columns of padding that one tree less saves.
    """
    grown = size + length - prefix
    return prefix + saved_padding > (grown**2 - size**2 - length**2) / PAIRS_PER_TOKEN


@dataclass(frozen=True, eq=False)
class TreeBatch(TensorEquality):
    """Token trees as a padded batch.

    Attributes:
        ids, positions: `[batch, nodes]`, tokens and their positions in their texts.
        visible: `[batch, nodes, nodes]`, bool: what a node attends to, its ancestors and itself; padding, only itself.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor

    @classmethod
    def from_trees(
        cls, trees: Sequence[TokenTree], pad: int, device: torch.device, width: int | None = None
    ) -> "TreeBatch":
        """The trees, padded to the largest or to `width` columns."""
        width = width or max(map(len, trees))
        ids = np.full((len(trees), width), pad)
        visible = np.tile(np.eye(width, dtype=bool), (len(trees), 1, 1))
        for row, tree in enumerate(trees):
            ids[row, : len(tree)] = tree.tokens
            for node, parent in enumerate(tree.parents):
                if parent >= 0:
                    visible[row, node] |= visible[row, parent]
        positions = visible.sum(-1) - 1
        return cls(*(torch.from_numpy(array).to(device) for array in (ids, positions, visible)))

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """`[batch, 1, nodes, nodes]`, to be added to attention scores."""
        hidden = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
        return hidden.masked_fill_(~self.visible, torch.finfo(dtype).min).unsqueeze(1)
