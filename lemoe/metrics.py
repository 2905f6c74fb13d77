"""Figures from predictions: what each measure means, and its mean with a standard error.

| measure | of one probe |
|---|---|
| token_accuracy | share of the expected tokens that stand at their place |
| exact_match | 1 if all do |
| complete_match | 1 if the model writes the target and then ends (greedy) |
| loss | mean negative log-likelihood (nats) of the target's tokens (teacher) |
| perplexity | exp of the mean loss of all probes; the spread is the loss's |
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lemoe.routing import Explanation
from lemoe.tokens import Passage


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
class Answer:
    """What a model gives for a probe.

    Attributes:
        tokens: likeliest at each target position (teacher), or written (greedy), as many as the target has.
        loss: mean negative log-likelihood of the target's tokens, nats (teacher); None otherwise.
        ended: whether the model ended its answer right behind the target (greedy).
    """

    tokens: tuple[int, ...]
    loss: float | None = None
    ended: bool = False


@dataclass(frozen=True)
class Item:
    """One probe of one edit (by its place), with its tokens; `open`: its target is what the base itself writes."""

    edit: int
    name: str
    kind: str
    prompt: str
    passage: Passage
    open: bool = False


@dataclass(frozen=True)
class Measured:
    """A probe with the answers of both models, and the route of its prompt in the edited one."""

    item: Item
    before: Answer
    after: Answer
    route: Explanation

    @property
    def expected(self) -> tuple[int, ...]:
        """Locality expects the base model's own tokens, everything else the target's."""
        return self.before.tokens if self.item.name == "locality" else self.item.passage.target


def token_accuracy(given: Sequence[int], expected: Sequence[int]) -> float:
    """Share of the expected tokens that stand at their place in what was given."""
    return sum(g == e for g, e in zip(given, expected, strict=False)) / len(expected)


def summarise(measured: Sequence[Measured], decode: str, *, edited: bool) -> list[Metric]:
    """Each name over all its probes, and by kind, before and (if `edited`) after."""
    metrics = []
    for name in dict.fromkeys(each.item.name for each in measured):
        chosen = [each for each in measured if each.item.name == name]
        kinds = list(dict.fromkeys(each.item.kind for each in chosen))
        for kind in ["all", *kinds]:
            group = [each for each in chosen if kind in ("all", each.item.kind)]
            for stage in ("before", "after") if edited else ("before",):
                metrics += _figures(group, name, kind, decode, stage)
    return metrics


def _figures(group: Sequence[Measured], name: str, kind: str, decode: str, stage: str) -> list[Metric]:
    answers: list[Answer] = [getattr(each, stage) for each in group]
    scores = [token_accuracy(answer.tokens, each.expected) for answer, each in zip(answers, group, strict=True)]
    exact = [float(score == 1.0) for score in scores]
    figures = [
        mean(name, kind, "token_accuracy", decode, stage, scores),
        mean(name, kind, "exact_match", decode, stage, exact),
    ]
    if name == "locality":
        return figures
    if decode == "greedy":
        complete = [float(score == 1.0 and answer.ended) for score, answer in zip(scores, answers, strict=True)]
        return [*figures, mean(name, kind, "complete_match", decode, stage, complete)]
    losses = [answer.loss for answer in answers if answer.loss is not None]
    loss = mean(name, kind, "loss", decode, stage, losses)
    return [*figures, loss, replace(loss, measure="perplexity", value=math.exp(min(loss.value, 700.0)), stderr=None)]


def agreement(measured: Sequence[Measured], home: Callable[[Item], tuple[int, frozenset[int]] | None]) -> list[Metric]:
    """Routing consistency: does an edit's own prompt, now, reach the expert that it was taught to?

    `home` gives the round of an item's edit and the experts that hold it, or None for an edit that is not held.
    """
    hits: dict[int, list[float]] = {}
    for each in measured:
        found = home(each.item) if each.item.name == "reliability" else None
        if found is not None:
            hits.setdefault(found[0], []).append(float(each.route.expert in found[1]))
    if not hits:
        return []
    everything = [hit for group in hits.values() for hit in group]
    rounds = [mean("routing", f"round {place}", "agreement", "route", "after", hits[place]) for place in sorted(hits)]
    return [mean("routing", "all", "agreement", "route", "after", everything), *rounds]


def mean(name: str, kind: str, measure: str, decode: str, stage: str, scores: Sequence[float]) -> Metric:
    """The mean of `scores` with its standard error."""
    n = len(scores)
    value = sum(scores) / n
    variance = sum((score - value) ** 2 for score in scores) / (n - 1) if n > 1 else None
    stderr = None if variance is None else math.sqrt(variance / n)
    return Metric(name, kind, measure, decode, stage, value, stderr, n)
