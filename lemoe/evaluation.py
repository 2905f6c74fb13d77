"""Measuring an edited model against its base: reliability, generality, locality, portability, routing.

Every figure is over probes, before and after. Teacher forcing compares the most likely token at each target
position; greedy lets the model write. Locality is agreement with the base model's own predictions, never with a
gold answer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lemoe.adaptor import AdaptorState
from lemoe.decoding import write_greedily
from lemoe.edits import Edit, Probe
from lemoe.frozen import Below, run_below
from lemoe.insertion import InsertedAdaptor
from lemoe.metrics import Answer, Item, Measured, Metric, agreement, summarise, token_accuracy
from lemoe.models import LOGIT_ROWS, BaseModel
from lemoe.products import fast_products
from lemoe.routing import Explanation
from lemoe.structure import FFNSite
from lemoe.tokens import Batch, Passage, encode_all, length_buckets

UNROUTED = Explanation(-1, 0.0, scope="subject")

Decode = Literal["teacher", "greedy"]

OPEN_ANSWER_TOKENS = 8  # of the base model's own answer, where a locality probe names none


@dataclass(frozen=True)
class Record:
    """One probe: what was expected, what the model gave before and after, and why its prompt took its route.

    `before` and `after` hold the most likely token at each target position (teacher) or what was written (greedy).
    `nearest` is the id of the edit that acted or came nearest to it, None if no edit's subject was mentioned.
    """

    edit: str
    name: str
    kind: str
    prompt: str
    expected: str
    before: str
    after: str
    token_accuracy_before: float
    token_accuracy_after: float
    nearest: str | None
    route: Explanation


@dataclass(frozen=True)
class EvalResult:
    """All figures, and one record for each probe."""

    metrics: tuple[Metric, ...]
    records: tuple[Record, ...]

    def value(self, name: str, measure: str = "token_accuracy", kind: str = "all", stage: str = "after") -> float:
        """The figure of that name; NaN if there is none."""
        chosen = [m for m in self.metrics if (m.name, m.measure, m.kind, m.stage) == (name, measure, kind, stage)]
        return chosen[0].value if chosen else math.nan


OnProgress = Callable[[int, int], None]


def evaluate(
    base: BaseModel,
    state: AdaptorState | None,
    edits: Sequence[Edit],
    *,
    decode: Decode = "teacher",
    only: Sequence[str] | None = None,
    batch_tokens: int = 4096,
    allow_base_mismatch: bool = False,
    on_progress: OnProgress = lambda done, of: None,
) -> EvalResult:
    """Measure `state` on the probes of `edits`; without a state, the base model alone.

    Args:
        decode: `teacher` or `greedy`.
        only: names of the metrics to measure; all by default.
        batch_tokens: padded tokens that run through the model at once.
        allow_base_mismatch: measure it on a base that it was not made for, if only it has a place there.
        on_progress: called with probes done and their number.

    Raises:
        InputError: listing the probes that cannot be used with this model.
        AdaptorError: if the state belongs to another base model.
    """
    with fast_products(base.model):
        items = _items(base, edits, only, batch_tokens)
    run = _teacher if decode == "teacher" else _greedy
    places: dict[int, Measured] = {}
    adaptor = InsertedAdaptor(base, state, allow_base_mismatch=allow_base_mismatch) if state else None
    with fast_products(base.model), adaptor or nullcontext():
        for rows, given in run(base, adaptor, items, batch_tokens):
            for row, (before, after, route) in zip(rows, given, strict=True):
                places[row] = Measured(items[row], before, after, route)
            on_progress(len(places), len(items))
    measured = [places[row] for row in range(len(items))]
    metrics = summarise(measured, decode, edited=state is not None)
    if state is not None and not only:
        metrics += agreement(measured, _home(state, edits))
    names = [edits_[0].id for edits_ in state.taught] if state else []
    records = tuple(_record(base, edits, each, names) for each in measured)
    return EvalResult(tuple(metrics), records)


def _home(state: AdaptorState, edits: Sequence[Edit]) -> Callable[[Item], tuple[int, frozenset[int]] | None]:
    homes = state.homes
    rounds = {digest: place for place, record in enumerate(state.rounds, 1) for digest in record.edits}

    def home(item: Item) -> tuple[int, frozenset[int]] | None:
        digest = edits[item.edit].digest
        return (rounds[digest], homes[digest]) if digest in homes else None

    return home


def _items(base: BaseModel, edits: Sequence[Edit], only: Sequence[str] | None, batch_tokens: int) -> list[Item]:
    probes = [
        (index, name, probe)
        for index, edit in enumerate(edits)
        for name, probe in _probes(edit)
        if only is None or name in only
    ]
    texts = [(f"{name} of edit {edits[index].id}", probe.prompt, probe.target) for index, name, probe in probes]
    passages = encode_all(base, texts)
    open_rows = [row for row, passage in enumerate(passages) if not passage.target]
    written = _write(base, [passages[row] for row in open_rows], OPEN_ANSWER_TOKENS, batch_tokens)
    for row, answer in zip(open_rows, written, strict=True):
        passages[row] = Passage(passages[row].prompt, answer)
    free = frozenset(open_rows)
    return [
        Item(index, name, probe.kind, probe.prompt, passage, open=row in free)
        for row, ((index, name, probe), passage) in enumerate(zip(probes, passages, strict=True))
    ]


def _probes(edit: Edit) -> Iterator[tuple[str, Probe]]:
    yield "reliability", Probe(edit.prompt, edit.target, "edit")
    for name, probes in (
        ("generality", edit.rephrases),
        ("locality", edit.locality),
        ("portability", edit.portability),
    ):
        for probe in probes:
            yield name, probe


Pair = tuple[Answer, Answer, Explanation]  # before, after, route
Answered = Iterator[tuple[list[int], list[Pair]]]


@torch.no_grad()
def _teacher(base: BaseModel, adaptor: InsertedAdaptor | None, items: Sequence[Item], batch_tokens: int) -> Answered:
    """Both stages from one frozen pass: the base's answers come with it, the edited ones from replaying its top."""
    for rows in length_buckets([len(item.passage.read) for item in items], batch_tokens):
        chosen = [items[row] for row in rows]
        if adaptor is None:
            top = len(base.layers) - 1
            before = _before(base, base.site(top), top, chosen, batch_tokens)[1]
            yield rows, [(answer, answer, UNROUTED) for answer in before]
        else:
            yield rows, _both(base, adaptor, chosen, batch_tokens)


def _both(base: BaseModel, adaptor: InsertedAdaptor, items: Sequence[Item], batch_tokens: int) -> list[Pair]:
    """Before and after for one batch; nothing is computed that is known.

    Where no expert acts, the edited model is the base model, bit for bit; and what the base model wrote itself, its
    likeliest tokens are.
    """
    batch = Batch.of([item.passage for item in items], range(len(items)), base.pad_token, base.device)
    routing = adaptor.routing_of(batch)
    acting = (routing.experts >= 0).flatten(1).any(1).tolist()
    before = {row: Answer(item.passage.target) for row, item in enumerate(items) if item.open and not acting[row]}
    asked = [row for row in range(len(items)) if row not in before]
    after: dict[int, Answer] = {}
    if asked:
        layer = adaptor.state.base.layer
        with adaptor.bypassed():
            below, answers = _before(base, adaptor.site, layer, [items[row] for row in asked], batch_tokens)
        before.update(zip(asked, answers, strict=True))
        places = [place for place, row in enumerate(asked) if acting[row]]
        if places:
            changed = [asked[place] for place in places]
            passages = [items[row].passage for row in asked]
            with adaptor.bypassed():
                few = below.freeze(Batch.of(passages, places, base.pad_token, base.device))
            hidden = adaptor.replay(few, routing.take(torch.tensor(changed, device=base.device), few.output.shape[1]))
            after.update(zip(changed, _answers(base, few.batch, hidden), strict=True))
    return [(before[row], after.get(row, before[row]), why) for row, why in enumerate(routing.explained)]


def _before(
    base: BaseModel, site: FFNSite, layer: int, items: Sequence[Item], batch_tokens: int
) -> tuple[Below, list[Answer]]:
    """The base model's answers, with what the layers up to `layer` give."""
    passages = [item.passage for item in items]
    below = run_below(base, site, layer, passages, batch_tokens, whole=True)
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
    return [Answer(tuple(tokens.tolist()), float(loss.mean())) for tokens, loss in pairs]


def _greedy(base: BaseModel, adaptor: InsertedAdaptor | None, items: Sequence[Item], batch_tokens: int) -> Answered:
    for rows in length_buckets([len(item.passage.read) for item in items], batch_tokens):
        chosen = [items[row].passage for row in rows]
        if adaptor is None:
            yield rows, [(answer, answer, UNROUTED) for answer in _written(base, chosen)]
            continue
        with adaptor.bypassed():
            before = _written(base, chosen)
        after = _written(base, chosen)
        routes = adaptor.router.explain([passage.prompt for passage in chosen])
        yield rows, list(zip(before, after, routes, strict=True))


def _written(base: BaseModel, passages: Sequence[Passage]) -> list[Answer]:
    """What the model writes, as far as each target goes, and whether it then ends by itself or ends the line."""
    longest = max(len(passage.target) for passage in passages)
    answers = []
    for written, passage in zip(write_greedily(base, passages, longest + 1), passages, strict=True):
        length = len(passage.target)
        following = written[length : length + 1]
        line_end = base.tokenizer.decode(list(following)).startswith("\n")
        answers.append(Answer(written[:length], ended=following == (base.end_token,) or line_end))
    return answers


def _write(base: BaseModel, passages: list[Passage], tokens: int, batch_tokens: int) -> list[tuple[int, ...]]:
    """The base model's own greedy answers of `tokens` tokens."""
    answers: list[tuple[int, ...]] = [()] * len(passages)
    for rows in length_buckets([len(passage.read) for passage in passages], batch_tokens):
        for row, answer in zip(rows, write_greedily(base, [passages[row] for row in rows], tokens), strict=True):
            answers[row] = answer
    return answers


def _record(base: BaseModel, edits: Sequence[Edit], each: Measured, names: Sequence[str]) -> Record:
    item, decode = each.item, base.tokenizer.decode
    return Record(
        edit=edits[item.edit].id,
        name=item.name,
        kind=item.kind,
        prompt=item.prompt,
        expected=decode(list(each.expected)),
        before=decode(list(each.before.tokens)),
        after=decode(list(each.after.tokens)),
        token_accuracy_before=token_accuracy(each.before.tokens, each.expected),
        token_accuracy_after=token_accuracy(each.after.tokens, each.expected),
        nearest=names[each.route.nearest] if each.route.nearest >= 0 else None,
        route=each.route,
    )
