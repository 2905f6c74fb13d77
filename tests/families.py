"""Tiny random models of every decoder family that the installed transformers builds, offline.

A family's own configuration is kept as it is but for its sizes, which are reduced by their names.
"""

import inspect
import re
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 3
SIZES: tuple[tuple[str, int], ...] = (
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", 8),
    (r"qk_head_dim", 16),
    (r"(.*_)?vocab(ulary)?_size(_per_layer_input)?", 0),
    (r"(num_(hidden_|encoder_|decoder_)?layers|n_layers?|(encoder|decoder)_layers)", LAYERS),
    (r"(num_)?(nextn_predict|mtp|kv_shared|mem|hash)_layers|num_(nextn_predict|kv_shared|hash)_layers", 0),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index)", 1),
    (r"(n_group|topk_group|num_expert_groups?|mamba_n_groups|n_groups|mamba_ngroups)", 1),
    (r"(num_|n_)?(routed_experts|local_experts|experts|moe_experts)|moe_num_experts|ffn_num_experts", 4),
    (r".*(experts_per_tok(en)?|moe_top_?k|moe_k|num_selected_experts|top_?k_experts|moe_topk)", 2),
    (r".*(key_value_heads|kv_heads|n_head_kv|num_kv_heads)", 2),
    (r".*(attention_heads|_heads|n_heads?)", 4),
    (r"rotary_dim", 4),
    (r".*head_dim|mamba_d_head|mamba_head_dim|.*_head_size|head_size|d_head|d_kv", 8),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank)", 16),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|inner_dim|n_inner|dim_ff|mlp_hidden_size)", 48),
    (r"(hidden_size|n_embd|d_model|dim_model|embed_dim|word_embed_proj_dim|d_embed|lru_width|emb_dim)", 32),
    (r"(mamba_)?chunk_size", 16),
    (r"(d_inner|mamba_d_ssm|feed_forward_size)", 64),
    (r"(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|max_target_positions)", 128),
    (r"(ssm_state_size|state_size|mamba_d_state)", 8),
    (r"(pad_token_id)", 0),
    (r"(bos_token_id|eos_token_id|decoder_start_token_id)", 1),
)

LINEAR_FIRST = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
IRREGULAR: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local", "local"], "axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"layer_types": ["full_attention"] * LAYERS, "n_shared_experts": 1},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "kimi_linear", "bailing_hybrid"), LINEAR_FIRST),
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "qwen4_exp_text": {"indexer_budget": 16, "indexer_compress_ratio": 2, "indexer_kv_heads": 1},
    "bamba": {"mamba_expand": 2},
    "zamba2": {"layer_types": ["hybrid", "mamba", "mamba"]},
}  # settings that some families need to agree with the reduced sizes

UNBUILT = {
    "blt": "its patcher is a second model, which does not shrink with it",
    "cohere_compass_text": "its own layer types are at odds with its rotary embeddings",
    "dbrx": "its own configuration cannot build it",
    "dots3_note": "its layers are set one by one",
    "dots3_note_text": "its layers are set one by one",
    "gemma3n": "it needs pillow",
    "gemma4_assistant": "it drafts for another model",
    "gemma4_unified_assistant": "it drafts for another model",
    "musicgen": "its own configuration cannot build it",
    "musicgen_melody": "its own configuration cannot build it",
    "zamba": "its tied weights stand in fixed layers",
}  # families that are not built tiny and offline, and why


def family_names() -> list[str]:
    """Every model type that `AutoModelForCausalLM` knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _reduced_size(name: str, vocabulary: int) -> int | None:
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return vocabulary if size == 0 and "vocab" in name else size
    return None


def _config_fields(config_class: type) -> set[str]:
    """The names that a configuration accepts."""
    names = {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    return names | set(inspect.signature(config_class).parameters)


def _config_values(config_class: Any, vocabulary: int) -> dict[str, Any]:
    given: dict[str, Any] = {}
    names = _config_fields(config_class)
    for name in sorted(names):
        size = _reduced_size(name, vocabulary)
        if size is not None and config_class.attribute_map.get(name) not in names:
            given[name] = size
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]  # latent attention has as many of both
    parts = config_class() if hf.AutoConfig in config_class.sub_configs.values() else None
    for name, part in config_class.sub_configs.items():
        kind = type(getattr(parts, name)) if part is hf.AutoConfig else part
        if issubclass(kind, hf.PretrainedConfig):
            given[name] = _config_values(kind, vocabulary)
    return given | IRREGULAR.get(config_class.model_type, {})


def tiny_config(family: str, vocabulary: int) -> Any:
    """A configuration of `family`, three layers deep and 32 wide."""
    config_class = hf.CONFIG_MAPPING[family]
    return config_class(**_config_values(config_class, vocabulary))


def tiny_model(family: str, vocabulary: int, seed: int = 0) -> Any:
    """A random model of `family`, whose logits differ clearly."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(tiny_config(family, vocabulary))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.12)
    model.generation_config = hf.GenerationConfig(pad_token_id=0, eos_token_id=1)
    return model.eval()
