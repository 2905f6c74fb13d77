"""The gate of MEMoE, there called knowledge anchor routing (arXiv 2405.19086, 3.2): by each token and its prompt.

The gate of a token is the softmax of `W [x; e]`, `x` being the token and `e` an embedding of its prompt; the top k
experts act on it. Routes are known before the forward pass starts here, so that `x` is the token's embedding, not the
FFN's input; and `e` is the mean embedding of the prompt, not that of its named entities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.base.tensors import rms_normalise
from lemoe.errors import AdaptorError
from lemoe.routing.key_router import pool_prompt
from lemoe.routing.router import Explanation, Host, Lineage, LiveRouter, Router, RouterSettings, Routing, Sequences


@dataclass(frozen=True, eq=False)
class MixtureGate(TensorEquality, Router):
    """The gate of a mixture of jointly trained experts.

    Attributes:
        weight: `[experts, 2 * hidden]`: each expert's weights for a token's embedding, then for that of the prompt.
        top_k: experts that act on one token.
    """

    method = "memoe"
    shared = True

    weight: Tensor
    top_k: int

    def route(self, embeddings: Tensor, prompt: Tensor) -> Routing:
        """The route of each of `embeddings` `[batch, seq, hidden]`, given that of its `prompt` `[batch, hidden]`."""
        tokens = rms_normalise(embeddings.float())
        both = torch.cat([tokens, prompt.unsqueeze(1).expand_as(tokens)], -1)
        gate = (both @ self.weight.T / both.shape[-1] ** 0.5).softmax(-1)
        weights, experts = gate.topk(min(self.top_k, len(self.weight)))
        return Routing(experts, weights)

    def tensors(self) -> dict[str, Tensor]:
        return {"router.weight": self.weight}

    @classmethod
    def expected_tensors(
        cls, settings: RouterSettings, hidden: int, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        stored = tensors.get("router.weight")
        width = stored.shape[1] if stored is not None and stored.dim() == 2 else 2 * hidden
        return {"router.weight": ((len(lineages), width), None)}

    @classmethod
    def from_tensors(
        cls, settings: RouterSettings, lineages: Sequence[Lineage], tensors: Mapping[str, Tensor]
    ) -> "MixtureGate":
        return cls(tensors["router.weight"], settings.top_k)

    def select(self, experts: Sequence[int]) -> "MixtureGate":
        if list(experts) != list(range(len(self.weight))):
            raise AdaptorError("the experts of a mixture were trained together, and nothing can be taken out of it")
        return self

    @classmethod
    def stack(cls, parts: "Sequence[tuple[MixtureGate, Sequence[Lineage]]]") -> "MixtureGate":
        if len(parts) > 1:
            raise AdaptorError("the experts of a mixture were trained together, and nothing can be stacked onto it")
        return parts[0][0]

    def to_live(self, base: Host, settings: RouterSettings) -> "LiveMixtureGate":
        return LiveMixtureGate(base, replace(self, weight=self.weight.to(base.device)))


class LiveMixtureGate(LiveRouter):
    """Its memory is the embedding of a sequence's prompt, which later tokens reuse."""

    def __init__(self, base: Host, gate: MixtureGate):
        self.device = base.device
        self._base = base
        self._gate = gate

    def route(self, sequences: Sequences) -> tuple[Routing, Tensor | None]:
        if sequences.starts is not None:
            raise AdaptorError("preset `memoe` reads a row as one prompt; give each sequence a row of its own")
        embeddings = sequences.embeddings
        if embeddings is None:
            embeddings = self._base.embedding(sequences.ids)
        if sequences.memory is None:
            prompt = pool_prompt(embeddings, sequences.prompt)
        else:
            prompt = sequences.memory[:, -1]
        routing = self._gate.route(embeddings, prompt)
        memory = prompt[:, None].expand(-1, embeddings.shape[1], -1)
        return replace(routing, explained=_explain_last_tokens(routing, sequences.prompt)), memory


def _explain_last_tokens(routing: Routing, prompt: Tensor) -> tuple[Explanation, ...]:
    """The route of each prompt's last token."""
    last = (prompt * torch.arange(1, prompt.shape[1] + 1, device=prompt.device)).argmax(1)
    rows = torch.arange(len(last), device=last.device)
    experts, weights = routing.experts[rows, last, 0].tolist(), routing.weights[rows, last, 0].tolist()
    return tuple(Explanation(int(e), w, nearest=int(e)) for e, w in zip(experts, weights, strict=True))
