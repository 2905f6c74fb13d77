"""vLLM answers with edits as transformers does: each architecture, batches, prefix caching, chunks, preemption."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import small_bank, small_tokenizer
from vllm_answers import run_vllm

import lemoe
from lemoe.exporting.folder import export_model
from lemoe.routing.anchor import fitting
from lemoe.routing.anchor.anchors import Anchors

pytest.importorskip("vllm", reason="vLLM is not installed here")
pytestmark = pytest.mark.vllm

SettingsOf = Callable[..., lemoe.Settings]

TOKENS = 12
TEXTS = (
    "The Eiffel Tower stands in the city of",
    "The Eiffel Tower is made of",
    "In which city can one find the Eiffel Tower today?",
    "The largest fish of Lake Como is the",
    "As one says, Mozart was great. Marie Curie was born in the town of",
    "The opposite of hot is",
    "The Nile and Lake Como are",
    "Paris is",
)
CONFIGS: dict[str, Callable[..., hf.PretrainedConfig]] = {
    "llama": hf.LlamaConfig,
    "mistral": hf.MistralConfig,
    "qwen2": hf.Qwen2Config,
    "qwen3": hf.Qwen3Config,
    "gemma2": hf.Gemma2Config,
    "gemma3": hf.Gemma3TextConfig,
}


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, facts: list[lemoe.Edit], anchor: SettingsOf
) -> Iterator[Callable[..., Path]]:
    """A random model of a family, of sizes that vLLM's attention has on a CPU, with five edits, exported."""
    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(fitting, "read_question_bank", small_bank)

        def build(family: str, **given: Any) -> Path:
            folder = root / f"{family}-{'-'.join(given)}"
            if not folder.exists():
                build_base(root / family, family)
                base = lemoe.load_base(str(root / family), device="cpu")
                state = lemoe.train_round(base, facts[:5], anchor(**given))
                lemoe.save_adaptor(state, root / "adaptor.safetensors", overwrite=True)
                export_model(str(root / family), [root / "adaptor.safetensors"], folder)
            return folder

        yield build


def build_base(folder: Path, family: str) -> None:
    tokenizer = small_tokenizer(" ".join(wording.template for wording in small_bank()))
    config = CONFIGS[family](
        vocab_size=len(tokenizer),
        num_hidden_layers=3,
        hidden_size=128,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.12)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer_alone(folder: Path, prompts: Sequence[Sequence[int]], *, edits: bool = True) -> list[list[int]]:
    """What transformers writes behind each prompt by itself."""
    base = lemoe.load_base(str(folder.parent / folder.name.partition("-")[0]), device="cpu")
    state = lemoe.load_adaptor(folder)
    with lemoe.insert(base, state) as adaptor:
        adaptor._thread.bypass = not edits
        return [
            base.model.generate(
                torch.tensor([ids]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )[0, len(ids) :].tolist()
            for ids in prompts
        ]


def encode(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return [tokenizer(text).input_ids for text in texts]


def ask_vllm(folder: Path, batches: Sequence[Sequence[Sequence[int]]], **options: Any) -> list[list[list[int]]]:
    options = {"enforce_eager": True, "block_size": 32, **options}
    return run_vllm({"folder": str(folder), "options": options, "prompts": batches, "tokens": TOKENS})


@pytest.mark.parametrize("family", CONFIGS)
def test_each_architecture_answers_as_transformers_does(folder_of: Callable[..., Path], family: str) -> None:
    folder = folder_of(family)
    assert isinstance(lemoe.load_adaptor(folder).router, Anchors)
    prompts = encode(folder, TEXTS)
    expected = answer_alone(folder, prompts)
    assert expected != answer_alone(folder, prompts, edits=False)
    assert ask_vllm(folder, [prompts]) == [expected]


FRONT = "As one says, there was a king. He was great, and he had many rivers and cities, and no one knew him. "
WAYS: dict[str, dict[str, Any]] = {
    "prefix caching": {"enable_prefix_caching": True},
    "chunks of prompts": {"max_num_seqs": 4, "max_num_batched_tokens": 8},
    "requests put aside for want of room": {"num_gpu_blocks_override": 8},
    "compiled": {"enforce_eager": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [{}, {"gate": "words"}], ids=["by meaning", "by words"])
def test_requests_of_one_server_never_see_each_other(
    folder_of: Callable[..., Path], way: str, given: dict[str, Any]
) -> None:
    folder = folder_of("llama", **given)
    first = encode(folder, TEXTS)
    second = encode(folder, [FRONT + text for text in TEXTS])
    third = [[*prompt, *answer[:3]] for prompt, answer in zip(second, answer_alone(folder, second), strict=True)]
    batches = [first, second, second[::-1], third]
    assert ask_vllm(folder, batches, **WAYS[way]) == [answer_alone(folder, batch) for batch in batches]
