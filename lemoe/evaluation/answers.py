"""What both models, the base and the edited one, give for passages: under teacher forcing, greedily, and for texts.

No answer depends on what else runs beside it, to the bit on a CPU in float32: passages of one edit share their
beginnings and no others, batches are laid out by `steady_width`, and experts run row by row.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from lemoe.base.frozen import Below, run_below
from lemoe.base.frozen.replay import hidden_of
from lemoe.base.hooks import released
from lemoe.base.loading import LOGIT_ROWS, BaseModel
from lemoe.base.placement import taken
from lemoe.base.structure import FFNSite
from lemoe.base.tokens import Batch, Passage, steady_width
from lemoe.evaluation.metrics import Decode
from lemoe.evaluation.scoring import Answer, Item
from lemoe.inference.generation import Tokens, generate_batch, prompt_batches
from lemoe.inference.insertion import InsertedAdaptor
from lemoe.routing.router import Explanation
from lemoe.training.weight_change import WeightChange

UNROUTED = Explanation(-1, 0.0, scope="subject")

Pair = tuple[Answer, Answer, Explanation]  # before, after, route
Answered = Iterator[tuple[list[int], list[Pair]]]


@torch.no_grad()
def teacher(base: BaseModel, adaptor: InsertedAdaptor | None, items: Sequence[Item], batch_tokens: int) -> Answered:
    """Both stages from one frozen pass: the base's answers come with it, the edited ones from replaying its top."""
    for rows in _edits_together(items, batch_tokens):
        chosen = [items[row] for row in rows]
        if adaptor is None:
            top = len(base.layers) - 1
            before = _before(base, base.site(top), top, chosen, batch_tokens)[1]
            yield rows, [(answer, answer, UNROUTED) for answer in before]
        else:
            yield rows, _both(base, adaptor, chosen, batch_tokens)


def _edits_together(items: Sequence[Item], batch_tokens: int) -> Iterator[list[int]]:
    """Rows of whole edits, those with the longest passages first; `batch_tokens` tokens, or the one edit that has more.

    Running out of memory then happens at once.
    """
    edits: dict[int, list[int]] = {}
    for row, item in enumerate(items):
        edits.setdefault(item.edit, []).append(row)
    waiting: list[int] = []
    tokens = 0
    for rows in sorted(edits.values(), key=lambda rows: -max(len(items[row].passage.read) for row in rows)):
        size = sum(len(items[row].passage.read) for row in rows)
        if waiting and tokens + size > batch_tokens:
            yield waiting
            waiting, tokens = [], 0
        waiting, tokens = waiting + rows, tokens + size
    if waiting:
        yield waiting


def _both(base: BaseModel, adaptor: InsertedAdaptor, items: Sequence[Item], batch_tokens: int) -> list[Pair]:
    """Before and after for one batch; nothing is computed that is known.

    Where no expert acts, the edited model is the base model, bit for bit; and what the base model wrote itself, its
    likeliest tokens are.
    """
    routes = [adaptor.routing_of(item.passage) for item in items]
    acting = [bool((route.experts >= 0).any()) for route in routes]
    before = {row: Answer(item.passage.target) for row, item in enumerate(items) if item.open and not acting[row]}
    asked = [row for row in range(len(items)) if row not in before]
    after: dict[int, Answer] = {}
    if asked:
        with adaptor.bypassed():
            layer = adaptor.state.base.layer
            below, answers = _before(base, adaptor.site, layer, [items[row] for row in asked], batch_tokens)
        before.update(zip(asked, answers, strict=True))
        places = [place for place, row in enumerate(asked) if acting[row]]
        passages = [items[row].passage for row in asked]
        for few in _by_width(base, passages, places, batch_tokens):
            with adaptor.bypassed():
                # No last FFN at target positions alone: a batch's last elements, which activations round in their own
                # way, would then be a target's; so they are padding.
                frozen = replace(below.freeze(few), top=None)
            changed = [asked[place] for place in few.rows]
            hidden = adaptor.replay(frozen, [routes[row] for row in changed])
            after.update(zip(changed, _answers(base, few, hidden), strict=True))
    return [(before[row], after.get(row, before[row]), route.explained[0]) for row, route in enumerate(routes)]


def _by_width(base: BaseModel, passages: Sequence[Passage], rows: Sequence[int], batch_tokens: int) -> Iterator[Batch]:
    """The passages `rows` in batches of one steady width each."""
    widths = {row: steady_width(len(passages[row].read), base.max_length) for row in rows}
    for width in sorted(set(widths.values()), reverse=True):
        alike = [row for row in rows if widths[row] == width]
        size = max(1, batch_tokens // width)
        for first in range(0, len(alike), size):
            yield Batch.of(passages, alike[first : first + size], base.pad_token, base.device, width)


def _before(
    base: BaseModel, site: FFNSite, layer: int, items: Sequence[Item], batch_tokens: int
) -> tuple[Below, list[Answer]]:
    """The base model's answers, with what the layers up to `layer` give.

    Passages with an open target stay by themselves: whether they run at all depends on the adaptor.
    """
    passages = [item.passage for item in items]
    groups = [-1 - row if item.open else item.edit for row, item in enumerate(items)]
    below = run_below(base, site, layer, passages, batch_tokens, whole=True, groups=groups)
    batch = Batch.of(passages, range(len(passages)), base.pad_token, base.device)
    return below, _answers(base, batch, below.base_hidden(batch))


def _answers(base: BaseModel, batch: Batch, hidden: Tensor) -> list[Answer]:
    """The likeliest token at each target position and the target's loss, for last hidden states `[targets, hidden]`."""
    counts = torch.bincount(batch.target_rows, minlength=len(batch.rows)).tolist()
    written, losses = [], []
    for logits, labels in zip(base.logits_in_parts(hidden), batch.labels.split(LOGIT_ROWS), strict=True):
        written.append(logits.argmax(-1))
        losses.append(functional.cross_entropy(logits.float(), labels, reduction="none"))
    pairs = zip(torch.cat(written).split(counts), torch.cat(losses).split(counts), strict=True)
    return [Answer(tuple(tokens.tolist()), float(loss.double().mean())) for tokens, loss in pairs]


@torch.no_grad()
def greedy(base: BaseModel, adaptor: InsertedAdaptor | None, items: Sequence[Item], batch_tokens: int) -> Answered:
    """What both models write; items with one prompt share its answer, so that each prompt is written on once."""
    sharing: dict[Tokens, list[int]] = {}
    for row, item in enumerate(items):
        sharing.setdefault(item.passage.prompt, []).append(row)
    wanted = {prompt: max(len(items[row].passage.target) for row in rows) + 1 for prompt, rows in sharing.items()}
    for prompts in prompt_batches(wanted, batch_tokens):
        count = max(wanted[prompt] for prompt in prompts)
        with adaptor.bypassed() if adaptor else nullcontext():
            before = generate_batch(base, prompts, count)
        after = generate_batch(base, prompts, count) if adaptor else before
        routes = adaptor.router.explain(prompts) if adaptor else [UNROUTED] * len(prompts)
        rows, pairs = [], []
        for prompt, one, other, route in zip(prompts, before, after, routes, strict=True):
            for row in sharing[prompt]:
                target = items[row].passage.target
                rows.append(row)
                pairs.append((_written(base, one, target), _written(base, other, target), route))
        yield rows, pairs


RUNS = {"teacher": teacher, "greedy": greedy}


@torch.no_grad()
def changed(
    base: BaseModel, change: WeightChange, items: Sequence[Item], decode: Decode, batch_tokens: int
) -> Answered:
    """The base's answers to everything, then those of the model with other weights."""
    own = list(RUNS[decode](base, None, items, batch_tokens))  # the base's structure is known from now on
    with change.applied(base):
        for (rows, before), (_, after) in zip(own, RUNS[decode](base, None, items, batch_tokens), strict=True):
            yield rows, [(one, other, UNROUTED) for (one, *_), (other, *_) in zip(before, after, strict=True)]


def _written(base: BaseModel, tokens: Tokens, target: Tokens) -> Answer:
    """What was written, as far as the target goes, and whether it then ends by itself or ends the line."""
    following = tokens[len(target) : len(target) + 1]
    line_end = base.tokenizer.decode(list(following)).startswith("\n")
    return Answer(tokens[: len(target)], ended=following == (base.end_token,) or line_end)


@torch.no_grad()
def read_through(base: BaseModel, passage: Passage) -> float:
    """Mean loss (nats) of a passage's target in one plain forward pass, as anyone would run the model as it stands."""
    batch = Batch.of([passage], [0], base.pad_token, base.device)
    seen: list[Tensor] = []
    handle = base.layers[-1].register_forward_hook(lambda module, args, output: seen.append(hidden_of(output)))
    with released([handle]):
        base.decoder(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    hidden = taken(seen[0], batch.target_rows, batch.target_columns).to(base.device)
    loss = _answers(base, batch, hidden)[0].loss
    assert loss is not None, "teacher forcing gives losses"
    return loss
