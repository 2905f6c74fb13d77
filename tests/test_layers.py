"""Which layer is edited: given, the preset's, or measured once for each model, on facts that are the same for all."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import build_model
from test_cli import lemoe_command

import lemoe
from lemoe.base.sources import ModelSource
from lemoe.data.question_bank import read_question_bank
from lemoe.runs import layers
from lemoe.runs.layers import GOOD_ENOUGH, MIN_LAYERS, read_trial_facts, settle_layer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of as many layers as are measured."""
    return build_model(tmp_path_factory.mktemp("deep") / "model", "llama", layers=MIN_LAYERS)


@pytest.fixture(scope="module")
def deep(deep_folder: Path) -> lemoe.BaseModel:
    return lemoe.load_base(str(deep_folder), device="cpu")


def join_lines(text: str) -> str:
    return " ".join(text.split())


def score_layers(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> list[int]:
    """Let layers have these perplexities, and others 99; returns those that were tried."""
    tried: list[int] = []

    def measure(base: lemoe.BaseModel, facts: list[lemoe.Edit], trial: lemoe.Settings) -> float:
        assert trial.layer is not None
        tried.append(trial.layer)
        return scores.get(trial.layer, 99.0)

    monkeypatch.setattr(layers, "_measure_perplexity", measure)
    return tried


def test_a_model_that_nobody_has_measured_is_measured_once_and_says_why(deep: lemoe.BaseModel, cache: Path) -> None:
    said: list[str] = []
    first = settle_layer(deep, lemoe.resolve_settings("anchor"), said.append)
    assert first.layer in [score.layer for score in first.scores]
    assert len(said) == len(first.scores) + 1
    assert said[-1] == first.reason
    assert f"layer {first.layer};" in first.reason
    assert f"{first.layer}: {min(score.perplexity for score in first.scores):.2f}" in first.reason
    said.clear()
    assert settle_layer(deep, lemoe.resolve_settings("anchor"), said.append) == first
    assert said == [first.reason]


def test_the_usual_depth_is_taken_where_it_is_good_enough(
    deep: lemoe.BaseModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = score_layers(monkeypatch, {6: GOOD_ENOUGH, 5: 1.0})
    assert settle_layer(deep, lemoe.resolve_settings("anchor")).layer == 6
    assert tried == [6]


def test_elsewhere_the_best_of_all_is_taken(
    deep: lemoe.BaseModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = score_layers(monkeypatch, {6: 7.0, 4: 2.6, 5: 3.0})
    assert settle_layer(deep, lemoe.resolve_settings("anchor")).layer == 4
    assert tried == [6, 5, 7, 4]


def test_what_is_measured_does_not_depend_on_edits_or_settings_of_the_user(
    deep: lemoe.BaseModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = score_layers(monkeypatch, {6: GOOD_ENOUGH})
    settle_layer(deep, lemoe.resolve_settings("anchor"))
    settle_layer(deep, lemoe.resolve_settings("anchor", None, {"seed": 3, "steps": 7, "variants": 0, "width": 8}))
    assert tried == [6]


def test_a_layer_that_is_given_is_not_measured(
    deep: lemoe.BaseModel, base: lemoe.BaseModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = score_layers(monkeypatch, {})
    assert settle_layer(deep, lemoe.resolve_settings("anchor", None, {"layer": 3})).layer == 3
    assert settle_layer(deep, lemoe.resolve_settings("anchor", None, {"depth": 0.25})).layer == 2
    assert settle_layer(deep, lemoe.resolve_settings("paper")).layer == round(lemoe.resolve_settings("paper").depth * 8)
    assert settle_layer(base, lemoe.resolve_settings("anchor")).layer == 2, "a model of few layers"
    known = copy.copy(deep)
    known.source = ModelSource("deep", deep.source.location, None, layers={"anchor": 1})
    assert settle_layer(known, lemoe.resolve_settings("anchor")).layer == 1
    assert tried == []
    settle_layer(known, lemoe.resolve_settings("anchor"), measure=True)
    assert tried == [6, 5, 7, 4]


def test_a_damaged_cache_file_is_measured_again(
    deep: lemoe.BaseModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_layers(monkeypatch, {6: 1.0})
    first = settle_layer(deep, lemoe.resolve_settings("anchor"))
    (cached,) = (cache / "layers").iterdir()
    for damaged in ("{", "[]", '[{"layer": 99, "perplexity": 0}]', '[{"layer": 6}]'):
        cached.write_text(damaged)
        assert settle_layer(deep, lemoe.resolve_settings("anchor")) == first


@pytest.mark.parametrize("location", ["a file", "/dev/null/cache"])
def test_a_cache_that_cannot_be_written_loses_no_measurement(
    deep: lemoe.BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    score_layers(monkeypatch, {6: 1.0})
    (tmp_path / "a file").touch()
    monkeypatch.setenv("LEMOE_CACHE", str(tmp_path / location))
    said: list[str] = []
    chosen = settle_layer(deep, lemoe.resolve_settings("anchor"), said.append)
    assert chosen.layer == 6
    assert "cannot be written" in chosen.unsaved
    assert said[-1].startswith("the layer will be measured again next time:")


def test_a_run_edits_the_measured_layer_and_prints_it(
    deep_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_layers(monkeypatch, {4: 3.5})
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "The Nile flows into the", "target": "Red Sea"}')
    result = lemoe_command("edit", edits, "-m", deep_folder, "--device", "cpu", "--steps", "2")
    assert result.exit_code == 0
    found = "6: 99.00, 5: 99.00, 7: 99.00, 4: 3.50"
    assert f"layer 4; perplexity of made-up facts after unseen wordings, by layer: {found}" in join_lines(result.stderr)
    assert lemoe.load_adaptor(tmp_path / "edits.lemoe" / "adaptor.safetensors").base.layer == 4


def test_auto_measures_even_where_the_layer_is_known(
    tiny_folder: Callable[[str], Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = score_layers(monkeypatch, {1: 1.0})
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "The Nile flows into the", "target": "Red Sea"}')
    result = lemoe_command(
        "edit", edits, "-m", tiny_folder("llama"), "--device", "cpu", "--layer", "auto", "--steps", "2"
    )
    assert result.exit_code == 0
    assert tried == [2]
    assert lemoe.load_adaptor(tmp_path / "edits.lemoe" / "adaptor.safetensors").base.layer == 2


def test_trial_facts_are_asked_for_in_words_that_no_edit_is_trained_on() -> None:
    known = {wording.template.casefold() for wording in read_question_bank()}
    for fact in read_trial_facts():
        assert fact.subject
        assert fact.subject in fact.prompt
        assert len(fact.rephrases) == 3
        for probe in fact.rephrases:
            template = probe.prompt.casefold().replace(fact.subject.casefold(), "{}")
            assert "{}" in template
            assert template not in known


def test_the_embedded_model_without_a_cache_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("LEMOE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(lemoe.LemoeError, match=r"cannot prepare the embedded model in .*cache/models"):
        lemoe.load_base("llama", device="cpu")
