"""A model that replays do not reproduce is refused before anything is trained or measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_tokenizer
from families import tiny_model
from torch import nn

import lemoe
from lemoe.base.frozen import compute_prefix_activations
from lemoe.base.loading import BaseModel
from lemoe.base.sources import ModelSource
from lemoe.base.tokens import encode_passages
from lemoe.errors import ModelError

REFUSAL = r"llama: layer {} cannot be edited: {} would be [\d.]+% off in training \([\d.]+ in size .* [\d.]+; .*`layer`"


def build_base(family: str) -> BaseModel:
    tokenizer = small_tokenizer()
    return BaseModel(tiny_model(family, len(tokenizer)), tokenizer, ModelSource(family, family))


def run_replay(base: BaseModel, facts: list[lemoe.Edit], layer: int) -> None:
    passages = encode_passages(base, [(edit.id, edit.prompt, edit.target) for edit in facts[:2]])
    compute_prefix_activations(base, base.ffn_site(layer), layer, passages, 64)


def scaled_output(module: nn.Module, args: Any, output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state * 1.5
    return output


def test_a_decoder_that_scales_its_output_is_refused_with_both_norms(facts: list[lemoe.Edit]) -> None:
    base = build_base("llama")
    base.decoder.register_forward_hook(scaled_output)
    with pytest.raises(ModelError, match=REFUSAL.format(1, "the logits")):
        run_replay(base, facts, 1)


def test_a_layer_whose_recorded_arguments_depend_on_the_edit_is_refused(facts: list[lemoe.Edit]) -> None:
    base = build_base("llama")

    def call_with_more(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {"residual": args[0], **kwargs}

    base.layers[2].register_forward_pre_hook(call_with_more, with_kwargs=True)
    base.layers[2].register_forward_hook(
        lambda module, args, kwargs, output: output + kwargs["residual"], with_kwargs=True
    )
    with pytest.raises(ModelError, match=REFUSAL.format(1, "an edit's change of the logits")):
        run_replay(base, facts, 1)


@pytest.mark.parametrize("preset", ["anchor", "paper"])
def test_nothing_is_trained_on_a_model_that_is_refused(facts: list[lemoe.Edit], preset: str) -> None:
    base = build_base("llama")
    base.decoder.register_forward_hook(scaled_output)
    settings = lemoe.resolve_settings(preset, None, {"layer": 1, "steps": 2})
    with pytest.raises(ModelError, match=REFUSAL.format(1, "the logits")):
        lemoe.train_round(base, facts[:2], settings, on_step=lambda step: pytest.fail("a step was taken"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "glm4", "granite", "cohere", "qwen2_moe", "opt"])
def test_rounding_is_no_reason_to_refuse(facts: list[lemoe.Edit], family: str, dtype: torch.dtype) -> None:
    base = build_base(family)
    base.model.to(dtype)
    for layer in range(len(base.layers)):
        run_replay(base, facts, layer)


def test_offloaded_layers_are_compared_too(tiny_folder: Callable[[str], Path], facts: list[lemoe.Edit]) -> None:
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    device_map = parts | {f"model.layers.{layer}": "disk" for layer in range(3)}
    base = lemoe.load_base(str(tiny_folder("llama")), device_map=device_map)
    run_replay(base, facts, 1)


def test_a_layer_is_compared_once(facts: list[lemoe.Edit]) -> None:
    base = build_base("llama")
    ran: list[int] = []
    base.model.register_forward_hook(lambda module, args, output: ran.append(1))
    run_replay(base, facts, 1)
    once = len(ran)
    run_replay(base, facts, 1)
    assert len(ran) == once > 0
