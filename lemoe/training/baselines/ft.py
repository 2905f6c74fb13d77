"""Baselines `ft` and `rect`: one layer's FFN fine-tuned, with a bound on the change of each weight.

`ft`: Zhu et al. 2020 (arXiv 2012.00363), eq. 3: the loss is minimised under a bound on the largest change of any weight
(the FT-L baseline of ROME). Each round continues from the one before; the bound is on the change since the base model.

`rect`: Gu et al. 2024 (arXiv 2401.04700): of what a round changed, only the weights with the largest relative change
keep it (`change_share`), the others go back to where they were before the round.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.base.loading import BaseModel
from lemoe.base.tokens import encode_edits
from lemoe.data.edits import Edit
from lemoe.settings import Settings
from lemoe.training.baselines.live_batches import live_batches, live_losses
from lemoe.training.baselines.weight_change import WeightChange, check_resident, require_gradients, swap_values
from lemoe.training.steps import OnStep, fit_round


@dataclass(frozen=True, eq=False)
class TunedFFN(TensorEquality, WeightChange):
    """New weights of one layer's FFN, in the order of `FFNSite.named_tensors`."""

    layer: int
    layer_path: str | None
    values: tuple[Tensor, ...]

    def tensors(self) -> Sequence[Tensor]:
        return self.values

    def applied(self, base: BaseModel) -> AbstractContextManager[None]:
        return swap_values(_ffn_weights(base, self.layer, self.layer_path), self.values)


def train_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: TunedFFN | None, on_step: OnStep
) -> TunedFFN:
    """Fine-tune the FFN on `edits`, starting from `before`."""
    layer = settings.resolve_layer(len(base.layers), base.source.layers)
    weights = _ffn_weights(base, layer, settings.layer_path)
    bounds = [(weight - settings.norm_limit, weight + settings.norm_limit) for weight in weights]
    values = tuple(value.clone() for value in (before.values if before else weights))
    batches = live_batches(base, layer, encode_edits(base, edits), settings.batch_tokens)

    @torch.no_grad()
    def clamp_weights() -> None:
        for weight, (low, high) in zip(weights, bounds, strict=True):
            weight.clamp_(low, high)

    def iterate_losses() -> Iterator[Tensor]:
        return live_losses(base, batches)

    with swap_values(weights, values), require_gradients(weights):
        optimiser = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        fit_round(optimiser, iterate_losses, settings, on_step, clamp_weights)
    if settings.change_share < 1:
        starts = before.values if before else weights
        values = tuple(
            keep_largest_changes(start.detach(), value, settings.change_share)
            for start, value in zip(starts, values, strict=True)
        )
    return TunedFFN(layer, settings.layer_path, values)


def keep_largest_changes(before: Tensor, after: Tensor, share: float) -> Tensor:
    """The weights `after` where their relative change is among the largest, that `share` of all; else those `before`.

    The relative change is `|(after - before) / before|` (Gu et al. 2024). A weight of 0 that changed has the largest;
    where changes are equal, weights that come first keep theirs.
    """
    change = (after - before).abs() / before.abs()
    ranked = change.nan_to_num(nan=0.0).flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(before.numel(), dtype=torch.bool, device=before.device)
    kept[ranked[: max(1, round(share * len(ranked)))]] = True
    return torch.where(kept.view_as(before), after, before)


def _ffn_weights(base: BaseModel, layer: int, layer_path: str | None) -> list[Tensor]:
    check_resident(base)
    return [weight for _, weight in base.ffn_site(layer, layer_path).named_tensors()]
