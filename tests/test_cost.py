"""Cached results, and their memory: views of a state, fingerprints of a base model."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

import lemoe
from lemoe.adaptor.merging import merge_adaptors
from lemoe.adaptor.state import AdaptorState, TaughtEdit
from lemoe.base import fingerprint, loading
from lemoe.routing.anchor.anchors import Anchors
from lemoe.routing.anchor.gate import Anchor
from lemoe.training.baselines.weight_change import swap_values

SettingsOf = Callable[..., lemoe.Settings]

EDITS = 20_000
VIEW_BYTES = 240  # per edit, of the views of a state, ids included


@pytest.fixture(scope="module")
def one(base: lemoe.BaseModel) -> AdaptorState:
    """An edit's state, hardly trained."""
    settings = lemoe.resolve_settings("anchor", None, {"layer": 1, "steps": 1, "variants": 0, "negatives": 0})
    return lemoe.train_round(base, [lemoe.Edit("Lake Como lies in", "Italy", "Lake Como", id="one")], settings)


def repeat_edit(one: AdaptorState, count: int, *, experts: int | None = None) -> AdaptorState:
    """A state of one round of so many edits, with names and digests of their own, in so many experts."""
    names = tuple(f"edit-{number}" for number in range(count))
    record = replace(
        one.rounds[0],
        experts=experts or count,
        ids=names,
        edits=tuple(f"{n:064x}" for n in range(count)),
        prompts=("What is it?",) * count,
        targets=("That.",) * count,
    )
    groups = tuple((Anchor((7, number + 8), (3,), "Lake Como"),) for number in range(count))
    return replace(one, rounds=(record,), experts=one.experts.select([0] * (experts or count)), router=Anchors(groups))


@pytest.fixture(scope="module")
def many(one: AdaptorState) -> AdaptorState:
    return repeat_edit(one, EDITS)


def test_a_state_works_its_views_out_once(many: AdaptorState) -> None:
    for name in ("edits", "edits_by_expert", "expert_spans"):
        assert getattr(many, name) is getattr(many, name)
    assert many.edits == tuple(map(TaughtEdit, many.rounds[0].ids, many.rounds[0].edits))
    assert tuple(chain.from_iterable(many.edits_by_expert)) == many.edits
    assert replace(many).edits is not many.edits


def test_the_views_of_a_state_take_few_bytes_per_edit(one: AdaptorState) -> None:
    state = repeat_edit(one, EDITS)
    tracemalloc.start()
    try:
        _ = state.edits, state.edits_by_expert, state.expert_spans, state.experts_holding(range(EDITS))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / EDITS < VIEW_BYTES


def test_experts_that_share_edits_hold_them_in_order(one: AdaptorState) -> None:
    state = repeat_edit(one, 10, experts=4)
    assert [[edit.id for edit in edits] for edits in state.edits_by_expert] == [
        ["edit-0", "edit-1", "edit-2"],
        ["edit-3", "edit-4", "edit-5"],
        ["edit-6", "edit-7"],
        ["edit-8", "edit-9"],
    ]
    with pytest.raises(lemoe.LemoeError, match=r"edit edit-6 .* shares an expert with 1 other edits"):
        state.experts_holding([6])


class Compared(str):
    """A name that counts how often it is compared."""

    __slots__ = ()
    times = 0

    def __eq__(self, other: object) -> bool:
        Compared.times += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_taking_edits_out_compares_each_name_a_few_times_however_many_there_are(one: AdaptorState) -> None:
    state = repeat_edit(one, 400)
    names = tuple(map(Compared, state.rounds[0].ids))
    record = replace(state.rounds[0], ids=names, missed=names[:200])
    Compared.times = 0
    left = replace(state, rounds=(record,)).drop_experts(range(0, 400, 2)).rounds[0]
    assert Compared.times <= 4 * 400
    assert left.ids == names[1::2]
    assert left.missed == names[1:200:2]


def test_dropping_many_edits_looks_through_their_names_once(
    one: AdaptorState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lemoe.save_adaptor(repeat_edit(one, 60), tmp_path / "all")
    made = []
    initialise = TaughtEdit.__init__

    def counting_init(self: TaughtEdit, *args: Any, **kwargs: Any) -> None:
        made.append(1)
        initialise(self, *args, **kwargs)

    monkeypatch.setattr(TaughtEdit, "__init__", counting_init)
    merged = merge_adaptors([tmp_path / "all"], None, drop=[f"edit-{number}" for number in range(30)])
    assert [edit.id for edit in merged.dropped] == [f"edit-{number}" for number in range(30)]
    assert len(made) == 60


# The base's fingerprint.


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the hashes over weights that were computed."""
    done: list[str] = []
    for name in ("ffn_sha256", "weights_sha256"):
        monkeypatch.setattr(loading, name, partial(_note_call, done, name, getattr(fingerprint, name)))
    return done


def _note_call(done: list[str], name: str, function: Callable[[Any], str], argument: Any) -> str:
    done.append(name)
    return function(argument)


def test_a_bases_weights_are_hashed_once_however_many_rounds_are_trained(
    tiny_folder: Callable[[str], Path], facts: list[lemoe.Edit], anchor: SettingsOf, hashed: list[str], tmp_path: Path
) -> None:
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    lemoe.edit(base, facts[:4], tmp_path / "run", anchor(round_size=1, steps=2))
    lemoe.edit(base, facts[:4], tmp_path / "run", anchor(round_size=1, steps=2), lemoe.EditOptions(resume=True))
    with lemoe.insert(base, tmp_path / "run" / "adaptor.safetensors"):
        assert sorted(hashed) == ["ffn_sha256", "weights_sha256"]


def test_each_layer_has_its_own_hash_and_other_weights_are_hashed_once(
    tiny_folder: Callable[[str], Path], hashed: list[str]
) -> None:
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    first, second = base.fingerprint(0), base.fingerprint(1)
    assert (first.layer, second.layer) == (0, 1)
    assert first.ffn_sha256 != second.ffn_sha256
    assert (base.fingerprint(0), base.fingerprint(1)) == (first, second)
    assert sorted(hashed) == ["ffn_sha256", "ffn_sha256", "weights_sha256"]


def test_while_a_baseline_answers_with_other_weights_the_fingerprint_is_theirs(
    tiny_folder: Callable[[str], Path],
) -> None:
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    own = base.fingerprint(1)
    weights = [weight for _, weight in base.ffn_site(1).named_tensors()]
    with swap_values(weights, [weight + 1.0 for weight in weights]):
        changed = base.fingerprint(1)
        with torch.no_grad():
            weights[0].mul_(2.0)
        assert base.fingerprint(1).ffn_sha256 != changed.ffn_sha256 != own.ffn_sha256
    assert base.fingerprint(1) == own


def test_a_fingerprint_taken_first_under_other_weights_is_not_kept_for_the_bases_own(
    tiny_folder: Callable[[str], Path],
) -> None:
    base, fresh = (lemoe.load_base(str(tiny_folder("llama")), device="cpu") for _ in range(2))
    weights = [weight for _, weight in base.ffn_site(1).named_tensors()]
    with swap_values(weights, [weight + 1.0 for weight in weights]):
        base.fingerprint(1)
    assert base.fingerprint(1) == fresh.fingerprint(1)
