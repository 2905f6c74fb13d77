"""The frozen base model: what `--model` names, loaded through transformers, with the places that editing needs."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lemoe import embedded
from lemoe.embedded import Notify
from lemoe.errors import ModelError
from lemoe.experts import DTYPES
from lemoe.fingerprint import Fingerprint, ffn_sha256, tokenizer_sha256, weights_sha256
from lemoe.placement import device_of, own_weights, taken
from lemoe.products import frozen_linear
from lemoe.sources import ModelSource, resolve_model
from lemoe.structure import FFNSite, find_ffn, find_layers, steps_after_layers

LOGIT_ROWS = 64  # positions whose logits over the whole vocabulary stand in memory at once, outside training steps
DeviceMap = str | Mapping[str, int | str | torch.device]


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
            ffn_sha256=ffn_sha256(site),
            weights_sha256=weights_sha256(self.model),
            tokenizer_sha256=self._tokenizer_sha256,
        )

    @cached_property
    def _tokenizer_sha256(self) -> str:
        return tokenizer_sha256(self.tokenizer)

    def _probe_input(self) -> dict[str, Tensor]:
        ids = torch.tensor([[0, 1]], device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


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
