"""What is measured: every metric and every measure by name, with its version, direction, definition and source.

A value is of one metric (`reliability`), one kind of probe (`paraphrase`) and one measure (`exact_match`), under one
way of decoding, before or after editing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Direction = Literal["higher", "lower"]
Decode = Literal["teacher", "greedy"]

BOTH: tuple[Decode, ...] = ("teacher", "greedy")
ROME = "ROME (Meng et al., 2022)"


@dataclass(frozen=True)
class Measure:
    """How a probe, or a set of probes, becomes a number.

    Attributes:
        better: the direction in which it improves.
        decode: under which ways of decoding it is there.
    """

    name: str
    better: Direction
    definition: str
    decode: tuple[Decode, ...] = BOTH


@dataclass(frozen=True)
class MetricDefinition:
    """What a metric asks.

    Attributes:
        version: raised whenever the same predictions would give another value.
        measures: names of its measures; the first that a run has is the one that is meant where none is named.
        source: where the definition comes from.
        needs: the option of `lemoe eval` without which it is not measured; empty for none.
    """

    name: str
    version: int
    measures: tuple[str, ...]
    definition: str
    source: str
    needs: str = ""

    @property
    def better(self) -> Direction:
        """The direction of its first measure."""
        return MEASURES[self.measures[0]].better

    def has_measure(self, measure: str, decode: Decode) -> bool:
        """Whether a run has that measure; what needs an option is measured in its own way, however the run decodes."""
        return bool(self.needs) or decode in MEASURES[measure].decode

    def default_measure(self, decode: Decode) -> Measure:
        """The measure that is meant where none is named."""
        return next(MEASURES[name] for name in self.measures if self.has_measure(name, decode))


def _index_by_name(*measures: Measure) -> dict[str, Measure]:
    return {measure.name: measure for measure in measures}


MEASURES = _index_by_name(
    Measure("token_accuracy", "higher", "share of the expected tokens that are given at their position"),
    Measure("exact_match", "higher", "1 if all do, else 0"),
    Measure("complete_match", "higher", "1 if the model writes the target and then ends, else 0", ("greedy",)),
    Measure("loss", "lower", "mean negative log-likelihood of the target's tokens, nats", ("teacher",)),
    Measure("perplexity", "lower", "exp of the mean loss of all probes; it has no standard error", ("teacher",)),
    Measure("agreement", "higher", "1 if the edit's own prompt reaches the expert that it was taught to, else 0"),
    Measure("recall", "higher", "1 if the edit's own prompt, or a rephrase, reaches that expert, else 0"),
    Measure("precision", "higher", "of all these and locality prompts that open the gate: 1 if that expert is reached"),
    Measure("false_alarm", "lower", "1 if a locality prompt opens the gate, else 0"),
    Measure("target_probability", "lower", "probability of the edit's whole target behind the prompt", ("teacher",)),
    Measure("target_written", "lower", "1 if the model writes the edit's target there, else 0", ("greedy",)),
    Measure("ngram_entropy", "higher", "(2/3 H2 + 4/3 H3) / 2, entropies (bits) of the text's word bi- and trigrams"),
    Measure("unchanged", "higher", "1 if the text's loss is the base model's to the last bit, else 0"),
)

_ANSWERS = ("token_accuracy", "exact_match", "complete_match", "loss", "perplexity")

METRICS = (
    MetricDefinition(
        "reliability", 1, _ANSWERS, "the edit's own prompt gives its target", "MEND (Mitchell et al., 2022)"
    ),
    MetricDefinition(
        "generality", 1, _ANSWERS, "the question in other words, or behind a distracting text, gives it", ROME
    ),
    MetricDefinition(
        "locality",
        1,
        ("token_accuracy", "exact_match"),
        "on other prompts, the edited model predicts what the base model does; never compared with a gold answer",
        "MEND (Mitchell et al., 2022)",
    ),
    MetricDefinition(
        "portability",
        1,
        _ANSWERS,
        "questions that need the new fact, and other names of its subject, give their answer",
        "EasyEdit (Yao et al., 2023)",
    ),
    MetricDefinition(
        "routing",
        1,
        ("agreement", "recall", "precision", "false_alarm"),
        "prompts reach the expert of their edit, and others reach none",
        "LEMoE (Wang and Li, 2024), 4.3",
    ),
    MetricDefinition(
        "overfit",
        1,
        ("target_probability", "target_written"),
        "the edit's target is given where another answer is right: locality and portability prompts about its subject",
        "EVOKE (Zhang et al., 2024), direct probability",
    ),
    MetricDefinition(
        "fluency",
        1,
        ("ngram_entropy",),
        "what the model writes on, 100 tokens, greedy, its end token held back, does not repeat itself",
        f"{ROME}, generation entropy",
        needs="fluency",
    ),
    MetricDefinition(
        "collapse",
        1,
        ("perplexity", "loss", "unchanged"),
        "texts that editing must not touch are as likely as before",
        "Butterfly Effect (Yang et al., 2024), ME-PPL",
        needs="texts",
    ),
)

DEFINITIONS = {definition.name: definition for definition in METRICS}


@dataclass(frozen=True)
class Metric:
    """One measured value: the mean over `n` probes with its standard error (None for fewer than two)."""

    name: str
    kind: str
    measure: str
    decode: str
    stage: str
    value: float
    stderr: float | None
    n: int

    @property
    def version(self) -> int:
        """Of the metric's definition."""
        return DEFINITIONS[self.name].version

    @property
    def better(self) -> Direction:
        return MEASURES[self.measure].better


def mean_metric(name: str, kind: str, measure: str, decode: str, stage: str, scores: Sequence[float]) -> Metric:
    """The mean of `scores` with its standard error; summed exactly, so that their order changes no digit."""
    n = len(scores)
    value = math.fsum(scores) / n
    variance = math.fsum((score - value) ** 2 for score in scores) / (n - 1) if n > 1 else None
    stderr = None if variance is None else math.sqrt(variance / n)
    return Metric(name, kind, measure, decode, stage, value, stderr, n)
