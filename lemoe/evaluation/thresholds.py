"""Thresholds on metrics, at which a pipeline can stop: `reliability=0.99`, `locality/same_subject=0.8`."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lemoe.data.counting import format_count
from lemoe.data.edits import Edit
from lemoe.errors import InputError
from lemoe.evaluation.metrics import DEFINITIONS, MEASURES, Decode, Direction, Metric

GRAMMAR = "METRIC[/KIND][:MEASURE]=NUMBER"


@dataclass(frozen=True)
class Threshold:
    """What a metric must reach: at least `limit` where higher is better, at most where lower is."""

    name: str
    kind: str
    measure: str
    limit: float

    @property
    def better(self) -> Direction:
        return MEASURES[self.measure].better

    def __str__(self) -> str:
        return f"{self.name}/{self.kind}:{self.measure}"


@dataclass(frozen=True)
class ThresholdCheck:
    """A threshold, the metric that it is about (None if it was not measured), and whether it is met."""

    threshold: Threshold
    metric: Metric | None

    @property
    def met(self) -> bool:
        if self.metric is None or math.isnan(self.metric.value):
            return False
        if self.threshold.better == "higher":
            return self.metric.value >= self.threshold.limit
        return self.metric.value <= self.threshold.limit


def read_thresholds(
    least: Iterable[str], most: Iterable[str], decode: Decode, *, edited: bool, given: Sequence[str] = ()
) -> tuple[Threshold, ...]:
    """The thresholds below which (`least`) and above which (`most`) a metric must not be.

    Args:
        decode: how the run decodes; a measure that it does not give can have no threshold.
        edited: whether there is an adaptor to measure.
        given: those among `fluency` and `texts` that are measured.

    Raises:
        InputError: listing every threshold that cannot be checked: unknown names (with the nearest right ones),
            numbers that are none, measures that the run does not give or that get better in the other direction.
    """
    thresholds: list[Threshold] = []
    problems = []
    for option, texts in (("least", least), ("most", most)):
        for text in texts:
            try:
                thresholds.append(_parse_threshold(text, option, decode, edited, given))
            except ValueError as problem:
                problems.append(f"`{option}` {text}: {problem}")
    if problems:
        raise InputError.from_problems(
            f"{format_count(len(problems), 'threshold')} cannot be checked, nothing was measured", problems
        )
    return tuple(thresholds)


def _parse_threshold(text: str, option: str, decode: Decode, edited: bool, given: Sequence[str]) -> Threshold:
    what, equals, number = text.partition("=")
    what, colon, measure = what.partition(":")
    name, slash, kind = what.partition("/")
    if not equals or (colon and not measure) or (slash and not kind):
        raise ValueError(f"expected {GRAMMAR}")
    limit = _parse_number(number)
    definition = DEFINITIONS.get(name)
    if definition is None:
        raise ValueError(_describe_unknown("metric", name, list(DEFINITIONS)))
    if measure and measure not in definition.measures:
        raise ValueError(_describe_unknown(f"measure of {name}", measure, definition.measures))
    chosen = MEASURES[measure] if measure else definition.default_measure(decode)
    if not definition.has_measure(chosen.name, decode):
        raise ValueError(f"{chosen.name} is measured under `decode` {chosen.decode[0]}")
    if definition.needs and definition.needs not in given:
        raise ValueError(f"{name} is measured with `{definition.needs}`")
    if not edited and (name == "routing" or chosen.name == "unchanged"):
        raise ValueError("the base model alone has no such metric; give an `adaptor`")
    if (option == "least") != (chosen.better == "higher"):
        raise ValueError(f"{chosen.name} is better {chosen.better}; give it by `{_option_for(chosen.better)}`")
    return Threshold(name, kind or "all", chosen.name, limit)


def _option_for(better: Direction) -> str:
    return "least" if better == "higher" else "most"


def _parse_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not a number; expected {GRAMMAR}")
    return number


def _describe_unknown(what: str, name: str, known: Sequence[str]) -> str:
    closest = difflib.get_close_matches(name, known, 1, cutoff=0.4)
    hint = f"did you mean {closest[0]}?" if closest else f"there is: {', '.join(known)}"
    return f"{name!r} is no {what}; {hint}"


def check_kinds(
    thresholds: Iterable[Threshold], edits: Sequence[Edit], rounds: int = 0, *, made_up: bool = False
) -> None:
    """Refuse thresholds on kinds of probes that `edits` do not have, before anything is measured.

    Args:
        rounds: of the adaptor, each of which is a kind of routing's agreement.
        made_up: whether probes will be made up for edits that have none.

    Raises:
        InputError: listing them, with the nearest kinds that are there.
    """
    kinds = _list_kinds(edits, made_up=made_up)
    kinds["routing"] = kinds["reliability"] | kinds["generality"] | kinds["locality"]
    kinds["routing"] |= {f"round {number}" for number in range(1, rounds + 1)}
    problems = [
        f"{threshold}: {_describe_missing(threshold, sorted(kinds[threshold.name]))}"
        for threshold in thresholds
        if threshold.kind not in kinds[threshold.name] and (threshold.kind != "all" or not kinds[threshold.name])
    ]
    if problems:
        raise InputError.from_problems(
            f"{format_count(len(problems), 'threshold')} cannot be checked, nothing was measured", problems
        )


def _describe_missing(threshold: Threshold, kinds: Sequence[str]) -> str:
    if not kinds:
        return f"these edits have no probes of {threshold.name}"
    return _describe_unknown(f"kind of {threshold.name} in these edits", threshold.kind, ["all", *kinds])


def _list_kinds(edits: Sequence[Edit], *, made_up: bool) -> dict[str, set[str]]:
    from lemoe.evaluation.evaluate import (  # loads torch, which reading thresholds does not need
        is_overfit_probe,
        list_probes,
    )
    from lemoe.evaluation.made_up import MADE_UP, find_made_up

    kinds: dict[str, set[str]] = {name: set() for name in DEFINITIONS}
    kinds["fluency"], kinds["collapse"] = {"all"}, {"all"}
    for edit in edits:
        for name, probe in list_probes(edit):
            kinds[name].add(probe.kind)
            if is_overfit_probe(edit, name, probe):
                kinds["overfit"].add(probe.kind)
    for name in find_made_up(edits) if made_up else ():
        kinds[name].add(MADE_UP)
    return kinds


def check_thresholds(
    thresholds: Iterable[Threshold], metrics: Sequence[Metric], stage: str
) -> tuple[ThresholdCheck, ...]:
    """Each threshold with its metric at `stage`."""
    measured = {(m.name, m.kind, m.measure): m for m in metrics if m.stage == stage}
    return tuple(
        ThresholdCheck(threshold, measured.get((threshold.name, threshold.kind, threshold.measure)))
        for threshold in thresholds
    )
