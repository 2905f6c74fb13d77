"""Training one round of preset `anchor`: a small expert for each edit, all of them in one batch.

An expert sees its own edit only: its prompt, rewordings of it, and other questions about its subject, on which it
learns to stay silent. AdamW works element by element, so that experts trained together do not touch each other, and
nothing depends on earlier rounds: they can be trained in any order, on any machine, and stacked.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemoe.adaptor.experts import Experts
from lemoe.adaptor.state import AdaptorState, RoundRecord, round_id
from lemoe.base.equality import TensorEquality
from lemoe.base.frozen import residual_scale
from lemoe.base.loading import LOGIT_ROWS, BaseModel
from lemoe.base.structure import FFNSite
from lemoe.base.tokens import encode_edits
from lemoe.data.edits import Edit, digest_of
from lemoe.errors import ModelError
from lemoe.routing.anchor.anchors import Anchors
from lemoe.routing.anchor.gate import Anchor
from lemoe.settings import Settings
from lemoe.training.anchor.batches import LessonMaker, Lessons, Teaching
from lemoe.training.steps import OnStep, Step

DEFAULT_WIDTH = 4
BETAS = (0.9, 0.95)
WARM_UP = 3  # steps
FREQUENT = 4096  # token ids that always take part in the loss
RIVALS = 64  # of the base model's own likeliest tokens at each target position


class Blocks(nn.Module):
    """The experts in training: `up`, `down` and `gate` `[experts, width, hidden]`.

    All start alike, with nothing written, so that training starts from the base model's own answers.
    """

    def __init__(self, experts: int, site: FFNSite, width: int, scale: float, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = [torch.randn(width, site.hidden, generator=generator) / site.hidden**0.5 for _ in range(2)]
        self.up = nn.Parameter(start[0].repeat(experts, 1, 1))
        self.gate = nn.Parameter(start[1].repeat(experts, 1, 1)) if site.gated else None
        self.down = nn.Parameter(torch.zeros(experts, width, site.hidden))
        self.scale = scale
        self._activation = site.activation

    def forward(self, normal: Tensor, owners: Tensor) -> Tensor:
        """Each row's expert output `[batch, seq, hidden]`, in units of the residual stream's RMS."""
        raised = torch.bmm(normal, self.up[owners].transpose(1, 2))
        if self.gate is None:
            inner = self._activation(raised)
        else:
            inner = self._activation(torch.bmm(normal, self.gate[owners].transpose(1, 2))) * raised
        return torch.bmm(inner, self.down[owners])

    def experts(self) -> Experts:
        count, width, hidden = self.up.shape
        gate = None if self.gate is None else self.gate.detach().cpu().reshape(-1, hidden)
        return Experts(
            up=self.up.detach().cpu().reshape(-1, hidden),
            down=self.down.detach().cpu().reshape(-1, hidden),
            gate=gate,
            offsets=torch.arange(count + 1) * width,
            scale=torch.full((count,), self.scale),
        )


def train_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: AdaptorState | None, on_step: OnStep
) -> AdaptorState:
    """Teach `edits`, one new expert each; see `lemoe.training.rounds.train_round`."""
    layer = before.base.layer if before else settings.layer_of(len(base.layers), base.source.layers)
    there = base.fingerprint(layer, settings.layer_path)
    fingerprint = before.base if before else there
    settings = replace(settings, layer=layer)
    identity = round_id(there, base.tokenizer.chat_template, settings, edits, None)
    torch_seed = training_seed(identity)
    site = base.site(layer, settings.layer_path)
    if not base.decoder_reads_tokens:
        raise ModelError(
            f"{base.source}: {type(base.model).__name__} gives its decoder embeddings, and preset anchor routes by "
            "tokens. Use --preset paper, or the text-only model of the family"
        )
    passages = encode_edits(base, edits)
    anchors = [
        Anchor(passage.prompt, passage.target, edit.subject) for edit, passage in zip(edits, passages, strict=True)
    ]
    maker = LessonMaker(base, site, layer, settings, edits, passages, anchors, random.Random(torch_seed))
    width = settings.width or DEFAULT_WIDTH
    blocks = Blocks(len(edits), site, width, residual_scale(base, layer), settings.seed).to(base.device)
    generator = torch.Generator(base.device).manual_seed(torch_seed)
    outcome = teach(base, blocks, maker, settings, generator, on_step)
    record = RoundRecord(
        id=identity,
        depth=1,
        parent=None,
        experts=len(edits),
        ids=tuple(edit.id for edit in edits),
        edits=tuple(edit.digest for edit in edits),
        edits_sha256=digest_of(edits),
        prompts=tuple(edit.prompt for edit in edits),  # which the anchors disclose in any case
        targets=tuple(edit.target for edit in edits),
        seed=settings.seed,
        loss=outcome.loss,
        end_loss=outcome.end_loss,
        steps=outcome.steps,
        retried=outcome.retried,
        missed=tuple(edits[place].id for place in outcome.missed),
        base_differences=tuple(fingerprint.differences(there)),
        routed=_routed(base, anchors, settings),
    )
    return AdaptorState(fingerprint, settings, (record,), blocks.experts(), Anchors.of_each(anchors))


def training_seed(identity: str) -> int:
    """The seed of everything random in the training of the round with this id."""
    return int(identity[:15], 16)


def _routed(base: BaseModel, anchors: Sequence[Anchor], settings: Settings) -> int:
    """How many own prompts reach their own expert, among all of the round."""
    live = Anchors.of_each(anchors).live(base, settings)
    return sum(live.reading(anchor.prompt).edit == number for number, anchor in enumerate(anchors))


@dataclass(frozen=True)
class Outcome:
    """How a round ended.

    Attributes:
        loss, end_loss: mean cross entropy (nats) of target tokens, and of ending tokens.
        steps: taken in all.
        retried: how many experts were trained on again.
        missed: places of the experts of which an own prompt, or a rephrase trained on, is still not answered.
    """

    loss: float
    end_loss: float
    steps: int
    retried: int
    missed: list[int]


def teach(
    base: BaseModel,
    blocks: Blocks,
    maker: LessonMaker,
    settings: Settings,
    generator: torch.Generator,
    on_step: OnStep,
) -> Outcome:
    """Train all experts, then those that miss an own prompt's answer again, with fresh optimiser state."""
    lessons = maker.lessons()
    vocabulary = _loss_vocabulary(base, lessons)
    steps = _optimise(base, blocks, lessons, settings, settings.steps, vocabulary, generator, on_step)
    found = _examine(base, blocks, lessons, settings)
    sums, missed, retried = found.sums, found.missed, frozenset[int]()
    for _ in range(settings.retries):
        if not missed:
            break
        retried |= missed
        lessons = maker.lessons(missed)
        vocabulary = torch.cat([vocabulary, found.rivals]).unique()
        steps += _optimise(base, blocks, lessons, settings, -(-settings.steps // 2), vocabulary, generator, on_step)
        found = _examine(base, blocks, lessons, settings)
        again = sorted(missed)
        sums[again] = found.sums[again]
        missed = found.missed
    (loss, end_loss), (targets, ends) = sums.sum(0).unbind(1)
    return Outcome(
        loss=float(loss / targets),
        end_loss=float(end_loss / ends),
        steps=steps,
        retried=len(retried),
        missed=sorted(missed),
    )


def _optimise(
    base: BaseModel,
    blocks: Blocks,
    lessons: Lessons,
    settings: Settings,
    steps: int,
    vocabulary: Tensor,
    generator: torch.Generator,
    on_step: OnStep,
) -> int:
    """AdamW over the own prompts and one kind of rewording a step; experts without lessons stay as they are."""
    optimiser = torch.optim.AdamW(
        blocks.parameters(),
        lr=settings.learning_rate,
        betas=BETAS,
        weight_decay=settings.weight_decay,
        fused=base.device.type == "cuda",
    )
    kinds = _kinds(lessons, steps, generator)
    shown: Tensor | None = None
    own = sum(len(teaching.weights) for teaching in lessons.own)
    logits = base.logits_over(vocabulary)
    for number in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _pace(number, steps)
        optimiser.zero_grad()
        losses = _losses(blocks, [*lessons.own, *kinds[number]], settings, vocabulary, logits, generator)
        total = losses.sum()
        if settings.negative_weight and lessons.silences:
            total = total + settings.negative_weight * _noise_on_silence(blocks, lessons)
        total.backward()
        optimiser.step()
        if shown is not None:  # one step late, so that a GPU is never waited for
            on_step(Step(number - 1, steps, float(shown) / lessons.edits))
        shown = losses[:own].detach().sum()
    if shown is not None:
        on_step(Step(steps - 1, steps, float(shown) / lessons.edits))
    return steps


def _pace(number: int, steps: int) -> float:
    """Warm-up, then full rate, then a linear fall to a tenth over the second half."""
    falling = max(0.0, number - steps / 2) / (steps / 2)
    return min(1.0, (number + 1) / WARM_UP) * (1 - 0.9 * falling)


def _kinds(lessons: Lessons, steps: int, generator: torch.Generator) -> list[list[Teaching]]:
    """The rewordings of each step, all of one kind, each kind as often as the others; else the own prompts again."""
    kinds = lessons.variants or [lessons.own]
    turns = -(-steps // len(kinds))
    drawn = [torch.randperm(len(kinds), generator=generator, device=generator.device) for _ in range(turns)]
    return [kinds[kind] for kind in torch.cat(drawn)[:steps].tolist()]


def _losses(
    blocks: Blocks,
    teachings: Sequence[Teaching],
    settings: Settings,
    vocabulary: Tensor,
    logits: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Cross entropy `[targets]` of targets and endings, weighted so that each text's sum is a mean.

    Args:
        vocabulary: `[words]`, sorted token ids over which the loss is taken, every label among them.
        logits: gives `[targets, words]` over them, for `[targets, hidden]`.
    """
    hidden = []
    for teaching in teachings:
        normal = teaching.normal
        if settings.noise:
            normal = normal + settings.noise * torch.randn(normal.shape, generator=generator, device=normal.device)
        hidden.append(teaching.frozen.replay(_delta(blocks, teaching, normal)))
    labels = torch.searchsorted(vocabulary, torch.cat([teaching.frozen.batch.labels for teaching in teachings]))
    weights = torch.cat([teaching.weights for teaching in teachings])
    return functional.cross_entropy(logits(torch.cat(hidden)).float(), labels, reduction="none") * weights


def _delta(blocks: Blocks, teaching: Teaching, normal: Tensor) -> Tensor:
    return blocks.scale * blocks(normal, teaching.owners) * teaching.active.unsqueeze(-1)


def _noise_on_silence(blocks: Blocks, lessons: Lessons) -> Tensor:
    """Mean squared expert output on other questions, summed over edits."""
    total = torch.zeros((), device=blocks.up.device)
    count = sum(len(silence.owners) for silence in lessons.silences) / lessons.edits
    for silence in lessons.silences:
        squares = blocks(silence.normal, silence.owners).pow(2).mean(-1)
        total = total + (squares * silence.weights).sum()
    return total / max(count, 1.0)


@torch.no_grad()
def _loss_vocabulary(base: BaseModel, lessons: Lessons) -> Tensor:
    """Token ids, sorted, over which the loss is taken: labels, the base model's own answers, and frequent tokens."""
    parts = [torch.arange(min(FREQUENT, base.vocabulary), device=base.device)]
    for teaching in lessons.own:
        parts.append(teaching.frozen.batch.labels)
        parts += [_likeliest(logits) for logits in base.logits_in_parts(teaching.frozen.base_hidden)]
    return torch.cat(parts).unique()


def _likeliest(logits: Tensor) -> Tensor:
    """The likeliest token ids of all rows of `logits` `[rows, vocab]`, `[n]`."""
    return logits.topk(min(RIVALS, logits.shape[-1])).indices.unique()


@dataclass(frozen=True, eq=False)
class Examined(TensorEquality):
    """What own prompts now get for an answer, over the whole vocabulary.

    Attributes:
        missed: places of the experts of which an edit is not answered, to the end, by the likeliest tokens, or at a
            loss above the target.
        rivals: `[n]`, token ids, the likeliest where another one was wanted.
        sums: `[experts, 2, 2]`: for target tokens and for ending tokens, the sum of their cross entropies (nats) and
            their number.
    """

    missed: frozenset[int]
    rivals: Tensor
    sums: Tensor


@torch.no_grad()
def _examine(base: BaseModel, blocks: Blocks, lessons: Lessons, settings: Settings) -> Examined:
    missed = torch.zeros(len(blocks.up), dtype=torch.bool, device=base.device)
    rivals = [torch.zeros(0, dtype=torch.long, device=base.device)]
    sums = torch.zeros(len(blocks.up), 2, 2, device=base.device)
    for teaching in lessons.own:
        labels, rows = teaching.frozen.batch.labels, teaching.frozen.batch.target_rows
        hidden = teaching.frozen.replay(_delta(blocks, teaching, teaching.normal))
        parts = []
        for logits, wanted in zip(base.logits_in_parts(hidden), labels.split(LOGIT_ROWS), strict=True):
            losses = functional.cross_entropy(logits.float(), wanted, reduction="none")
            wrong = logits.argmax(-1) != wanted
            parts.append((losses, wrong))
            rivals.append(_likeliest(logits[wrong]))
        losses, wrong = (torch.cat(part) for part in zip(*parts, strict=True))
        level = torch.zeros(len(teaching.owners), device=base.device).index_add(0, rows, losses * teaching.weights)
        missed[teaching.owners[level > settings.loss_target]] = True
        missed[teaching.owners[rows[wrong]]] = True
        places = (teaching.owners[rows], teaching.ends.long())
        sums.index_put_(places, torch.stack([losses, torch.ones_like(losses)], 1), accumulate=True)
    return Examined(frozenset(missed.nonzero().flatten().tolist()), torch.cat(rivals), sums)
