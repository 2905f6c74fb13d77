"""The bytes that a token stands for, according to the tokenizer's own decoder.

The vocabulary alone does not tell: the same characters are text in one and encoded bytes in another.
"""

import json
import re
from collections.abc import Callable
from typing import Any

Step = dict[str, Any]  # one decoder (or pre-tokenizer) as the tokenizers library writes it
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes_reader(tokenizer: Any) -> Callable[[str], bytes]:
    """A function that gives the bytes of an ordinary token, with the spaces that surround it in a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = None if backend is None else _decoder_steps(backend)
    if steps is None:
        return _slow_tokenizer_reader(tokenizer)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _ByteLevelReader(_byte_alphabet(), frozenset(tokenizer.get_added_vocab()))
    decode_steps = [decode for step in steps if (decode := _build_decode_step(step))]
    return _TextTokenReader(decode_steps, byte_fallback="ByteFallback" in kinds)


class _ByteLevelReader:
    """Byte-level tokens: each character encodes a byte, except in `added` tokens and those with other characters."""

    def __init__(self, alphabet: dict[str, int], added: frozenset[str]):
        self._alphabet, self._added = alphabet, added

    def __call__(self, token: str) -> bytes:
        values = [self._alphabet[char] for char in token if char in self._alphabet]
        is_plain_text = token in self._added or len(values) < len(token)
        return token.encode("utf-8", "replace") if is_plain_text else bytes(values)


class _TextTokenReader:
    """Tokens that are text after the decoder's steps; with `byte_fallback`, `<0x41>` is a byte."""

    def __init__(self, decode_steps: list[Callable[[str], str]], byte_fallback: bool):
        self._decode_steps, self._byte_fallback = decode_steps, byte_fallback

    def __call__(self, token: str) -> bytes:
        if self._byte_fallback and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for decode in self._decode_steps:
            token = decode(token)
        return token.encode("utf-8", "replace")


def _decoder_steps(backend: Any) -> list[Step] | None:
    """The decoder's steps, or without a decoder the pre-tokenizer's, whose marks then stay in the text.

    None if they are written in Python, so that the library cannot describe them.
    """
    try:
        steps = _flatten_steps(backend.decoder, "decoders")
        if backend.decoder is None:
            steps = [*_flatten_steps(backend.pre_tokenizer, "pretokenizers"), {"type": "Joined"}]
            marks = {"ByteLevel", "Metaspace"}
            steps = [step for step in steps if step["type"] in marks] or steps[-1:]
    except Exception as error:  # the library raises a plain Exception for steps written in Python
        if type(error) is not Exception:
            raise
        return None
    return steps


def _flatten_steps(part: Any, inner: str) -> list[Step]:
    if part is None:
        return []
    described = json.loads(part.__getstate__())
    return _expand_sequence(described, inner)


def _expand_sequence(described: Step, inner: str) -> list[Step]:
    if inner not in described:
        return [described]
    return [step for part in described[inner] for step in _expand_sequence(part, inner)]


def _build_decode_step(step: Step) -> Callable[[str], str] | None:
    """The function by which one decoder step changes a token in the middle of a text; None if it does not."""
    kind = step["type"]
    if kind == "Metaspace":
        return lambda token: token.replace(step["replacement"], " ")
    if kind == "Replace":
        pattern = step["pattern"].get("Regex") or re.escape(step["pattern"]["String"])
        return lambda token: re.sub(pattern, lambda _: step["content"], token)
    if kind == "WordPiece":
        prefix = step["prefix"]
        return lambda token: token[len(prefix) :] if token.startswith(prefix) else f" {token}"
    if kind == "BPEDecoder":
        return lambda token: token.replace(step["suffix"], " ")
    if kind == "Joined":
        return lambda token: f" {token}"
    return None


def _slow_tokenizer_reader(tokenizer: Any) -> Callable[[str], bytes]:
    """`token_bytes_reader` of a slow tokenizer (written in Python): by its `byte_decoder`, or by decoding tokens."""
    alphabet = getattr(tokenizer, "byte_decoder", None)
    if isinstance(alphabet, dict):
        return _ByteLevelReader(alphabet, frozenset(tokenizer.get_added_vocab()))

    def decode_after_itself(token: str) -> str:
        """The text of the second of two equal tokens, so that no leading space is stripped."""
        alone: str = tokenizer.convert_tokens_to_string([token])
        twice: str = tokenizer.convert_tokens_to_string([token, token])
        return twice[len(alone) :]

    return _TextTokenReader([decode_after_itself], byte_fallback=True)


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of byte-level tokens encodes (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(shifted)}
