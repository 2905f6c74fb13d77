"""Baseline `memoe`: a mixture of a fixed number of experts, all trained further in every round (arXiv 2405.19086).

Experts and scales are those of preset `paper`; the difference is that no expert is added and none is frozen, so that a
round overwrites what earlier ones have learned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemoe.adaptor.experts import Experts
from lemoe.adaptor.state import AdaptorState, RoundRecord, round_id
from lemoe.base.frozen import FrozenBatch, residual_scale
from lemoe.base.loading import BaseModel
from lemoe.base.structure import FFNSite
from lemoe.data.edits import Edit, combine_digests
from lemoe.errors import AdaptorError
from lemoe.routing.mixture_gate import MixtureGate
from lemoe.routing.router import Routing
from lemoe.settings import Settings
from lemoe.training.paper import REFERENCE_WIDTH, freeze_edits, pooled_prompts, random_matrix
from lemoe.training.steps import OnStep, fit_round


def train_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: AdaptorState | None, on_step: OnStep
) -> AdaptorState:
    """Train all experts and their gate on `edits`, starting from `before`.

    Returns:
        a state of the same size as `before`, which replaces it.
    """
    layer = settings.resolve_layer(len(base.layers), base.source.layers)
    settings = replace(settings, layer=layer)
    site = base.ffn_site(layer, settings.layer_path)
    batches = freeze_edits(base, site, layer, edits, settings.batch_tokens)
    fingerprint = base.fingerprint(layer, settings.layer_path)
    parent = before.rounds[-1] if before else None
    identity = round_id(fingerprint, base.tokenizer.chat_template, settings, edits, parent.id if parent else None)
    generator = torch.Generator().manual_seed(int(identity[:15], 16) ^ settings.seed)
    scale = residual_scale(base, layer)
    width = batches[0].embeddings.shape[-1]
    mixture = Mixture(site, settings, scale, width, before, generator).to(base.device)
    loss, steps = _optimise_mixture(base, mixture, batches, settings, on_step)
    digests = (*(parent.edits if parent else ()), *(edit.digest for edit in edits))
    ids = (*(parent.ids if parent else ()), *(edit.id for edit in edits))
    record = RoundRecord(
        id=identity,
        depth=parent.depth + 1 if parent else 1,
        parent=None,
        experts=settings.experts,
        ids=ids,
        edits=digests,
        edits_sha256=combine_digests(digests),
        seed=settings.seed,
        loss=loss,
        end_loss=None,
        steps=steps,
        retried=0,
        missed=None,
        routed=len(digests),
    )
    return AdaptorState(fingerprint, settings, (record,), *mixture.trained_parts())


class Mixture(nn.Module):
    """All experts, concatenated, and their gate; they start like those of preset `paper`."""

    def __init__(
        self,
        site: FFNSite,
        settings: Settings,
        scale: float,
        embedded: int,
        before: AdaptorState | None,
        generator: torch.Generator,
    ):
        super().__init__()
        width = settings.width or site.intermediate
        neurons = width * settings.experts
        self.activation = site.activation
        self.top_k = settings.top_k
        self.offsets = torch.arange(0, neurons + 1, width)
        self.scale = nn.Buffer(torch.full((settings.experts,), scale * REFERENCE_WIDTH / width))
        if before:
            self._continue_from(before)
            return
        self.up = random_matrix(neurons, site.hidden, generator)
        self.gate = random_matrix(neurons, site.hidden, generator) if site.gated else None
        self.down = nn.Parameter(torch.zeros(neurons, site.hidden))
        self.route = nn.Parameter(torch.randn(settings.experts, 2 * embedded, generator=generator))

    def _continue_from(self, before: AdaptorState) -> None:
        experts, router = before.experts, before.router
        if not isinstance(router, MixtureGate):
            raise AdaptorError(f"this adaptor routes by method {router.method!r}; continue it with that method")
        self.up, self.down = nn.Parameter(experts.up.clone()), nn.Parameter(experts.down.clone())
        self.gate = None if experts.gate is None else nn.Parameter(experts.gate.clone())
        self.route = nn.Parameter(router.weight.clone())

    def delta(self, frozen: FrozenBatch, pooled: Tensor) -> Tensor | None:
        """What the experts add to the FFN's output, `[batch, seq, hidden]`; padding is not routed."""
        routing = MixtureGate(self.route, self.top_k).route(frozen.embeddings, pooled)
        padding = (frozen.batch.mask == 0).unsqueeze(-1)
        routing = Routing(routing.experts.masked_fill(padding, -1), routing.weights)
        experts = Experts(self.up, self.down, self.gate, self.offsets, self.scale)
        return experts.delta(frozen.inputs, routing, self.activation)

    @torch.no_grad()
    def trained_parts(self) -> tuple[Experts, MixtureGate]:
        gate = None if self.gate is None else self.gate.detach().cpu()
        experts = Experts(self.up.detach().cpu(), self.down.detach().cpu(), gate, self.offsets, self.scale.cpu())
        return experts, MixtureGate(self.route.detach().cpu(), self.top_k)


def _optimise_mixture(
    base: BaseModel, mixture: Mixture, batches: Sequence[FrozenBatch], settings: Settings, on_step: OnStep
) -> tuple[float, int]:
    optimiser = torch.optim.AdamW(mixture.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    targets = sum(len(frozen.batch.labels) for frozen in batches)
    pooled = [pooled_prompts(frozen) for frozen in batches]

    def iterate_losses() -> Iterator[Tensor]:
        for frozen, prompts in zip(batches, pooled, strict=True):
            logits = base.logits(frozen.replay(mixture.delta(frozen, prompts))).float()
            yield functional.cross_entropy(logits, frozen.batch.labels, reduction="sum") / targets

    return fit_round(optimiser, iterate_losses, settings, on_step)
