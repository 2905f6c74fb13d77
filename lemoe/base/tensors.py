"""What several stages do with tensors: the types that weights are stored in, and normalising by the RMS."""

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPSILON = 1e-6


def rms_normalise(vectors: Tensor) -> Tensor:
    """`vectors` `[..., width]` in float32, each divided by its RMS."""
    wide = vectors.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
