"""The interface of routers: a stored part, which is saved and stacks, and a live part, which routes tokens."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lemoe.base.equality import TensorEquality

Scope = Literal["in", "subject", "relation"]

Self = TypeVar("Self", bound="Router")


class Host(Protocol):
    """What a router needs of the model that it is used in."""

    embedding: nn.Embedding
    tokenizer: Any

    @property
    def device(self) -> torch.device: ...


class RouterSettings(Protocol):
    """The settings that routers use; see `lemoe.Settings`."""

    @property
    def top_k(self) -> int: ...
    @property
    def router_width(self) -> int: ...
    @property
    def gate_conflict(self) -> float: ...
    @property
    def gate_probability(self) -> float: ...
    @property
    def gate_slack(self) -> int: ...


@dataclass(frozen=True)
class Explanation:
    """Why a prompt took its route, read at its last token.

    Attributes:
        expert: the expert that acts, -1 for none.
        weight: its weight.
        scope: `in`; or why no expert acts: no edit's `subject` was mentioned, or another `relation` is asked of one.
        nearest: the expert that acts or came nearest, -1 for none.
        coverage: share of the nearest edit's subject that was read, 0 to 1.
        conflict: how far the question read differs from the nearest edit's; 0 is not at all.
        fit: matched share of the two questions, 0 to 2.
        meaning: log-likelihood ratio (nats) of both asking the same.
        probability: that this edit is asked for, by all evidence.
        edit: number of the nearest edit, -1 if there is none or the router does not tell edits apart.
        acted: the experts that act anywhere in the answer, in the order in which they first do.
    """

    expert: int
    weight: float = 1.0
    scope: Scope = "in"
    nearest: int = -1
    coverage: float = 1.0
    conflict: float = 0.0
    fit: float = 0.0
    meaning: float = 0.0
    probability: float = 1.0
    edit: int = -1
    acted: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Routing(TensorEquality):
    """The experts that act at each token.

    Attributes:
        experts: `[batch, seq, k]`, -1 for none.
        weights: `[batch, seq, k]`, of these experts.
        explained: why each row's prompt takes its route; empty if the router does not tell.
    """

    experts: Tensor
    weights: Tensor
    explained: tuple[Explanation, ...] = ()


@dataclass(frozen=True)
class Lineage:
    """The position of an expert's round in a line of rounds that trained one router in turn; see `RoundRecord`.

    `edits`: how many edits the expert has.
    """

    round: str
    parent: str | None
    depth: int
    edits: int

    @classmethod
    def from_round(cls, name: str, parent: str | None, depth: int, experts: int, edits: int) -> "list[Lineage]":
        """One for each of a round's experts; those with the same number of edits share one object."""
        sizes = [len(part) for part in split_evenly(edits, experts)]
        shared = {size: cls(name, parent, depth, size) for size in set(sizes)}
        return [shared[size] for size in sizes]


def split_evenly(edits: int, experts: int) -> list[range]:
    """The indices of the edits of each expert of a round: parts in order, of equal size but for one edit."""
    size, larger = divmod(edits, experts)
    starts = [size * part + min(part, larger) for part in range(experts + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


@dataclass(frozen=True, eq=False)
class Sequences(TensorEquality):
    """The input of a router.

    Attributes:
        ids: `[batch, seq]`, or None if the model was called with embeddings.
        embeddings: `[batch, seq, hidden]`, or None if the model was called with ids.
        mask: `[batch, seq]`, bool; False on padding.
        prompt: `[batch, seq]`, bool; tokens of the prompt, if its end is known, else all tokens.
        memory: `[batch, past, k]`, the router's memory of the tokens before these, or None at the start.
        hidden: `[batch, seq, hidden]`, the states that enter the decoder layer which the router reads, if it reads one.
        starts: `[batch, seq]`, bool; where another sequence begins in a row that several share, or None for nowhere.
    """

    ids: Tensor | None
    embeddings: Tensor | None
    mask: Tensor
    prompt: Tensor
    memory: Tensor | None = None
    hidden: Tensor | None = None
    starts: Tensor | None = None

    def to(self, device: torch.device) -> "Sequences":
        """The same, on `device`; the memory stays where its router put it."""
        given = {name: value for name, value in vars(self).items() if value is not None and name != "memory"}
        return replace(self, **{name: value.to(device) for name, value in given.items()})


class LiveRouter(ABC):
    """A router at work in one base model, on `device`."""

    device: torch.device
    layer_read: int | None = None  # the decoder layer whose incoming hidden states it reads, if any

    @abstractmethod
    def route(self, sequences: Sequences) -> tuple[Routing, Tensor | None]:
        """The routes of new tokens, and their memory `[batch, seq, k]`, which travels with the KV cache.

        There is no memory of rows that several sequences share, which no KV cache can go on with. Threads may call it
        at once.

        Raises:
            AdaptorError: for sequences that it cannot route.
        """

    def route_text(self, ids: Sequence[int], prompt: int, hidden: Tensor | None = None) -> Routing:
        """The route of a text (token ids) with its states `[seq, hidden]`; the first `prompt` tokens are its prompt."""
        tokens = torch.tensor([list(ids)], device=self.device)
        is_prompt = torch.arange(len(ids), device=self.device).unsqueeze(0) < prompt
        states = None if hidden is None else hidden.unsqueeze(0)
        return self.route(Sequences(tokens, None, torch.ones_like(is_prompt), is_prompt, hidden=states))[0]


class Router(ABC):
    """The stored part: all that decides routes, as tensors. Entry `i` belongs to expert `i`."""

    method: ClassVar[str]
    shared: ClassVar[bool] = False  # whether each expert is trained on all edits
    gated: ClassVar[bool] = False  # whether a prompt may reach no expert, by a threshold on `Explanation.conflict`
    by_prompt: ClassVar[bool] = False  # whether a sequence is routed once, by its prompt, whose end must be known

    @property
    def layer_read(self) -> int | None:
        """The decoder layer whose incoming hidden states it reads, if it reads any."""
        return None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the router that a file must have, by name."""

    @classmethod
    @abstractmethod
    def expected_tensors(
        cls, settings: RouterSettings, hidden: int, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and type (None: floating point) of each tensor that a file must have; `lineages`: of each expert."""

    @classmethod
    @abstractmethod
    def from_tensors(
        cls: type[Self], settings: RouterSettings, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> Self:
        """The router of a file whose tensors have the expected shapes.

        Raises:
            ValueError: if indices are out of order or range.
        """

    @abstractmethod
    def select(self: Self, experts: Sequence[int]) -> Self:
        """The router for these experts alone."""

    @classmethod
    @abstractmethod
    def stack(cls: type[Self], parts: "Sequence[tuple[Self, Sequence[Lineage]]]") -> Self:
        """One router for the experts of all parts, in order; a part comes with the lineage of each of its experts."""

    def superseded(self) -> dict[int, int]:
        """Edits that a later one with the same question supersedes, by number: earlier to latest. None by default."""
        return {}

    @abstractmethod
    def to_live(self, base: Host, settings: RouterSettings) -> LiveRouter:
        """The live router for `base`."""


def are_valid_offsets(offsets: Tensor, total: int) -> bool:
    """Whether `offsets` starts at 0, never falls, and ends at `total`."""
    return (
        bool(len(offsets)) and int(offsets[0]) == 0 and int(offsets[-1]) == total and bool((offsets.diff() >= 0).all())
    )
