"""The frozen base model: what `--model` names, loaded through transformers, with the places that editing needs."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import platformdirs
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lemoe import embedded
from lemoe.embedded import Notify
from lemoe.errors import InputError, ModelError
from lemoe.placement import device_of, named_weights, own_weights, taken
from lemoe.products import frozen_linear
from lemoe.structure import FFNSite, find_ffn, find_layers, steps_after_layers

LOGIT_ROWS = 64  # positions whose logits over the whole vocabulary stand in memory at once, outside training steps
DeviceMap = str | Mapping[str, int | str | torch.device]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """What a `--model` argument means; `layers` holds the layer to edit by method, where the preset says one."""

    name: str
    location: str
    revision: str | None = None
    embedded: bool = False
    layers: Mapping[str, int] = field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """The repository on the hub, if it is there."""
        if self.embedded:
            return embedded.HUB_ID
        return None if Path(self.location).is_dir() or self.location.count("/") != 1 else self.location

    @property
    def shared_name(self) -> str:
        """A name that says nothing of this machine: of a folder, its last part."""
        return self.name if self.hub_id else Path(self.location).name

    def __str__(self) -> str:
        if self.embedded:
            return f"{self.name} = {embedded.TITLE}, embedded"
        where = f"{self.location}@{self.revision}" if self.revision else self.location
        return where if where == self.name else f"{self.name} = {where}"


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

    def differences(self, other: "Fingerprint") -> list[str]:
        """One line for each identifying field in which `other` differs; names and revisions are only labels."""
        return [
            f"{name}: {getattr(self, name)} != {getattr(other, name)}"
            for name in _IDENTITY
            if getattr(self, name) != getattr(other, name)
        ]

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


class BaseModel:
    """A frozen causal language model with its tokenizer, in evaluation mode.

    Attributes:
        model: the transformers model; its weights are never changed.
        tokenizer: its tokenizer.
        layers: the decoder layers.
        hidden_size: width of the residual stream.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: ModelSource):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.source = source
        self.layers_path, self.decoder, self.layers = find_layers(model)
        self.embedding: nn.Embedding = model.get_input_embeddings()
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{source}: has no language-model head; lemoe edits causal language models")
        self.head: nn.Linear = head
        self.vocabulary: int = head.weight.shape[0]
        text_config = model.config.get_text_config()
        self.hidden_size: int = getattr(text_config, "hidden_size", self.embedding.weight.shape[1])
        self._softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self.max_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self._sites: dict[tuple[int, str | None], FFNSite] = {}
        self._finish = steps_after_layers(self.decoder, self.layers, self._probe_input())

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and with them all that is not the model's own."""
        return device_of(self.embedding)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All that the model runs on, the embeddings' first."""
        return tuple(dict.fromkeys(map(device_of, (self.embedding, *self.layers, self.head))))

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def end_token(self) -> int:
        """The token with which the model itself ends an answer."""
        end = self.model.generation_config.eos_token_id
        if end is None:
            end = self.tokenizer.eos_token_id
        end = end[0] if isinstance(end, list) else end
        return 0 if end is None else int(end)

    @property
    def pad_token(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.end_token if pad is None else int(pad)

    def site(self, layer: int, path: str | None = None) -> FFNSite:
        """The FFN of decoder layer `layer` (zero-based), at `path` below it if given."""
        if not 0 <= layer < len(self.layers):
            raise ModelError(f"layer {layer} is not there: {self.source} has layers 0 to {len(self.layers) - 1}")
        if (layer, path) not in self._sites:
            name = f"{self.layers_path}.{layer}"
            self._sites[layer, path] = find_ffn(self.layers[layer], self.hidden_size, name, path)
        return self._sites[layer, path]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocab]` of the last layer's output `hidden` `[..., hidden]`, on its device."""
        return self._capped(self.head(self.finish(hidden))).to(hidden.device)

    def logits_over(self, words: Tensor) -> Callable[[Tensor], Tensor]:
        """What gives logits `[..., words]` over the token ids `words` alone, for last layer outputs `[..., hidden]`."""
        chosen = {name: taken(value, words).to(words.device) for name, value in own_weights(self.head).items()}
        weight, bias = chosen["weight"], chosen.get("bias")
        return lambda hidden: self._capped(frozen_linear(self.finish(hidden).to(weight.device), weight, bias))

    def _capped(self, logits: Tensor) -> Tensor:
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    def logits_in_parts(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of `hidden` `[rows, hidden]`, `LOGIT_ROWS` rows at a time: all at once they fill the memory."""
        return (self.logits(part) for part in hidden.split(LOGIT_ROWS))

    def finish(self, hidden: Tensor) -> Tensor:
        """What the head reads, `[..., width]`, of the last layer's output `hidden` `[..., hidden]`."""
        for step in self._finish:
            hidden = step(hidden)
        return hidden

    def fingerprint(self, layer: int, path: str | None = None) -> Fingerprint:
        """What an adaptor for this layer is bound to."""
        site = self.site(layer, path)
        return Fingerprint(
            name=self.source.name,
            revision=self.source.revision,
            architecture=type(self.model).__name__,
            layer=layer,
            ffn=site.path,
            hidden=site.hidden,
            intermediate=site.intermediate,
            gated=site.gated,
            vocabulary=self.vocabulary,
            ffn_sha256=_ffn_sha256(site),
            weights_sha256=_weights_sha256(self.model),
            tokenizer_sha256=self._tokenizer_sha256,
        )

    @cached_property
    def _tokenizer_sha256(self) -> str:
        return _tokenizer_sha256(self.tokenizer)

    def _probe_input(self) -> dict[str, Tensor]:
        ids = torch.tensor([[0, 1]], device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _ffn_sha256(site: FFNSite) -> str:
    digest = hashlib.sha256()
    for name, tensor in site.tensors():
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(_as_bytes(tensor))
    return digest.hexdigest()


SAMPLES = 1024  # values of a tensor that are hashed


def _weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, shape, sample in sorted((name, list(each.shape), _sample(each)) for name, each in named_weights(model)):
        digest.update(f"{name}{shape}".encode())
        digest.update(sample)
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    return _as_bytes(tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLES)])


def _as_bytes(tensor: Tensor) -> bytes:
    content: bytes = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    return content


def _tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides how text becomes tokens, not of padding or truncation left on by an earlier use."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    for state in ("padding", "truncation"):
        described.pop(state, None)
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def model_presets() -> dict[str, Mapping[str, Any]]:
    """The names that `--model` knows: ours, then the user's own file, which wins."""
    presets = yaml.safe_load(resources.files("lemoe").joinpath("presets/models.yaml").read_text())
    own = Path(os.environ.get("LEMOE_MODELS") or Path(platformdirs.user_config_dir("lemoe")) / "models.yaml")
    if not own.is_file():
        if os.environ.get("LEMOE_MODELS"):
            raise InputError(f"{own}: no such file, but LEMOE_MODELS names it")
        return dict(presets)
    try:
        mine = yaml.safe_load(own.read_text()) or {}
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise InputError(f"{own}: not valid YAML: {error}") from None
    if not isinstance(mine, dict) or not all(_names_a_model(entry) for entry in mine.values()):
        raise InputError(f"{own}: expected lines like `name: {{hub: org/name, layers: {{anchor: 28}}}}`")
    return {**presets, **mine}


_ENTRY_KEYS = {"hub", "embedded", "layers"}


def _names_a_model(entry: Any) -> bool:
    if not isinstance(entry, dict) or len({"hub", "embedded"} & set(entry)) != 1 or not set(entry) <= _ENTRY_KEYS:
        return False
    layers = entry.get("layers", {})
    texts = [entry[key] for key in ("hub", "embedded") if key in entry]
    return all(isinstance(text, str) and text for text in texts) and (
        isinstance(layers, dict) and all(isinstance(layer, int) for layer in layers.values())
    )


def resolve_model(name: str, revision: str | None = None) -> ModelSource:
    """What `name` means: a folder, a preset name, or a hub id `org/name[@revision]`.

    Raises:
        ModelError: if it is none of these, with the names that are known.
    """
    if name and Path(name).is_dir():
        return ModelSource(name, str(Path(name)), revision)
    presets = model_presets()
    if name in presets:
        entry = presets[name]
        if "embedded" in entry and revision:
            raise ModelError(f"--revision {revision}: {name} is embedded and has one revision only")
        if "embedded" in entry:
            return ModelSource(name, str(entry["embedded"]), None, embedded=True, layers=entry.get("layers", {}))
        return _hub_source(name, str(entry["hub"]), revision, entry.get("layers", {}))
    if "/" in name and not name.startswith((".", "/", "~")):
        return _hub_source(name, name, revision, {})
    raise ModelError(
        f"--model {name}: no such folder or preset. Give a local folder, a hub id (org/name[@revision]), "
        f"or one of: {', '.join(sorted(presets))}"
    )


def _hub_source(name: str, hub: str, revision: str | None, layers: Mapping[str, int]) -> ModelSource:
    location, _, pinned = hub.partition("@")
    return ModelSource(name, location, revision or pinned or None, layers=layers)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes cuda, then mps, then cpu.

    Raises:
        ModelError: if the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        accelerators = (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        there = ["cpu", *(kind for kind, available in accelerators if available)]
        reason = str(error).splitlines()[0][:80]
        raise ModelError(f"--device {name}: not available here ({reason}); there is: {', '.join(there)}") from None
    return device


def load_base(
    name: str = "llama",
    *,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    notify: Notify = lambda stage: None,
) -> BaseModel:
    """Load a base model, frozen, ready for editing.

    Args:
        name: a preset name, a local folder, or a hub id `org/name[@revision]`.
        device: `auto`, or a torch device.
        device_map: instead of one device, for a model too large for it: `auto`, `balanced`, `sequential`, or a device,
            `cpu` or `disk` for each part of the model by name, as transformers takes it.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: as stored, but float32 on CPU.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code that the repository brings. Only for sources you trust.
        notify: called with one line for each stage that takes time.

    Raises:
        ModelError: if the model cannot be found, loaded or edited, the device is not there, or a map is given as well.
    """
    transformers_logging.disable_progress_bar()
    source = resolve_model(name, revision)
    place = _place(device, device_map)
    location = str(embedded.embedded_folder(notify)) if source.embedded else source.location
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.revision:
        options["revision"] = source.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=_dtype(dtype, place), device_map=device_map, **options
        )
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{source}: cannot be loaded: {reason}") from None
    return BaseModel(model.to(place) if device_map is None else model, tokenizer, source)


def answer(base: BaseModel, prompt: str, max_new_tokens: int = 32) -> str:
    """The model's greedy continuation of `prompt`, edited if an adaptor is inserted."""
    inputs = base.tokenizer(prompt, return_tensors="pt").to(base.device)
    ids = base.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=base.pad_token)
    text: str = base.tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


def _place(device: str, device_map: DeviceMap | None) -> torch.device:
    """The device, or the kind of those on which a map lets the model run."""
    if device_map is None:
        return pick_device(device)
    if device != "auto":
        raise ModelError(
            f"--device {device} and --device-map exclude each other: give one device, or a map over several"
        )
    named = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    return torch.device("cpu") if {str(place) for place in named} <= {"cpu", "disk"} else pick_device()


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise ModelError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]
