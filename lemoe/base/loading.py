"""The frozen base model, loaded through transformers, with the modules that editing needs."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lemoe.base import embedded
from lemoe.base.embedded import Notify
from lemoe.base.fingerprint import (
    Fingerprint,
    Stamp,
    ffn_checksum,
    ffn_sha256,
    tokenizer_sha256,
    weights_sha256,
    weights_stamp,
)
from lemoe.base.head import ModelHead
from lemoe.base.hooks import removed_on_exit
from lemoe.base.placement import device_of
from lemoe.base.sources import ModelSource, resolve_model
from lemoe.base.structure import FFNSite, find_ffn, find_layers, run_decoder
from lemoe.base.tensors import DTYPES
from lemoe.errors import ModelError

LOGIT_ROWS = 64  # positions whose full-vocabulary logits are in memory at once, outside training steps
DeviceMap = str | Mapping[str, int | str | torch.device]


class BaseModel:
    """A frozen causal language model with its tokenizer, in evaluation mode.

    Attributes:
        model: the transformers model; its weights are never changed.
        tokenizer: its tokenizer.
        layers: the decoder layers.
        hidden_size: width of the residual stream.

    Example:
        >>> import lemoe
        >>> base = lemoe.load_base("llama")
        >>> inputs = base.tokenizer("The capital of France is", return_tensors="pt")
        >>> base.model(**inputs).logits.shape[-1] == base.vocabulary
        True
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: ModelSource):
        """See `load_base`."""
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
        longest = getattr(text_config, "max_position_embeddings", None)
        self.max_length: int | None = longest if longest and longest > 0 else None  # XLNet says -1
        self._sites: dict[tuple[int, str | None], FFNSite] = {}
        self._ffn_hashes: dict[tuple[int, str | None], tuple[Stamp, str]] = {}
        self._weights_hash: tuple[Stamp, str] | None = None
        self._final_modules, output = run_decoder(self.decoder, self.layers, self._probe_input())
        self._head = ModelHead(model, self.layers_path.rpartition(".")[0], head, type(output))

    def __repr__(self) -> str:
        size = f"{len(self.layers)} layers, {self.hidden_size} wide"
        kind = f"{str(self.dtype).removeprefix('torch.')} on {', '.join(map(str, self.devices))}"
        return f"BaseModel({self.source.name!r}: {type(self.model).__name__}, {size}, {kind})"

    @property
    def device(self) -> torch.device:
        """The embeddings' device, on which all tensors are that do not belong to the model."""
        return device_of(self.embedding)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that the model runs on, the embeddings' first."""
        return tuple(dict.fromkeys(map(device_of, (self.embedding, *self.layers, self.head))))

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def eos_token_id(self) -> int:
        """The id of the token with which the model ends an answer."""
        end = self.model.generation_config.eos_token_id
        if end is None:
            end = self.tokenizer.eos_token_id
        end = end[0] if isinstance(end, list) else end
        return 0 if end is None else int(end)

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eos_token_id if pad is None else int(pad)

    @cached_property
    def decoder_reads_tokens(self) -> bool:
        """Whether the model calls its decoder with token ids, as most do; vision models call it with embeddings."""
        seen: list[bool] = []
        signature = inspect.signature(self.decoder.forward)

        def record_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(signature.bind_partial(*args, **kwargs).arguments.get("input_ids") is not None)

        with (
            torch.no_grad(),
            removed_on_exit([self.decoder.register_forward_pre_hook(record_arguments, with_kwargs=True)]),
        ):
            self.model(**self._probe_input(), use_cache=False)
        return any(seen)

    def ffn_site(self, layer: int, path: str | None = None) -> FFNSite:
        """The FFN of decoder layer `layer` (zero-based), at `path` inside the layer if given."""
        if not 0 <= layer < len(self.layers):
            raise ModelError(f"layer {layer} is not there: {self.source} has layers 0 to {len(self.layers) - 1}")
        if (layer, path) not in self._sites:
            name = f"{self.layers_path}.{layer}"
            self._sites[layer, path] = find_ffn(self.layers[layer], self.hidden_size, name, path)
        return self._sites[layer, path]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocab]` of the last layer's output `hidden` `[..., hidden]`, on its device."""
        return self._head.logits(self.apply_final_norm(hidden)).to(hidden.device)

    def logits_over(self, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
        """A function of the last layer's output `[..., hidden]` that gives logits `[..., tokens]` over `token_ids`."""
        compute_logits = self._head.logits_over(token_ids)
        return lambda hidden: compute_logits(self.apply_final_norm(hidden))

    def logits_in_chunks(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of `hidden` `[rows, hidden]`, `LOGIT_ROWS` rows at a time: all at once could fill the memory."""
        return (self.logits(chunk) for chunk in hidden.split(LOGIT_ROWS))

    def apply_final_norm(self, hidden: Tensor) -> Tensor:
        """The decoder's output `[..., width]`: final norm (and projections) of the last layer's `[..., hidden]`."""
        for module in self._final_modules:
            hidden = module(hidden)
        return hidden

    def fingerprint(self, layer: int, path: str | None = None) -> Fingerprint:
        """What an adaptor for this layer is bound to; weights are hashed again only if they changed."""
        site = self.ffn_site(layer, path)
        ffn, weights = self._weight_hashes(layer, path)
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
            ffn_sha256=ffn,
            weights_sha256=weights,
            tokenizer_sha256=self._tokenizer_sha256,
        )

    def _weight_hashes(self, layer: int, path: str | None) -> tuple[str, str]:
        """Hashes of a layer's FFN and of all weights, computed again only if the weights changed."""
        site, stamp = self.ffn_site(layer, path), weights_stamp(self.model)
        ffn_stamp = (*stamp, ffn_checksum(site))
        cached = self._ffn_hashes.get((layer, path))
        changed = cached is not None and cached[0] != ffn_stamp
        if cached is None or changed:
            cached = self._ffn_hashes[layer, path] = (ffn_stamp, ffn_sha256(site))
        if self._weights_hash is None or changed or self._weights_hash[0] != stamp:
            self._weights_hash = (stamp, weights_sha256(self.model))
        return cached[1], self._weights_hash[1]

    @cached_property
    def _tokenizer_sha256(self) -> str:
        return tokenizer_sha256(self.tokenizer)

    def _probe_input(self) -> dict[str, Tensor]:
        ids = torch.tensor([[0, 1]], device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


BaseLike = BaseModel | Path | str


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
        present = ["cpu", *(kind for kind, available in accelerators if available)]
        reason = str(error).splitlines()[0][:80]
        raise ModelError(f"`device` {name}: not available here ({reason}); there is: {', '.join(present)}") from None
    return device


def load_base(
    name: Path | str = "llama",
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

    Example:
        >>> import lemoe
        >>> base = lemoe.load_base("llama", device="cpu", dtype="bfloat16")
        >>> base.dtype
        torch.bfloat16
    """
    transformers_logging.disable_progress_bar()
    source = resolve_model(str(name), revision)
    target_device = _resolve_device(device, device_map)
    location = str(embedded.embedded_folder(notify)) if source.embedded else source.location
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.revision:
        options["revision"] = source.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        tokenizer("any text")  # some invalid values in tokenizer_config.json fail only when it is used
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=_pick_dtype(dtype, target_device), device_map=device_map, **options
        )
        _check_special_tokens(model)
    except Exception as error:  # other libraries' readers raise anything on a broken file
        raise ModelError(f"{source}: cannot be loaded: {_describe_load_error(error)}") from None
    return BaseModel(model.to(target_device) if device_map is None else model, tokenizer, source)


def resolve_base(base: BaseLike) -> BaseModel:
    """The base model that is given as such, or by what `load_base` takes."""
    return base if isinstance(base, BaseModel) else load_base(base)


def answer(base: BaseLike, prompt: str, max_new_tokens: int = 32) -> str:
    """The model's greedy continuation of `prompt`, edited if an adaptor is inserted.

    Example:
        >>> import lemoe
        >>> base = lemoe.load_base("llama")
        >>> before = lemoe.answer(base, "The Eiffel Tower is located in the city of")
        >>> with lemoe.insert(base, "edits.lemoe"):
        ...     after = lemoe.answer(base, "The Eiffel Tower is located in the city of")
        >>> before == after
        False
    """
    base = resolve_base(base)
    inputs = base.tokenizer(prompt, return_tensors="pt").to(base.device)
    ids = base.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=base.pad_token_id)
    text: str = base.tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


def _resolve_device(device: str, device_map: DeviceMap | None) -> torch.device:
    """The device, or with a device map the kind of device that the model runs on."""
    if device_map is None:
        return pick_device(device)
    if device != "auto":
        raise ModelError(
            f"`device` {device} and `device_map` exclude each other: give one device, or a map over several"
        )
    named = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    return torch.device("cpu") if {str(each) for each in named} <= {"cpu", "disk"} else pick_device()


def _describe_load_error(error: Exception) -> str:
    """Why a model cannot be loaded, in one line."""
    if isinstance(error, UnpicklingError):
        return "its weights are a pickle of more than tensors, which may run any program; convert them to safetensors"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _check_special_tokens(model: PreTrainedModel) -> None:
    """Refuse special tokens in generation_config.json on which `generate` would fail.

    Raises:
        ValueError: naming the token.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.generation_config, name, None)
        ids = value if isinstance(value, list) and value else [value]
        if value is not None and not all(type(number) is int for number in ids):
            raise ValueError(f"{name} of its generation_config.json is {value!r:.60}, not a token's number")


def _pick_dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise ModelError(f"`dtype` {name}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]
