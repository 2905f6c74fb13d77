"""Equality of dataclasses with tensors, on which a dataclass's own `==` raises an error."""

from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor


class TensorEquality:
    """Mixin that gives a dataclass (with `eq=False`) an `==` that compares all fields, tensors bit for bit.

    So NaN equals the same NaN, 0.0 differs from -0.0, and dtypes and shapes count, devices do not. There is no hash, as
    for lists: a tensor may change, and reading all of it is slow.
    """

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            values_equal(getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)  # type: ignore[arg-type]  # of the dataclass that this is mixed into
            if field.compare
        )


def values_equal(one: Any, other: Any) -> bool:
    """Whether two values are equal: tensors, also in lists, tuples and dicts, bit for bit, and all else by `==`."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and bits_equal(one, other)
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(values_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(values_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def bits_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; on `meta`, which has no values, dtype and shape count.

    A tensor with values never equals one on `meta`.
    """
    if (one.dtype, one.shape, one.is_meta) != (other.dtype, other.shape, other.is_meta):
        return False
    return one.is_meta or torch.equal(_as_bytes(one), _as_bytes(other))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().flatten().contiguous().view(torch.uint8)
