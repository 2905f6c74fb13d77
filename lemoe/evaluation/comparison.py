"""Methods side by side: the same edits in the same rounds, taught by each, measured by the same probes at the end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lemoe.base.embedded import Notify
from lemoe.base.loading import BaseLike, BaseModel, resolve_base
from lemoe.data.counting import edits_in_rounds
from lemoe.data.edits import Edit, Edits, resolve_edits
from lemoe.evaluation.evaluate import EvalOptions, Record, evaluate
from lemoe.evaluation.metrics import Decode, Metric
from lemoe.planning.plan import edits_by_round, plan
from lemoe.settings import Settings, resolve_settings
from lemoe.training.methods import check_installed
from lemoe.training.rounds import count_bytes, teach_rounds

MEASURED = ("reliability", "generality", "locality")


@dataclass(frozen=True)
class MethodResult:
    """One method's metrics.

    Attributes:
        settings: all of its settings, the method among them.
        learned, learned_exact: reliability (token accuracy, exact match) of each round when it had just been taught,
            mean over edits; what the reliability after the last round falls short of it was forgotten.
        metrics: reliability, generality and locality after the last round, over all edits.
        seconds_per_edit: of training alone.
        bytes_per_edit: of all that has to be kept beside the base, after the last round.
    """

    settings: Settings
    learned: float
    learned_exact: float
    metrics: tuple[Metric, ...]
    seconds_per_edit: float
    bytes_per_edit: float

    def value(self, name: str, measure: str = "token_accuracy") -> Metric | None:
        """The metric of that name after the last round, over all kinds; None where the edits have no such probes."""
        chosen = [m for m in self.metrics if (m.name, m.measure, m.kind) == (name, measure, "all")]
        return chosen[0] if chosen else None


@dataclass(frozen=True)
class Comparison:
    """Metrics of several methods, and the ids of each round's edits.

    Example:
        >>> import lemoe
        >>> compared = lemoe.compare("llama", "edits.jsonl", ["context"])
        >>> compared.edit_count, compared.methods[0].settings.method
        (3, 'context')
    """

    rounds: tuple[tuple[str, ...], ...]
    methods: tuple[MethodResult, ...]

    def __repr__(self) -> str:
        scores = {each.settings.method: each.value("reliability") for each in self.methods}
        shown = ", ".join(f"{name}={score.value:.3f}" for name, score in scores.items() if score is not None)
        return f"Comparison({edits_in_rounds(self.edit_count, len(self.rounds))}, reliability: {shown})"

    @property
    def edit_count(self) -> int:
        """How many were taught."""
        return sum(map(len, self.rounds))


def compare(
    base: BaseLike,
    edits: Edits,
    methods: Sequence[Settings | str],
    *,
    decode: Decode = "teacher",
    batch_tokens: int = 4096,
    notify: Notify = lambda stage: None,
) -> Comparison:
    """Teach `edits` by each of `methods`, in the rounds that the first of them plans, and measure what came of it.

    Args:
        base: or what `load_base` takes.
        edits: or their records, or the path of their file.
        methods: settings, or names of presets.
        decode: `teacher` or `greedy`.
        batch_tokens: padded tokens that run through the model at once, while measuring.
        notify: called with one line for each stage.

    Raises:
        InputError: listing the edits and probes that cannot be used with this model.
        LemoeError: if a method needs a package that is not installed, before anything is trained.

    Example:
        >>> import lemoe
        >>> compared = lemoe.compare(lemoe.load_base("llama"), "edits.jsonl", ["context", "rag"])
        >>> [each.settings.method for each in compared.methods]
        ['context', 'rag']
    """
    chosen = [resolve_settings(method) if isinstance(method, str) else method for method in methods]
    check_installed(chosen)
    edits, base = resolve_edits(edits), resolve_base(base)
    notify("planning")
    rounds = edits_by_round(plan(base, edits, chosen[0]), edits)
    compared = tuple(measure_method(base, rounds, settings, decode, batch_tokens, notify) for settings in chosen)
    return Comparison(tuple(tuple(edit.id for edit in members) for members in rounds), compared)


def measure_method(
    base: BaseModel,
    rounds: Sequence[Sequence[Edit]],
    settings: Settings,
    decode: Decode = "teacher",
    batch_tokens: int = 4096,
    notify: Notify = lambda stage: None,
) -> MethodResult:
    """Teach `rounds` by the method of `settings`, and measure each when it was taught and all at the end."""
    learned: list[Record] = []
    seconds, began = 0.0, time.monotonic()
    for number, edited in enumerate(teach_rounds(base, rounds, settings), 1):
        seconds += time.monotonic() - began
        notify(f"{settings.method}: round {number} of {len(rounds)} taught")
        fresh = rounds[number - 1]
        learned += evaluate(
            base, edited, fresh, EvalOptions(decode=decode, only=("reliability",), batch_tokens=batch_tokens)
        ).records
        began = time.monotonic()
    taught = [edit for members in rounds for edit in members]
    last = evaluate(base, edited, taught, EvalOptions(decode=decode, only=MEASURED, batch_tokens=batch_tokens))
    return MethodResult(
        settings=settings,
        learned=fmean(record.token_accuracy_after for record in learned),
        learned_exact=fmean(record.token_accuracy_after == 1.0 for record in learned),
        metrics=tuple(metric for metric in last.metrics if metric.stage == "after"),
        seconds_per_edit=seconds / len(taught),
        bytes_per_edit=count_bytes(edited) / len(taught),
    )
