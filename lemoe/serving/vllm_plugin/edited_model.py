"""What is mixed into a model class of vLLM to make it an edited one."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig

from lemoe.serving.vllm_plugin.edits import Edits
from lemoe.serving.vllm_plugin.operators import hook_layers


class EditedModel(nn.Module):
    """A model of vLLM whose edits act in each forward pass; comes before the model's own class.

    Attributes:
        ffn_path: the FFN inside a decoder layer.
    """

    ffn_path: str

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.edits = Edits(self, vllm_config)
        hook_layers(self, self.edits, self.ffn_path)

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.edits.begin(input_ids, positions)
        return super().forward(input_ids, positions, *args, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base's weights; the adaptor's tensors, which lie in the same folder, are none of them."""
        own = self.edits.tensor_names
        return super().load_weights((name, tensor) for name, tensor in weights if name not in own)  # type: ignore[misc]
