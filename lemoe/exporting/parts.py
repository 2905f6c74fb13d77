"""What everything that runs an exported folder needs: its adaptor's file, and the model as routers see it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn

ADAPTOR = "adaptor.safetensors"


@dataclass(eq=False)
class HostParts:
    """What a router reads of the model that it is used in."""

    embedding: nn.Embedding
    tokenizer: Any
    device: torch.device


def find_adaptor(home: str, revision: str | None) -> Path:
    """The adaptor's file of an exported folder, or of a repository on the hub."""
    folder = Path(home)
    return folder / ADAPTOR if folder.is_dir() else Path(hf_hub_download(home, ADAPTOR, revision=revision))
