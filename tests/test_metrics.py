"""Each metric of `evaluate` against a recomputation from its definition, and what never changes a metric."""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch

import lemoe
from lemoe.data.texts import read_texts
from lemoe.errors import InputError
from lemoe.evaluation.evaluate import EvalResult
from lemoe.evaluation.metrics import DEFINITIONS, MEASURES, METRICS, Decode
from lemoe.evaluation.scoring import ngram_entropy

REPOSITORY = Path(__file__).resolve().parents[1]
TEXTS = ("The weather over the lake was fine all week.", "A penguin is a bird.", "The Nile flows slowly " * 9)
SettingsOf = Callable[..., lemoe.Settings]


@pytest.fixture(scope="module")
def probed(facts: list[lemoe.Edit]) -> list[lemoe.Edit]:
    """The facts with probes of every kind."""
    return [
        replace(
            edit,
            rephrases=(
                lemoe.Probe(f"Tell me: {edit.prompt}", edit.target, "paraphrase"),
                lemoe.Probe(f"It rained in Oslo. {edit.prompt}", edit.target, "distracted"),
            ),
            locality=(
                lemoe.Probe(f"Number {number} and the opposite of hot is", "cold", "unrelated"),
                lemoe.Probe(edit.prompt.replace(edit.subject or "", "Berlin"), "old", "same_template"),
                lemoe.Probe(f"{edit.subject} is known for its", None, "same_subject"),
                lemoe.Probe(f"{edit.prompt}, which is not {number},", "new", "forgetfulness"),
            ),
            portability=(
                lemoe.Probe(f"{edit.prompt}, so that the country is", "Italy", "one_hop"),
                lemoe.Probe(edit.prompt, "nowhere", "reasoning"),
                lemoe.Probe(edit.prompt.replace("The", "That"), edit.target, "subject_alias"),
            ),
        )
        for number, edit in enumerate(facts)
    ]


@pytest.fixture(scope="module")
def anchored(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf) -> lemoe.AdaptorState:
    """Two rounds of preset `anchor`; the last fact is not taught."""
    parts = [lemoe.train_round(base, group, anchor(steps=60)) for group in (facts[:2], facts[2:5])]
    return lemoe.stack(parts)


@pytest.fixture(scope="module")
def result(base: lemoe.BaseModel, anchored: lemoe.AdaptorState, probed: list[lemoe.Edit]) -> EvalResult:
    return lemoe.evaluate(base, anchored, probed, lemoe.EvalOptions(texts=TEXTS, fluency=True))


@torch.no_grad()
def target_losses(base: lemoe.BaseModel, prompt: str, target: str) -> list[float]:
    """Negative log-likelihood of each token of the target, in one plain pass of the model as it is."""
    start = base.tokenizer(prompt).input_ids
    whole = base.tokenizer(f"{prompt} {target}").input_ids
    logits = base.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return [-float(logits[position - 1, whole[position]]) for position in range(len(start), len(whole))]


def overfit_probes(edit: lemoe.Edit) -> list[lemoe.Probe]:
    """Probes about the subject with another right answer, picked by hand from `probed`."""
    return [probe for probe in (*edit.locality, *edit.portability) if probe.kind in ABOUT_THE_SUBJECT]


ABOUT_THE_SUBJECT = ("same_subject", "forgetfulness", "one_hop", "reasoning")


def test_overfit_is_the_probability_of_the_edits_whole_target_where_another_answer_is_right(
    base: lemoe.BaseModel, anchored: lemoe.AdaptorState, probed: list[lemoe.Edit], result: EvalResult
) -> None:
    def probabilities(kinds: tuple[str, ...]) -> list[float]:
        asked = [(e, p) for e in probed for p in overfit_probes(e) if p.kind in kinds]
        return [math.exp(-sum(target_losses(base, probe.prompt, edit.target))) for edit, probe in asked]

    kinds = [("all", ABOUT_THE_SUBJECT), *((kind, (kind,)) for kind in ABOUT_THE_SUBJECT)]
    assert {m.kind for m in result.metrics if m.name == "overfit"} == {kind for kind, _ in kinds}
    for kind, group in kinds:
        before = mean(probabilities(group))
        with lemoe.insert(base, anchored):
            after = mean(probabilities(group))
        assert result.value("overfit", "target_probability", kind, "before") == pytest.approx(before, abs=1e-6)
        assert result.value("overfit", "target_probability", kind) == pytest.approx(after, abs=1e-6)
        assert after != before


def test_greedy_overfit_is_the_share_of_those_prompts_on_which_the_target_is_written(
    base: lemoe.BaseModel, anchored: lemoe.AdaptorState, probed: list[lemoe.Edit]
) -> None:
    measured = lemoe.evaluate(base, anchored, probed, lemoe.EvalOptions(decode="greedy"))
    with lemoe.insert(base, anchored):
        written = [
            lemoe.answer(base, probe.prompt, max_new_tokens=12).strip().startswith(edit.target)
            for edit in probed
            for probe in overfit_probes(edit)
        ]
    assert measured.value("overfit", "target_written") == mean(map(float, written)) > 0
    assert math.isnan(measured.value("overfit", "target_probability"))


def test_a_record_holds_its_probes_share_in_overfit(result: EvalResult, probed: list[lemoe.Edit]) -> None:
    shares = [record.overfit_after for record in result.records if record.overfit_after is not None]
    assert len(shares) == sum(len(overfit_probes(edit)) for edit in probed)
    assert mean(shares) == pytest.approx(result.value("overfit", "target_probability"))


def test_loss_and_perplexity_are_of_the_targets_tokens(
    base: lemoe.BaseModel, anchored: lemoe.AdaptorState, probed: list[lemoe.Edit], result: EvalResult
) -> None:
    for name in ("reliability", "generality", "portability"):
        asked = [
            (probe.prompt, probe.target or "")
            for edit in probed
            for probe in {
                "reliability": [lemoe.Probe(edit.prompt, edit.target, "")],
                "generality": edit.rephrases,
                "portability": edit.portability,
            }[name]
        ]
        before = mean(mean(target_losses(base, *each)) for each in asked)
        with lemoe.insert(base, anchored):
            after = mean(mean(target_losses(base, *each)) for each in asked)
        for stage, loss in (("before", before), ("after", after)):
            assert result.value(name, "loss", stage=stage) == pytest.approx(loss, abs=2e-6)
            assert result.value(name, "perplexity", stage=stage) == pytest.approx(math.exp(loss), rel=2e-6)


def test_the_gates_recall_and_precision_follow_from_the_records(
    anchored: lemoe.AdaptorState, probed: list[lemoe.Edit], result: EvalResult
) -> None:
    own_experts = {edit.id: anchored.experts_by_edit.get(edit.digest) for edit in probed}
    inside = [
        record.route.expert in (own_experts[record.edit] or ())
        for record in result.records
        if record.name in ("reliability", "generality") and own_experts[record.edit]
    ]
    outside = [record.route.expert >= 0 for record in result.records if record.name == "locality"]
    opened = [
        record.route.expert in (own_experts[record.edit] or ())
        for record in result.records
        if (record.name in ("reliability", "generality") and own_experts[record.edit] and record.route.expert >= 0)
    ]
    right = sum(opened)
    assert result.value("routing", "recall") == mean(map(float, inside))
    assert result.value("routing", "false_alarm") == mean(map(float, outside)) > 0
    assert result.value("routing", "precision") == right / (len(opened) + sum(outside))
    assert result.value("routing", "false_alarm", "unrelated") == 0
    counts = {(m.measure, m.kind): m.n for m in result.metrics if m.name == "routing"}
    assert counts["recall", "all"] == 15
    assert counts["recall", "distracted"] == counts["agreement", "all"] == 5
    assert counts["agreement", "round 2"] == 3


def test_texts_that_open_no_gate_are_as_likely_as_before_to_the_last_bit(
    base: lemoe.BaseModel, anchored: lemoe.AdaptorState, probed: list[lemoe.Edit]
) -> None:
    apart = lemoe.evaluate(base, anchored, probed[:1], lemoe.EvalOptions(texts=TEXTS[:2]))
    assert apart.value("collapse", "loss") == apart.value("collapse", "loss", stage="before")
    assert apart.value("collapse", "unchanged") == 1.0


def test_collapse_is_the_perplexity_of_texts_after_their_first_token(
    base: lemoe.BaseModel, anchored: lemoe.AdaptorState, result: EvalResult
) -> None:
    def loss(text: str) -> float:
        ids = torch.tensor([base.tokenizer(text).input_ids])
        logits = base.model(ids).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    before = [loss(text) for text in TEXTS]
    with lemoe.insert(base, anchored):
        after = [loss(text) for text in TEXTS]
    assert result.value("collapse", "perplexity", stage="before") == pytest.approx(math.exp(mean(before)), rel=1e-5)
    assert result.value("collapse", "perplexity") == pytest.approx(math.exp(mean(after)), rel=1e-5)
    assert result.value("collapse", "unchanged") == mean(float(a == b) for a, b in zip(after, before, strict=True))
    assert after[2] != before[2]  # its text is about an edited subject


def test_fluency_is_the_weighted_entropy_of_bigrams_and_trigrams_that_the_model_writes(
    base: lemoe.BaseModel, anchored: lemoe.AdaptorState, probed: list[lemoe.Edit], result: EvalResult
) -> None:
    def entropy(text: str) -> float:
        words = re.findall(r"\w+|[^\w\s]+", text)
        total = 0.0
        for n, weight in ((2, 2 / 3), (3, 4 / 3)):
            grams = Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
            shares = torch.tensor([float(count) for count in grams.values()], dtype=torch.float64)
            shares = shares / shares.sum()
            total += weight * float(-(shares * shares.log2()).sum())
        return total / 2

    def written(prompt: str) -> str:
        ids = torch.tensor([base.tokenizer(prompt).input_ids[-28:]])  # of 128 tokens that the model can hold
        output = base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=100,
            min_new_tokens=100,
            do_sample=False,
            pad_token_id=0,
        )
        return str(base.tokenizer.decode(output[0, ids.shape[1] :]))

    with lemoe.insert(base, anchored):
        expected = mean(entropy(written(edit.prompt)) for edit in probed)
    assert result.value("fluency", "ngram_entropy") == pytest.approx(expected, abs=1e-6)
    assert ngram_entropy("a b c d") > ngram_entropy("a a a a") == 0.0 == ngram_entropy("")


def test_an_edits_generation_prompts_are_written_on_from(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    edits = [replace(facts[0], generation=("The Nile", "The Nile", "Rome and"))]
    (metric,) = [
        m for m in lemoe.evaluate(base, None, edits, lemoe.EvalOptions(fluency=True)).metrics if m.name == "fluency"
    ]
    assert (metric.n, metric.stage) == (2, "before")


@pytest.mark.parametrize("decode", ["teacher", "greedy"])
@pytest.mark.parametrize("method", ["anchor", "paper"])
def test_neither_batch_size_nor_order_nor_padding_side_changes_a_metric_in_its_last_digit(
    base: lemoe.BaseModel,
    trained: lemoe.AdaptorState,
    anchored: lemoe.AdaptorState,
    probed: list[lemoe.Edit],
    method: str,
    decode: Decode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = anchored if method == "anchor" else trained
    expected = lemoe.evaluate(base, state, probed, lemoe.EvalOptions(decode=decode, texts=TEXTS[:1]))
    for tokens in (1, 90):
        assert (
            lemoe.evaluate(base, state, probed, lemoe.EvalOptions(decode=decode, texts=TEXTS[:1], batch_tokens=tokens))
            == expected
        )
    monkeypatch.setattr(base.tokenizer, "padding_side", {"left": "right", "right": "left"}[base.tokenizer.padding_side])
    mixed = random.Random(1).sample(probed, len(probed))
    assert index_metrics(
        lemoe.evaluate(base, state, mixed, lemoe.EvalOptions(decode=decode, texts=TEXTS[:1]))
    ) == index_metrics(expected)


def index_metrics(result: EvalResult) -> dict[tuple[str, str, str, str], tuple[float, float | None, int]]:
    return {(m.name, m.kind, m.measure, m.stage): (m.value, m.stderr, m.n) for m in result.metrics}


def test_a_probes_record_does_not_depend_on_what_else_is_measured(
    base: lemoe.BaseModel, anchored: lemoe.AdaptorState, probed: list[lemoe.Edit], result: EvalResult
) -> None:
    alone = lemoe.evaluate(base, anchored, probed[2:3]).records
    assert list(alone) == [record for record in result.records if record.edit == probed[2].id]


def test_the_type_in_which_an_adaptor_is_stored_changes_no_metric(
    base: lemoe.BaseModel, anchored: lemoe.AdaptorState, probed: list[lemoe.Edit], tmp_path: Path
) -> None:
    halved = replace(anchored, experts=anchored.experts.to_dtype(torch.bfloat16))
    widened = replace(halved, experts=halved.experts.to_dtype(torch.float32))
    results = []
    for name, state in (("half", halved), ("full", widened)):
        lemoe.save_adaptor(state, tmp_path / name)
        results.append(lemoe.evaluate(base, lemoe.load_adaptor(tmp_path / name), probed))
    assert results[0] == results[1]
    assert (tmp_path / "half").stat().st_size < (tmp_path / "full").stat().st_size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_the_device_changes_no_share(
    tiny_folder: Callable[[str], Path], anchored: lemoe.AdaptorState, probed: list[lemoe.Edit]
) -> None:
    one, other = (
        lemoe.evaluate(lemoe.load_base(str(tiny_folder("llama")), device=device, dtype="float32"), anchored, probed)
        for device in ("cpu", "cuda")
    )
    for left, right in zip(one.metrics, other.metrics, strict=True):
        assert left.value == pytest.approx(right.value, rel=1e-4)


def test_every_value_is_of_a_registered_metric_and_measure(result: EvalResult) -> None:
    for metric in result.metrics:
        assert metric.measure in DEFINITIONS[metric.name].measures
        assert metric.better == MEASURES[metric.measure].better
        assert metric.version == DEFINITIONS[metric.name].version
    assert {metric.name for metric in result.metrics} == set(DEFINITIONS)


def test_the_page_on_evaluation_lists_every_metric_as_the_registry_has_it() -> None:
    page = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for metric in METRICS:
        row = (
            f"| {metric.name} | {metric.version} | {metric.measures[0]} | {metric.better} "
            f"| {metric.definition} | {metric.source} |"
        )
        assert row in page
    for measure in MEASURES.values():
        assert f"| {measure.name} | {measure.better} | {measure.definition} |" in page


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.json", json.dumps([{"Corpus": "C4", "Text": "One."}, {"text": "Two."}, "Three."])),
        ("texts.jsonl", '{"text": "One."}\n"Two."\n{"Text": "Three."}\n'),
        ("texts.txt", "One.\n\nTwo.\nThree.\n"),
    ],
)
def test_texts_are_read_from_json_json_lines_and_plain_lines(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read_texts(tmp_path / name) == ["One.", "Two.", "Three."]


@pytest.mark.parametrize(("content", "said"), [("[]", "no texts"), ('[{"x": 1}]', "record 1: expected a text")])
def test_a_file_without_texts_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "texts.json").write_text(content)
    with pytest.raises(InputError, match=said):
        read_texts(tmp_path / "texts.json")


def test_texts_too_short_to_predict_anything_are_named(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    with pytest.raises(InputError, match="text 2: 'x' has 1 token"):
        lemoe.evaluate(base, None, facts, lemoe.EvalOptions(texts=("The Nile", "x")))
