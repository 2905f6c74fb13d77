"""The frozen base model under an edit: run once below the edited layer, replayed above it."""

from lemoe.base.frozen.prefix_pass import Below, run_below
from lemoe.base.frozen.replay import FrozenBatch
from lemoe.base.frozen.scale import residual_scale

__all__ = ["Below", "FrozenBatch", "residual_scale", "run_below"]
