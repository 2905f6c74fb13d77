"""Where prompts went, and how the gate scored them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lemoe.adaptor.state import AdaptorState
from lemoe.data.edits import Edit
from lemoe.evaluation.evaluate import Record
from lemoe.evaluation.metrics import DEFINITIONS
from lemoe.report.scores import KIND_SHOWN
from lemoe.report.text import clean_text
from lemoe.routing.router import Explanation

Destination = Literal["own", "other", "relation", "subject"]
METRIC_NAMES = list(DEFINITIONS)
DESTINATIONS: tuple[Destination, ...] = ("own", "other", "relation", "subject")


@dataclass(frozen=True)
class Destinations:
    """How many probes of one kind went where: to an expert of their edit, to another's, or, the gate shut, to none.

    Attributes:
        counts: in the order of `DESTINATIONS`.
    """

    name: str
    kind: str
    counts: tuple[int, ...]

    @property
    def n(self) -> int:
        return sum(self.counts)

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(count / self.n for count in self.counts)


@dataclass(frozen=True)
class GateScores:
    """How the gate scored the probes of one metric.

    Attributes:
        values: of those that mention an edit's subject, by the gate's measure.
        unmentioned: how many mention none.
        opened: how many opened the gate.
    """

    name: str
    values: tuple[float, ...]
    unmentioned: int
    opened: int

    @property
    def n(self) -> int:
        return len(self.values) + self.unmentioned


@dataclass(frozen=True)
class Gate:
    """All scores by one measure, and its threshold, up to which the gate opens."""

    measure: str
    threshold: float
    scores: tuple[GateScores, ...]


@dataclass(frozen=True)
class GateMeasure:
    """What a gate opens up to `threshold` of: `conflict` of words, or `doubt` that the edit is asked for."""

    name: Literal["conflict", "doubt"]
    threshold: float

    @classmethod
    def of_state(cls, state: AdaptorState) -> "GateMeasure | None":
        """The measure of an adaptor's gate; None if it has no gate."""
        if not state.router.gated:
            return None
        if state.router.layer_read is not None:
            return cls("doubt", 1 - state.settings.gate_probability)
        return cls("conflict", state.settings.gate_conflict)

    def score(self, route: Explanation) -> float:
        """Of one route."""
        return route.conflict if self.name == "conflict" else 1 - route.probability


class OwnExperts:
    """Which experts each measured edit was taught to."""

    def __init__(self, state: AdaptorState | None, edits: Sequence[Edit]):
        """Of `edits` in `state`; without a state, none."""
        held = state.experts_by_edit if state else {}
        self._experts: Mapping[str, frozenset[int]] = {edit.id: held.get(edit.digest, frozenset()) for edit in edits}

    def find_destination(self, record: Record) -> Destination:
        """Where the prompt of a probe went."""
        if record.route.expert in self._experts.get(record.edit, frozenset()):
            return "own"
        if record.route.expert >= 0:
            return "other"
        return "relation" if record.route.scope == "relation" else "subject"


def count_destinations(records: Sequence[Record], own_experts: OwnExperts) -> tuple[Destinations, ...]:
    """Where the probes of each metric and kind went."""
    found: dict[tuple[str, str], list[Destination]] = {}
    for record in sorted(records, key=lambda record: METRIC_NAMES.index(record.name)):
        found.setdefault((record.name, record.kind), []).append(own_experts.find_destination(record))
    return tuple(
        Destinations(name, clean_text(kind, KIND_SHOWN), tuple(map(went.count, DESTINATIONS)))
        for (name, kind), went in found.items()
    )


def build_gate(records: Sequence[Record], measure: GateMeasure) -> Gate:
    """The gate's scores of the probes of each metric."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.name, []).append(record)
    scores = [
        GateScores(
            name=name,
            values=tuple(measure.score(record.route) for record in group if record.nearest is not None),
            unmentioned=sum(record.nearest is None for record in group),
            opened=sum(record.route.expert >= 0 for record in group),
        )
        for name, group in groups.items()
    ]
    return Gate(measure.name, measure.threshold, tuple(scores))
