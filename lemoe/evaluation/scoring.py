"""Scoring of answers and routes: the means that `lemoe.evaluation.metrics` defines."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lemoe.base.tokens import Passage
from lemoe.evaluation.metrics import Decode, Metric, mean_metric
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
class EncodedProbe:
    """One probe of one edit, with its tokens.

    Attributes:
        edit: the edit's index.
        base_written: whether its target is what the base itself generates.
        overfit_of: for an `overfit` probe, the index of the probe whose prompt it puts before the edit's own target.
    """

    edit: int
    name: str
    kind: str
    prompt: str
    passage: Passage
    base_written: bool = False
    overfit_of: int | None = None


@dataclass(frozen=True)
class MeasuredProbe:
    """A probe with the answers of both models, and the route of its prompt in the edited one."""

    probe: EncodedProbe
    before: Answer
    after: Answer
    route: Explanation

    @property
    def expected(self) -> tuple[int, ...]:
        """Locality expects the base model's own tokens, everything else the target's."""
        return self.before.tokens if self.probe.name == "locality" else self.probe.passage.target

    def target_probability(self, answer: Answer) -> float:
        """The probability of the whole target (teacher), or whether it was written (greedy)."""
        if answer.loss is None:
            return float(answer.tokens == self.probe.passage.target)
        return math.exp(-answer.loss * len(self.probe.passage.target))


def token_accuracy(given: Sequence[int], expected: Sequence[int]) -> float:
    """Share of the expected tokens that are given at their position."""
    return sum(g == e for g, e in zip(given, expected, strict=False)) / len(expected)


def summarise_probes(measured: Sequence[MeasuredProbe], decode: Decode, *, edited: bool) -> list[Metric]:
    """Each name over all its probes, and by kind, before and (if `edited`) after."""
    metrics = []
    for name in dict.fromkeys(each.probe.name for each in measured):
        chosen = [each for each in measured if each.probe.name == name]
        kinds = sorted({each.probe.kind for each in chosen})
        for kind in ["all", *kinds]:
            group = [each for each in chosen if kind in ("all", each.probe.kind)]
            for stage in ("before", "after") if edited else ("before",):
                score = _score_overfit if name == "overfit" else _score_answers
                metrics += score(group, name, kind, decode, stage)
    return metrics


def _select_answers(group: Sequence[MeasuredProbe], stage: str) -> list[Answer]:
    return [each.before if stage == "before" else each.after for each in group]


def _score_answers(group: Sequence[MeasuredProbe], name: str, kind: str, decode: Decode, stage: str) -> list[Metric]:
    answers = _select_answers(group, stage)
    scores = [token_accuracy(answer.tokens, each.expected) for answer, each in zip(answers, group, strict=True)]
    exact = [float(score == 1.0) for score in scores]
    metrics = [
        mean_metric(name, kind, "token_accuracy", decode, stage, scores),
        mean_metric(name, kind, "exact_match", decode, stage, exact),
    ]
    if name == "locality":
        return metrics
    if decode == "greedy":
        complete = [float(score == 1.0 and answer.ended) for score, answer in zip(scores, answers, strict=True)]
        return [*metrics, mean_metric(name, kind, "complete_match", decode, stage, complete)]
    return [*metrics, *score_losses(name, kind, stage, [answer.loss for answer in answers if answer.loss is not None])]


def _score_overfit(group: Sequence[MeasuredProbe], name: str, kind: str, decode: Decode, stage: str) -> list[Metric]:
    measure = "target_probability" if decode == "teacher" else "target_written"
    given = [each.target_probability(answer) for each, answer in zip(group, _select_answers(group, stage), strict=True)]
    return [mean_metric(name, kind, measure, decode, stage, given)]


def score_losses(name: str, kind: str, stage: str, values: Sequence[float]) -> list[Metric]:
    """Mean loss and perplexity."""
    loss = mean_metric(name, kind, "loss", "teacher", stage, values)
    return [loss, replace(loss, measure="perplexity", value=math.exp(min(loss.value, 700.0)), stderr=None)]


FindOwnExperts = Callable[[EncodedProbe], tuple[int, frozenset[int]] | None]


def score_routing(measured: Sequence[MeasuredProbe], find_own_experts: FindOwnExperts) -> list[Metric]:
    """Whether prompts reach the expert of their edit, and others none.

    `find_own_experts` gives the round of a probe's edit and the experts that were taught it, None for one that was not.
    """
    hits: dict[tuple[str, str], list[float]] = {}
    opened: list[float] = []
    for each in measured:
        probe, open_ = each.probe, each.route.expert >= 0
        found = find_own_experts(probe)
        if probe.name == "locality":
            _count_hit(hits, "false_alarm", probe.kind, open_)
            opened += [0.0] if open_ else []
        elif found is not None and probe.name in ("reliability", "generality"):
            hit = each.route.expert in found[1]
            _count_hit(hits, "recall", probe.kind, hit)
            opened += [float(hit)] if open_ else []
            if probe.name == "reliability":
                _count_hit(hits, "agreement", f"round {found[0]}", hit)
    if opened:
        hits["precision", "all"] = opened
    return [
        mean_metric("routing", kind, measure, "route", "after", scores) for (measure, kind), scores in _sort_hits(hits)
    ]


def _count_hit(hits: dict[tuple[str, str], list[float]], measure: str, kind: str, hit: bool) -> None:
    for key in (measure, "all"), (measure, kind):
        hits.setdefault(key, []).append(float(hit))


def _sort_hits(hits: dict[tuple[str, str], list[float]]) -> list[tuple[tuple[str, str], list[float]]]:
    """By measure, over all probes first, then by kind; rounds by number."""
    order = ("agreement", "recall", "precision", "false_alarm")

    def sort_key(entry: tuple[tuple[str, str], list[float]]) -> tuple[int, bool, int, str]:
        (measure, kind), _ = entry
        return order.index(measure), kind != "all", len(kind), kind

    return sorted(hits.items(), key=sort_key)


_WORDS = re.compile(r"\w+|[^\w\s]+")


def ngram_entropy(text: str) -> float:
    """Weighted mean of the entropies (bits) of a text's word bi- and trigrams, 2/3 and 4/3 (ROME, appendix).

    Low where a text repeats itself; 0 for a text too short to have any.
    """
    words = _WORDS.findall(text)
    return (2 / 3 * _entropy_of_ngrams(words, 2) + 4 / 3 * _entropy_of_ngrams(words, 3)) / 2


def _entropy_of_ngrams(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = counts.total()
    return -math.fsum(count / total * math.log2(count / total) for count in counts.values())
