"""`==` of values that hold tensors: one value is one value to the last bit, and no comparison raises."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lemoe
from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.base.equality import TensorEquality, bits_equal, values_equal
from lemoe.routing.anchor.anchors import Anchors
from lemoe.routing.key_router import KeyRouter
from lemoe.routing.mixture_gate import MixtureGate
from lemoe.routing.router import Routing
from lemoe.training.rounds import teach_rounds

SettingsOf = Callable[..., lemoe.Settings]

NAN = float("nan")


@pytest.fixture(scope="module", params=["anchor", "paper", "memoe"])
def state(
    request: pytest.FixtureRequest,
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    anchor: SettingsOf,
    trained: lemoe.AdaptorState,
) -> lemoe.AdaptorState:
    """An adaptor with each kind of router."""
    if request.param == "paper":
        return trained
    if request.param == "memoe":
        (taught,) = teach_rounds(base, [facts[:2]], lemoe.resolve_settings("memoe", None, {"layer": 1, "steps": 2}))
        assert isinstance(taught, lemoe.AdaptorState)
        return taught
    return lemoe.train_round(base, facts[:2], anchor(steps=2))


def test_a_state_that_was_saved_and_read_back_equals_the_one_it_was(state: lemoe.AdaptorState, tmp_path: Path) -> None:
    lemoe.save_adaptor(state, tmp_path / "adaptor")
    loaded = lemoe.load_adaptor(tmp_path / "adaptor")
    assert loaded is not state
    assert loaded == state
    assert loaded.experts == state.experts
    assert loaded.router == state.router
    assert isinstance(state.router, {"anchor": Anchors, "paper": KeyRouter, "memoe": MixtureGate}[state.router.method])


def test_a_state_differs_from_one_with_another_value_in_any_field(state: lemoe.AdaptorState) -> None:
    halved = state.experts.to_dtype(torch.float16)
    others: dict[str, Any] = {
        "base": replace(state.base, name="other"),
        "settings": replace(state.settings, seed=99),
        "rounds": (*state.rounds[:-1], replace(state.rounds[-1], loss=99.0)),
        "experts": halved,
        "router": None,
    }
    assert set(others) == {field.name for field in fields(state)}
    for name, value in others.items():
        assert replace(state, **{name: value}) != state, name
    assert state.experts.to_meta() != state.experts
    assert state != state.experts


def test_states_have_no_hash_as_their_tensors_may_change(state: lemoe.AdaptorState) -> None:
    for value in (state, state.experts):
        with pytest.raises(TypeError, match="unhashable"):
            hash(value)


def test_a_file_opened_without_its_experts_is_equal_to_itself_alone(
    trained: lemoe.AdaptorState, tmp_path: Path
) -> None:
    lemoe.save_adaptor(trained, tmp_path / "adaptor")
    opened = [AdaptorFile(tmp_path / "adaptor").state for _ in range(2)]
    assert opened[0] == opened[1]
    assert opened[0] != trained


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1.0])),
        (torch.tensor(2.0), torch.tensor(2.0)),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
        (torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous()),
        (torch.ones(1).expand(4), torch.ones(4)),
        (torch.ones(3, requires_grad=True), torch.ones(3)),
        (torch.tensor([True, False]), torch.tensor([True, False])),
        (torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta")),
    ],
)
def test_tensors_of_one_type_shape_and_bits_are_equal(one: Tensor, other: Tensor) -> None:
    assert bits_equal(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor([2.0]))),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(0, 2), torch.zeros(0, 3)),
        (torch.tensor(1.0), torch.tensor([1.0])),
        (torch.zeros(2), torch.zeros(2, device="meta")),
        (torch.empty(2, device="meta"), torch.empty(3, device="meta")),
    ],
)
def test_tensors_of_other_bits_shapes_or_types_differ(one: Tensor, other: Tensor) -> None:
    assert not bits_equal(one, other)


def test_tensors_are_compared_wherever_they_stand_in_a_value() -> None:
    ones, zeros = torch.ones(2), torch.zeros(2)
    for wrapped in (lambda t: [t], lambda t: (1, (t, "a")), lambda t: {"a": [t]}):
        assert values_equal(wrapped(ones), wrapped(ones.clone()))
        assert not values_equal(wrapped(ones), wrapped(zeros))
    assert not values_equal([ones], [ones, ones])
    assert not values_equal([ones], (ones,))
    assert not values_equal({"a": ones}, {"b": ones})
    assert not values_equal(ones, None)
    assert not values_equal(None, ones)
    assert not values_equal(ones, [1.0, 1.0])


def test_a_value_is_never_equal_to_one_of_another_kind() -> None:
    routing = Routing(torch.zeros(1, 2, 1), torch.ones(1, 2, 1))
    assert routing == replace(routing)
    assert routing != replace(routing, weights=torch.zeros(1, 2, 1))
    assert routing != (routing.experts, routing.weights, ())


def dataclasses_of_the_library() -> Iterator[type]:
    for module in pkgutil.walk_packages(lemoe.__path__, "lemoe."):
        try:
            content = vars(importlib.import_module(module.name))
        except (lemoe.LemoeError, ImportError):  # an extra that is not installed
            continue
        yield from (kind for kind in content.values() if isinstance(kind, type) and is_dataclass(kind))


def test_every_dataclass_that_holds_tensors_compares_them_by_value() -> None:
    holding = [
        kind for kind in dataclasses_of_the_library() if any(holds_tensors(field.type) for field in fields(kind))
    ]
    assert {"Experts", "KeyRouter", "Projection", "MixtureGate", "Batch"} <= {kind.__name__ for kind in holding}
    by_tuples = [kind for kind in holding if not issubclass(kind, TensorEquality) or "__eq__" in vars(kind)]
    assert by_tuples == []


def holds_tensors(annotation: object) -> bool:
    written = str(annotation)
    return "torch.Tensor" in written and "Callable" not in written
