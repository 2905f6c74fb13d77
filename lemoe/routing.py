"""KV anchor routing: which expert acts on a sequence, by the same rule in training and in use (paper, 3.2).

The value of a sequence is the mean of the embedding layer's output over its prompt, sent through a trained
projection; each expert has a key, and the gate is the softmax over the products of keys and value, of which the
top k act. One decision holds for the whole sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lemoe.experts import EPSILON, Routing


@dataclass(frozen=True)
class Projection:
    """`W_up(SiLU(W_down e))`: `down` `[width, hidden]`, `up` `[width, width]`."""

    down: Tensor
    up: Tensor

    @classmethod
    def new(cls, hidden: int, width: int, generator: torch.Generator) -> "Projection":
        """A random projection that keeps the scale of its input."""
        down = torch.randn(width, hidden, generator=generator) / hidden**0.5
        up = torch.randn(width, width, generator=generator) / (width / 2) ** 0.5
        return cls(down, up)

    def __call__(self, embedded: Tensor) -> Tensor:
        """Values `[batch, width]` of pooled prompts `[batch, hidden]`."""
        return functional.silu(embedded @ self.down.T) @ self.up.T


@dataclass(frozen=True)
class Router:
    """Keys of all experts, and the projection under which each key was trained.

    Attributes:
        keys: `[experts, width]`.
        projections: one for each lineage (a run and its continuations); adaptors merged from several runs keep
            one each, since a key means something under its own projection only.
        lineage: `[experts]`, int64, index into `projections`.
        top_k: experts that act on one sequence.
    """

    keys: Tensor
    projections: tuple[Projection, ...]
    lineage: Tensor
    top_k: int

    def to(self, device: torch.device) -> "Router":
        moved = tuple(Projection(p.down.to(device), p.up.to(device)) for p in self.projections)
        return replace(self, keys=self.keys.to(device), projections=moved, lineage=self.lineage.to(device))

    def gate(self, pooled: Tensor) -> Tensor:
        """The softmax gate `[batch, experts]` of pooled prompts `[batch, hidden]`.

        Values and keys are compared by direction: prompts pool to vectors so alike that otherwise the longest key
        would win them all.
        """
        values = torch.stack([unit_rms(projection(pooled)) for projection in self.projections])
        scores = torch.einsum("ebk,ek->be", values[self.lineage], unit_rms(self.keys)) / self.keys.shape[1] ** 0.5
        return scores.softmax(-1)

    def route(self, pooled: Tensor, length: int) -> Routing:
        """The route of each sequence, the same at each of its `length` positions."""
        weights, experts = self.gate(pooled).topk(min(self.top_k, len(self.keys)))
        shape = (len(pooled), length, experts.shape[-1])
        return Routing(experts.unsqueeze(1).expand(shape), weights.unsqueeze(1).expand(shape))


def pool(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Mean of `embeddings` `[batch, seq, hidden]` over the prompt (`mask` `[batch, seq]`), divided by its RMS.

    The paper pools without normalising; embeddings differ in size by an order of magnitude between families, and
    the projection's learning rate would have to follow.
    """
    weight = mask.unsqueeze(-1).float()
    mean = (embeddings.float() * weight).sum(1) / weight.sum(1).clamp(min=1)
    return unit_rms(mean)


def unit_rms(vectors: Tensor) -> Tensor:
    """`vectors` `[..., width]`, each divided by its RMS."""
    return vectors * torch.rsqrt(vectors.pow(2).mean(-1, keepdim=True) + EPSILON)


def stack_routers(parts: Sequence[tuple[Router, Mapping[str, int]]]) -> Router:
    """One router with the keys of all parts, in order.

    Args:
        parts: each router with the depth of each of its lineages (name -> rounds that trained its projection), in
            the order of its projections. Of two projections of one lineage the deeper is the newer, and serves
            all of the lineage's keys.
    """
    newest: dict[str, tuple[int, Projection]] = {}
    for router, depths in parts:
        for (name, depth), projection in zip(depths.items(), router.projections, strict=True):
            if name not in newest or newest[name][0] < depth:
                newest[name] = (depth, projection)
    position = {name: index for index, name in enumerate(newest)}
    lineage = [position[list(depths)[int(owner)]] for router, depths in parts for owner in router.lineage]
    return Router(
        torch.cat([router.keys for router, _ in parts]),
        tuple(projection for _, projection in newest.values()),
        torch.tensor(lineage, dtype=torch.long),
        parts[0][0].top_k,
    )
