"""Bars that figures must meet, so that a pipeline can stop on them: `reliability=0.99`, `locality/same_subject=0.8`."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lemoe.data.edits import Edit
from lemoe.errors import InputError
from lemoe.evaluation.metrics import DEFINITIONS, MEASURES, Decode, Direction, Metric

GRAMMAR = "METRIC[/KIND][:MEASURE]=NUMBER"


@dataclass(frozen=True)
class Bar:
    """What a figure must reach: at least `limit` where more is better, at most where less is."""

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
class Verdict:
    """A bar, the figure that it was held against (None if there was none), and whether it is met."""

    bar: Bar
    figure: Metric | None

    @property
    def met(self) -> bool:
        if self.figure is None or math.isnan(self.figure.value):
            return False
        if self.bar.better == "higher":
            return self.figure.value >= self.bar.limit
        return self.figure.value <= self.bar.limit


def read_bars(
    least: Iterable[str], most: Iterable[str], decode: Decode, *, edited: bool, given: Sequence[str] = ()
) -> tuple[Bar, ...]:
    """The bars of `--min` (`least`) and `--max` (`most`).

    Args:
        decode: how the run decodes; a measure that it does not give cannot be a bar.
        edited: whether there is an adaptor to measure.
        given: options among `--fluency` and `--texts` that are given.

    Raises:
        InputError: listing every bar that cannot be held: names that are not known (with the nearest right ones),
            numbers that are none, measures that the run does not give or that get better in the other direction.
    """
    bars: list[Bar] = []
    problems = []
    for option, texts in (("--min", least), ("--max", most)):
        for text in texts:
            try:
                bars.append(_bar(text, option, decode, edited, given))
            except ValueError as problem:
                problems.append(f"{option} {text}: {problem}")
    if problems:
        raise InputError.listing(f"{len(problems)} bar(s) cannot be held, nothing was measured", problems)
    return tuple(bars)


def _bar(text: str, option: str, decode: Decode, edited: bool, given: Sequence[str]) -> Bar:
    place, equals, number = text.partition("=")
    place, colon, measure = place.partition(":")
    name, slash, kind = place.partition("/")
    if not equals or (colon and not measure) or (slash and not kind):
        raise ValueError(f"expected {GRAMMAR}")
    limit = _number(number)
    definition = DEFINITIONS.get(name)
    if definition is None:
        raise ValueError(_unknown("metric", name, list(DEFINITIONS)))
    if measure and measure not in definition.measures:
        raise ValueError(_unknown(f"measure of {name}", measure, definition.measures))
    chosen = MEASURES[measure] if measure else definition.default(decode)
    if not definition.gives(chosen.name, decode):
        raise ValueError(f"{chosen.name} is measured under --decode {chosen.decode[0]}")
    if definition.needs and definition.needs not in given:
        raise ValueError(f"{name} is measured with {definition.needs}")
    if not edited and (name == "routing" or chosen.name == "unchanged"):
        raise ValueError("the base model alone has no such figure; give an --adaptor")
    if (option == "--min") != (chosen.better == "higher"):
        raise ValueError(f"{chosen.name} is better {chosen.better}; give it by {_option(chosen.better)}")
    return Bar(name, kind or "all", chosen.name, limit)


def _option(better: Direction) -> str:
    return "--min" if better == "higher" else "--max"


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not a number; expected {GRAMMAR}")
    return number


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"there is: {', '.join(known)}"
    return f"{name!r} is no {what}; {hint}"


def check_kinds(bars: Iterable[Bar], edits: Sequence[Edit], rounds: int = 0) -> None:
    """Refuse bars on kinds of probes that `edits` do not have, before anything is measured.

    Args:
        rounds: of the adaptor, each of which is a kind of routing's agreement.

    Raises:
        InputError: listing them, with the nearest kinds that are there.
    """
    there = _kinds(edits)
    there["routing"] = there["reliability"] | there["generality"] | there["locality"]
    there["routing"] |= {f"round {number}" for number in range(1, rounds + 1)}
    problems = [
        f"{bar}: " + _unknown(f"kind of {bar.name} in these edits", bar.kind, ["all", *sorted(there[bar.name])])
        for bar in bars
        if bar.kind not in there[bar.name] and (bar.kind != "all" or not there[bar.name])
    ]
    if problems:
        raise InputError.listing(f"{len(problems)} bar(s) cannot be held, nothing was measured", problems)


def _kinds(edits: Sequence[Edit]) -> dict[str, set[str]]:
    from lemoe.evaluation.evaluate import probes_of, tempts  # loads torch, which reading bars does not need

    kinds: dict[str, set[str]] = {name: set() for name in DEFINITIONS}
    kinds["fluency"], kinds["collapse"] = {"all"}, {"all"}
    for edit in edits:
        for name, probe in probes_of(edit):
            kinds[name].add(probe.kind)
            if tempts(edit, name, probe):
                kinds["overfit"].add(probe.kind)
    return kinds


def hold(bars: Iterable[Bar], metrics: Sequence[Metric], stage: str) -> tuple[Verdict, ...]:
    """Each bar against its figure at `stage`."""
    figures = {(m.name, m.kind, m.measure): m for m in metrics if m.stage == stage}
    return tuple(Verdict(bar, figures.get((bar.name, bar.kind, bar.measure))) for bar in bars)
