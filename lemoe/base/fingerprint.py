"""What binds an adaptor to its base: the shape of the edited FFN, and hashes of weights and tokenizer."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lemoe.base.placement import named_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lemoe.base.structure import FFNSite

SAMPLES = 1024  # values of each tensor that are hashed


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a base model, as far as an adaptor for `layer` depends on it.

    Weights are hashed as bfloat16, so that one checkpoint has one fingerprint however it is loaded.

    Attributes:
        ffn_sha256: of the edited layer's FFN.
        weights_sha256: of `SAMPLES` values of every tensor, so that a fine-tuned model differs from its base.
        tokenizer_sha256: of everything that determines how text is tokenised.
    """

    name: str
    revision: str | None
    architecture: str
    layer: int
    ffn: str
    hidden: int
    intermediate: int
    gated: bool
    vocabulary: int
    ffn_sha256: str
    weights_sha256: str
    tokenizer_sha256: str

    def differing_fields(self, other: "Fingerprint") -> list[str]:
        """The identifying fields in which `other` differs; names and revisions do not identify."""
        return [name for name in _IDENTITY if getattr(self, name) != getattr(other, name)]

    def describe_differences(self, other: "Fingerprint") -> list[str]:
        """One line for each identifying field in which `other` differs."""
        return [f"{name}: {getattr(self, name)} != {getattr(other, name)}" for name in self.differing_fields(other)]

    def is_compatible(self, other: "Fingerprint") -> bool:
        """Whether an adaptor for `self` can be inserted into `other`: layer, path and shape of the FFN agree."""
        return all(getattr(self, name) == getattr(other, name) for name in _SHAPE)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_SHAPE = ("layer", "ffn", "hidden", "gated")
_IDENTITY = (
    "architecture",
    "layer",
    "ffn",
    "hidden",
    "intermediate",
    "gated",
    "ffn_sha256",
    "weights_sha256",
    "tokenizer_sha256",
)


def ffn_sha256(site: "FFNSite") -> str:
    """Hash of all values of an FFN, by name and shape."""
    digest = hashlib.sha256()
    for name, tensor in site.named_tensors():
        digest.update(f"{name}{list(tensor.shape)}".encode())
        for part in _stored_parts(tensor):
            digest.update(_as_bytes(part))
    return digest.hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Hash of `SAMPLES` values of each tensor, by name and shape."""
    digest = hashlib.sha256()
    weights = named_weights(model)
    for name, shape, sample in sorted((name, list(each.shape), _sample_bytes(each)) for name, each in weights):
        digest.update(f"{name}{shape}".encode())
        digest.update(sample)
    return digest.hexdigest()


Stamp = tuple[object, ...]


def weights_stamp(model: nn.Module) -> Stamp:
    """Changes when weights are replaced by other tensors, as in baseline `ft`, or written to.

    It does not read the weights: it is each one's memory address and version counter, which misses writes to `.data`.
    """
    parts = (part for weight in model.parameters() for part in _stored_parts(weight))
    return tuple((part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts)


def ffn_checksum(site: "FFNSite") -> int:
    """The sum of an FFN's bit patterns, to detect writes that `weights_stamp` misses; far quicker than a hash.

    Weights that a device map offloads count as 0: nothing can write to them.
    """
    weights = dict.fromkeys(weight for part in (site.entry, site.exit) for weight in part.parameters())
    parts = (part for weight in weights if not weight.is_meta for part in _stored_parts(weight))
    return sum(int(_view_as_integers(part).sum(dtype=torch.int64)) for part in parts)


def _stored_parts(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight is made of: itself, or of a quantised one its integers, scales and the like."""
    flatten = getattr(weight, "__tensor_flatten__", None)
    if flatten is None:
        return [weight]
    names, _ = flatten()
    return [part for name in names for part in _stored_parts(getattr(weight, name))]


def _view_as_integers(weight: Tensor) -> Tensor:
    return weight.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32}.get(weight.itemsize, torch.int64))


def _sample_bytes(tensor: Tensor) -> bytes:
    parts = (part.detach().flatten() for part in _stored_parts(tensor))
    return b"".join(_as_bytes(part[:: max(1, len(part) // SAMPLES)]) for part in parts)


def _as_bytes(tensor: Tensor) -> bytes:
    content: bytes = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    return content


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of everything that determines how text is tokenised, without padding and truncation: calls set those."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    for state in ("padding", "truncation"):
        described.pop(state, None)
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
