"""Faster matrix products with frozen weights on a CPU, as exact as torch's own.

For float32, torch calls the library it was built with, commonly MKL, which runs at about half speed on AMD processors.
With `set_float32_matmul_precision("medium")` it calls oneDNN instead, which on many processors computes in full
float32 all the same and on others rounds to bfloat16. Which of the two is tried once; where it rounds, nothing
changes. Attention is left alone: it is slower there.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lemoe.base.placement import device_of

EXACT = 1e-6  # relative error of a product in float32; bfloat16 has some 1e-3


@contextmanager
def _through_onednn() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def onednn_is_exact() -> bool:
    """Whether products through oneDNN are as exact as float32 allows on this processor."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(256, 256, generator=generator) for _ in range(2))
    expected = one.double() @ other.double()
    with _through_onednn():
        found = one @ other
    return float((found - expected).norm() / expected.norm()) < EXACT


STEP = 32  # rows; oneDNN keeps a kernel, and memory, for each number of rows that it meets
FEWEST = 4  # rows; products of fewer add up in another order, so that a row would depend on how many run beside it


def _multiply(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix`, with rows of zeros up to the next multiple of `STEP`, or power of two from `FEWEST` below it."""
    flat = rows.reshape(-1, rows.shape[-1])
    count = len(flat)
    step = max(FEWEST, min(STEP, 1 << max(count - 1, 0).bit_length()))
    with _through_onednn():
        product = functional.pad(flat, (0, 0, 0, -count % step)) @ matrix
    return product[:count].reshape(*rows.shape[:-1], matrix.shape[1])


class _FrozenLinear(torch.autograd.Function):
    """`functional.linear` with a weight and a bias that are not trained."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        product = _multiply(inputs, weight.T)
        return product if bias is None else product.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _multiply(gradients[0], weight), None, None


def frozen_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`inputs @ weight.T + bias`, with a weight `[out, in]` and a bias `[out]` that are not trained."""
    if _gains(weight, weight.device):
        result: Tensor = _FrozenLinear.apply(inputs, weight, bias)
        return result
    return functional.linear(inputs, weight, bias)


def _gains(weight: Tensor, device: torch.device) -> bool:
    """Whether products on `device` with a weight, which may be away, are faster so."""
    frozen = device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad
    return frozen and onednn_is_exact()


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """While open, the frozen linear layers of `model` compute by `frozen_linear`."""
    changed = [
        (module, name)
        for module in model.modules()
        if type(module) is nn.Linear and _gains(module.weight, device_of(module)) and (name := _plain_forward(module))
    ]
    before = [module.__dict__.get(name) for module, name in changed]
    for module, name in changed:
        module.__dict__[name] = functools.partial(_forward, module)
    try:
        yield
    finally:
        for (module, name), own in zip(changed, before, strict=True):
            del module.__dict__[name]
            if own is not None:
                module.__dict__[name] = own


def _plain_forward(module: nn.Linear) -> str | None:
    """The attribute under which a layer finds its class's forward; None where it has one of its own.

    Where accelerate's hooks bring weights in, they stand around `_old_forward`.
    """
    if hasattr(module, "_hf_hook"):
        plain = getattr(module._old_forward, "__func__", None) is nn.Linear.forward
        return "_old_forward" if plain else None
    return None if "forward" in module.__dict__ else "forward"


def _forward(module: nn.Linear, inputs: Tensor) -> Tensor:
    return frozen_linear(inputs, module.weight, module.bias)
