"""The frozen base model under an edit: run once below the edited layer, replayed above it."""

from lemoe.frozen.below import Below, run_below
from lemoe.frozen.replay import FrozenBatch
from lemoe.frozen.scale import residual_scale

__all__ = ["Below", "FrozenBatch", "residual_scale", "run_below"]
