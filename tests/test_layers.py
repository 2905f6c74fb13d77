"""`--layer auto`: measured once on the user's own first edits, then cached."""

from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import lemoe_command

import lemoe
from lemoe.runs.layers import choose_layer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_layer_is_measured_once_and_then_cached(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: Callable[..., lemoe.Settings], cache: Path
) -> None:
    said: list[str] = []
    first = choose_layer(base, facts, anchor(layer=None), said.append)
    assert first.best_layer in [score.layer for score in first.scores]
    assert len(said) == len(first.scores)
    said.clear()
    assert choose_layer(base, facts, anchor(layer=None), said.append) == first
    assert said == []


def test_other_edits_are_measured_anew(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: Callable[..., lemoe.Settings], cache: Path
) -> None:
    choose_layer(base, facts, anchor(layer=None))
    said: list[str] = []
    choose_layer(base, facts[:2], anchor(layer=None), said.append)
    assert said
    assert len(list((cache / "layers").iterdir())) == 2


def test_a_damaged_cache_file_is_measured_again(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: Callable[..., lemoe.Settings], cache: Path
) -> None:
    first = choose_layer(base, facts, anchor(layer=None))
    (cached,) = (cache / "layers").iterdir()
    for damaged in ("{", "[]", '[{"layer": 99, "reliability": 0, "generality": 0}]'):
        cached.write_text(damaged)
        assert choose_layer(base, facts, anchor(layer=None)) == first


@pytest.mark.parametrize("location", ["a file", "/dev/null/cache"])
def test_a_cache_that_cannot_be_written_loses_no_measurement(
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    anchor: Callable[..., lemoe.Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    location: str,
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("LEMOE_CACHE", str(tmp_path / location))
    chosen = choose_layer(base, facts, anchor(layer=None))
    assert chosen.best_layer in [score.layer for score in chosen.scores]
    assert "cannot be written" in chosen.unsaved


def test_the_run_goes_on_with_the_measured_layer_and_says_that_it_is_not_cached(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEMOE_CACHE", "/dev/null/cache")
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "The Nile flows into the", "target": "Red Sea"}')
    where = ("-m", tiny_folder("llama"), "--device", "cpu")
    result = lemoe_command("edit", edits, *where, "--layer", "auto", "--steps", "2", "-q")
    assert result.exit_code == 0
    assert "measured again next time: /dev/null/cache" in " ".join(result.stderr.split())


def test_the_embedded_model_without_a_cache_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("LEMOE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(lemoe.LemoeError, match=r"cannot prepare the embedded model in .*cache/models"):
        lemoe.load_base("llama", device="cpu")
