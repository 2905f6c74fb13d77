"""KV anchor routing (the paper's term, section 3.2): one decision per sequence, by one rule in training and in use.

The value of a sequence is the mean of the embedding layer's output over its prompt, through a trained projection. Each
expert has a key; the gate is the softmax of the products of keys and value, and the top k experts act on the whole
sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lemoe.base.equality import TensorEquality
from lemoe.base.tensors import rms_normalise
from lemoe.errors import AdaptorError
from lemoe.routing.router import Explanation, Host, Lineage, LiveRouter, Router, RouterSettings, Routing, Sequences


@dataclass(frozen=True, eq=False)
class Projection(TensorEquality):
    """`W_up(SiLU(W_down e))`: `down` `[width, hidden]`, `up` `[width, width]`."""

    down: Tensor
    up: Tensor

    @classmethod
    def from_generator(cls, hidden: int, width: int, generator: torch.Generator) -> "Projection":
        """A random projection that preserves the scale of its input."""
        down = torch.randn(width, hidden, generator=generator) / hidden**0.5
        up = torch.randn(width, width, generator=generator) / (width / 2) ** 0.5
        return cls(down, up)

    def to(self, device: torch.device) -> "Projection":
        return Projection(self.down.to(device), self.up.to(device))

    def __call__(self, embedded: Tensor) -> Tensor:
        """Values `[batch, width]` of pooled prompts `[batch, hidden]`."""
        return functional.silu(embedded @ self.down.T) @ self.up.T


@dataclass(frozen=True, eq=False)
class KeyRouter(TensorEquality, Router):
    """The keys of all experts, and the projection with which each key was trained.

    Attributes:
        keys: `[experts, width]`.
        projections: one for each line of rounds (a run and its continuations); adaptors merged from several runs
            keep one each, since a key is only valid with its own projection.
        lineage: `[experts]`, int64, index into `projections`.
        top_k: experts that act on one sequence.
    """

    method = "paper"
    by_prompt = True

    keys: Tensor
    projections: tuple[Projection, ...]
    lineage: Tensor
    top_k: int

    def to(self, device: torch.device) -> "KeyRouter":
        moved = tuple(projection.to(device) for projection in self.projections)
        return replace(self, keys=self.keys.to(device), projections=moved, lineage=self.lineage.to(device))

    def gate_weights(self, pooled: Tensor) -> Tensor:
        """The softmax gate `[batch, experts]` of pooled prompts `[batch, hidden]`.

        Values and keys are normalised first: pooled prompts are so similar that otherwise the longest key would win
        them all.
        """
        values = torch.stack([rms_normalise(projection(pooled)) for projection in self.projections])
        scores = torch.einsum("ebk,ek->be", values[self.lineage], rms_normalise(self.keys)) / self.keys.shape[1] ** 0.5
        return scores.softmax(-1)

    def route(self, pooled: Tensor, length: int) -> Routing:
        """The route of each sequence, the same at each of its `length` positions."""
        weights, experts = self.gate_weights(pooled).topk(min(self.top_k, len(self.keys)))
        shape = (len(pooled), length, experts.shape[-1])
        return Routing(experts.unsqueeze(1).expand(shape), weights.unsqueeze(1).expand(shape))

    def tensors(self) -> dict[str, Tensor]:
        return {
            "router.keys": self.keys,
            "router.lineage": self.lineage,
            "router.projection.down": torch.stack([projection.down for projection in self.projections]),
            "router.projection.up": torch.stack([projection.up for projection in self.projections]),
        }

    @classmethod
    def expected_tensors(
        cls, settings: RouterSettings, hidden: int, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        width = settings.router_width
        stored = tensors.get("router.projection.down")
        count, embedded = (
            (stored.shape[0], stored.shape[2]) if stored is not None and stored.dim() == 3 else (1, hidden)
        )
        return {
            "router.keys": ((len(lineages), width), None),
            "router.lineage": ((len(lineages),), torch.int64),
            "router.projection.down": ((count, width, embedded), None),
            "router.projection.up": ((count, width, width), None),
        }

    @classmethod
    def from_tensors(
        cls, settings: RouterSettings, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> "KeyRouter":
        downs, ups = tensors["router.projection.down"], tensors["router.projection.up"]
        lineage = tensors["router.lineage"]
        if not bool(((lineage >= 0) & (lineage < len(downs))).all()):
            raise ValueError("router.lineage: index out of range")
        projections = tuple(Projection(down, up) for down, up in zip(downs, ups, strict=True))
        return cls(tensors["router.keys"], projections, lineage, settings.top_k)

    def select(self, experts: Sequence[int]) -> "KeyRouter":
        chosen = torch.tensor(list(experts), dtype=torch.long)
        owners = self.lineage[chosen]
        used = list(dict.fromkeys(owners.tolist()))
        return replace(
            self,
            keys=self.keys[chosen],
            projections=tuple(self.projections[owner] for owner in used),
            lineage=torch.tensor([used.index(owner) for owner in owners.tolist()], dtype=torch.long),
        )

    @classmethod
    def stack(cls, parts: "Sequence[tuple[KeyRouter, Sequence[Lineage]]]") -> "KeyRouter":
        """All keys, each with the newest projection of its line of rounds; branches keep one each."""
        lineages = {lineage.round: lineage for _, own in parts for lineage in own}
        tips: dict[str, Projection] = {}
        fallback: dict[str, str] = {}
        for router, own in parts:
            owners = router.lineage.tolist()
            for index, projection in enumerate(router.projections):
                served = [lineage for lineage, owner in zip(own, owners, strict=True) if owner == index]
                tip = max(served, key=lambda lineage: lineage.depth).round
                tips.setdefault(tip, projection)
                for lineage in served:
                    fallback.setdefault(lineage.round, tip)
        serving = fallback | _newest_projections(lineages, tips)
        chosen = [serving[lineage.round] for _, own in parts for lineage in own]
        used = list(dict.fromkeys(chosen))
        return cls(
            torch.cat([router.keys for router, _ in parts]),
            tuple(tips[tip] for tip in used),
            torch.tensor([used.index(tip) for tip in chosen], dtype=torch.long),
            parts[0][0].top_k,
        )

    def to_live(self, base: Host, settings: RouterSettings) -> "LiveKeyRouter":
        return LiveKeyRouter(base, self.to(base.device))


def _newest_projections(lineages: Mapping[str, Lineage], tips: Mapping[str, Projection]) -> dict[str, str]:
    """For each round, the deepest round of its line, itself included, whose projection is in `tips`."""
    newest: dict[str, str] = {}
    for tip in tips:
        current: str | None = tip
        while current is not None and current in lineages:
            if current not in newest or (lineages[newest[current]].depth, newest[current]) < (lineages[tip].depth, tip):
                newest[current] = tip
            current = lineages[current].parent
    return newest


class LiveKeyRouter(LiveRouter):
    """Routes a sequence once, by its prompt; its memory is the decision, which later tokens reuse."""

    def __init__(self, base: Host, router: KeyRouter):
        self.device = base.device
        self._base = base
        self._router = router

    def route(self, sequences: Sequences) -> tuple[Routing, Tensor | None]:
        length = sequences.mask.shape[1]
        if sequences.starts is not None:
            raise AdaptorError("preset `paper` routes a row by its prompt; give each sequence a row of its own")
        if sequences.memory is not None:
            memory = sequences.memory[:, -1:].expand(-1, length, -1)
            experts, weights = memory.chunk(2, dim=-1)
            return _add_explanations(Routing(experts.long(), weights)), memory
        embeddings = sequences.embeddings
        if embeddings is None:
            embeddings = self._base.embedding(sequences.ids)
        routing = self._router.route(pool_prompt(embeddings, sequences.prompt), length)
        memory = torch.cat([routing.experts.float(), routing.weights], dim=-1)
        return _add_explanations(routing), memory


def _add_explanations(routing: Routing) -> Routing:
    pairs = zip(routing.experts[:, 0, 0].tolist(), routing.weights[:, 0, 0].tolist(), strict=True)
    return replace(routing, explained=tuple(Explanation(int(e), w, nearest=int(e)) for e, w in pairs))


def pool_prompt(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Mean of `embeddings` `[batch, seq, hidden]` over the prompt (`mask` `[batch, seq]`), divided by its RMS.

    The paper pools without normalising; embeddings differ in size by an order of magnitude between families, and
    the projection's learning rate would have to follow.
    """
    weight = mask.unsqueeze(-1).float()
    mean = (embeddings.float() * weight).sum(1) / weight.sum(1).clamp(min=1)
    return rms_normalise(mean)
