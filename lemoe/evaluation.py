"""Measuring an edited model against its base: reliability, generality, locality, portability, routing.

Every figure is over probes, before and after. Teacher forcing compares the most likely token at each target
position; greedy lets the model write. Locality is agreement with the base model's own predictions, never with a
gold answer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lemoe.adaptor import AdaptorState
from lemoe.edits import Edit, Probe
from lemoe.frozen import FrozenBatch, freeze
from lemoe.insertion import InsertedAdaptor
from lemoe.models import BaseModel
from lemoe.routing import Explanation
from lemoe.tokens import Batch, Passage, encode_all, length_buckets

UNROUTED = Explanation(-1, 0.0, scope="subject")

Decode = Literal["teacher", "greedy"]

OPEN_ANSWER_TOKENS = 8  # of the base model's own answer, where a locality probe names none


@dataclass(frozen=True)
class Metric:
    """One figure: the mean over `n` probes with its standard error (None for fewer than two)."""

    name: str
    kind: str
    measure: str
    decode: str
    stage: str
    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Record:
    """One probe: what was expected, what the model gave before and after, and why its prompt took its route.

    `before` and `after` hold the most likely token at each target position (teacher) or what was written (greedy).
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


@dataclass(frozen=True)
class Item:
    """One probe of one edit, with its tokens."""

    edit: int
    name: str
    kind: str
    prompt: str
    passage: Passage


@dataclass(frozen=True)
class Answers:
    """Predicted token ids of one item, and the route of its prompt."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    route: Explanation


OnProgress = Callable[[int, int], None]


def evaluate(
    base: BaseModel,
    state: AdaptorState | None,
    edits: Sequence[Edit],
    *,
    decode: Decode = "teacher",
    only: Sequence[str] | None = None,
    batch_tokens: int = 4096,
    on_progress: OnProgress = lambda done, of: None,
) -> EvalResult:
    """Measure `state` on the probes of `edits`; without a state, the base model alone.

    Args:
        decode: `teacher` or `greedy`.
        only: names of the metrics to measure; all by default.
        batch_tokens: padded tokens that run through the model at once.
        on_progress: called with probes done and their number.

    Raises:
        InputError: listing the probes that cannot be used with this model.
        AdaptorError: if the state belongs to another base model.
    """
    items = _items(base, edits, only, batch_tokens)
    run = _teacher if decode == "teacher" else _greedy
    answers: list[Answers | None] = [None] * len(items)
    done = 0
    for rows, given in run(base, state, [item.passage for item in items], batch_tokens):
        for row, answer in zip(rows, given, strict=True):
            answers[row] = answer
        done += len(rows)
        on_progress(done, len(items))
    complete = [answer for answer in answers if answer is not None]
    records = tuple(_record(base, edits, item, answer) for item, answer in zip(items, complete, strict=True))
    metrics = _metrics(items, complete, decode, edited=state is not None)
    if state is not None and not only:
        metrics += _routing(state, edits, items, complete)
    return EvalResult(tuple(metrics), records)


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
    return [
        Item(index, name, probe.kind, probe.prompt, passage)
        for (index, name, probe), passage in zip(probes, passages, strict=True)
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


Answered = Iterator[tuple[list[int], list[Answers]]]


@torch.no_grad()
def _teacher(base: BaseModel, state: AdaptorState | None, passages: list[Passage], batch_tokens: int) -> Answered:
    """Both stages from one frozen pass: the base's answers come with it, the edited ones from replaying its top."""
    layer = state.base.layer if state else len(base.layers) - 1
    adaptor = InsertedAdaptor(base, state) if state else None
    try:
        for rows in length_buckets([len(passage) for passage in passages], batch_tokens):
            batch = Batch.of(passages, rows, base.pad_token, base.device)
            if adaptor is None:
                frozen = freeze(base, base.site(layer), layer, batch)
                before = after = base.logits(frozen.base_hidden).argmax(-1)
                routes = [UNROUTED] * len(rows)
            else:
                with adaptor.bypassed():
                    frozen = freeze(base, adaptor.site, layer, batch)
                before = base.logits(frozen.base_hidden).argmax(-1)
                after = base.logits(frozen.replay(adaptor.delta_for(frozen))).argmax(-1)
                routes = adaptor.router.explain([passages[row].prompt for row in rows])
            yield rows, _split(frozen, before, after, routes)
    finally:
        if adaptor:
            adaptor.remove()


def _split(frozen: FrozenBatch, before: Tensor, after: Tensor, routes: Sequence[Explanation]) -> list[Answers]:
    counts = torch.bincount(frozen.batch.target_rows, minlength=len(frozen.batch.rows)).tolist()
    pairs = zip(before.split(counts), after.split(counts), routes, strict=True)
    return [Answers(tuple(b.tolist()), tuple(a.tolist()), route) for b, a, route in pairs]


def _greedy(base: BaseModel, state: AdaptorState | None, passages: list[Passage], batch_tokens: int) -> Answered:
    for rows in length_buckets([len(passage) for passage in passages], batch_tokens):
        chosen = [passages[row] for row in rows]
        longest = max(len(passage.target) for passage in chosen)
        before = _clipped(_generate(base, chosen, longest), chosen)
        if state is None:
            yield rows, [Answers(answer, answer, UNROUTED) for answer in before]
            continue
        with InsertedAdaptor(base, state) as adaptor:
            after = _clipped(_generate(base, chosen, longest), chosen)
            routes = adaptor.router.explain([passage.prompt for passage in chosen])
        triples = zip(before, after, routes, strict=True)
        yield rows, [Answers(b, a, route) for b, a, route in triples]


def _write(base: BaseModel, passages: list[Passage], tokens: int, batch_tokens: int) -> list[tuple[int, ...]]:
    """The base model's own greedy answers of `tokens` tokens."""
    answers: list[tuple[int, ...]] = [()] * len(passages)
    for rows in length_buckets([len(passage) for passage in passages], batch_tokens):
        for row, answer in zip(rows, _generate(base, [passages[row] for row in rows], tokens), strict=True):
            answers[row] = answer
    return answers


@torch.no_grad()
def _generate(base: BaseModel, passages: Sequence[Passage], tokens: int) -> list[tuple[int, ...]]:
    """Greedy answers of at most `tokens` tokens, up to and with the model's end token, prompts padded on the left."""
    width = max(len(passage.prompt) for passage in passages)
    ids = torch.full((len(passages), width), base.pad_token)
    mask = torch.zeros_like(ids)
    for row, passage in enumerate(passages):
        ids[row, width - len(passage.prompt) :] = torch.tensor(passage.prompt)
        mask[row, width - len(passage.prompt) :] = 1
    output = base.model.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=base.pad_token,
    )
    return [_until_end(tuple(row), base.end_token) for row in output[:, width:].tolist()]


def _clipped(answers: list[tuple[int, ...]], passages: Sequence[Passage]) -> list[tuple[int, ...]]:
    """As many tokens as each target has, so that a figure does not depend on what else was in the batch."""
    return [answer[: len(passage.target)] for answer, passage in zip(answers, passages, strict=True)]


def _until_end(tokens: tuple[int, ...], end: int) -> tuple[int, ...]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _expected(item: Item, answer: Answers) -> tuple[int, ...]:
    """Locality expects the base model's own tokens, everything else the target's."""
    return answer.before if item.name == "locality" else item.passage.target


def token_accuracy(given: Sequence[int], expected: Sequence[int]) -> float:
    """Share of the expected tokens that stand at their place in what was given."""
    return sum(g == e for g, e in zip(given, expected, strict=False)) / len(expected)


def _record(base: BaseModel, edits: Sequence[Edit], item: Item, answer: Answers) -> Record:
    expected = _expected(item, answer)
    return Record(
        edit=edits[item.edit].id,
        name=item.name,
        kind=item.kind,
        prompt=item.prompt,
        expected=base.tokenizer.decode(expected),
        before=base.tokenizer.decode(answer.before),
        after=base.tokenizer.decode(answer.after),
        token_accuracy_before=token_accuracy(answer.before, expected),
        token_accuracy_after=token_accuracy(answer.after, expected),
        route=answer.route,
    )


def _metrics(items: Sequence[Item], answers: Sequence[Answers], decode: Decode, *, edited: bool) -> list[Metric]:
    """Each name over all its probes, and by kind where there are several; token accuracy and exact match."""
    metrics = []
    for name in dict.fromkeys(item.name for item in items):
        chosen = [(item, answer) for item, answer in zip(items, answers, strict=True) if item.name == name]
        kinds = list(dict.fromkeys(item.kind for item, _ in chosen))
        for kind in ["all", *(kinds if len(kinds) > 1 else [])]:
            group = [(item, answer) for item, answer in chosen if kind in ("all", item.kind)]
            for stage in ("before", "after") if edited else ("before",):
                scores = [token_accuracy(getattr(a, stage), _expected(i, a)) for i, a in group]
                exact = [float(score == 1.0) for score in scores]
                metrics.append(_mean(name, kind, "token_accuracy", decode, stage, scores))
                metrics.append(_mean(name, kind, "exact_match", decode, stage, exact))
    return metrics


def _routing(
    state: AdaptorState, edits: Sequence[Edit], items: Sequence[Item], answers: Sequence[Answers]
) -> list[Metric]:
    """Routing consistency: does an edit's own prompt, now, reach the expert that it was taught to?"""
    homes = state.homes
    rounds = {digest: place for place, record in enumerate(state.rounds, 1) for digest in record.edits}
    hits: dict[int, list[float]] = {}
    for item, answer in zip(items, answers, strict=True):
        digest = edits[item.edit].digest
        if item.name == "reliability" and digest in homes:
            hits.setdefault(rounds[digest], []).append(float(answer.route.expert in homes[digest]))
    if not hits:
        return []
    everything = [hit for group in hits.values() for hit in group]
    each = [_mean("routing", f"round {place}", "agreement", "route", "after", hits[place]) for place in sorted(hits)]
    return [_mean("routing", "all", "agreement", "route", "after", everything), *each]


def _mean(name: str, kind: str, measure: str, decode: str, stage: str, scores: Sequence[float]) -> Metric:
    n = len(scores)
    mean = sum(scores) / n
    variance = sum((score - mean) ** 2 for score in scores) / (n - 1) if n > 1 else None
    stderr = None if variance is None else math.sqrt(variance / n)
    return Metric(name, kind, measure, decode, stage, mean, stderr, n)
