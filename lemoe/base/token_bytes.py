"""The bytes that a token writes, as the tokenizer's own decoder has it.

A vocabulary does not tell: one written in plain characters may hold the letters with which another writes bytes.
"""

import json
import re
from collections.abc import Callable
from typing import Any

Step = dict[str, Any]  # one decoder (or pre-tokenizer) as the tokenizers library writes it
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_reader(tokenizer: Any) -> Callable[[str], bytes]:
    """What gives the bytes of an ordinary token, with the spaces that stand around it in a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = None if backend is None else _decoder_steps(backend)
    if steps is None:
        return _own_reader(tokenizer)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _ByteLevel(_byte_alphabet(), frozenset(tokenizer.get_added_vocab()))
    return _Plain([undo for step in steps if (undo := _undoing(step))], bytewise="ByteFallback" in kinds)


class _ByteLevel:
    """Every character stands for a byte, but in `added` tokens, and those with any other character."""

    def __init__(self, alphabet: dict[str, int], added: frozenset[str]):
        self._alphabet, self._added = alphabet, added

    def __call__(self, token: str) -> bytes:
        values = [self._alphabet[char] for char in token if char in self._alphabet]
        as_it_stands = token in self._added or len(values) < len(token)
        return token.encode("utf-8", "replace") if as_it_stands else bytes(values)


class _Plain:
    """A token is text once what the decoder puts right is put right; `<0x41>` is a byte if `bytewise`."""

    def __init__(self, undo: list[Callable[[str], str]], bytewise: bool):
        self._undo, self._bytewise = undo, bytewise

    def __call__(self, token: str) -> bytes:
        if self._bytewise and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for undo in self._undo:
            token = undo(token)
        return token.encode("utf-8", "replace")


def _decoder_steps(backend: Any) -> list[Step] | None:
    """The decoder's steps; those of the pre-tokenizer without one, whose marks then stay in the text.

    None where they are code of the tokenizer's own.
    """
    try:
        steps = _flattened(backend.decoder, "decoders")
        if backend.decoder is None:
            steps = [*_flattened(backend.pre_tokenizer, "pretokenizers"), {"type": "Joined"}]
            marks = {"ByteLevel", "Metaspace"}
            steps = [step for step in steps if step["type"] in marks] or steps[-1:]
    except Exception as error:  # what the library raises for them has no class of its own
        if type(error) is not Exception:
            raise
        return None
    return steps


def _flattened(part: Any, inner: str) -> list[Step]:
    if part is None:
        return []
    described = json.loads(part.__getstate__())
    return _parts(described, inner)


def _parts(described: Step, inner: str) -> list[Step]:
    if inner not in described:
        return [described]
    return [step for part in described[inner] for step in _parts(part, inner)]


def _undoing(step: Step) -> Callable[[str], str] | None:
    """How one step changes a token in the middle of a text; None if it does not."""
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


def _own_reader(tokenizer: Any) -> Callable[[str], bytes]:
    """That of a tokenizer written in Python, by its own alphabet of bytes or its own way from tokens to text."""
    alphabet = getattr(tokenizer, "byte_decoder", None)
    if isinstance(alphabet, dict):
        return _ByteLevel(alphabet, frozenset(tokenizer.get_added_vocab()))

    def follow(token: str) -> str:
        """What the token adds to a text that ends in the token itself: so nothing at its start is stripped."""
        alone: str = tokenizer.convert_tokens_to_string([token])
        twice: str = tokenizer.convert_tokens_to_string([token, token])
        return twice[len(alone) :]

    return _Plain([follow], bytewise=True)


def _byte_alphabet() -> dict[str, int]:
    """The characters with which byte-level tokenizers write bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(shifted)}
