"""The closed-form start of experts: a neuron that is active where an answer begins.

Where it begins, the base model would often say something else first, or nothing, however the question is put. So one
neuron of each expert starts as the ridge regression that tells these positions from those further on in the answer, by
what the expert reads there. The others start at random.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lemoe.base.frozen import FrozenBatch

RIDGE = 1.0  # variance of the noise on inputs that the regression allows for
ACTIVE = 3.0  # wanted activation at the beginning of an answer; further on it is the negative of it


class AnswerBatch(Protocol):
    """Texts that end in an answer; see `lemoe.training.anchor.batches.PositiveBatch`."""

    @property
    def frozen(self) -> FrozenBatch: ...
    @property
    def owners(self) -> Tensor: ...
    @property
    def firsts(self) -> Tensor: ...
    @property
    def normalised_inputs(self) -> Tensor: ...


@torch.no_grad()
def fit_detectors(batches: Sequence[AnswerBatch], experts: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each of `experts` with texts: what detects the beginning of an answer, and what is 1 at all its positions.

    Both are `[hidden]`, to be multiplied with what the expert reads.
    """
    inputs, owners, firsts = (torch.cat(parts) for parts in zip(*map(_answer_positions, batches), strict=True))
    fitted = {}
    for expert in range(experts):
        own = owners == expert
        if bool(own.any()):
            rows, first = inputs[own].float(), firsts[own].float()
            wanted = torch.stack([ACTIVE * (2 * first - 1), torch.ones_like(first)], 1)
            penalty = RIDGE * len(rows) * torch.eye(len(rows), device=rows.device)
            detector, constant = (rows.T @ torch.linalg.solve(rows @ rows.T + penalty, wanted)).unbind(1)
            fitted[expert] = (detector, constant)
    return fitted


def _answer_positions(batch: AnswerBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Input `[targets, hidden]` at each position of an answer, its expert, and whether the answer begins there."""
    rows, columns = batch.frozen.batch.target_rows, batch.frozen.batch.target_columns - batch.frozen.start
    return batch.normalised_inputs[rows, columns], batch.owners[rows], batch.firsts
