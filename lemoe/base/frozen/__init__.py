"""Editing a frozen model cheaply: the layers up to the edited one run once, those above it are replayed."""

from lemoe.base.frozen.layer_inputs import read_layer_inputs
from lemoe.base.frozen.prefix_pass import PrefixActivations, compute_prefix_activations
from lemoe.base.frozen.replay import FrozenBatch
from lemoe.base.frozen.scale import residual_scale

__all__ = ["FrozenBatch", "PrefixActivations", "compute_prefix_activations", "read_layer_inputs", "residual_scale"]
