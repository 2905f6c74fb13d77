"""The architectures of vLLM that can be edited: `EditedLlamaForCausalLM` is its `LlamaForCausalLM` with edits."""

from functools import cache
from typing import Any

from vllm import ModelRegistry

from lemoe.serving.vllm_plugin.config import PREFIX
from lemoe.serving.vllm_plugin.edited_model import EditedModel

# The FFN inside a decoder layer, whose argument is what experts are trained on. Each was compared with transformers'
# model, in `tests/test_vllm.py`: others keep the residual stream, or the FFN's input, in other places.
FFN_PATHS = {
    "Gemma2ForCausalLM": "mlp",
    "Gemma3ForCausalLM": "mlp",
    "LlamaForCausalLM": "mlp",
    "MistralForCausalLM": "mlp",
    "Qwen2ForCausalLM": "mlp",
    "Qwen3ForCausalLM": "mlp",
}


@cache
def _edited_class(name: str, base: str) -> type[EditedModel]:
    """The class `name`: vLLM's class `base` with edits."""
    model = ModelRegistry.models[base].load_model_cls()
    return type(name, (EditedModel, model), {"__module__": __name__, "ffn_path": FFN_PATHS[base]})


def __getattr__(name: str) -> Any:
    base = name.removeprefix(PREFIX)
    if base == name or base not in FFN_PATHS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _edited_class(name, base)
