"""Batches follow the memory that is free, and a round that does not fit is tried again instead of dying."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES

import lemoe
from lemoe.base import memory
from lemoe.data.edits import Round
from lemoe.runs import edit as edit_run
from lemoe.runs.engines import local
from lemoe.runs.engines.local import LocalEngine
from lemoe.runs.progress import NullProgress
from lemoe.training.rounds import train_round

SettingsOf = Callable[..., lemoe.Settings]
Teach = Callable[..., "edit_run.EditReport"]


class Notes(NullProgress):
    """Keeps the notes of a run."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Counting(LocalEngine):
    """Counts the rounds whose experts are still in memory when another one is trained."""

    def __init__(self) -> None:
        self.in_memory: list[int] = []

    def train(self, *given: Any) -> Iterator[tuple[Round, lemoe.AdaptorState]]:
        references: list[weakref.ref[object]] = []
        for round_, state in super().train(*given):
            references.append(weakref.ref(state.experts))
            self.in_memory.append(sum(experts() is not None for experts in references))
            yield round_, state


@pytest.fixture
def teach(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path) -> Teach:
    """Runs `lemoe.edit` on the first facts into a folder of this name."""

    def run(name: str, count: int, progress: NullProgress | None = None, **given: Any) -> edit_run.EditReport:
        return lemoe.edit(base, facts[:count], tmp_path / name, anchor(**given), progress=progress)

    return run


def test_a_run_holds_no_more_than_two_rounds_however_many_there_are(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    engine = Counting()
    report = lemoe.edit(base, facts, tmp_path / "run", anchor(round_size=1), engine=engine)
    assert len(engine.in_memory) == report.rounds == len(facts)
    assert max(engine.in_memory) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cost_of_a_token_is_known_for_every_family(tiny: Callable[[str], lemoe.BaseModel], family: str) -> None:
    base = tiny(family)
    least = base.hidden_size * base.dtype.itemsize * len(base.layers)
    assert least < memory.bytes_per_token(base, base.ffn_site(1)) < 100 * least


def test_short_memory_makes_smaller_batches_and_says_so(
    base: lemoe.BaseModel, teach: Teach, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = teach("usual", 6, noise=0.0)
    free = 2 * 100 * memory.bytes_per_token(base, base.ffn_site(1))
    for module in (memory, edit_run):
        monkeypatch.setattr(module, "free_memory", lambda device: free)
    notes = Notes()
    short = teach("short", 6, notes, noise=0.0)
    assert [line for line in notes.said if "batches of 100 tokens, not 2048" in line]
    assert short.state.settings.batch_tokens == 100
    assert [record.id for record in short.state.rounds] == [record.id for record in usual.state.rounds]
    torch.testing.assert_close(short.state.experts.up, usual.state.experts.up, atol=1e-3, rtol=1e-3)


def test_a_round_that_runs_out_of_memory_is_tried_again_with_smaller_batches(
    teach: Teach, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def hungry(base: lemoe.BaseModel, edits: Any, settings: lemoe.Settings, *rest: Any) -> lemoe.AdaptorState:
        sizes.append(settings.batch_tokens)
        if settings.batch_tokens > 512:
            raise torch.OutOfMemoryError("too much")
        return train_round(base, edits, settings, *rest)

    monkeypatch.setattr(local, "train_round", hungry)
    notes = Notes()
    report = teach("run", 2, notes)
    assert sizes == [2048, 1024, 512]
    assert report.taught == 2
    assert notes.said[-1] == "out of memory: trying again with batches of 512 tokens"


def test_a_model_that_leaves_no_memory_at_all_is_an_error_that_says_so(
    teach: Teach, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*args: Any) -> lemoe.AdaptorState:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(local, "train_round", greedy)
    with pytest.raises(lemoe.LemoeError, match="too little memory"):
        teach("run", 2)
