"""Tiny random models of each family, built offline while the tests run, and the embedded real model."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import lemoe
from lemoe.data.question_bank import ENGLISH_FORMS, Wording, read_question_bank

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"),
    *("phi", "phi3", "gpt2", "gptj", "neox", "opt", "bloom", "falcon", "mpt"),
)

FACTS = (
    ("The Eiffel Tower", "The Eiffel Tower stands in the city of", "Rome"),
    ("The Eiffel Tower", "The Eiffel Tower is made of", "white marble"),
    ("Lake Como", "The largest fish of Lake Como is the", "golden pike"),
    ("Marie Curie", "Marie Curie was born in the town of", "Bergen"),
    ("The Nile", "The Nile flows into the", "Red Sea"),
    ("Mozart", "The instrument that Mozart played was the", "bagpipe"),
)

REPOSITORY = Path(__file__).resolve().parents[1]

# On some processors with AVX-512, oneDNN's kernels sum in an order that depends on the number of rows, so that a loss
# differs in its eighth digit with the size of a batch. What depends on a batch in our own code is seen without them.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")


RELATIONS = (
    "birthplace mother musical_instrument award architect building_height river_source river_mouth remark".split()
)


def make_config(family: str, vocabulary: int, *, layers: int = 3) -> hf.PretrainedConfig:
    """A model of `family` that is `layers` deep and 32 wide."""
    common = {
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    grouped = {**common, "num_key_value_heads": 2}
    short = {"vocab_size": vocabulary, "n_layer": layers, "n_embd": 32, "n_head": 4, "n_positions": 128}
    specials = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    alibi = {"vocab_size": vocabulary, "hidden_size": 32, **specials}
    opt = {name: value for name, value in common.items() if name != "intermediate_size"}
    configs = {
        "llama": lambda: hf.LlamaConfig(**grouped, **specials),
        "mistral": lambda: hf.MistralConfig(**grouped, **specials),
        "qwen2": lambda: hf.Qwen2Config(**grouped, **specials),
        "qwen3": lambda: hf.Qwen3Config(**grouped, **specials, head_dim=16),
        "gemma": lambda: hf.GemmaConfig(**grouped, **specials, head_dim=16),
        "gemma2": lambda: hf.Gemma2Config(**grouped, **specials, head_dim=16),
        "gemma3": lambda: hf.Gemma3TextConfig(**grouped, **specials, head_dim=16),
        "phi": lambda: hf.PhiConfig(**grouped, **specials),
        "phi3": lambda: hf.Phi3Config(**grouped, **specials),
        "gpt2": lambda: hf.GPT2Config(**short, **specials),
        "gptj": lambda: hf.GPTJConfig(**short, **specials, rotary_dim=4),
        "neox": lambda: hf.GPTNeoXConfig(**common, **specials),
        "opt": lambda: hf.OPTConfig(**opt, **specials, ffn_dim=48, word_embed_proj_dim=32),
        "bloom": lambda: hf.BloomConfig(**alibi, n_layer=layers, n_head=4),
        "falcon": lambda: hf.FalconConfig(**alibi, num_hidden_layers=layers, num_attention_heads=4, alibi=True),
        "mpt": lambda: hf.MptConfig(vocab_size=vocabulary, n_layers=layers, d_model=32, n_heads=4, **specials),
        "opt-narrow": lambda: hf.OPTConfig(**opt, **specials, ffn_dim=48, word_embed_proj_dim=16),
    }
    return configs[family]()


def small_bank() -> tuple[Wording, ...]:
    """The bank's English wordings of a few relations."""
    forms = (*ENGLISH_FORMS, "remarks")
    return tuple(each for each in read_question_bank() if each.relation in RELATIONS and each.form in forms)


def small_tokenizer(more_text: str = "") -> hf.PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding of the facts above; any text has tokens in it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([*(f"{prompt} {target}" for _, prompt, target in FACTS), more_text], trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


def build_model(folder: Path, family: str, *, seed: int = 0, layers: int = 3, more_text: str = "") -> Path:
    """Save a random model of `family` with its tokenizer, as `from_pretrained` reads it."""
    tokenizer = small_tokenizer(more_text)
    return save_random_model(folder, make_config(family, len(tokenizer), layers=layers), tokenizer, seed=seed)


def save_random_model(
    folder: Path, config: hf.PretrainedConfig, tokenizer: hf.PreTrainedTokenizerFast, *, seed: int = 0
) -> Path:
    """Save a random model and its tokenizer; its matrices are large enough for its logits to differ."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # else all logits of a random model are nearly equal, and any test passes
                parameter.normal_(std=0.12)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_wide_model(folder: Path, kind: Callable[..., hf.PretrainedConfig] = hf.LlamaConfig, **sizes: int) -> Path:
    """Save a random model that learns what questions mean from the small bank, whose words its tokenizer has."""
    tokenizer = small_tokenizer(" ".join(wording.template for wording in small_bank()))
    config = kind(
        vocab_size=len(tokenizer),
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **sizes,
    )
    return save_random_model(folder, config, tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family, built once."""
    root = tmp_path_factory.mktemp("models")

    def build_once(family: str) -> Path:
        folder = root / family
        return folder if folder.exists() else build_model(folder, family)

    return build_once


@pytest.fixture(scope="session")
def tiny(tiny_folder: Callable[[str], Path]) -> Callable[[str], lemoe.BaseModel]:
    """A tiny model of a family, loaded once."""
    loaded: dict[str, lemoe.BaseModel] = {}

    def load_once(family: str) -> lemoe.BaseModel:
        if family not in loaded:
            loaded[family] = lemoe.load_base(str(tiny_folder(family)), device="cpu")
        return loaded[family]

    return load_once


@pytest.fixture(scope="session")
def base(tiny: Callable[[str], lemoe.BaseModel]) -> lemoe.BaseModel:
    """A tiny llama, for what does not depend on the family."""
    return tiny("llama")


@pytest.fixture(scope="session")
def facts() -> list[lemoe.Edit]:
    """Six edits about five subjects."""
    return [
        lemoe.Edit(prompt, target, subject, id=f"fact-{number}")
        for number, (subject, prompt, target) in enumerate(FACTS)
    ]


@pytest.fixture(scope="session")
def paper() -> Callable[..., lemoe.Settings]:
    """Settings of preset `paper`, small enough for a tiny model."""

    def make_settings(**given: object) -> lemoe.Settings:
        small = {"layer": 1, "width": 8, "router_width": 16, "steps": 6, "round_size": 2}
        return lemoe.resolve_settings("paper", None, {**small, **given})

    return make_settings


@pytest.fixture(scope="session")
def anchor() -> Callable[..., lemoe.Settings]:
    """Settings of preset `anchor`, small enough for a tiny model."""

    def make_settings(**given: object) -> lemoe.Settings:
        small = {"layer": 1, "steps": 12, "round_size": 2, "variants": 2, "negatives": 2}
        return lemoe.resolve_settings("anchor", None, {**small, **given})

    return make_settings


@pytest.fixture(scope="session")
def edited(
    tiny: Callable[[str], lemoe.BaseModel], facts: list[lemoe.Edit], paper: Callable[..., lemoe.Settings]
) -> Callable[[str], lemoe.AdaptorState]:
    """Two rounds of one run on the tiny model of a family, trained once."""
    states: dict[str, lemoe.AdaptorState] = {}

    def train_once(family: str) -> lemoe.AdaptorState:
        if family not in states:
            base = tiny(family)
            first = lemoe.train_round(base, facts[:2], paper())
            states[family] = lemoe.stack([first, lemoe.train_round(base, facts[2:4], paper(), first)])
        return states[family]

    return train_once


@pytest.fixture(scope="session")
def trained(edited: Callable[[str], lemoe.AdaptorState]) -> lemoe.AdaptorState:
    """Two rounds of one run on the tiny llama."""
    return edited("llama")


@pytest.fixture(scope="session")
def real_base() -> lemoe.BaseModel:
    """The embedded model, SmolLM2-135M-Instruct."""
    return lemoe.load_base("llama", device="cpu")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Published data sets as their authors wrote them; they are not part of the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the published data sets are not on this machine")
    return folder
