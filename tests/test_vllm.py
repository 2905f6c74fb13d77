"""vLLM answers with edits as transformers does: each architecture, batches, prefix caching, chunks, preemption."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import save_wide_model, small_bank
from vllm_answers import run_vllm

import lemoe
from lemoe.exporting import folder as exporting
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
        patch.setattr(exporting, "_compare_answers", lambda *given: None)  # it takes longer than these tests' models

        def build(family: str, **given: Any) -> Path:
            folder = root / f"{family}-{'-'.join(given)}"
            if not folder.exists():
                sizes = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}
                save_wide_model(root / family, CONFIGS[family], **sizes)
                base = lemoe.load_base(str(root / family), device="cpu")
                state = lemoe.train_round(base, facts[:5], anchor(**given))
                lemoe.save_adaptor(state, root / "adaptor.safetensors", overwrite=True)
                export_model(str(root / family), [root / "adaptor.safetensors"], folder)
            return folder

        yield build


def answer_alone(folder: Path, prompts: Sequence[Sequence[int]], *, edits: bool = True) -> list[list[int]]:
    """What transformers writes behind each prompt by itself."""
    base = lemoe.load_base(str(folder.parent / folder.name.partition("-")[0]), device="cpu")
    state = lemoe.load_adaptor(folder)
    with lemoe.insert(base, state) as adaptor, nullcontext() if edits else adaptor.bypassed():
        return [
            base.model.generate(
                torch.tensor([ids]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )[0, len(ids) :].tolist()
            for ids in prompts
        ]


def encode(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return [tokenizer(text).input_ids for text in texts]


FRONT = "As one says, there was a king. He was great, and he had many rivers and cities, and no one knew him. "
CROWDED = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "num_gpu_blocks_override": 8}


def make_request(folder: Path, batches: Sequence[Sequence[Sequence[int]]], **options: Any) -> dict[str, Any]:
    options = {"enforce_eager": True, "block_size": 32, **options}
    return {"folder": str(folder), "options": options, "prompts": batches, "tokens": TOKENS}


def test_each_architecture_answers_as_transformers_does(folder_of: Callable[..., Path]) -> None:
    requests, expected = [], {}
    for family in CONFIGS:
        folder = folder_of(family)
        assert isinstance(lemoe.load_adaptor(folder).router, Anchors)
        prompts = encode(folder, TEXTS)
        expected[family] = answer_alone(folder, prompts)
        assert expected[family] != answer_alone(folder, prompts, edits=False)
        requests.append(make_request(folder, [prompts]))
    assert dict(zip(CONFIGS, run_vllm(requests), strict=True)) == {name: [found] for name, found in expected.items()}


@pytest.mark.parametrize("given", [{}, {"gate": "words"}], ids=["by meaning", "by words"])
def test_requests_never_see_each_other(folder_of: Callable[..., Path], given: dict[str, Any]) -> None:
    """Prefixes that are shared, in one step too, prompts in chunks, requests put aside for want of room; compiled."""
    folder = folder_of("llama", **given)
    first, second = encode(folder, TEXTS), encode(folder, [FRONT + text for text in TEXTS])
    third = [[*prompt, *answer[:3]] for prompt, answer in zip(second, answer_alone(folder, second), strict=True)]
    batches = [first, second, second[::-1], third]
    expected = [answer_alone(folder, batch) for batch in batches]
    ways: list[dict[str, Any]] = [{}, CROWDED, {"num_gpu_blocks_override": 8}, {"enforce_eager": False}]
    found = run_vllm([make_request(folder, batches, **options) for options in ways])
    assert [answers == expected for answers in found] == [True] * len(ways)


def test_what_cannot_be_routed_is_refused(folder_of: Callable[..., Path]) -> None:
    with pytest.raises(RuntimeError, match="an edited model cannot be served with --enable-lora"):
        run_vllm([make_request(folder_of("llama"), [[[5, 6, 7]]], enable_lora=True)])


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("parallel_config.pipeline_parallel_size", 2, "--pipeline-parallel-size"),
        ("parallel_config.decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("parallel_config.enable_dbo", True, "--enable-dbo"),
        ("kv_transfer_config", object(), "--kv-transfer-config"),
    ],
)
def test_each_way_that_needs_other_machines_is_refused_too(path: str, value: object, named: str) -> None:
    from lemoe.serving.vllm_plugin.edits import refuse_what_cannot_be_routed

    parallel = SimpleNamespace(pipeline_parallel_size=1, decode_context_parallel_size=1, enable_dbo=False)
    config = SimpleNamespace(parallel_config=parallel, lora_config=None, kv_transfer_config=None)
    refuse_what_cannot_be_routed(config)
    holder, _, name = path.rpartition(".")
    setattr(getattr(config, holder) if holder else config, name, value)
    with pytest.raises(lemoe.LemoeError, match=named):
        refuse_what_cannot_be_routed(config)
