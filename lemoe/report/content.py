"""Everything that a report shows, computed from what was measured; how it looks is decided elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lemoe import __version__
from lemoe.adaptor.state import AdaptorState
from lemoe.base.loading import BaseModel
from lemoe.data.counting import edits_in_rounds, format_count
from lemoe.data.edits import Edit, digest_edits
from lemoe.evaluation.comparison import Comparison
from lemoe.evaluation.evaluate import EvalResult
from lemoe.evaluation.factors import Factors
from lemoe.evaluation.metrics import Decode
from lemoe.evaluation.sweep import Sweep
from lemoe.report.clusters import Clusters, build_clusters
from lemoe.report.failures import Failures, find_failures
from lemoe.report.rounds import Forgetting, RoundQuality, build_forgetting, round_numbers, score_rounds
from lemoe.report.routes import Destinations, Gate, GateMeasure, OwnExperts, build_gate, count_destinations
from lemoe.report.scores import MetricScores, group_scores
from lemoe.report.studies import MethodRow, OrderTable, SweepTable, make_method_rows, make_order_table, make_sweep_table
from lemoe.report.text import clean_text

DECODING = {
    "teacher": "teacher forcing: the likeliest token at each position of the target",
    "greedy": "greedy: what the model writes",
}


@dataclass(frozen=True)
class Fact:
    """A line on what was measured, and with what."""

    name: str
    value: str


@dataclass(frozen=True)
class Report:
    """What a report shows; a part that was not measured is empty, or None.

    Attributes:
        command: that measured.
        source: name of the edits.
        edited: whether there is an adaptor; else all metrics are of the base alone.
        rounds: those that have measured edits.
        forgetting, routed: reliability, and share of prompts that reach their edit's expert, round by round.
    """

    command: str
    source: str
    edited: bool
    facts: tuple[Fact, ...]
    settings: tuple[Fact, ...]
    metrics: tuple[MetricScores, ...]
    rounds: tuple[RoundQuality, ...]
    routes: tuple[Destinations, ...]
    gate: Gate | None
    clusters: Clusters | None
    failures: tuple[Failures, ...]
    forgetting: Forgetting | None
    routed: Forgetting | None
    orders: OrderTable | None
    methods: tuple[MethodRow, ...]
    sweep: SweepTable | None


def build_report(
    base: BaseModel,
    state: AdaptorState | None,
    edits: Sequence[Edit],
    result: EvalResult,
    *,
    source: str,
    command: str = "lemoe eval",
    decode: Decode = "teacher",
    factors: Factors | None = None,
    comparison: Comparison | None = None,
    sweep: Sweep | None = None,
) -> Report:
    """The report on `result`, which `lemoe.evaluate` gave for the same base, state, edits and `decode`.

    A result without metrics leaves the studies.

    Args:
        source: name of the edits, such as their file's.
        factors: the three factors of these edits, where they were measured.
        comparison: of methods on them, where it was made.
        sweep: of settings of one method, where it was made.
    """
    numbers = round_numbers(state, edits)
    own_experts = OwnExperts(state, edits)
    measure = GateMeasure.of_state(state) if state else None
    return Report(
        command=command,
        source=clean_text(source),
        edited=state is not None,
        facts=_list_facts(base, state, edits, decode),
        settings=_list_settings(state),
        metrics=group_scores(result.metrics),
        rounds=score_rounds(result, numbers, decode),
        routes=count_destinations(result.records, own_experts) if state else (),
        gate=None if measure is None else build_gate(result.records, measure),
        clusters=_cluster_rounds(base, edits, numbers),
        failures=find_failures(result.records, edits, own_experts, numbers, measure) if state else (),
        forgetting=build_forgetting(factors.forgetting) if factors else None,
        routed=build_forgetting(factors.routing) if factors and factors.routing else None,
        orders=make_order_table(factors) if factors and factors.orders else None,
        methods=make_method_rows(comparison) if comparison else (),
        sweep=make_sweep_table(sweep) if sweep else None,
    )


def _list_facts(base: BaseModel, state: AdaptorState | None, edits: Sequence[Edit], decode: Decode) -> tuple[Fact, ...]:
    facts = [
        Fact(
            "model",
            f"{clean_text(base.source.hub_id or base.source.shared_name)}, {str(base.dtype).removeprefix('torch.')}",
        )
    ]
    if state:
        taught = sum(len(record.edits) for record in state.rounds)
        facts += [
            Fact("adaptor", edits_in_rounds(taught, len(state.rounds))),
            Fact("method", f"{state.settings.method}, beside the FFN of layer {state.base.layer}"),
        ]
    facts += [
        Fact("measured", f"{format_count(len(edits), 'edit')}, SHA-256 {digest_edits(edits)[:12]}"),
        Fact("decoding", DECODING[decode]),
        Fact("written by", f"lemoe {__version__}"),
    ]
    return tuple(facts)


def _list_settings(state: AdaptorState | None) -> tuple[Fact, ...]:
    return (
        tuple(Fact(name, clean_text(str(value))) for name, value in state.settings.as_dict().items()) if state else ()
    )


def _cluster_rounds(base: BaseModel, edits: Sequence[Edit], numbers: Mapping[str, int]) -> Clusters | None:
    members: dict[int, list[Edit]] = {number: [] for number in sorted(set(numbers.values()))}
    for edit in edits:
        if edit.id in numbers:
            members[numbers[edit.id]].append(edit)
    return build_clusters(base, list(members.items())) if members else None
