"""Answers of both models, the base and the edited one: under teacher forcing, in greedy decoding, and on plain texts.

No answer depends on what else is in its batch, to the bit on a CPU in float32: passages share prefixes within an edit
alone, batches are laid out by `batch_invariant_width`, and experts run row by row.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from lemoe.base.frozen import PrefixActivations, compute_prefix_activations
from lemoe.base.frozen.replay import extract_hidden
from lemoe.base.hooks import removed_on_exit
from lemoe.base.loading import LOGIT_ROWS, BaseModel
from lemoe.base.placement import index_on_device
from lemoe.base.structure import FFNSite
from lemoe.base.tokens import Batch, Passage, batch_invariant_width
from lemoe.evaluation.metrics import Decode
from lemoe.evaluation.scoring import Answer, EncodedProbe
from lemoe.inference.generation import Tokens, generate_batch, prompt_batches
from lemoe.inference.insertion import InsertedAdaptor
from lemoe.routing.router import Explanation
from lemoe.training.baselines.weight_change import WeightChange

UNROUTED = Explanation(-1, 0.0, scope="subject")

BeforeAfter = tuple[Answer, Answer, Explanation]  # before, after, route
AnsweredRows = Iterator[tuple[list[int], list[BeforeAfter]]]


@torch.no_grad()
def answer_teacher_forced(
    base: BaseModel, adaptor: InsertedAdaptor | None, probes: Sequence[EncodedProbe], batch_tokens: int
) -> AnsweredRows:
    """Both stages from one pass of the base: it gives the answers before; those after come from replaying its top."""
    for rows in _batch_whole_edits(probes, batch_tokens):
        selected = [probes[row] for row in rows]
        if adaptor is None:
            top = len(base.layers) - 1
            before = _answer_by_base(base, base.ffn_site(top), top, selected, batch_tokens)[1]
            yield rows, [(answer, answer, UNROUTED) for answer in before]
        else:
            yield rows, _answer_before_and_after(base, adaptor, selected, batch_tokens)


def _batch_whole_edits(probes: Sequence[EncodedProbe], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of whole edits, of at most `batch_tokens` tokens unless one edit has more.

    The longest passages come first, so that running out of memory happens at once.
    """
    edits: dict[int, list[int]] = {}
    for row, probe in enumerate(probes):
        edits.setdefault(probe.edit, []).append(row)
    waiting: list[int] = []
    tokens = 0
    for rows in sorted(edits.values(), key=lambda rows: -max(len(probes[row].passage.input_ids) for row in rows)):
        size = sum(len(probes[row].passage.input_ids) for row in rows)
        if waiting and tokens + size > batch_tokens:
            yield waiting
            waiting, tokens = [], 0
        waiting, tokens = waiting + rows, tokens + size
    if waiting:
        yield waiting


def _answer_before_and_after(
    base: BaseModel, adaptor: InsertedAdaptor, probes: Sequence[EncodedProbe], batch_tokens: int
) -> list[BeforeAfter]:
    """Before and after for one batch, without passes whose result is known.

    Where no expert acts, the edited model is the base model, bit for bit. A target that the base wrote itself consists
    of its likeliest tokens.
    """
    groups = _sharing_groups(probes)
    routes = adaptor.route_passages([probe.passage for probe in probes], batch_tokens, groups)
    acting = [bool((route.experts >= 0).any()) for route in routes]
    before = {
        row: Answer(probe.passage.target) for row, probe in enumerate(probes) if probe.base_written and not acting[row]
    }
    asked = [row for row in range(len(probes)) if row not in before]
    after: dict[int, Answer] = {}
    if asked:
        with adaptor.bypassed():
            layer = adaptor.state.base.layer
            prefix, answers = _answer_by_base(base, adaptor.site, layer, [probes[row] for row in asked], batch_tokens)
        before.update(zip(asked, answers, strict=True))
        indices = [index for index, row in enumerate(asked) if acting[row]]
        passages = [probes[row].passage for row in asked]
        for batch in _batch_by_width(base, passages, indices, batch_tokens):
            with adaptor.bypassed():
                # Not the shortcut that runs the last FFN at target positions alone: activation functions round the
                # last elements of a batch differently, and these must be padding, never a target.
                frozen = replace(prefix.freeze_batch(batch), last_ffn=None)
            changed = [asked[index] for index in batch.rows]
            hidden = adaptor.replay(frozen, [routes[row] for row in changed])
            after.update(zip(changed, _read_answers(base, batch, hidden), strict=True))
    return [(before[row], after.get(row, before[row]), route.explained[0]) for row, route in enumerate(routes)]


def _batch_by_width(
    base: BaseModel, passages: Sequence[Passage], rows: Sequence[int], batch_tokens: int
) -> Iterator[Batch]:
    """The passages `rows` in batches of equal padded width."""
    widths = {row: batch_invariant_width(len(passages[row].input_ids), base.max_length) for row in rows}
    for width in sorted(set(widths.values()), reverse=True):
        same_width = [row for row in rows if widths[row] == width]
        size = max(1, batch_tokens // width)
        for first in range(0, len(same_width), size):
            yield Batch.from_passages(passages, same_width[first : first + size], base.pad_token_id, base.device, width)


def _answer_by_base(
    base: BaseModel, site: FFNSite, layer: int, probes: Sequence[EncodedProbe], batch_tokens: int
) -> tuple[PrefixActivations, list[Answer]]:
    """The base model's answers, with the prefix activations up to `layer`.

    Passages whose target the base wrote share no prefix: whether they run at all depends on the adaptor.
    """
    passages, groups = [probe.passage for probe in probes], _sharing_groups(probes)
    prefix = compute_prefix_activations(base, site, layer, passages, batch_tokens, reach="end", groups=groups)
    batch = Batch.from_passages(passages, range(len(passages)), base.pad_token_id, base.device)
    return prefix, _read_answers(base, batch, prefix.base_hidden(batch))


def _sharing_groups(probes: Sequence[EncodedProbe]) -> list[int]:
    """One number for each probe; those with the same may share a prefix."""
    return [-1 - row if probe.base_written else probe.edit for row, probe in enumerate(probes)]


def _read_answers(base: BaseModel, batch: Batch, hidden: Tensor) -> list[Answer]:
    """The likeliest token at each target position and the target's loss, for last hidden states `[targets, hidden]`."""
    counts = torch.bincount(batch.target_rows, minlength=len(batch.rows)).tolist()
    written, losses = [], []
    for logits, labels in zip(base.logits_in_chunks(hidden), batch.labels.split(LOGIT_ROWS), strict=True):
        written.append(logits.argmax(-1))
        losses.append(functional.cross_entropy(logits.float(), labels, reduction="none"))
    pairs = zip(torch.cat(written).split(counts), torch.cat(losses).split(counts), strict=True)
    return [Answer(tuple(tokens.tolist()), float(loss.double().mean())) for tokens, loss in pairs]


@torch.no_grad()
def answer_greedily(
    base: BaseModel, adaptor: InsertedAdaptor | None, probes: Sequence[EncodedProbe], batch_tokens: int
) -> AnsweredRows:
    """What both models generate; probes with the same prompt share its answer, so that each prompt is run once."""
    sharing: dict[Tokens, list[int]] = {}
    for row, probe in enumerate(probes):
        sharing.setdefault(probe.passage.prompt, []).append(row)
    wanted = {prompt: max(len(probes[row].passage.target) for row in rows) + 1 for prompt, rows in sharing.items()}
    for prompts in prompt_batches(wanted, batch_tokens):
        count = max(wanted[prompt] for prompt in prompts)
        with adaptor.bypassed() if adaptor else nullcontext():
            before = generate_batch(base, prompts, count)
        after = generate_batch(base, prompts, count) if adaptor else before
        routes = adaptor.explain(prompts, batch_tokens, answers=after) if adaptor else [UNROUTED] * len(prompts)
        rows, pairs = [], []
        for prompt, one, other, route in zip(prompts, before, after, routes, strict=True):
            for row in sharing[prompt]:
                target = probes[row].passage.target
                rows.append(row)
                pairs.append((_cut_written_answer(base, one, target), _cut_written_answer(base, other, target), route))
        yield rows, pairs


ANSWER_BY_DECODE = {"teacher": answer_teacher_forced, "greedy": answer_greedily}


@torch.no_grad()
def answer_changed_weights(
    base: BaseModel, change: WeightChange, probes: Sequence[EncodedProbe], decode: Decode, batch_tokens: int
) -> AnsweredRows:
    """The base's answers to all probes, then those of the model with the changed weights."""
    own = list(ANSWER_BY_DECODE[decode](base, None, probes, batch_tokens))  # the base's structure is known from now on
    with change.applied(base):
        for (rows, before), (_, after) in zip(
            own, ANSWER_BY_DECODE[decode](base, None, probes, batch_tokens), strict=True
        ):
            yield rows, [(one, other, UNROUTED) for (one, *_), (other, *_) in zip(before, after, strict=True)]


@torch.no_grad()
def answer_changed_prompts(
    base: BaseModel,
    probes: Sequence[EncodedProbe],
    changed: Sequence[EncodedProbe],
    decode: Decode,
    batch_tokens: int,
) -> AnsweredRows:
    """The base's answers to the probes, and to the same probes with other prompts."""
    before, after = (
        {row: answer for rows, given in answered for row, (answer, *_) in zip(rows, given, strict=True)}
        for answered in (ANSWER_BY_DECODE[decode](base, None, asked, batch_tokens) for asked in (probes, changed))
    )
    yield list(before), [(before[row], after[row], UNROUTED) for row in before]


def _cut_written_answer(base: BaseModel, tokens: Tokens, target: Tokens) -> Answer:
    """The generated text cut to the target's length, and whether the model then ends its answer or the line."""
    following = tokens[len(target) : len(target) + 1]
    line_end = base.tokenizer.decode(list(following)).startswith("\n")
    return Answer(tokens[: len(target)], ended=following == (base.eos_token_id,) or line_end)


@torch.no_grad()
def compute_plain_loss(base: BaseModel, passage: Passage) -> float:
    """Mean loss (nats) of a passage's target in one plain forward pass of the model as it is, hooks included."""
    batch = Batch.from_passages([passage], [0], base.pad_token_id, base.device)
    seen: list[Tensor] = []
    handle = base.layers[-1].register_forward_hook(lambda module, args, output: seen.append(extract_hidden(output)))
    with removed_on_exit([handle]):
        base.decoder(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    hidden = index_on_device(seen[0], batch.target_rows, batch.target_columns).to(base.device)
    loss = _read_answers(base, batch, hidden)[0].loss
    assert loss is not None, "teacher forcing gives losses"
    return loss
