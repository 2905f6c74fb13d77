"""Knowledge anchor routing: each token by itself and by what its sequence is about (MEMoE, arXiv 2405.19086, 3.2).

The gate of a token is the softmax of `W [x; e]`, `x` being the token and `e` its sequence's knowledge anchor; the top k
experts act on it. Routes are known before the forward pass starts here, so that `x` is the token's embedding, not the
FFN's input; and the anchor is the mean embedding of the prompt, not that of its named entities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.base.tensors import rms_normalise
from lemoe.errors import AdaptorError
from lemoe.routing.key_router import pool
from lemoe.routing.router import Explanation, Host, Lineage, LiveRouter, Router, RouterSettings, Routing, Sequences


@dataclass(frozen=True, eq=False)
class AnchoredGate(TensorEquality, Router):
    """The gate of a mixture.

    Attributes:
        weight: `[experts, 2 * hidden]`: what each expert reads of a token's embedding, then of the anchor.
        top_k: experts that act on one token.
    """

    method = "memoe"
    shared = True

    weight: Tensor
    top_k: int

    def route(self, embeddings: Tensor, anchor: Tensor) -> Routing:
        """The route of each token of `embeddings` `[batch, seq, hidden]`, with its `anchor` `[batch, hidden]`."""
        tokens = rms_normalise(embeddings.float())
        both = torch.cat([tokens, anchor.unsqueeze(1).expand_as(tokens)], -1)
        gate = (both @ self.weight.T / both.shape[-1] ** 0.5).softmax(-1)
        weights, experts = gate.topk(min(self.top_k, len(self.weight)))
        return Routing(experts, weights)

    def tensors(self) -> dict[str, Tensor]:
        return {"router.weight": self.weight}

    @classmethod
    def expected(
        cls, settings: RouterSettings, hidden: int, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        stored = tensors.get("router.weight")
        width = stored.shape[1] if stored is not None and stored.dim() == 2 else 2 * hidden
        return {"router.weight": ((len(lineages), width), None)}

    @classmethod
    def from_tensors(
        cls, settings: RouterSettings, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> "AnchoredGate":
        return cls(tensors["router.weight"], settings.top_k)

    def select(self, experts: Sequence[int]) -> "AnchoredGate":
        if list(experts) != list(range(len(self.weight))):
            raise AdaptorError("the experts of a mixture were trained together, and nothing can be taken out of it")
        return self

    @classmethod
    def stack(cls, parts: "Sequence[tuple[AnchoredGate, Sequence[Lineage]]]") -> "AnchoredGate":
        if len(parts) > 1:
            raise AdaptorError("the experts of a mixture were trained together, and nothing can be stacked onto it")
        return parts[0][0]

    def live(self, base: Host, settings: RouterSettings) -> "LiveGate":
        return LiveGate(base, replace(self, weight=self.weight.to(base.device)))


class LiveGate(LiveRouter):
    """Takes a sequence's anchor from its prompt; its memory is the anchor, which later tokens inherit."""

    def __init__(self, base: Host, gate: AnchoredGate):
        self.device = base.device
        self._base = base
        self._gate = gate

    def route(self, sequences: Sequences) -> tuple[Routing, Tensor]:
        embeddings = sequences.embeddings
        if embeddings is None:
            embeddings = self._base.embedding(sequences.ids)
        if sequences.memory is None:
            anchor = pool(embeddings, sequences.prompt)
        else:
            anchor = sequences.memory[:, 0, -1]
        routing = self._gate.route(embeddings, anchor)
        memory = anchor[:, None, None].expand(-1, 1, embeddings.shape[1], -1)
        return replace(routing, explained=_explained(routing, sequences.prompt)), memory


def _explained(routing: Routing, prompt: Tensor) -> tuple[Explanation, ...]:
    """The route of each prompt's last token."""
    last = (prompt * torch.arange(1, prompt.shape[1] + 1, device=prompt.device)).argmax(1)
    rows = torch.arange(len(last), device=last.device)
    experts, weights = routing.experts[rows, last, 0].tolist(), routing.weights[rows, last, 0].tolist()
    return tuple(Explanation(int(e), w, nearest=int(e)) for e, w in zip(experts, weights, strict=True))
