"""Baseline `lora-merge`: new low-rank matrices in each round, merged into the weights (`lemoe[lora]`).

Thede et al. 2025 (arXiv 2503.05683): the matrices are trained on the weights so far; then the weights go a part of the
way, `merge_share`, from those before the round to those that it trained.
"""

from collections.abc import Sequence
from contextlib import nullcontext

from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit
from lemoe.settings import Settings
from lemoe.training.baselines import lora
from lemoe.training.baselines.weight_change import AddedWeights, add_up
from lemoe.training.steps import OnStep


def train_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: AddedWeights | None, on_step: OnStep
) -> AddedWeights:
    """Train matrices on `edits`, beside the weights of `before`, and merge them into these."""
    with before.applied(base) if before else nullcontext():
        trained = lora.train_round(base, edits, settings, None, on_step).multiply_out(base)
    merged = [settings.merge_share * change for change in trained.changes]
    return AddedWeights(trained.paths, add_up(before, merged))
