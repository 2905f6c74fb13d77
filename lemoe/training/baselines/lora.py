"""Baseline `lora`: low-rank matrices added to every linear layer of the upper decoder layers, by peft (`lemoe[lora]`).

Hu et al. 2021 (arXiv 2106.09685). One set of matrices, which each round trains further.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Conv1D

from lemoe.base.equality import TensorEquality
from lemoe.base.loading import BaseModel
from lemoe.base.tokens import encode_edits
from lemoe.data.edits import Edit
from lemoe.errors import LemoeError
from lemoe.settings import Settings
from lemoe.training.baselines.live_batches import live_batches, live_losses
from lemoe.training.baselines.weight_change import AddedWeights, WeightChange, check_resident
from lemoe.training.steps import OnStep, fit_round

try:
    from peft import LoraConfig, LoraModel
    from peft.tuners.lora import LoraLayer
except ImportError:
    raise LemoeError("baselines lora and lora-merge need peft: pip install 'lemoe[lora]'") from None

DEFAULT_RANK = 8
ADAPTER = "lemoe"  # what peft calls the matrices


@dataclass(frozen=True, eq=False)
class LowRank(TensorEquality, WeightChange):
    """Low-rank matrices of the linear modules of `layers`, in peft's order."""

    layers: range
    rank: int
    values: tuple[Tensor, ...]

    def tensors(self) -> Sequence[Tensor]:
        return self.values

    @contextmanager
    def applied(self, base: BaseModel) -> Iterator[None]:
        with _insert_matrices(base, self.layers, self.rank) as matrices, torch.no_grad():
            for matrix, value in zip(matrices, self.values, strict=True):
                matrix.copy_(value).requires_grad_(False)
            yield

    @torch.no_grad()
    def multiply_out(self, base: BaseModel) -> AddedWeights:
        """What the matrices add to the weights of the modules."""
        with self.applied(base):
            tuned = {path: each for path, each in base.model.named_modules() if isinstance(each, LoraLayer)}
            return AddedWeights(tuple(tuned), tuple(each.get_delta_weight(ADAPTER).cpu() for each in tuned.values()))


def train_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: LowRank | None, on_step: OnStep
) -> LowRank:
    """Train the matrices on `edits`, starting from `before`."""
    first = settings.resolve_layer(len(base.layers), base.source.layers)
    layers, rank = range(first, len(base.layers)), settings.width or DEFAULT_RANK
    batches = live_batches(base, first, encode_edits(base, edits), settings.batch_tokens)
    with _insert_matrices(base, layers, rank, settings.seed) as matrices:
        if before:
            with torch.no_grad():
                for matrix, value in zip(matrices, before.values, strict=True):
                    matrix.copy_(value)
        optimiser = torch.optim.AdamW(matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        fit_round(optimiser, lambda: live_losses(base, batches), settings, on_step)
        return LowRank(layers, rank, tuple(matrix.detach().cpu() for matrix in matrices))


@contextmanager
def _insert_matrices(base: BaseModel, layers: range, rank: int, seed: int = 0) -> Iterator[list[Tensor]]:
    """While open, new matrices are added to the linear modules of `layers`; yields them."""
    check_resident(base)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_linear_module_paths(base, layers))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        tuner = LoraModel(base.model, config, ADAPTER)
    try:
        yield [parameter for name, parameter in base.model.named_parameters() if "lora_" in name]
    finally:
        tuner.unload()


def _linear_module_paths(base: BaseModel, layers: range) -> list[str]:
    """The paths of all linear modules of `layers`."""
    return [
        f"{base.layers_path}.{layer}.{path}"
        for layer in layers
        for path, module in base.layers[layer].named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
