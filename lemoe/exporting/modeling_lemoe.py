"""A language model with edits: the experts of `adaptor.safetensors` act beside one frozen FFN of the base model.

Made by lemoe (https://pypi.org/project/lemoe), which is not needed to run it. The base's weights are unchanged; this
file attaches the experts to the base, and the modules that it imports decide which expert acts.
"""

import json
import shutil
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseModel

from lemoe.adaptor.experts import Experts
from lemoe.base.hooks import Site, not_compiled
from lemoe.base.placement import device_of
from lemoe.exporting.parts import ADAPTOR, HostParts, find_adaptor
from lemoe.inference.live_adaptor import LiveAdaptor
from lemoe.routing.anchor.anchors import Anchors as StoredRouter
from lemoe.routing.router import Lineage

_ATTACHING = Lock()  # one thread at a time attaches edits


class LemoeConfig(BaseConfig):
    """The base model's configuration, and in `lemoe` what the base is, and the modules that experts are attached to."""

    model_type = "lemoe"


class LemoeForCausalLM(BaseModel):
    """The base model; its edits are attached at the first forward pass, and follow it from device to device."""

    config_class = LemoeConfig

    def __init__(self, config: LemoeConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self._edits = Edits(config)
        self._live: LiveAdaptor | None = None
        self.register_forward_pre_hook(lambda module, args: module._attach_edits() and None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._attach_edits().generate(super().generate, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(self._edits.path, Path(save_directory) / ADAPTOR)
        return result

    @not_compiled
    def _attach_edits(self) -> LiveAdaptor:
        """The attached experts, on the device of the embeddings."""
        embedding = self.get_input_embeddings()
        with _ATTACHING:
            if self._live is None or self._live.router.device != device_of(embedding):
                if self._live is not None:
                    self._live.remove()
                modules = {name: self.get_submodule(path) for name, path in self.config.lemoe["modules"].items()}
                self._live = self._edits.attach(modules, embedding)
            return self._live


# `transformers serve` looks a model's class up in its library, of which there are two instances of one class:
type(transformers).LemoeForCausalLM = LemoeForCausalLM


class Edits:
    """The contents of the adaptor's file."""

    def __init__(self, config: LemoeConfig):
        self._revision = getattr(config, "_commit_hash", None)
        self._home = config.name_or_path
        self.path = find_adaptor(self._home, self._revision)
        with safe_open(self.path, framework="pt") as file:
            header = json.loads(file.metadata()["lemoe"])
            names = list(file.keys())
            tensors = {name: file.get_tensor(name).clone() for name in names}
        self._experts = Experts(
            tensors["experts.up"],
            tensors["experts.down"],
            tensors.get("experts.gate"),
            tensors["experts.offsets"],
            tensors["experts.scale"],
        )
        self._settings = SimpleNamespace(**header["settings"])
        self._router = StoredRouter.from_tensors(self._settings, _read_lineages(header["rounds"]), tensors)

    def attach(self, modules: dict[str, nn.Module], embedding: nn.Embedding) -> LiveAdaptor:
        """Attach the experts to the decoder's FFN, on the device of the embeddings."""
        device = device_of(embedding)
        tokenizer = AutoTokenizer.from_pretrained(self._home, revision=self._revision, trust_remote_code=True)
        self._host = HostParts(embedding, tokenizer, device)
        router = self._router.to_live(self._host, self._settings)
        site = Site(modules["entry"], modules["exit"], modules["activation"])
        with torch.device("cpu"):
            experts = self._experts.to(device)
            return LiveAdaptor(modules["decoder"], site, router, experts, modules.get("layer_read"), owner=self)


def _read_lineages(rounds: list[dict[str, Any]]) -> list[Lineage]:
    return [
        lineage
        for record in rounds
        for lineage in Lineage.from_round(
            record["id"], record["parent"], record["depth"], record["experts"], len(record["edits"])
        )
    ]
