"""vLLM runs exported folders with their edits at work: its own model classes, and the gate beside them (extra `vllm`).

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). A folder's configuration becomes
that of its base with an edited architecture (`config`), whose class is the base's own with edits attached
(`architectures`, `edited_model`). The gate reads each pass at one layer and the experts act at another (`operators`,
`edits`); what it remembers of a token lies in vLLM's KV cache, as a layer of it (`route_layer`), so that paging, prefix
caching, chunks and preemption treat it as they treat keys and values.
"""


def register() -> None:
    """Make vLLM know exported folders. Harmless if repeated."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from lemoe.serving.vllm_plugin import architectures
    from lemoe.serving.vllm_plugin.config import LemoeConfig, edited_name

    AutoConfig.register(LemoeConfig.model_type, LemoeConfig, exist_ok=True)
    for name in architectures.FFN_PATHS:
        ModelRegistry.register_model(edited_name(name), f"{architectures.__name__}:{edited_name(name)}")
