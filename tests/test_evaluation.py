"""Metrics of `evaluate`, each against a recomputation by the model's own forward pass and `generate`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean, stdev

import pytest
import torch

import lemoe
from lemoe.errors import AdaptorError, InputError
from lemoe.evaluation.metrics import Decode

Answer = Sequence[int]


@pytest.fixture(scope="module")
def probed(facts: list[lemoe.Edit]) -> list[lemoe.Edit]:
    """The facts with rephrases, locality and portability."""
    return [
        replace(
            edit,
            rephrases=(lemoe.Probe(f"Tell me: {edit.prompt}", edit.target, "paraphrase"),),
            locality=(
                lemoe.Probe(f"Number {number} and the opposite of hot is", "cold", "unrelated"),
                lemoe.Probe(f"{edit.subject} is known for its", None, "same_subject"),
            ),
            portability=(lemoe.Probe(f"{edit.prompt}, so that the country is", "Italy", "reasoning"),) * (number % 2),
        )
        for number, edit in enumerate(facts)
    ]


def encode_probe(base: lemoe.BaseModel, prompt: str, target: str) -> tuple[list[int], list[int]]:
    start = base.tokenizer(prompt).input_ids
    return start, base.tokenizer(f"{prompt} {target}").input_ids[len(start) :]


def write_greedily(base: lemoe.BaseModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = base.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=base.pad_token_id,
    )
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def likeliest_tokens(
    base: lemoe.BaseModel, prompt: list[int], target: Answer, adaptor: lemoe.InsertedAdaptor | None
) -> list[int]:
    """The most likely token at each position of the target."""
    ids = torch.tensor([[*prompt, *target]])
    if adaptor is None:
        logits = base.model(ids).logits
    else:
        with adaptor.mark_prompts(len(prompt)):
            logits = base.model(ids).logits
    return logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


def token_accuracy(given: Answer, expected: Answer) -> float:
    return sum(g == e for g, e in zip(given, expected, strict=False)) / len(expected)


def probes_by_metric(edit: lemoe.Edit) -> dict[str, list[tuple[str, str | None]]]:
    return {
        "reliability": [(edit.prompt, edit.target)],
        "generality": [(probe.prompt, probe.target) for probe in edit.rephrases],
        "locality": [(probe.prompt, probe.target) for probe in edit.locality],
        "portability": [(probe.prompt, probe.target) for probe in edit.portability],
    }


def recompute_accuracies(
    base: lemoe.BaseModel, state: lemoe.AdaptorState, edits: Sequence[lemoe.Edit], name: str, decode: Decode
) -> list[tuple[float, float]]:
    """Token accuracy before and after, of each probe of the metric `name`, one forward pass at a time."""
    scores = []
    for prompt, target in (probe for edit in edits for probe in probes_by_metric(edit)[name]):
        start = base.tokenizer(prompt).input_ids
        wanted = encode_probe(base, prompt, target)[1] if target else write_greedily(base, start, 8)
        if decode == "teacher":
            before = likeliest_tokens(base, start, wanted, None)
            with lemoe.insert(base, state) as adaptor:
                after = likeliest_tokens(base, start, wanted, adaptor)
        else:
            before = write_greedily(base, start, len(wanted))
            with lemoe.insert(base, state):
                after = write_greedily(base, start, len(wanted))
        expected = before if name == "locality" else wanted
        scores.append((token_accuracy(before, expected), token_accuracy(after, expected)))
    return scores


@pytest.mark.parametrize("decode", ["teacher", "greedy"])
@pytest.mark.parametrize("name", ["reliability", "generality", "locality", "portability"])
def test_a_metric_is_what_the_model_itself_gives(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, probed: list[lemoe.Edit], name: str, decode: Decode
) -> None:
    result = lemoe.evaluate(base, trained, probed, lemoe.EvalOptions(decode=decode))
    scores = recompute_accuracies(base, trained, probed, name, decode)
    for column, stage in enumerate(("before", "after")):
        values = [score[column] for score in scores]
        assert result.value(name, stage=stage) == pytest.approx(mean(values))
        exact = mean(float(value == 1.0) for value in values)
        assert result.value(name, "exact_match", stage=stage) == pytest.approx(exact)


def test_reliability_is_full_once_the_targets_are_learned(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: Callable[..., lemoe.Settings]
) -> None:
    state = lemoe.train_round(base, facts[:3], paper(steps=80, width=32, learning_rate=2e-2))
    for decode in ("teacher", "greedy"):
        result = lemoe.evaluate(base, state, facts[:3], lemoe.EvalOptions(decode=decode))
        assert result.value("reliability", "exact_match", stage="before") == 0.0
        assert result.value("reliability", "exact_match") == 1.0


def test_locality_is_agreement_with_the_base_model_and_never_with_a_gold_answer(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, probed: list[lemoe.Edit]
) -> None:
    result = lemoe.evaluate(base, trained, probed)
    assert result.value("locality", stage="before") == 1.0
    records = [record for record in result.records if record.name == "locality"]
    assert all(record.expected == record.before for record in records)
    assert any(record.expected.strip() != "cold" for record in records)
    assert result.value("locality") < 1.0  # a router that always routes does disturb a random model


@pytest.mark.parametrize("decode", ["teacher", "greedy"])
def test_the_batch_size_changes_no_metric(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, probed: list[lemoe.Edit], decode: Decode
) -> None:
    small, large = (
        lemoe.evaluate(base, trained, probed, lemoe.EvalOptions(decode=decode, batch_tokens=count))
        for count in (1, 100_000)
    )
    assert small == large


def test_counts_and_standard_errors_are_over_probes(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, probed: list[lemoe.Edit]
) -> None:
    result = lemoe.evaluate(base, trained, probed)
    for name, count in {"reliability": 6, "generality": 6, "locality": 12, "portability": 3}.items():
        scores = [record.token_accuracy_after for record in result.records if record.name == name]
        (metric,) = [
            metric
            for metric in result.metrics
            if (metric.name, metric.measure, metric.kind, metric.stage) == (name, "token_accuracy", "all", "after")
        ]
        assert metric.n == len(scores) == count
        assert metric.value == pytest.approx(mean(scores))
        assert metric.stderr == pytest.approx(stdev(scores) / math.sqrt(count))


def test_one_probe_has_no_standard_error(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, facts: list[lemoe.Edit]
) -> None:
    assert all(metric.stderr is None for metric in lemoe.evaluate(base, trained, facts[:1]).metrics)


def test_kinds_of_probes_are_reported_apart_and_together(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, probed: list[lemoe.Edit]
) -> None:
    result = lemoe.evaluate(base, trained, probed)
    kinds = {metric.kind: metric.n for metric in result.metrics if metric.name == "locality"}
    assert kinds == {"all": 12, "unrelated": 6, "same_subject": 6}
    parts = [result.value("locality", kind=kind) for kind in ("unrelated", "same_subject")]
    assert result.value("locality") == pytest.approx(mean(parts))
    assert {metric.kind for metric in result.metrics if metric.name == "reliability"} == {"all", "edit"}


def test_a_record_has_the_prompt_the_expected_and_given_answers_and_the_expert_reached(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, probed: list[lemoe.Edit]
) -> None:
    result = lemoe.evaluate(base, trained, probed)
    assert len(result.records) == 27
    record = result.records[0]
    assert (record.edit, record.name, record.kind) == ("fact-0", "reliability", "edit")
    assert (record.prompt, record.expected) == (probed[0].prompt, " Rome")
    with lemoe.insert(base, trained) as adaptor:
        (route,) = adaptor.explain([base.tokenizer(record.prompt).input_ids])
        prompt, target = encode_probe(base, record.prompt, "Rome")
        assert record.after == base.tokenizer.decode(likeliest_tokens(base, prompt, target, adaptor))
    assert record.before == base.tokenizer.decode(likeliest_tokens(base, prompt, target, None))
    assert record.route.expert == route.expert
    assert record.route.weight == pytest.approx(route.weight, abs=1e-5)


def test_routing_counts_prompts_that_reach_the_expert_of_their_own_round(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, facts: list[lemoe.Edit]
) -> None:
    with lemoe.insert(base, trained) as adaptor:
        routes = adaptor.explain([base.tokenizer(edit.prompt).input_ids for edit in facts[:4]])
    hits = [float(route.expert == home) for route, home in zip(routes, (0, 0, 1, 1), strict=True)]
    metrics = {m.kind: m for m in lemoe.evaluate(base, trained, facts).metrics if m.measure == "agreement"}
    assert {kind: metric.n for kind, metric in metrics.items()} == {"all": 4, "round 1": 2, "round 2": 2}
    assert metrics["all"].value == mean(hits)
    assert metrics["round 2"].value == mean(hits[2:])


def test_the_base_alone_has_metrics_before_and_none_after(base: lemoe.BaseModel, probed: list[lemoe.Edit]) -> None:
    result = lemoe.evaluate(base, None, probed)
    assert {metric.stage for metric in result.metrics} == {"before"}
    assert math.isnan(result.value("reliability"))
    assert result.value("locality", stage="before") == 1.0
    assert {record.route.expert for record in result.records} == {-1}


def test_the_metrics_before_do_not_depend_on_the_adaptor(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, probed: list[lemoe.Edit]
) -> None:
    alone, edited = lemoe.evaluate(base, None, probed), lemoe.evaluate(base, trained, probed)
    assert [metric for metric in edited.metrics if metric.stage == "before"] == list(alone.metrics)


def test_only_the_metrics_that_are_asked_for_are_measured(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, probed: list[lemoe.Edit]
) -> None:
    result = lemoe.evaluate(base, trained, probed, lemoe.EvalOptions(only=("generality",)))
    assert {metric.name for metric in result.metrics} == {"generality"}
    assert result.value("generality") == lemoe.evaluate(base, trained, probed).value("generality")


def test_evaluation_leaves_the_base_as_it_was(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, probed: list[lemoe.Edit]
) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = base.model(ids).logits
    for decode in ("teacher", "greedy"):
        lemoe.evaluate(base, trained, probed, lemoe.EvalOptions(decode=decode))
    assert torch.equal(base.model(ids).logits, before)


def test_progress_ends_at_the_number_of_probes(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, probed: list[lemoe.Edit]
) -> None:
    seen: list[tuple[int, int]] = []
    lemoe.evaluate(base, trained, probed, on_progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (27, 27)
    assert seen == sorted(seen)


def test_probes_that_the_model_cannot_hold_are_all_named(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, facts: list[lemoe.Edit]
) -> None:
    long = lemoe.Probe("word " * 300, "x", "unrelated")
    edits = [replace(edit, locality=(long,)) for edit in facts[:2]]
    with pytest.raises(InputError, match=r"(?s)locality of edit fact-0: .*locality of edit fact-1: "):
        lemoe.evaluate(base, trained, edits)


def test_an_adaptor_of_another_base_cannot_be_measured(
    tiny: Callable[[str], lemoe.BaseModel], trained: lemoe.AdaptorState, facts: list[lemoe.Edit]
) -> None:
    with pytest.raises(AdaptorError, match="architecture"):
        lemoe.evaluate(tiny("gpt2"), trained, facts)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "neox"])
def test_metrics_of_other_families_are_what_the_model_itself_gives(
    tiny: Callable[[str], lemoe.BaseModel],
    edited: Callable[[str], lemoe.AdaptorState],
    probed: list[lemoe.Edit],
    family: str,
) -> None:
    base, state = tiny(family), edited(family)
    result = lemoe.evaluate(base, state, probed)
    for name in ("reliability", "locality"):
        scores = recompute_accuracies(base, state, probed, name, "teacher")
        assert result.value(name) == pytest.approx(mean(after for _, after in scores))
