"""Measuring an edited model against its base, on the probes of edits.

`lemoe.evaluation.metrics` says what each metric means. Every metric is a mean over probes, before and after editing.
Teacher forcing compares the most likely token at each target position; greedy decoding lets the model generate.
Locality is agreement with the base model's own predictions, never with a gold answer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.adaptor.state import AdaptorState
from lemoe.base.loading import BaseLike, BaseModel, resolve_base
from lemoe.base.matmul import use_onednn
from lemoe.base.tokens import Passage, encode_passages, refuse_texts
from lemoe.data.counting import format_count
from lemoe.data.edits import Edit, Edits, Probe, resolve_edits
from lemoe.errors import InputError
from lemoe.evaluation import answers
from lemoe.evaluation.metrics import Decode, Metric, mean_metric
from lemoe.evaluation.scoring import (
    EncodedProbe,
    FindOwnExperts,
    MeasuredProbe,
    ngram_entropy,
    score_losses,
    score_routing,
    summarise_probes,
    token_accuracy,
)
from lemoe.inference.generation import generate_answers
from lemoe.inference.insertion import InsertedAdaptor, insert
from lemoe.routing.router import Explanation
from lemoe.training.baselines.context import Context
from lemoe.training.baselines.weight_change import WeightChange

OPEN_ANSWER_TOKENS = 8  # of the base model's own answer, where a locality probe names none
FLUENCY_TOKENS = 100  # that the model writes on


@dataclass(frozen=True)
class Record:
    """One probe: what was expected, what the model gave before and after, and why its prompt took its route.

    `before` and `after` hold the most likely token at each target position (teacher) or what was written (greedy).
    `nearest` is the id of the edit that acted on the prompt or came nearest to it, None if no edit's subject was
    mentioned; `acted` has those that acted anywhere in the answer.
    `overfit_before` and `overfit_after` are the probe's share in metric `overfit`, None where it has none.
    """

    edit: str
    name: str
    kind: str
    prompt: str
    expected: str
    before: str
    after: str
    token_accuracy_before: float
    token_accuracy_after: float
    overfit_before: float | None
    overfit_after: float | None
    nearest: str | None
    acted: tuple[str, ...]
    route: Explanation


@dataclass(frozen=True)
class EvalResult:
    """All metrics, and one record for each probe.

    Example:
        >>> import lemoe
        >>> result = lemoe.evaluate("llama", "edits.lemoe", "edits.jsonl")
        >>> result.value("reliability") > result.value("reliability", stage="before")
        True
        >>> result.records[0].edit, result.records[0].name
        ('eiffel-tower-city', 'reliability')
    """

    metrics: tuple[Metric, ...]
    records: tuple[Record, ...]

    def __repr__(self) -> str:
        found = {m.name: m.value for m in reversed(self.metrics) if m.stage == "after" and m.kind == "all"}
        shown = [f"{name}={value:.3f}" for name, value in reversed(found.items())]
        return f"EvalResult({', '.join([*shown, f'records={len(self.records)}'])})"

    def value(self, name: str, measure: str = "token_accuracy", kind: str = "all", stage: str = "after") -> float:
        """The value of the metric of that name; NaN if there is none."""
        chosen = [m for m in self.metrics if (m.name, m.measure, m.kind, m.stage) == (name, measure, kind, stage)]
        return chosen[0].value if chosen else math.nan


OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvalOptions:
    """What is measured, and how.

    Attributes:
        decode: `teacher` or `greedy`.
        only: names of the metrics to measure on probes; all by default.
        texts: that editing must not touch, for metric `collapse`; each is read up to the model's context.
        fluency: let the model write on from each edit's generation prompts, else from its own; slow.
        batch_tokens: padded tokens that run through the model at once.
        expert_cache: bytes of experts that are kept in memory of an adaptor that is given as its file; see `insert`.
        allow_base_mismatch: measure an adaptor on a base that it was not made for, if its shapes fit.

    Example:
        >>> import lemoe
        >>> options = lemoe.EvalOptions(decode="greedy", only=("reliability",))
        >>> result = lemoe.evaluate("llama", "edits.lemoe", "edits.jsonl", options)
        >>> {metric.name for metric in result.metrics}
        {'reliability'}
    """

    decode: Decode = "teacher"
    only: Sequence[str] | None = None
    texts: Sequence[str] = ()
    fluency: bool = False
    batch_tokens: int = 4096
    expert_cache: int | None = None
    allow_base_mismatch: bool = False


def evaluate(
    base: BaseLike,
    edited: AdaptorState | AdaptorFile | WeightChange | Context | Path | str | None,
    edits: Edits,
    options: EvalOptions | None = None,
    *,
    on_progress: OnProgress = lambda done, of: None,
) -> EvalResult:
    """Measure an adaptor, or other weights, on the probes of `edits`; without either, the base model alone.

    Args:
        base: or what `load_base` takes.
        edited: an adaptor, or the path of one's file or run folder; or other weights, or what stands before prompts.
        edits: or their records, or the path of their file.
        options: what is measured, and how; all metrics of probes if None.
        on_progress: called with texts done and their number: probes, texts, and what is written for fluency.

    Raises:
        InputError: listing the probes and texts that cannot be used with this model.
        AdaptorError: if the state belongs to another base model.

    Example:
        >>> import lemoe
        >>> base = lemoe.load_base("llama")
        >>> result = lemoe.evaluate(base, "edits.lemoe", "edits.jsonl")
        >>> result.value("locality", kind="unrelated")
        1.0
    """
    options = options or EvalOptions()
    decode, batch_tokens = options.decode, options.batch_tokens
    if isinstance(edited, WeightChange | Context) and (options.texts or options.fluency):
        raise InputError("metrics collapse and fluency are measured on adaptors, not on baselines")
    edits = resolve_edits(edits)
    edited = AdaptorFile(edited) if isinstance(edited, Path | str) else edited
    base = resolve_base(base)
    untouched = _encode_texts(base, options.texts)
    prompts = _encode_generation_prompts(base, edits) if options.fluency else []
    with use_onednn(base.model):
        probes = _encode_probes(base, edits, options.only, batch_tokens)
    total = sum(probe.overfit_of is None for probe in probes) + len(untouched) + len(prompts)
    by_index: dict[int, MeasuredProbe] = {}
    done = 0
    adaptor = None
    if isinstance(edited, AdaptorState | AdaptorFile):
        adaptor = insert(
            base, edited, expert_cache=options.expert_cache, allow_base_mismatch=options.allow_base_mismatch
        )
    state = adaptor.state if adaptor else None
    with use_onednn(base.model), adaptor or nullcontext():
        if isinstance(edited, WeightChange):
            answered = answers.answer_changed_weights(base, edited, probes, decode, batch_tokens)
        elif isinstance(edited, Context):
            answered = _answer_in_context(base, edited, edits, probes, decode, batch_tokens)
        else:
            answered = answers.ANSWER_BY_DECODE[decode](base, adaptor, probes, batch_tokens)
        for rows, given in answered:
            for row, (before, after, route) in zip(rows, given, strict=True):
                by_index[row] = MeasuredProbe(probes[row], before, after, route)
            done += sum(probes[row].overfit_of is None for row in rows)
            on_progress(done, total)
        written = _measure_fluency(base, adaptor, prompts, batch_tokens) if prompts else []
        on_progress(total - len(untouched), total)
        read = _measure_collapse(base, adaptor, untouched) if untouched else []
        on_progress(total, total)
    measured = [by_index[row] for row in range(len(probes))]
    metrics = summarise_probes(measured, decode, edited=edited is not None)
    if state is not None and (options.only is None or "routing" in options.only):
        metrics += score_routing(measured, _make_expert_finder(state, edits))
    return EvalResult((*metrics, *written, *read), tuple(_make_records(base, state, edits, measured)))


def _make_expert_finder(state: AdaptorState, edits: Sequence[Edit]) -> FindOwnExperts:
    experts = state.experts_by_edit
    rounds = {digest: number for number, record in enumerate(state.rounds, 1) for digest in record.edits}

    def find_own_experts(probe: EncodedProbe) -> tuple[int, frozenset[int]] | None:
        digest = edits[probe.edit].digest
        return (rounds[digest], experts[digest]) if digest in experts else None

    return find_own_experts


def make_edit_lookup(state: AdaptorState) -> Callable[[Explanation, int], str]:
    """A function that gives the id of the edit for which an expert acted on a route, or came nearest to it.

    Where the route does not tell the edits of an expert apart, it is the first of them.
    """
    named, taught = state.edits, state.edits_by_expert

    def find_edit(route: Explanation, expert: int) -> str:
        told_apart = route.edit >= 0 and expert == route.nearest
        return named[route.edit].id if told_apart else taught[expert][0].id

    return find_edit


def _encode_probes(
    base: BaseModel, edits: Sequence[Edit], only: Sequence[str] | None, batch_tokens: int
) -> list[EncodedProbe]:
    probes = [
        (index, name, probe)
        for index, edit in enumerate(edits)
        for name, probe in list_probes(edit)
        if only is None or name in only
    ]
    overfit = [
        (row, Probe(probe.prompt, edits[index].target, probe.kind))
        for row, (index, name, probe) in enumerate(probes)
        if (only is None or "overfit" in only) and is_overfit_probe(edits[index], name, probe)
    ]
    asked = [*probes, *((probes[row][0], "overfit", tempting) for row, tempting in overfit)]
    texts = [(f"{name} of edit {edits[index].id}", probe.prompt, probe.target) for index, name, probe in asked]
    passages = encode_passages(base, texts)
    free = [row for row, passage in enumerate(passages) if not passage.target]
    prompts = [passages[row].prompt for row in free]
    for row, answer in zip(free, generate_answers(base, prompts, OPEN_ANSWER_TOKENS, batch_tokens), strict=True):
        passages[row] = Passage(passages[row].prompt, answer)
    overfit_of = [None] * len(probes) + [row for row, _ in overfit]
    base_written = frozenset(free)
    return [
        EncodedProbe(
            index, name, probe.kind, probe.prompt, passage, base_written=row in base_written, overfit_of=overfit_of[row]
        )
        for row, ((index, name, probe), passage) in enumerate(zip(asked, passages, strict=True))
    ]


def _answer_in_context(
    base: BaseModel,
    context: Context,
    edits: Sequence[Edit],
    probes: Sequence[EncodedProbe],
    decode: Decode,
    batch_tokens: int,
) -> answers.AnsweredRows:
    """The base's answers to the probes, and with what `context` puts in front of their prompts."""
    texts = [
        (f"{each.name} of edit {edits[each.edit].id}", context.complete(each.prompt, edits[each.edit]), None)
        for each in probes
    ]
    completed = [
        replace(each, passage=Passage(passage.prompt, each.passage.target))
        for each, passage in zip(probes, encode_passages(base, texts), strict=True)
    ]
    return answers.answer_changed_prompts(base, probes, completed, decode, batch_tokens)


def list_probes(edit: Edit) -> Iterator[tuple[str, Probe]]:
    """Every probe of an edit with the metric that it belongs to."""
    yield "reliability", Probe(edit.prompt, edit.target, "edit")
    for name, probes in (
        ("generality", edit.rephrases),
        ("locality", edit.locality),
        ("portability", edit.portability),
    ):
        for probe in probes:
            yield name, probe


def is_overfit_probe(edit: Edit, name: str, probe: Probe) -> bool:
    """Whether a probe belongs to metric `overfit` too: it is about the edit's subject, with another right answer."""
    if name not in ("locality", "portability") or _is_same_answer(probe.target or "", edit.target):
        return False
    mentioned = bool(edit.subject) and (edit.subject or "").casefold() in probe.prompt.casefold()
    return name == "portability" or probe.kind == "same_subject" or mentioned


def _is_same_answer(one: str, other: str) -> bool:
    return one.strip().casefold() == other.strip().casefold()


def _encode_generation_prompts(base: BaseModel, edits: Sequence[Edit]) -> list[tuple[int, ...]]:
    """Tokens of the distinct prompts to continue, cut on the left to leave room for the text."""
    asked = [(edit, prompt) for edit in edits for prompt in edit.generation or (edit.prompt,)]
    passages = encode_passages(base, [(f"generation prompt of edit {edit.id}", prompt, None) for edit, prompt in asked])
    room = None if base.max_length is None else max(1, base.max_length - FLUENCY_TOKENS)
    return sorted({passage.prompt[-room:] if room else passage.prompt for passage in passages})


def _measure_fluency(
    base: BaseModel, adaptor: InsertedAdaptor | None, prompts: Sequence[tuple[int, ...]], batch_tokens: int
) -> list[Metric]:
    metrics = []
    for stage in ("before", "after") if adaptor else ("before",):
        with adaptor.bypassed() if adaptor and stage == "before" else nullcontext():
            written = generate_answers(base, prompts, FLUENCY_TOKENS, batch_tokens, suppress_end=True)
        scores = [ngram_entropy(base.tokenizer.decode(list(tokens))) for tokens in written]
        metrics.append(mean_metric("fluency", "all", "ngram_entropy", "greedy", stage, scores))
    return metrics


def _encode_texts(base: BaseModel, texts: Iterable[str]) -> list[Passage]:
    """Texts as passages: all tokens but the first are to be predicted."""
    passages, problems = [], []
    for number, text in enumerate(texts, 1):
        tokens = tuple(base.tokenizer(text).input_ids)[: base.max_length]
        passages.append(Passage(tokens[:1], tokens[1:]))
        if len(tokens) < 2:
            problems.append(
                f"text {number}: {text[:60]!r} has {format_count(len(tokens), 'token')}; at least 2 are needed"
            )
    if problems:
        raise refuse_texts("text", problems)
    return passages


def _measure_collapse(base: BaseModel, adaptor: InsertedAdaptor | None, passages: Sequence[Passage]) -> list[Metric]:
    """Each text by itself in a plain pass of each model; nothing is inferred from the gate."""
    with adaptor.bypassed() if adaptor else nullcontext():
        before = [answers.compute_plain_loss(base, passage) for passage in passages]
    metrics = score_losses("collapse", "all", "before", before)
    if adaptor is None:
        return metrics
    after = [answers.compute_plain_loss(base, passage) for passage in passages]
    same = [float(one == other) for one, other in zip(before, after, strict=True)]
    unchanged = mean_metric("collapse", "all", "unchanged", "teacher", "after", same)
    return [*metrics, *score_losses("collapse", "all", "after", after), unchanged]


def _make_records(
    base: BaseModel, state: AdaptorState | None, edits: Sequence[Edit], measured: Sequence[MeasuredProbe]
) -> Iterator[Record]:
    find_edit = make_edit_lookup(state) if state else None
    decode = base.tokenizer.decode
    overfit = {each.probe.overfit_of: each for each in measured if each.probe.overfit_of is not None}
    for row, each in enumerate(measured):
        if each.probe.overfit_of is not None:
            continue
        tempting = overfit.get(row)
        yield Record(
            edit=edits[each.probe.edit].id,
            name=each.probe.name,
            kind=each.probe.kind,
            prompt=each.probe.prompt,
            expected=decode(list(each.expected)),
            before=decode(list(each.before.tokens)),
            after=decode(list(each.after.tokens)),
            token_accuracy_before=token_accuracy(each.before.tokens, each.expected),
            token_accuracy_after=token_accuracy(each.after.tokens, each.expected),
            overfit_before=tempting.target_probability(tempting.before) if tempting else None,
            overfit_after=tempting.target_probability(tempting.after) if tempting else None,
            nearest=find_edit(each.route, each.route.nearest) if find_edit and each.route.nearest >= 0 else None,
            acted=tuple(find_edit(each.route, expert) for expert in each.route.acted) if find_edit else (),
            route=each.route,
        )
