"""`--layer auto`: measured once on the user's own first edits, then remembered."""

from collections.abc import Callable
from pathlib import Path

import pytest

import lemoe
from lemoe.layers import choose_layer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_layer_is_measured_once_and_then_remembered(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: Callable[..., lemoe.Settings], cache: Path
) -> None:
    said: list[str] = []
    first = choose_layer(base, facts, anchor(layer=None), said.append)
    assert first.layer in [score.layer for score in first.scores]
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


def test_a_damaged_memory_is_measured_again(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: Callable[..., lemoe.Settings], cache: Path
) -> None:
    first = choose_layer(base, facts, anchor(layer=None))
    (memory,) = (cache / "layers").iterdir()
    memory.write_text("{")
    assert choose_layer(base, facts, anchor(layer=None)) == first
