"""What binds an adaptor to its base: the shape of the FFN it stands beside, and hashes of weights and tokenizer."""

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

SAMPLES = 1024  # values of a tensor that are hashed


@dataclass(frozen=True)
class Fingerprint:
    """What tells one base model from another, as far as an adaptor for `layer` depends on it.

    Weights are hashed as bfloat16, so that one checkpoint has one fingerprint however it is loaded.

    Attributes:
        ffn_sha256: of the edited layer's FFN.
        weights_sha256: of `SAMPLES` values of every other tensor, so that no fine-tune passes for its base.
        tokenizer_sha256: of all that decides how text becomes tokens.
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

    def differing(self, other: "Fingerprint") -> list[str]:
        """The identifying fields in which `other` differs; names and revisions are only labels."""
        return [name for name in _IDENTITY if getattr(self, name) != getattr(other, name)]

    def differences(self, other: "Fingerprint") -> list[str]:
        """One line for each identifying field in which `other` differs."""
        return [f"{name}: {getattr(self, name)} != {getattr(other, name)}" for name in self.differing(other)]

    def fits(self, other: "Fingerprint") -> bool:
        """Whether an adaptor for `self` has a place in `other` at all."""
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
    for name, tensor in site.tensors():
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(_as_bytes(tensor))
    return digest.hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Hash of `SAMPLES` values of each tensor, by name and shape."""
    digest = hashlib.sha256()
    for name, shape, sample in sorted((name, list(each.shape), _sample(each)) for name, each in named_weights(model)):
        digest.update(f"{name}{shape}".encode())
        digest.update(sample)
    return digest.hexdigest()


Stamp = tuple[object, ...]


def weights_stamp(model: nn.Module) -> Stamp:
    """What changes when other tensors stand in for weights, as in baseline `ft`, or when weights are written to.

    Reads none of them: it is where each is in memory, and how often it was written to, `.data` left aside.
    """
    return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in model.parameters())


def ffn_checksum(site: "FFNSite") -> int:
    """The sum over an FFN's bit patterns, far quicker than its hash, which tells of writes that leave no other trace.

    Weights that a device map keeps off the devices count as 0: nothing can write to them.
    """
    weights = dict.fromkeys(weight for part in (site.entry, site.exit) for weight in part.parameters())
    return sum(int(_bits(weight).sum(dtype=torch.int64)) for weight in weights if not weight.is_meta)


def _bits(weight: Tensor) -> Tensor:
    return weight.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32}.get(weight.itemsize, torch.int64))


def _sample(tensor: Tensor) -> bytes:
    return _as_bytes(tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLES)])


def _as_bytes(tensor: Tensor) -> bytes:
    content: bytes = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    return content


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of all that decides how text becomes tokens, not of padding or truncation left on by an earlier use."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    for state in ("padding", "truncation"):
        described.pop(state, None)
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
