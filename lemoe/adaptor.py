"""Adaptor states: experts, their routes and where they came from; values that can be stacked and saved."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lemoe.edits import Edit, digest_of
from lemoe.errors import AdaptorError
from lemoe.experts import Experts
from lemoe.models import Fingerprint
from lemoe.routing import Router, stack_routers
from lemoe.settings import Settings


@dataclass(frozen=True)
class RoundRecord:
    """Where one expert came from.

    Attributes:
        id: hash of what the round was trained on and with; equal rounds have equal ids.
        lineage: id of the first round of the run that this round continues.
        depth: its place in that lineage, from 1.
        parent: id of the round before, whose experts were frozen while this one was trained; None for the first.
        edits: digest of each edit it holds.
        edits_sha256: hash over those.
        seed: of the run.
        loss: mean cross entropy (nats) of its target tokens when training ended.
        steps: training steps it took.
        routed: how many of its edits took the route to its own expert when training ended.
    """

    id: str
    lineage: str
    depth: int
    parent: str | None
    edits: tuple[str, ...]
    edits_sha256: str
    seed: int
    loss: float
    steps: int
    routed: int


def round_id(base: Fingerprint, settings: Settings, edits: Sequence[Edit], parent: str | None) -> str:
    """Hash of all that decides a round's tensors: base, settings, its edits in order, and the round before."""
    made_of = [base.ffn_sha256, base.tokenizer_sha256, base.ffn, settings.as_dict(), digest_of(edits), parent]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class AdaptorState:
    """Everything an adaptor file holds: one expert and one record for each round, and the router over them."""

    base: Fingerprint
    settings: Settings
    rounds: tuple[RoundRecord, ...]
    experts: Experts
    router: Router

    @property
    def lineages(self) -> dict[str, int]:
        """Each lineage with its depth, in the order of the router's projections."""
        depths: dict[str, int] = {}
        for record in self.rounds:
            depths[record.lineage] = max(record.depth, depths.get(record.lineage, 0))
        return depths

    def to(self, device: torch.device) -> "AdaptorState":
        return replace(self, experts=self.experts.to(device), router=self.router.to(device))


def stack(states: Sequence[AdaptorState]) -> AdaptorState:
    """One state with the rounds of all `states`, in order; a round that comes twice counts once.

    Raises:
        AdaptorError: if bases, layers or methods differ, listing the differences.
    """
    if not states:
        raise AdaptorError("nothing to stack: no adaptor given")
    differences = [
        f"adaptor {number}: {difference}"
        for number, other in enumerate(states[1:], 2)
        for difference in _differences(states[0], other)
    ]
    if differences:
        raise AdaptorError("\n  ".join(["these adaptors cannot be stacked; compared with the first:", *differences]))
    parts = _without_repeats(states)
    return replace(
        states[0],
        rounds=tuple(record for part in parts for record in part.rounds),
        experts=Experts.stack([part.experts for part in parts]),
        router=stack_routers([(part.router, part.lineages) for part in parts]),
    )


def _without_repeats(states: Sequence[AdaptorState]) -> list[AdaptorState]:
    seen: set[str] = set()
    parts = []
    for state in states:
        kept = [index for index, record in enumerate(state.rounds) if record.id not in seen]
        seen.update(record.id for record in state.rounds)
        parts.append(state if len(kept) == len(state.rounds) else _only(state, kept))
    return [part for part in parts if part.rounds]


def _only(state: AdaptorState, kept: Sequence[int]) -> AdaptorState:
    rounds = tuple(state.rounds[index] for index in kept)
    names = list(state.lineages)
    used = list(dict.fromkeys(record.lineage for record in rounds))
    router = replace(
        state.router,
        keys=state.router.keys[list(kept)],
        projections=tuple(state.router.projections[names.index(name)] for name in used),
        lineage=torch.tensor([used.index(record.lineage) for record in rounds], dtype=torch.long),
    )
    return replace(state, rounds=rounds, experts=state.experts.select(kept), router=router)


_COMPATIBLE_SETTINGS = ("method", "top_k", "router_width")


def _differences(first: AdaptorState, other: AdaptorState) -> list[str]:
    settings = [
        f"{name}: {getattr(first.settings, name)} != {getattr(other.settings, name)}"
        for name in _COMPATIBLE_SETTINGS
        if getattr(first.settings, name) != getattr(other.settings, name)
    ]
    return first.base.differences(other.base) + settings
