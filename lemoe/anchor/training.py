"""Training one round of preset `anchor`: a small expert for each edit, all of them in one batch.

An expert sees its own edit only: its prompt, rewordings of it, and other questions about its subject, on which it
learns to stay silent. AdamW works element by element, so that experts trained together do not touch each other, and
nothing depends on earlier rounds: they can be trained in any order, on any machine, and stacked.
"""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemoe.adaptor import AdaptorState, RoundRecord, round_id
from lemoe.anchor.anchors import Anchors, build_gate
from lemoe.anchor.examples import other_questions, rewordings
from lemoe.anchor.gate import Anchor, Route
from lemoe.edits import Edit, digest_of
from lemoe.experts import Experts, rms_normal
from lemoe.frozen import FrozenBatch, ffn_inputs, freeze, residual_scale
from lemoe.models import BaseModel
from lemoe.settings import Settings
from lemoe.structure import FFNSite
from lemoe.tokens import Batch, Passage, encode, encode_all, length_buckets
from lemoe.training import OnStep, Step, encode_edits

DEFAULT_WIDTH = 4
BETAS = (0.9, 0.95)
WARM_UP = 3  # steps
FREQUENT = 4096  # token ids that always take part in the loss
RIVALS = 64  # of the base model's own likeliest tokens at each target position
DECISIVE = 3.0  # weight of a question's last token among those on which an expert shall stay silent


@dataclass(frozen=True)
class Teaching:
    """A frozen batch of texts that end in an answer: one row for each, of the edit `owners` `[batch]`.

    `active` `[batch, seq]`: where the expert acts. `ends` `[targets]`: which labels end an answer. `weights`
    `[targets]`: of each label, so that every text counts the same.
    """

    frozen: FrozenBatch
    owners: Tensor
    active: Tensor
    ends: Tensor
    weights: Tensor

    @property
    def normal(self) -> Tensor:
        """`[batch, seq, hidden]`, what experts read."""
        return rms_normal(self.frozen.inputs)

    def of(self, chosen: Tensor) -> "Teaching | None":
        """The rows of the edits `chosen` `[edits]`, bool; None if there are none."""
        rows = chosen[self.owners].nonzero().squeeze(1)
        if not len(rows):
            return None
        targets = torch.isin(self.frozen.batch.target_rows, rows)
        return Teaching(
            self.frozen.take(rows), self.owners[rows], self.active[rows], self.ends[targets], self.weights[targets]
        )


@dataclass(frozen=True)
class Silence:
    """Texts on which an expert shall stay silent: its normalised inputs, owners `[batch]`, weights `[batch, seq]`."""

    normal: Tensor
    owners: Tensor
    weights: Tensor

    def of(self, chosen: Tensor) -> "Silence | None":
        """The rows of the edits `chosen` `[edits]`, bool; None if there are none."""
        rows = chosen[self.owners]
        return Silence(self.normal[rows], self.owners[rows], self.weights[rows]) if bool(rows.any()) else None


@dataclass(frozen=True)
class Lessons:
    """All texts of a round after the frozen pass: own prompts, rewordings by kind, and other questions."""

    own: list[Teaching]
    variants: list[list[Teaching]]
    silences: list[Silence]

    def of(self, chosen: Tensor) -> "Lessons":
        """The lessons of the edits `chosen` `[edits]`, bool."""
        return Lessons(
            [kept for teaching in self.own if (kept := teaching.of(chosen))],
            [[kept for teaching in kind if (kept := teaching.of(chosen))] for kind in self.variants],
            [quiet for silence in self.silences if (quiet := silence.of(chosen))],
        )


class Blocks(nn.Module):
    """The experts in training, one for each edit: `up`, `down` and `gate` `[edits, width, hidden]`.

    All start alike, with nothing written, so that training starts from the base model's own answers.
    """

    def __init__(self, edits: int, site: FFNSite, width: int, scale: float, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = [torch.randn(width, site.hidden, generator=generator) / site.hidden**0.5 for _ in range(2)]
        self.up = nn.Parameter(start[0].repeat(edits, 1, 1))
        self.gate = nn.Parameter(start[1].repeat(edits, 1, 1)) if site.gated else None
        self.down = nn.Parameter(torch.zeros(edits, width, site.hidden))
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
        edits, width, hidden = self.up.shape
        gate = None if self.gate is None else self.gate.detach().cpu().reshape(-1, hidden)
        return Experts(
            up=self.up.detach().cpu().reshape(-1, hidden),
            down=self.down.detach().cpu().reshape(-1, hidden),
            gate=gate,
            offsets=torch.arange(edits + 1) * width,
            scale=torch.full((edits,), self.scale),
        )


def train_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: AdaptorState | None, on_step: OnStep
) -> AdaptorState:
    """Teach `edits`, one new expert each; see `lemoe.methods.train_round`."""
    layer = before.base.layer if before else settings.layer_of(len(base.layers), base.source.layers)
    fingerprint = before.base if before else base.fingerprint(layer, settings.layer_path)
    settings = replace(settings, layer=layer)
    identity = round_id(fingerprint, settings, edits, None)
    torch_seed = int(identity[:15], 16)
    site = base.site(layer, settings.layer_path)
    passages = encode_edits(base, edits)
    anchors = [
        Anchor(passage.prompt, passage.target, edit.subject) for edit, passage in zip(edits, passages, strict=True)
    ]
    maker = LessonMaker(base, site, layer, settings, edits, passages, anchors, random.Random(torch_seed))
    lessons = maker.lessons()
    width = settings.width or DEFAULT_WIDTH
    blocks = Blocks(len(edits), site, width, residual_scale(base, layer), settings.seed).to(base.device)
    generator = torch.Generator(base.device).manual_seed(torch_seed)
    outcome = _teach(base, blocks, lessons, settings, generator, on_step)
    record = RoundRecord(
        id=identity,
        depth=1,
        parent=None,
        experts=len(edits),
        ids=tuple(edit.id for edit in edits),
        edits=tuple(edit.digest for edit in edits),
        edits_sha256=digest_of(edits),
        seed=settings.seed,
        loss=outcome.loss,
        end_loss=outcome.end_loss,
        steps=outcome.steps,
        retried=outcome.retried,
        routed=len(edits),
    )
    return AdaptorState(fingerprint, settings, (record,), blocks.experts(), Anchors(tuple(anchors)))


class LessonMaker:
    """Makes a round's texts and runs the frozen pass over them."""

    def __init__(
        self,
        base: BaseModel,
        site: FFNSite,
        layer: int,
        settings: Settings,
        edits: Sequence[Edit],
        passages: Sequence[Passage],
        anchors: Sequence[Anchor],
        rng: random.Random,
    ):
        self._base, self._site, self._layer, self._settings = base, site, layer, settings
        self._edits, self._passages, self._anchors, self._rng = edits, passages, anchors, rng
        self._gates = [build_gate(base, [anchor], settings) for anchor in anchors]

    def lessons(self) -> Lessons:
        everyone = range(len(self._edits))
        own = self._teachings([(place, self._passages[place]) for place in everyone])
        return Lessons(own, self._variants(), self._silences())

    def _variants(self) -> list[list[Teaching]]:
        edits, settings = self._edits, self._settings
        texts = [rewordings(edits, place, settings.variants, self._rng) for place in range(len(edits))]
        usable = [self._usable([(text, edit.target) for text in own]) for own, edit in zip(texts, edits, strict=True)]
        if settings.train_rephrases:
            rephrased = self._rephrases()
            usable = [[*own, *theirs] for own, theirs in zip(usable, rephrased, strict=True)]
        kinds = [
            [(place, own[kind]) for place, own in enumerate(usable) if kind < len(own)]
            for kind in range(max(map(len, usable), default=0))
        ]
        return [self._teachings(rows) for rows in kinds]

    def _rephrases(self) -> list[list[Passage]]:
        """The user's own; one that cannot be used is the user's to mend."""
        return [
            encode_all(self._base, ((f"rephrase of edit {e.id}", p.prompt, e.target) for p in e.rephrases))
            for e in self._edits
        ]

    def _usable(self, texts: Sequence[tuple[str, str | None]]) -> list[Passage]:
        """The passages of made-up texts; one that this tokenizer or context cannot take is left out."""
        passages = []
        for text, target in texts:
            with suppress(ValueError):
                passages.append(encode(self._base, text, target))
        return passages

    def _teachings(self, rows: Sequence[tuple[int, Passage]]) -> list[Teaching]:
        """Frozen batches of passages, each with the token that ends an answer behind its target."""
        ended = [self._ended(passage) for _, passage in rows]
        buckets = length_buckets(list(map(len, ended)), self._settings.batch_tokens)
        return [self._teaching(rows, ended, bucket) for bucket in buckets]

    def _ended(self, passage: Passage) -> Passage:
        full = self._base.max_length is not None and len(passage) >= self._base.max_length
        return passage if full else Passage(passage.prompt, (*passage.target, self._base.end_token))

    def _teaching(
        self, rows: Sequence[tuple[int, Passage]], ended: Sequence[Passage], bucket: Sequence[int]
    ) -> Teaching:
        base = self._base
        batch = Batch.of(ended, bucket, base.pad_token, base.device)
        starts = [self._start(rows[index][0], ended[index]) for index in bucket]
        columns = torch.arange(batch.ids.shape[1], device=base.device)
        active = (columns >= torch.tensor(starts, device=base.device).unsqueeze(1)) & batch.mask.bool()
        lengths = torch.tensor([len(ended[index].target) for index in bucket], device=base.device)
        last = batch.prompt_lengths + lengths - 2
        return Teaching(
            frozen=freeze(base, self._site, self._layer, batch),
            owners=torch.tensor([rows[index][0] for index in bucket], device=base.device),
            active=active,
            ends=batch.target_columns == last[batch.target_rows],
            weights=1.0 / lengths[batch.target_rows],
        )

    def _start(self, place: int, passage: Passage) -> int:
        """Where the gate opens on a text, in use; at the prompt's last token where it would not open at all."""
        route = Route(self._gates[place])
        for column, token in enumerate(passage.prompt):
            if route.push(token).edit >= 0:
                return column
        return len(passage.prompt) - 1

    def _silences(self) -> list[Silence]:
        base, edits = self._base, self._edits
        gate = build_gate(base, self._anchors, self._settings)
        count = self._settings.negatives
        rows = [
            (place, passage)
            for place in range(len(edits))
            for passage in self._usable(
                [(text, None) for text in other_questions(gate, edits, place, count, self._rng)]
            )
        ]
        passages = [passage for _, passage in rows]
        silences = []
        for bucket in length_buckets(list(map(len, passages)), self._settings.batch_tokens):
            batch = Batch.of(passages, bucket, base.pad_token, base.device)
            starts = [self._start(rows[index][0], passages[index]) for index in bucket]
            columns = torch.arange(batch.ids.shape[1], device=base.device)
            weights = ((columns >= torch.tensor(starts, device=base.device).unsqueeze(1)) & batch.mask.bool()).float()
            weights = torch.where(columns == batch.prompt_lengths.unsqueeze(1) - 1, DECISIVE * weights, weights)
            weights = weights / weights.sum(1, keepdim=True)
            owners = torch.tensor([rows[index][0] for index in bucket], device=base.device)
            silences.append(Silence(rms_normal(ffn_inputs(base, self._site, batch)), owners, weights))
        return silences


@dataclass(frozen=True)
class Outcome:
    """Mean cross entropy (nats) of target tokens and of ending tokens, steps taken, and edits trained on again."""

    loss: float
    end_loss: float
    steps: int
    retried: int


def _teach(
    base: BaseModel,
    blocks: Blocks,
    lessons: Lessons,
    settings: Settings,
    generator: torch.Generator,
    on_step: OnStep,
) -> Outcome:
    """Train all experts, then those whose own prompt is not answered exactly again, with fresh optimiser state."""
    vocabulary = _loss_vocabulary(base, lessons)
    steps = _optimise(base, blocks, lessons, settings, settings.steps, vocabulary, generator, on_step)
    retried = torch.zeros(len(blocks.up), dtype=torch.bool, device=base.device)
    for _ in range(settings.retries):
        missed = _missed(base, blocks, lessons, settings)
        if not bool(missed.any()):
            break
        retried |= missed
        few = lessons.of(missed)
        steps += _optimise(base, blocks, few, settings, -(-settings.steps // 2), None, generator, on_step)
    loss, end_loss = _losses(base, blocks, lessons)
    return Outcome(loss, end_loss, steps, int(retried.sum()))


def _optimise(
    base: BaseModel,
    blocks: Blocks,
    lessons: Lessons,
    settings: Settings,
    steps: int,
    vocabulary: Tensor | None,
    generator: torch.Generator,
    on_step: OnStep,
) -> int:
    """AdamW over the own prompts and one kind of rewording a step; experts without lessons stay as they are."""
    optimiser = torch.optim.AdamW(
        blocks.parameters(), lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay
    )
    edits = sum(len(teaching.owners) for teaching in lessons.own)
    head = None if vocabulary is None else base.head.weight[vocabulary]
    for number in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _pace(number, steps)
        optimiser.zero_grad()
        total = torch.zeros((), device=base.device)
        for teaching in lessons.own:
            total = total + _step_loss(base, blocks, teaching, settings, vocabulary, head, generator)
        own = total.detach()
        for teaching in _variant(lessons, number, generator):
            total = total + _step_loss(base, blocks, teaching, settings, vocabulary, head, generator)
        if settings.negative_weight and lessons.silences:
            total = total + settings.negative_weight * _noise_on_silence(blocks, lessons)
        total.backward()
        optimiser.step()
        on_step(Step(number, steps, float(own) / edits))
    return steps


def _pace(number: int, steps: int) -> float:
    """Warm-up, then full rate, then a linear fall to a tenth over the second half."""
    falling = max(0.0, number - steps / 2) / (steps / 2)
    return min(1.0, (number + 1) / WARM_UP) * (1 - 0.9 * falling)


def _variant(lessons: Lessons, number: int, generator: torch.Generator) -> Sequence[Teaching]:
    if not lessons.variants:
        return lessons.own
    return lessons.variants[int(torch.randint(len(lessons.variants), (), generator=generator, device=generator.device))]


def _step_loss(
    base: BaseModel,
    blocks: Blocks,
    teaching: Teaching,
    settings: Settings,
    vocabulary: Tensor | None,
    head: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """Cross entropy of targets and endings, a mean over each text, summed over texts."""
    normal = teaching.normal
    if settings.noise:
        normal = normal + settings.noise * torch.randn(normal.shape, generator=generator, device=normal.device)
    hidden = teaching.frozen.replay(_delta(blocks, teaching, normal))
    labels = teaching.frozen.batch.labels
    if vocabulary is None or head is None:
        logits = base.logits(hidden)
    else:
        logits = base.finish(hidden) @ head.T
        labels = torch.searchsorted(vocabulary, labels.contiguous())
    losses = functional.cross_entropy(logits.float(), labels, reduction="none")
    return (losses * teaching.weights).sum()


def _delta(blocks: Blocks, teaching: Teaching, normal: Tensor) -> Tensor:
    return blocks.scale * blocks(normal, teaching.owners) * teaching.active.unsqueeze(-1)


def _noise_on_silence(blocks: Blocks, lessons: Lessons) -> Tensor:
    """Mean squared expert output on other questions, summed over edits."""
    total = torch.zeros((), device=blocks.up.device)
    count = sum(len(s.owners) for s in lessons.silences) / sum(len(teaching.owners) for teaching in lessons.own)
    for silence in lessons.silences:
        squares = blocks(silence.normal, silence.owners).pow(2).mean(-1)
        total = total + (squares * silence.weights).sum()
    return total / max(count, 1.0)


@torch.no_grad()
def _loss_vocabulary(base: BaseModel, lessons: Lessons) -> Tensor:
    """Token ids, sorted, over which the loss is taken: labels, the base model's own answers, and frequent tokens."""
    parts = [torch.arange(min(FREQUENT, base.vocabulary), device=base.device)]
    for teaching in lessons.own:
        logits = base.logits(teaching.frozen.base_hidden)
        parts += [teaching.frozen.batch.labels, logits.topk(min(RIVALS, base.vocabulary)).indices.flatten()]
    return torch.cat(parts).unique()


@torch.no_grad()
def _missed(base: BaseModel, blocks: Blocks, lessons: Lessons, settings: Settings) -> Tensor:
    """`[edits]`: whose own prompt is not answered, to the end, by the likeliest tokens, or at a loss above target."""
    missed = torch.zeros(len(blocks.up), dtype=torch.bool, device=base.device)
    for teaching in lessons.own:
        logits = base.logits(teaching.frozen.replay(_delta(blocks, teaching, teaching.normal))).float()
        labels, rows = teaching.frozen.batch.labels, teaching.frozen.batch.target_rows
        losses = functional.cross_entropy(logits, labels, reduction="none") * teaching.weights
        level = torch.zeros(len(teaching.owners), device=base.device).index_add(0, rows, losses)
        missed[teaching.owners[level > settings.loss_target]] = True
        missed[teaching.owners[rows[logits.argmax(-1) != labels]]] = True
    return missed


@torch.no_grad()
def _losses(base: BaseModel, blocks: Blocks, lessons: Lessons) -> tuple[float, float]:
    """Mean cross entropy over all target tokens, and over all ending tokens, of the own prompts."""
    sums = torch.zeros(2, 2)
    for teaching in lessons.own:
        logits = base.logits(teaching.frozen.replay(_delta(blocks, teaching, teaching.normal))).float()
        losses = functional.cross_entropy(logits, teaching.frozen.batch.labels, reduction="none").cpu()
        for index, mask in enumerate((~teaching.ends.cpu(), teaching.ends.cpu())):
            sums[index] += torch.stack([losses[mask].sum(), mask.sum()])
    means = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
    return means[0], means[1]
