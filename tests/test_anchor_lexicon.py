"""The bytes of tokens: whatever kind of tokenizer a model has, the gate reads all letters of a text."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from lemoe.routing.anchor.lexicon import Lexicon

TEXTS = ("The river Oder (Odra) flows past Łódź and Kraków.", "São Tomé, Ñuñoa: 東京タワー, Ђорђе Ġgantija")
SPECIAL = ["<pad>", "<unk>", "<eos>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap_tokenizer(raw: Tokenizer) -> hf.PreTrainedTokenizerFast:
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def train_byte_level(decoder: bool = True) -> hf.PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])
    if decoder:
        raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXTS, trainer)
    raw.add_tokens(["Kraków"])  # stored as plain text
    return wrap_tokenizer(raw)


def train_metaspace_raw() -> Tokenizer:
    """Its vocabulary has the letter `Ġ`, with which byte-level tokenizers write a space, but not all letters."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*SPECIAL, *BYTES],
        limit_alphabet=40,
        initial_alphabet=["Ġ"],
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS, trainer)
    return raw


def train_metaspace() -> hf.PreTrainedTokenizerFast:
    raw = train_metaspace_raw()
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return wrap_tokenizer(raw)


def train_gemma_like() -> hf.PreTrainedTokenizerFast:
    raw = train_metaspace_raw()
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrap_tokenizer(raw)


def train_word_piece() -> hf.PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=140, special_tokens=SPECIAL, show_progress=False)
    )
    return wrap_tokenizer(raw)


def train_suffixed() -> hf.PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    raw.train_from_iterator(TEXTS, trainer)
    return wrap_tokenizer(raw)


def train_whole_words() -> hf.PreTrainedTokenizerFast:
    """No decoder at all: tokens are joined by spaces."""
    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return wrap_tokenizer(raw)


class InPython:
    """A tokenizer without a fast backend, which hands tokens to the vocabulary of another one."""

    all_special_ids = (0, 1, 2)

    def __init__(self, other: hf.PreTrainedTokenizerFast):
        self._other = other

    def __call__(self, text: str, **options: Any) -> Any:
        return self._other(text, **options)

    def convert_ids_to_tokens(self, token: int) -> str:
        piece: str = self._other.convert_ids_to_tokens(token)
        return piece

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text: str = self._other.backend_tokenizer.decoder.decode(tokens)
        return text


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": train_byte_level,
    "byte-level without a decoder": lambda: train_byte_level(decoder=False),
    "metaspace with byte fallback": train_metaspace,
    "gemma": train_gemma_like,
    "word pieces": train_word_piece,
    "end of word marked": train_suffixed,
    "whole words": train_whole_words,
    "pieces in Python": lambda: InPython(train_metaspace()),
    "word pieces in Python": lambda: InPython(train_word_piece()),
}


def make_lexicon(tokenizer: Any) -> Lexicon:
    host = SimpleNamespace(tokenizer=tokenizer, embedding=nn.Embedding(600, 4), device=torch.device("cpu"))
    return Lexicon(host)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_letter_of_a_text_is_read_whatever_the_tokenizer(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    lexicon = make_lexicon(tokenizer)
    read = b"".join(map(lexicon.token_bytes, tokenizer(text, add_special_tokens=False).input_ids)).decode()
    assert "".join(read.split()) == "".join(text.split())


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_read_apart(kind: str) -> None:
    tokenizer = KINDS[kind]()
    lexicon = make_lexicon(tokenizer)
    ids = tokenizer("past Łódź and Kraków", add_special_tokens=False).input_ids
    assert b"".join(map(lexicon.token_bytes, ids)).decode().split() == ["past", "Łódź", "and", "Kraków"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Python" not in kind])
def test_special_tokens_read_as_a_space(kind: str) -> None:
    tokenizer = KINDS[kind]()
    assert make_lexicon(tokenizer).token_bytes(tokenizer.eos_token_id) == b" "


def test_a_vocabulary_in_plain_letters_may_hold_the_letter_that_stands_for_a_space_elsewhere() -> None:
    tokenizer = train_metaspace()
    assert "Ġ" in tokenizer.get_vocab()
    assert make_lexicon(tokenizer).token_bytes(tokenizer.convert_tokens_to_ids("Ġ")).decode() == "Ġ"
