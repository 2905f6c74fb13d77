"""Figures from answers and routes: the means that `lemoe.evaluation.metrics` defines."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lemoe.base.tokens import Passage
from lemoe.evaluation.metrics import Decode, Metric, mean
from lemoe.routing.router import Explanation


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
    """One probe of one edit, with its tokens.

    Attributes:
        edit: the edit's place.
        open: whether its target is what the base itself writes.
        rival_of: for an `overfit` item, the place of the item whose prompt it puts before the edit's own target.
    """

    edit: int
    name: str
    kind: str
    prompt: str
    passage: Passage
    open: bool = False
    rival_of: int | None = None


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

    def target_given(self, answer: Answer) -> float:
        """The probability of the whole target (teacher), or whether it was written (greedy)."""
        if answer.loss is None:
            return float(answer.tokens == self.item.passage.target)
        return math.exp(-answer.loss * len(self.item.passage.target))


def token_accuracy(given: Sequence[int], expected: Sequence[int]) -> float:
    """Share of the expected tokens that stand at their place in what was given."""
    return sum(g == e for g, e in zip(given, expected, strict=False)) / len(expected)


def summarise(measured: Sequence[Measured], decode: Decode, *, edited: bool) -> list[Metric]:
    """Each name over all its probes, and by kind, before and (if `edited`) after."""
    metrics = []
    for name in dict.fromkeys(each.item.name for each in measured):
        chosen = [each for each in measured if each.item.name == name]
        kinds = sorted({each.item.kind for each in chosen})
        for kind in ["all", *kinds]:
            group = [each for each in chosen if kind in ("all", each.item.kind)]
            for stage in ("before", "after") if edited else ("before",):
                figures = _overfit if name == "overfit" else _figures
                metrics += figures(group, name, kind, decode, stage)
    return metrics


def _answers(group: Sequence[Measured], stage: str) -> list[Answer]:
    return [each.before if stage == "before" else each.after for each in group]


def _figures(group: Sequence[Measured], name: str, kind: str, decode: Decode, stage: str) -> list[Metric]:
    answers = _answers(group, stage)
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
    return [*figures, *losses(name, kind, stage, [answer.loss for answer in answers if answer.loss is not None])]


def _overfit(group: Sequence[Measured], name: str, kind: str, decode: Decode, stage: str) -> list[Metric]:
    measure = "target_probability" if decode == "teacher" else "target_written"
    given = [each.target_given(answer) for each, answer in zip(group, _answers(group, stage), strict=True)]
    return [mean(name, kind, measure, decode, stage, given)]


def losses(name: str, kind: str, stage: str, values: Sequence[float]) -> list[Metric]:
    """Mean loss and perplexity."""
    loss = mean(name, kind, "loss", "teacher", stage, values)
    return [loss, replace(loss, measure="perplexity", value=math.exp(min(loss.value, 700.0)), stderr=None)]


Home = Callable[[Item], tuple[int, frozenset[int]] | None]


def routing(measured: Sequence[Measured], home: Home) -> list[Metric]:
    """Whether prompts reach the expert of their edit, and others none.

    `home` gives the round of an item's edit and the experts that hold it, or None for an edit that is not held.
    """
    hits: dict[tuple[str, str], list[float]] = {}
    opened: list[float] = []
    for each in measured:
        item, open_ = each.item, each.route.expert >= 0
        found = home(item)
        if item.name == "locality":
            _count(hits, "false_alarm", item.kind, open_)
            opened += [0.0] if open_ else []
        elif found is not None and item.name in ("reliability", "generality"):
            hit = each.route.expert in found[1]
            _count(hits, "recall", item.kind, hit)
            opened += [float(hit)] if open_ else []
            if item.name == "reliability":
                _count(hits, "agreement", f"round {found[0]}", hit)
    if opened:
        hits["precision", "all"] = opened
    return [mean("routing", kind, measure, "route", "after", scores) for (measure, kind), scores in _in_order(hits)]


def _count(hits: dict[tuple[str, str], list[float]], measure: str, kind: str, hit: bool) -> None:
    for place in (measure, "all"), (measure, kind):
        hits.setdefault(place, []).append(float(hit))


def _in_order(hits: dict[tuple[str, str], list[float]]) -> list[tuple[tuple[str, str], list[float]]]:
    """By measure, over all probes first, then by kind; rounds by number."""
    order = ("agreement", "recall", "precision", "false_alarm")

    def rank(entry: tuple[tuple[str, str], list[float]]) -> tuple[int, bool, int, str]:
        (measure, kind), _ = entry
        return order.index(measure), kind != "all", len(kind), kind

    return sorted(hits.items(), key=rank)


_WORDS = re.compile(r"\w+|[^\w\s]+")


def ngram_entropy(text: str) -> float:
    """Weighted mean of the entropies (bits) of a text's word bi- and trigrams, 2/3 and 4/3 (ROME, appendix).

    Low where a text repeats itself; 0 for a text too short to have any.
    """
    words = _WORDS.findall(text)
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = counts.total()
    return -math.fsum(count / total * math.log2(count / total) for count in counts.values())
