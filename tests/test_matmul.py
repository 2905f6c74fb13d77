"""Matmuls with frozen weights through oneDNN: faster on some processors, the same results everywhere."""

from typing import Any

import pytest
import torch
from torch import nn

import lemoe
from lemoe.base import matmul
from lemoe.base.matmul import frozen_linear, use_onednn

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=[True, False])
def exact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a processor on which oneDNN is exact, and as on one on which it rounds."""
    is_exact = bool(request.param)
    if is_exact and not matmul.onednn_is_exact():
        pytest.skip("oneDNN rounds to bfloat16 on this processor")
    monkeypatch.setattr(matmul, "onednn_is_exact", lambda: is_exact)
    return is_exact


@pytest.mark.parametrize("bias", [True, False])
def test_frozen_linear_and_its_gradients_match_torch(exact: bool, bias: bool) -> None:
    layer = nn.Linear(48, 32, bias=bias).requires_grad_(False)
    inputs = torch.randn(2, 5, 48, requires_grad=True)
    again = inputs.detach().clone().requires_grad_()
    expected, found = layer(inputs), frozen_linear(again, layer.weight, layer.bias)
    torch.testing.assert_close(found, expected, **CLOSE)
    expected.sin().sum().backward()
    found.sin().sum().backward()
    torch.testing.assert_close(again.grad, inputs.grad, **CLOSE)


def test_a_model_computes_the_same_and_is_left_as_it_was(exact: bool, base: lemoe.BaseModel) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    before = torch.get_float32_matmul_precision()
    with torch.no_grad():
        expected = base.model(ids).logits
        with use_onednn(base.model):
            assert any("forward" in module.__dict__ for module in base.model.modules()) == exact
            torch.testing.assert_close(base.model(ids).logits, expected, **CLOSE)
            assert torch.get_float32_matmul_precision() == before
        assert not any("forward" in module.__dict__ for module in base.model.modules())
        assert torch.equal(base.model(ids).logits, expected)


def test_other_precisions_and_layers_with_their_own_forward_are_left_alone(exact: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[0].bfloat16()
    own = model[1].forward
    model[1].__dict__["forward"] = own
    with use_onednn(model):
        assert "forward" not in model[0].__dict__
        assert model[1].__dict__["forward"] is own
    assert model[1].__dict__["forward"] is own
