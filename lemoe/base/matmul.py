"""Faster float32 matmuls with frozen weights on a CPU through oneDNN, as exact as torch's own.

For float32, torch calls the library it was built with, commonly MKL, which runs at about half speed on AMD processors.
With `set_float32_matmul_precision("medium")` it calls oneDNN instead, which on many processors computes in full
float32 all the same and on others rounds to bfloat16. Which of the two is tried once; where it rounds, nothing
changes. Attention is left out, since it is slower with oneDNN.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemoe.base.placement import device_of

MAX_RELATIVE_ERROR = 1e-6  # of a float32 matmul; bfloat16 has about 1e-3


_lock = threading.RLock()


class _Precision:
    """The process's float32 precision, lowered while any thread is inside, so that oneDNN is called."""

    def __init__(self) -> None:
        self._inside = 0
        self._before = ""

    def __enter__(self) -> None:
        with _lock:
            if not self._inside:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("medium")
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with _lock:
            self._inside -= 1
            if not self._inside:
                torch.set_float32_matmul_precision(self._before)


_through_onednn = _Precision()


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's matmul on this processor is as exact as float32 allows, rather than rounding to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(256, 256, generator=generator) for _ in range(2))
    expected = one.double() @ other.double()
    with _through_onednn:
        product = one @ other
    return float((product - expected).norm() / expected.norm()) < MAX_RELATIVE_ERROR


ROW_MULTIPLE = 32  # oneDNN keeps a kernel, and memory, for each number of rows that it meets
MIN_ROWS = 4  # with fewer rows sums are in another order, so that a row would depend on the batch size


def _padded_matmul(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix`, computed with zero rows up to a multiple of `ROW_MULTIPLE`; below it, to a power of two."""
    flat = rows.reshape(-1, rows.shape[-1])
    count = len(flat)
    step = max(MIN_ROWS, min(ROW_MULTIPLE, 1 << max(count - 1, 0).bit_length()))
    with _through_onednn:
        product = functional.pad(flat, (0, 0, 0, -count % step)) @ matrix
    return product[:count].reshape(*rows.shape[:-1], matrix.shape[1])


class _FrozenLinear(torch.autograd.Function):
    """`functional.linear` with a weight and a bias that are not trained."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        product = _padded_matmul(inputs, weight.T)
        return product if bias is None else product.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _padded_matmul(gradients[0], weight), None, None


def frozen_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`inputs @ weight.T + bias`, with a weight `[out, in]` and a bias `[out]` that are not trained."""
    if _onednn_helps(weight, weight.device):
        result: Tensor = _FrozenLinear.apply(inputs, weight, bias)
        return result
    return functional.linear(inputs, weight, bias)


def _onednn_helps(weight: Tensor, device: torch.device) -> bool:
    """Whether oneDNN is used for a weight that runs on `device` (it may be offloaded): float32 on a CPU, and exact."""
    frozen = device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad
    return frozen and onednn_is_exact()


_Changed = list[tuple[nn.Linear, str, Any]]  # layers, the attribute that was changed of each, and its value before


class _Use:
    """How many are inside `use_onednn` with a model, and what was changed for them."""

    def __init__(self, changed: _Changed):
        self.changed = changed
        self.inside = 0


_uses: "WeakKeyDictionary[nn.Module, _Use]" = WeakKeyDictionary()


@contextmanager
def use_onednn(model: nn.Module) -> Iterator[None]:
    """While open on any thread, the frozen linear layers of `model` run `frozen_linear`."""
    with _lock:
        use = _uses.get(model) or _uses.setdefault(model, _Use(_replace_forwards(model)))
        use.inside += 1
    try:
        yield
    finally:
        with _lock:
            use.inside -= 1
            if not use.inside:
                _restore_forwards(_uses.pop(model).changed)


def _replace_forwards(model: nn.Module) -> _Changed:
    changed = [
        (module, name, module.__dict__.get(name))
        for module in model.modules()
        if type(module) is nn.Linear
        and _onednn_helps(module.weight, device_of(module))
        and (name := _plain_forward(module))
    ]
    for module, name, _ in changed:
        module.__dict__[name] = functools.partial(_forward_frozen, module)
    return changed


def _restore_forwards(changed: _Changed) -> None:
    for module, name, own in changed:
        del module.__dict__[name]
        if own is not None:
            module.__dict__[name] = own


def _plain_forward(module: nn.Linear) -> str | None:
    """The attribute that holds the class's forward of a layer; None if the layer has another forward.

    Accelerate's hooks wrap it as `_old_forward`.
    """
    if hasattr(module, "_hf_hook"):
        plain = getattr(module._old_forward, "__func__", None) is nn.Linear.forward
        return "_old_forward" if plain else None
    return None if "forward" in module.__dict__ else "forward"


def _forward_frozen(module: nn.Linear, inputs: Tensor) -> Tensor:
    return frozen_linear(inputs, module.weight, module.bias)
