"""The scores of a report: the headline of each metric, and all of its measures, before and after."""

from collections.abc import Sequence
from dataclasses import dataclass

from lemoe.evaluation.metrics import DEFINITIONS, MEASURES, Measure, Metric, MetricDefinition
from lemoe.report.text import clean_text

KIND_SHOWN = 60  # characters
UNBOUNDED = ("loss", "perplexity", "ngram_entropy")  # measures that are no share


@dataclass(frozen=True)
class Score:
    """One measure of one kind of probe, before and after; None where it was not measured."""

    name: str
    kind: str
    measure: str
    before: Metric | None
    after: Metric | None

    @property
    def last(self) -> Metric:
        """The value after editing, or of the base alone where nothing was edited."""
        chosen = self.after or self.before
        assert chosen is not None, "a score has a value"
        return chosen

    @property
    def n(self) -> int:
        return self.last.n

    @property
    def meaning(self) -> Measure:
        return MEASURES[self.measure]

    @property
    def is_share(self) -> bool:
        """Whether it lies between 0 and 1."""
        return self.measure not in UNBOUNDED


@dataclass(frozen=True)
class MetricScores:
    """All scores of one metric, its headline first among those over all kinds."""

    definition: MetricDefinition
    scores: tuple[Score, ...]

    @property
    def headline(self) -> Score:
        return self.scores[0]

    @property
    def exact(self) -> Score | None:
        """Exact match over all kinds, where the headline is another measure."""
        found = [score for score in self.scores[1:] if (score.kind, score.measure) == ("all", "exact_match")]
        return found[0] if found else None


def group_scores(metrics: Sequence[Metric]) -> tuple[MetricScores, ...]:
    """The scores by metric. A kind that is the only one of its metric is left out, as are single rounds."""
    stages: dict[tuple[str, str, str], dict[str, Metric]] = {}
    for metric in metrics:
        if not is_round(metric):
            stages.setdefault((metric.name, metric.kind, metric.measure), {})[metric.stage] = metric
    scores = [
        Score(name, clean_text(kind, KIND_SHOWN), measure, found.get("before"), found.get("after"))
        for (name, kind, measure), found in stages.items()
    ]
    return tuple(
        MetricScores(definition, tuple(_drop_only_kinds([score for score in scores if score.name == name])))
        for name, definition in DEFINITIONS.items()
        if any(score.name == name for score in scores)
    )


def is_round(metric: Metric) -> bool:
    """Whether it is of one round alone."""
    return metric.kind.startswith("round ")


def _drop_only_kinds(scores: Sequence[Score]) -> list[Score]:
    kinds: dict[str, set[str]] = {}
    for score in scores:
        kinds.setdefault(score.measure, set()).add(score.kind)
    return [score for score in scores if score.kind == "all" or len(kinds[score.measure]) > 2]
