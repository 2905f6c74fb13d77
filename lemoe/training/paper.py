"""Training one round of preset `paper`: a new expert, its key and the projection; all else stays frozen."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemoe.adaptor.experts import Experts
from lemoe.adaptor.state import AdaptorState, RoundRecord, round_id
from lemoe.base.frozen import FrozenBatch, compute_prefix_activations, residual_scale
from lemoe.base.loading import BaseModel
from lemoe.base.structure import FFNSite
from lemoe.base.tensors import rms_normalise
from lemoe.base.tokens import Batch, encode_edits, length_buckets
from lemoe.data.edits import Edit, digest_edits
from lemoe.errors import AdaptorError
from lemoe.routing.key_router import KeyRouter, Projection, pool_prompt
from lemoe.routing.router import Routing
from lemoe.settings import Settings
from lemoe.training.steps import OnStep, fit_round

REFERENCE_WIDTH = 32


def train_round(
    base: BaseModel,
    edits: Sequence[Edit],
    settings: Settings,
    before: AdaptorState | None = None,
    on_step: OnStep = lambda step: None,
) -> AdaptorState:
    """Train one new expert on `edits`, beside the frozen ones of `before`.

    Returns:
        a state with this round alone; stack it onto `before`.
    """
    layer = before.base.layer if before else settings.resolve_layer(len(base.layers), base.source.layers)
    site = base.ffn_site(layer, settings.layer_path)
    batches = freeze_edits(base, site, layer, edits, settings.batch_tokens)
    own_fingerprint = base.fingerprint(layer, settings.layer_path)
    fingerprint = before.base if before else own_fingerprint
    settings = replace(settings, layer=layer)
    identity = round_id(
        own_fingerprint, base.tokenizer.chat_template, settings, edits, before.rounds[-1].id if before else None
    )
    generator = torch.Generator().manual_seed(int(identity[:15], 16) ^ settings.seed)
    trainable = TrainableRound(site, settings, residual_scale(base, layer), batches, before, generator).to(base.device)
    loss, steps = _optimise_trainable(base, trainable, batches, settings, on_step)
    experts, router, routed = trainable.trained_parts(batches)
    record = RoundRecord(
        id=identity,
        depth=before.rounds[-1].depth + 1 if before else 1,
        parent=before.rounds[-1].id if before else None,
        experts=1,
        ids=tuple(edit.id for edit in edits),
        edits=tuple(edit.digest for edit in edits),
        edits_sha256=digest_edits(edits),
        seed=settings.seed,
        loss=loss,
        end_loss=None,
        steps=steps,
        retried=0,
        missed=None,
        base_differences=tuple(fingerprint.describe_differences(own_fingerprint)),
        routed=routed,
    )
    return AdaptorState(fingerprint, settings, (record,), experts, router)


def freeze_edits(
    base: BaseModel, site: FFNSite, layer: int, edits: Sequence[Edit], batch_tokens: int
) -> list[FrozenBatch]:
    """Batches of the edits' prompts and targets, run up to `layer`, of at most `batch_tokens` padded tokens each."""
    passages = encode_edits(base, edits)
    buckets = length_buckets([len(passage.input_ids) for passage in passages], batch_tokens)
    prefix_activations = compute_prefix_activations(base, site, layer, passages, batch_tokens)
    return [
        prefix_activations.freeze_batch(Batch.from_passages(passages, rows, base.pad_token_id, base.device))
        for rows in buckets
    ]


class TrainableRound(nn.Module):
    """The trainable part of a round, and the frozen experts and router of earlier rounds.

    The expert reads RMS-normalised input and its output is scaled to the residual stream; the last matrix starts at
    zero, so that training starts from the base model's own answers. The factor `REFERENCE_WIDTH / width` keeps one
    optimiser step's effect on the output the same at every width.
    """

    def __init__(
        self,
        site: FFNSite,
        settings: Settings,
        scale: float,
        batches: Sequence[FrozenBatch],
        before: AdaptorState | None,
        generator: torch.Generator,
    ):
        super().__init__()
        width = settings.width or site.intermediate
        device = batches[0].output.device
        self.up = random_matrix(width, site.hidden, generator)
        self.gate = random_matrix(width, site.hidden, generator) if site.gated else None
        self.down = nn.Parameter(torch.zeros(width, site.hidden))
        self.scale = torch.tensor([scale * REFERENCE_WIDTH / width])
        self.activation = site.activation
        self.frozen_experts = before.experts.to(device) if before else None
        self.frozen_router = _key_router(before).to(device) if before else None
        self.top_k = settings.top_k
        self.index = len(before.experts) if before else 0
        self._start_router(settings, batches, generator)

    def _start_router(self, settings: Settings, batches: Sequence[FrozenBatch], generator: torch.Generator) -> None:
        """The projection starts from the round before; the key starts at the mean of the round's projected prompts."""
        if self.frozen_router:
            projection = self.frozen_router.projections[int(self.frozen_router.lineage[-1])]
        else:
            projection = Projection.from_generator(batches[0].embeddings.shape[-1], settings.router_width, generator)
        self.project_down = nn.Parameter(projection.down.detach().cpu().clone())
        self.project_up = nn.Parameter(projection.up.detach().cpu().clone())
        pooled = torch.cat([pooled_prompts(frozen) for frozen in batches]).cpu()
        centre = rms_normalise(Projection(self.project_down, self.project_up)(pooled)).mean(0)
        self.key = nn.Parameter(centre.detach().clone())

    def expert_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in (self.up, self.gate, self.down) if parameter is not None]

    def router_parameters(self) -> list[nn.Parameter]:
        return [self.project_down, self.project_up, self.key]

    def router(self) -> KeyRouter:
        """Frozen keys and the new one, under the projection in training."""
        projection = Projection(self.project_down, self.project_up)
        if not self.frozen_router:
            lineage = torch.zeros(1, dtype=torch.long, device=self.key.device)
            return KeyRouter(self.key.unsqueeze(0), (projection,), lineage, self.top_k)
        frozen = self.frozen_router
        own = int(frozen.lineage[-1])
        projections = tuple(projection if i == own else other for i, other in enumerate(frozen.projections))
        return KeyRouter(
            torch.cat([frozen.keys, self.key.unsqueeze(0)]),
            projections,
            torch.cat([frozen.lineage, frozen.lineage[-1:]]),
            self.top_k,
        )

    def delta(self, inputs: Tensor, routing: Routing) -> Tensor | None:
        """What the frozen experts and the one in training add to the FFN's output, `[batch, seq, hidden]`."""
        offsets = torch.tensor([0, len(self.up)])
        new = Experts(self.up, self.down, self.gate, offsets, self.scale.to(self.up.device))
        own = torch.where(routing.experts == self.index, 0, -1)
        total = new.delta(inputs, Routing(own, routing.weights), self.activation)
        if self.frozen_experts is None:
            return total
        others = routing.experts.masked_fill(routing.experts == self.index, -1)
        frozen = self.frozen_experts.delta(inputs, Routing(others, routing.weights), self.activation)
        parts = [part for part in (total, frozen) if part is not None]
        return torch.stack(parts).sum(0) if parts else None

    def route(self, frozen: FrozenBatch, pooled: Tensor) -> Routing:
        """The routing of each sequence of a batch, as at inference; padding is not routed."""
        routing = self.router().route(pooled, frozen.output.shape[1])
        padding = (frozen.batch.mask == 0).unsqueeze(-1)
        return Routing(routing.experts.masked_fill(padding, -1), routing.weights)

    @torch.no_grad()
    def trained_parts(self, batches: Sequence[FrozenBatch]) -> tuple[Experts, KeyRouter, int]:
        """The new expert, the router for it alone, and how many sequences are routed to it."""
        routes = [self.route(frozen, pooled_prompts(frozen)).experts[:, 0] for frozen in batches]
        routed = sum(int((route == self.index).any(-1).sum()) for route in routes)
        gate = None if self.gate is None else self.gate.detach().cpu()
        offsets = torch.tensor([0, len(self.up)])
        experts = Experts(self.up.detach().cpu(), self.down.detach().cpu(), gate, offsets, self.scale.cpu())
        projection = Projection(self.project_down.detach().cpu(), self.project_up.detach().cpu())
        key = self.key.detach().cpu().unsqueeze(0)
        return experts, KeyRouter(key, (projection,), torch.zeros(1, dtype=torch.long), self.top_k), routed


def _key_router(state: AdaptorState) -> KeyRouter:
    if not isinstance(state.router, KeyRouter):
        raise AdaptorError(f"this adaptor routes by method {state.router.method!r}; continue it with that method")
    return state.router


def pooled_prompts(frozen: FrozenBatch) -> Tensor:
    """Pooled prompt `[batch, hidden]` of each sequence of a batch."""
    columns = torch.arange(frozen.output.shape[1], device=frozen.output.device)
    return pool_prompt(frozen.embeddings, columns < frozen.batch.prompt_lengths.unsqueeze(1))


def random_matrix(rows: int, columns: int, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, generator=generator) / columns**0.5)


def _optimise_trainable(
    base: BaseModel,
    trainable: TrainableRound,
    batches: Sequence[FrozenBatch],
    settings: Settings,
    on_step: OnStep,
) -> tuple[float, int]:
    """AdamW; expert and router each have their own learning rate."""
    optimiser = torch.optim.AdamW(
        [
            {"params": trainable.expert_parameters(), "lr": settings.learning_rate},
            {"params": trainable.router_parameters(), "lr": settings.router_learning_rate},
        ],
        weight_decay=settings.weight_decay,
    )
    targets = sum(len(frozen.batch.labels) for frozen in batches)
    pooled = [pooled_prompts(frozen) for frozen in batches]

    def iterate_losses() -> Iterator[Tensor]:
        for frozen, summary in zip(batches, pooled, strict=True):
            yield _compute_loss(base, trainable, frozen, summary) / targets

    return fit_round(optimiser, iterate_losses, settings, on_step)


def _compute_loss(base: BaseModel, trainable: TrainableRound, frozen: FrozenBatch, pooled: Tensor) -> Tensor:
    """Summed cross entropy of the target tokens of one batch."""
    delta = trainable.delta(frozen.inputs, trainable.route(frozen, pooled))
    logits = base.logits(frozen.replay(delta))
    return functional.cross_entropy(logits.float(), frozen.batch.labels, reduction="sum")
