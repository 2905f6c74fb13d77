"""The memory that a run needs in addition to the loaded model, and how large its batches may be."""

from collections.abc import Iterable

import psutil
import torch

from lemoe.base.loading import BaseModel
from lemoe.base.structure import FFNSite

MEMORY_SHARE = 0.5  # share of the free memory that batches may take
MIN_BATCH_TOKENS = 64  # with fewer a run is not worth starting


def free_memory(devices: Iterable[torch.device]) -> int:
    """The smallest number of free bytes on any of `devices`."""
    return min(map(_device_free_memory, devices))


def _device_free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def bytes_per_token(base: BaseModel, site: FFNSite) -> int:
    """Memory that one padded token of a batch takes at most, in bytes.

    Keys and values of every layer, one layer's activations at its widest, and what the replay keeps: the FFN's input,
    the layer's output and their normalised copies in float32.
    """
    config = base.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or base.hidden_size // heads
    key_width = width * (getattr(config, "num_key_value_heads", None) or heads)
    elements = 2 * key_width * len(base.layers) + 4 * base.hidden_size + 3 * site.intermediate
    return elements * base.dtype.itemsize + 4 * 4 * base.hidden_size


def fit_batch_tokens(base: BaseModel, site: FFNSite, wanted: int) -> int:
    """`wanted` padded tokens per batch, or as many as fit into `MEMORY_SHARE` of the free memory."""
    available = int(MEMORY_SHARE * free_memory(base.devices))
    return max(MIN_BATCH_TOKENS, min(wanted, available // bytes_per_token(base, site)))
