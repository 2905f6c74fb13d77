"""Training one round of preset `anchor`: a small expert for each edit, all of them at once.

An expert is trained on its own edit only: positives are the edit's prompt and synthetic paraphrases of it, negatives
are other questions about its subject, on which it is trained to output zero, as it is in phrases before the place of
the answer. AdamW works element by element, so that experts trained together do not influence each other, and nothing
depends on earlier rounds: rounds can be trained in any order, on any machine, and stacked.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemoe.adaptor.experts import Experts
from lemoe.adaptor.state import AdaptorState, RoundRecord, round_id
from lemoe.base.equality import TensorEquality
from lemoe.base.frozen import residual_scale
from lemoe.base.loading import LOGIT_ROWS, BaseModel
from lemoe.base.structure import FFNSite
from lemoe.base.tokens import Passage, encode_edits
from lemoe.data.edits import Edit, digest_edits
from lemoe.errors import ModelError
from lemoe.routing.anchor.anchors import Anchors
from lemoe.routing.anchor.fitting import fitted_meaning
from lemoe.routing.anchor.gate import Anchor
from lemoe.routing.anchor.meaning import Meaning
from lemoe.settings import Settings
from lemoe.training.anchor.batches import PositiveBatch, TrainingBatchBuilder, TrainingBatches
from lemoe.training.anchor.detectors import DETECTORS, fit_detectors
from lemoe.training.steps import OnStep, Step

MIN_WIDTH, TOKENS_PER_NEURON = 4, 4  # of experts, and of the targets of those that take more than `DETECTORS`
ADAM_BETAS = (0.9, 0.95)
WARM_UP_STEPS = 3
FREQUENT_TOKENS = 1024  # the first token ids, which always take part in the loss
CONFUSABLE_TOKENS = 16  # likeliest tokens of each target position that take part as well
WINNING_TOKENS = 8  # the same while experts are trained, by what they make of it then,
CONFUSABLE_SHARE = 0.4  # after this share of the steps
FIRST_TOKEN_WEIGHT = 1.0  # of an answer's first token in the loss, besides its share of the mean over the answer
LAST_RETRIES = 6  # further retries by the own prompt alone,
LAST_RATE = 0.5  # at this share of the learning rate
LABEL_MARGIN = 2.0  # nats by which a label's logit is lowered in the loss


class TrainableExperts(nn.Module):
    """The experts in training: `up`, `down` and `gate` `[experts, width, hidden]`, as wide as the widest of them.

    All start from the same weights, with `down` at zero, so that training starts from the base model's own answers. It
    stays at zero for neurons that an expert does not have.
    """

    present: Tensor  # [experts, width], which neurons an expert has

    def __init__(self, widths: Sequence[int], site: FFNSite, scale: float, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        experts, width = len(widths), max(widths)
        start = [torch.randn(width, site.hidden, generator=generator) / site.hidden**0.5 for _ in range(2)]
        self.up = nn.Parameter(start[0].repeat(experts, 1, 1))
        self.gate = nn.Parameter(start[1].repeat(experts, 1, 1)) if site.gated else None
        self.down = nn.Parameter(torch.zeros(experts, width, site.hidden))
        self.register_buffer("present", torch.arange(width) < torch.tensor(widths).unsqueeze(1))
        self.down.register_hook(lambda gradient: gradient * self.present.unsqueeze(-1))
        self.scale = scale
        self._activation = site.activation

    def forward(self, normalised_inputs: Tensor, owners: Tensor) -> Tensor:
        """Each row's expert output `[batch, seq, hidden]`, in units of the residual stream's RMS."""
        projected = torch.bmm(normalised_inputs, self.up[owners].transpose(1, 2))
        if self.gate is None:
            inner = self._activation(projected)
        else:
            inner = self._activation(torch.bmm(normalised_inputs, self.gate[owners].transpose(1, 2))) * projected
        return torch.bmm(inner, self.down[owners])

    @torch.no_grad()
    def start_with(self, detectors: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Let the first neurons of each expert start as detectors; see `lemoe.training.anchor.detectors`."""
        for expert, (detecting, constant) in detectors.items():
            first = slice(len(detecting))
            if self.gate is None:
                self.up[expert, first] = detecting
            else:
                self.gate[expert, first], self.up[expert, first] = detecting, constant

    def to_experts(self) -> Experts:
        """The trained experts, as an adaptor stores them."""
        kept = self.present.cpu()
        return Experts(
            up=self.up.detach().cpu()[kept],
            down=self.down.detach().cpu()[kept],
            gate=None if self.gate is None else self.gate.detach().cpu()[kept],
            offsets=functional.pad(kept.sum(1).cumsum(0), (1, 0)),
            scale=torch.full((len(kept),), self.scale),
        )


def choose_widths(passages: Sequence[Passage], settings: Settings) -> list[int]:
    """Neurons of each edit's expert, unless `width` is set: one for each position of the answer and of its end, up to
    `DETECTORS`, and fewer than that for each position of a long answer.
    """
    if settings.width is not None:
        return [settings.width] * len(passages)
    lengths = [len(passage.target) for passage in passages]
    return [max(MIN_WIDTH, min(length + 1, DETECTORS), -(-length // TOKENS_PER_NEURON)) for length in lengths]


def train_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: AdaptorState | None, on_step: OnStep
) -> AdaptorState:
    """Train one new expert for each of `edits`; see `lemoe.training.rounds.train_round`."""
    layer = before.base.layer if before else settings.resolve_layer(len(base.layers), base.source.layers)
    own_fingerprint = base.fingerprint(layer, settings.layer_path)
    fingerprint = before.base if before else own_fingerprint
    settings = replace(settings, layer=layer, gate=before.settings.gate if before else settings.gate)
    identity = round_id(own_fingerprint, base.tokenizer.chat_template, settings, edits, None)
    torch_seed = training_seed(identity)
    site = base.ffn_site(layer, settings.layer_path)
    if not base.decoder_reads_tokens:
        raise ModelError(
            f"{base.source}: {type(base.model).__name__} gives its decoder embeddings, and preset anchor routes by "
            "tokens. Use preset paper, or the text-only model of the family"
        )
    passages = encode_edits(base, edits)
    anchors = [
        Anchor(passage.prompt, passage.target, edit.subject) for edit, passage in zip(edits, passages, strict=True)
    ]
    meaning = _choose_meaning(base, layer, settings, before)
    rng = random.Random(torch_seed)
    builder = TrainingBatchBuilder(base, site, layer, settings, edits, passages, anchors, rng, meaning)
    widths = choose_widths(passages, settings)
    experts = TrainableExperts(widths, site, residual_scale(base, layer), settings.seed).to(base.device)
    generator = torch.Generator(base.device).manual_seed(torch_seed)
    outcome = train_experts(base, experts, builder, settings, generator, on_step)
    record = RoundRecord(
        id=identity,
        depth=1,
        parent=None,
        experts=len(edits),
        ids=tuple(edit.id for edit in edits),
        edits=tuple(edit.digest for edit in edits),
        edits_sha256=digest_edits(edits),
        prompts=tuple(edit.prompt for edit in edits),  # the anchors disclose them in any case
        targets=tuple(edit.target for edit in edits),
        seed=settings.seed,
        loss=outcome.loss,
        end_loss=outcome.end_loss,
        steps=outcome.steps,
        retried=outcome.retried,
        missed=tuple(edits[index].id for index in outcome.missed),
        base_differences=tuple(fingerprint.describe_differences(own_fingerprint)),
        routed=_count_routed(base, anchors, settings),
    )
    router = Anchors.from_anchors(anchors, meaning, builder.keys)
    return AdaptorState(fingerprint, settings, (record,), experts.to_experts(), router)


def _choose_meaning(base: BaseModel, layer: int, settings: Settings, before: AdaptorState | None) -> Meaning | None:
    """How questions are read: as in the rounds before, whose gate the round joins, or as fitted to the model."""
    if before is None:
        return fitted_meaning(base, layer) if settings.gate == "meaning" else None
    assert isinstance(before.router, Anchors)
    return before.router.meaning


def training_seed(identity: str) -> int:
    """The seed of everything random in the training of the round with this id."""
    return int(identity[:15], 16)


def _count_routed(base: BaseModel, anchors: Sequence[Anchor], settings: Settings) -> int:
    """How many own prompts are routed to their own expert, among all experts of the round."""
    live = Anchors.from_anchors(anchors).to_live(base, settings)
    return sum(live.final_state(anchor.prompt).edit == index for index, anchor in enumerate(anchors))


@dataclass(frozen=True)
class RoundOutcome:
    """How a round ended.

    Attributes:
        loss, end_loss: mean cross entropy (nats) of target tokens, and of ending tokens.
        steps: how many were taken, retries included.
        retried: how many experts were trained again.
        missed: indices of the experts whose own prompt, or a rephrase trained on, still gets a wrong answer.
    """

    loss: float
    end_loss: float
    steps: int
    retried: int
    missed: list[int]


def train_experts(
    base: BaseModel,
    experts: TrainableExperts,
    builder: TrainingBatchBuilder,
    settings: Settings,
    generator: torch.Generator,
    on_step: OnStep,
) -> RoundOutcome:
    """Train all experts, then retry those that miss an answer.

    1. Optimise all experts; the loss is taken over a part of the vocabulary.
    2. Evaluate the round: which experts miss an own prompt's answer over the whole vocabulary.
    3. Retry those, with fresh optimiser state, half the steps, and the confusable tokens of step 2 added to the loss;
       the first time also those that answered a paraphrase wrong when they were last trained on it.
    4. Evaluate those again; go on with step 3, at most `retries` times.
    5. Go on with those that still miss, by their own prompts alone, without noise and silence and at a lower rate, at
       most `LAST_RETRIES` times: an edit that answers no other wording is worth more than one that does not answer.
    """
    batches = builder.build()
    widths = experts.present.sum(1).tolist()
    positives = [*batches.prompts, *chain.from_iterable(batches.paraphrases)]
    experts.start_with(fit_detectors(positives, widths, builder.sinks, builder.other_beginnings))
    vocabulary = _select_loss_vocabulary(base, batches)
    unsure = _optimise_experts(base, experts, batches, settings, settings.steps, vocabulary, generator, on_step)
    evaluation = _evaluate_round(base, experts, batches, settings)
    steps, sums, missed, retried = settings.steps, evaluation.loss_sums, evaluation.missed, frozenset[int]()
    trained_again = missed | unsure
    for attempt in range(settings.retries + LAST_RETRIES if settings.retries else 0):
        if not trained_again:
            break
        retried |= missed
        batches, eased, more = builder.build(trained_again), settings, -(-settings.steps // 2)
        if attempt >= settings.retries:
            rate = LAST_RATE * settings.learning_rate
            batches = replace(batches, paraphrases=[])
            eased = replace(settings, noise=0.0, negative_weight=0.0, learning_rate=rate)
        vocabulary = torch.cat([vocabulary, evaluation.confusable_tokens]).unique()
        _optimise_experts(base, experts, batches, eased, more, vocabulary, generator, on_step)
        evaluation = _evaluate_round(base, experts, batches, settings)
        rows = sorted(trained_again)
        sums[rows] = evaluation.loss_sums[rows]
        steps, missed = steps + more, evaluation.missed
        trained_again = missed
    (loss, end_loss), (targets, ends) = sums.sum(0).unbind(1)
    return RoundOutcome(
        loss=float(loss / targets),
        end_loss=float(end_loss / ends),
        steps=steps,
        retried=len(retried),
        missed=sorted(missed),
    )


def _optimise_experts(
    base: BaseModel,
    experts: TrainableExperts,
    batches: TrainingBatches,
    settings: Settings,
    steps: int,
    vocabulary: Tensor,
    generator: torch.Generator,
    on_step: OnStep,
) -> frozenset[int]:
    """AdamW; each step takes all own prompts and one kind of paraphrase. Experts without batches stay as they are.

    Returns:
        indices of the experts that answered texts of some kind wrong, among the tokens of the loss and under noise,
        when they were last trained on them.
    """
    optimiser = torch.optim.AdamW(
        experts.parameters(),
        lr=settings.learning_rate,
        betas=ADAM_BETAS,
        weight_decay=settings.weight_decay,
        fused=base.device.type == "cuda",
    )
    kinds = batches.paraphrases or [batches.prompts]
    wrong = torch.zeros(1 + len(kinds), len(experts.up), dtype=torch.bool, device=base.device)
    step_loss: Tensor | None = None
    own_targets = sum(len(positive.weights) for positive in batches.prompts)
    logits = base.logits_over(vocabulary)
    confusable_step = int(CONFUSABLE_SHARE * steps)
    for number, kind in enumerate(_draw_kinds(len(kinds), steps, generator)):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _learning_rate_factor(number, steps)
        optimiser.zero_grad()
        positives = [*batches.prompts, *kinds[kind]]
        hidden, spoken = _replay_positives(experts, positives, settings, generator)
        if number == confusable_step:
            vocabulary = _extend_vocabulary(base, vocabulary, hidden.detach())
            logits = base.logits_over(vocabulary)
        losses, right = _compute_losses(positives, hidden, vocabulary, logits)
        wrong[0] = _experts_with_wrong(batches.prompts, right[:own_targets], len(experts.up))
        wrong[1 + kind] = _experts_with_wrong(kinds[kind], right[own_targets:], len(experts.up))
        total = losses.sum()
        if settings.negative_weight:
            total = total + settings.negative_weight * (spoken + _compute_negative_loss(experts, batches))
        total.backward()
        optimiser.step()
        if step_loss is not None:  # reported one step late, so that the CPU never waits for the GPU
            on_step(Step(number - 1, steps, float(step_loss) / batches.edit_count))
        step_loss = losses[:own_targets].detach().sum()
    if step_loss is not None:
        on_step(Step(steps - 1, steps, float(step_loss) / batches.edit_count))
    return frozenset(wrong.any(0).nonzero().flatten().tolist())


def _experts_with_wrong(positives: Sequence[PositiveBatch], right: Tensor, experts: int) -> Tensor:
    """`[experts]`, bool, those with a text in `positives` whose answer is not all right; `right` is `[targets]`."""
    owners = torch.cat([positive.owners[positive.frozen.batch.target_rows] for positive in positives])
    return torch.zeros(experts, device=right.device).index_add(0, owners, (~right).float()) > 0


def _learning_rate_factor(number: int, steps: int) -> float:
    """Warm-up, then full rate, then a linear fall to a tenth over the second half."""
    falling = max(0.0, number - steps / 2) / (steps / 2)
    return min(1.0, (number + 1) / WARM_UP_STEPS) * (1 - 0.9 * falling)


def _draw_kinds(count: int, steps: int, generator: torch.Generator) -> list[int]:
    """Which of `count` kinds of paraphrases each step takes, each equally often."""
    cycles = -(-steps // count)
    order = [torch.randperm(count, generator=generator, device=generator.device) for _ in range(cycles)]
    drawn: list[int] = torch.cat(order)[:steps].tolist()
    return drawn


def _replay_positives(
    experts: TrainableExperts, positives: Sequence[PositiveBatch], settings: Settings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the experts do to texts, under noise on what they read.

    Returns:
        last hidden states `[targets, hidden]`; and what the experts say before an answer is due: the mean square of
        their output there, summed over texts.
    """
    hidden = []
    spoken = torch.zeros((), device=experts.up.device)
    for positive in positives:
        inputs = positive.normalised_inputs
        if settings.noise:
            inputs = inputs + settings.noise * torch.randn(inputs.shape, generator=generator, device=inputs.device)
        output = experts(inputs, positive.owners)
        spoken = spoken + (output.pow(2).mean(-1) * positive.silent).sum()
        hidden.append(_replay_output(experts, positive, output))
    return torch.cat(hidden), spoken


def _compute_losses(
    positives: Sequence[PositiveBatch], hidden: Tensor, vocabulary: Tensor, logits: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Cross entropy `[targets]` of target and ending tokens, weighted so that each text counts the same.

    A text's sum is the mean over its answer, and that of the first token once more: an answer that does not begin is
    none. Each label has to win by `LABEL_MARGIN` (additive margin: Wang et al. 2018).

    Args:
        hidden: `[targets, hidden]`, last hidden states.
        vocabulary: `[tokens]`, sorted token ids over which the loss is taken, every label among them.
        logits: gives `[targets, tokens]` over them, for `[targets, hidden]`.

    Returns:
        the losses; and `[targets]`, bool, whether the label is the likeliest of these tokens.
    """
    labels = torch.searchsorted(vocabulary, torch.cat([positive.frozen.batch.labels for positive in positives]))
    weights = torch.cat([positive.weights + FIRST_TOKEN_WEIGHT * positive.firsts for positive in positives])
    values = logits(hidden).float()
    right = values.detach().argmax(1) == labels
    margins = torch.full((len(labels), 1), -LABEL_MARGIN, device=values.device)
    values = values.scatter_add(1, labels.unsqueeze(1), margins)
    return functional.cross_entropy(values, labels, reduction="none") * weights, right


@torch.no_grad()
def _extend_vocabulary(base: BaseModel, vocabulary: Tensor, hidden: Tensor) -> Tensor:
    """The token ids of the loss, sorted, and those that are likeliest by last hidden states `[targets, hidden]`."""
    likeliest = [_top_tokens(logits, WINNING_TOKENS) for logits in base.logits_in_chunks(hidden)]
    return torch.cat([vocabulary, *likeliest]).unique()


def _replay_output(experts: TrainableExperts, positive: PositiveBatch, output: Tensor) -> Tensor:
    """Last hidden states `[targets, hidden]` with the experts' `output` `[batch, seq, hidden]` where they act."""
    return positive.frozen.replay(experts.scale * output * positive.active.unsqueeze(-1))


def _compute_negative_loss(experts: TrainableExperts, batches: TrainingBatches) -> Tensor:
    """Mean squared expert output on negative prompts, summed over edits."""
    total = torch.zeros((), device=experts.up.device)
    per_edit = sum(len(negative.owners) for negative in batches.negatives) / batches.edit_count
    for negative in batches.negatives:
        squares = experts(negative.normalised_inputs, negative.owners).pow(2).mean(-1)
        total = total + (squares * negative.weights).sum()
    return total / max(per_edit, 1.0)


@torch.no_grad()
def _select_loss_vocabulary(base: BaseModel, batches: TrainingBatches) -> Tensor:
    """Token ids, sorted, over which the loss is taken: labels, the base model's own answers, and frequent tokens."""
    parts = [torch.arange(min(FREQUENT_TOKENS, base.vocabulary), device=base.device)]
    for positive in batches.prompts:
        parts.append(positive.frozen.batch.labels)
        parts += [_top_tokens(logits) for logits in base.logits_in_chunks(positive.frozen.base_hidden)]
    return torch.cat(parts).unique()


def _top_tokens(logits: Tensor, count: int = CONFUSABLE_TOKENS) -> Tensor:
    """The `count` likeliest token ids of all rows of `logits` `[rows, vocab]`, `[n]`."""
    return logits.topk(min(count, logits.shape[-1])).indices.unique()


@dataclass(frozen=True, eq=False)
class RoundEvaluation(TensorEquality):
    """How own prompts are answered after training, over the whole vocabulary.

    Attributes:
        missed: indices of the experts with a text whose likeliest tokens are not the whole answer, its end included,
            or whose loss is above the loss target.
        confusable_tokens: `[n]`, token ids, the likeliest at the positions where the likeliest one is wrong.
        loss_sums: `[experts, 2, 2]`: for target tokens and for ending tokens, the sum of their cross entropies (nats)
            and their number.
    """

    missed: frozenset[int]
    confusable_tokens: Tensor
    loss_sums: Tensor


@torch.no_grad()
def _evaluate_round(
    base: BaseModel, experts: TrainableExperts, batches: TrainingBatches, settings: Settings
) -> RoundEvaluation:
    missed = torch.zeros(len(experts.up), dtype=torch.bool, device=base.device)
    confusable = [torch.zeros(0, dtype=torch.long, device=base.device)]
    sums = torch.zeros(len(experts.up), 2, 2, device=base.device)
    for positive in batches.prompts:
        labels, rows = positive.frozen.batch.labels, positive.frozen.batch.target_rows
        hidden = _replay_output(experts, positive, experts(positive.normalised_inputs, positive.owners))
        parts = []
        for logits, wanted in zip(base.logits_in_chunks(hidden), labels.split(LOGIT_ROWS), strict=True):
            losses = functional.cross_entropy(logits.float(), wanted, reduction="none")
            wrong = logits.argmax(-1) != wanted
            parts.append((losses, wrong))
            confusable.append(_top_tokens(logits[wrong]))
        losses, wrong = (torch.cat(part) for part in zip(*parts, strict=True))
        text_losses = torch.zeros(len(positive.owners), device=base.device).index_add(
            0, rows, losses * positive.weights
        )
        missed[positive.owners[text_losses > settings.loss_target]] = True
        missed[positive.owners[rows[wrong]]] = True
        indices = (positive.owners[rows], positive.ends.long())
        sums.index_put_(indices, torch.stack([losses, torch.ones_like(losses)], 1), accumulate=True)
    return RoundEvaluation(frozenset(missed.nonzero().flatten().tolist()), torch.cat(confusable), sums)
