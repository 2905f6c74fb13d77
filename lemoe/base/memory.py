"""What a run needs beside the loaded model, and how large its batches may be."""

from collections.abc import Iterable

import psutil
import torch

from lemoe.base.loading import BaseModel
from lemoe.base.structure import FFNSite

SHARE = 0.5  # of the free memory that batches may take
SMALLEST = 64  # tokens; below this a run is not worth starting


def free_memory(devices: Iterable[torch.device]) -> int:
    """Bytes that are free on the device, of these, that has the least."""
    return min(map(_free_on, devices))


def _free_on(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def bytes_per_token(base: BaseModel, site: FFNSite) -> int:
    """What one padded token of a batch takes at most, bytes.

    Keys and values of every layer, one layer's activations at its widest, and what is kept of it for the replay: the
    FFN's input, the layer's output and their normalised copies in float32.
    """
    config = base.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or base.hidden_size // heads
    key_width = width * (getattr(config, "num_key_value_heads", None) or heads)
    elements = 2 * key_width * len(base.layers) + 4 * base.hidden_size + 3 * site.intermediate
    return elements * base.dtype.itemsize + 4 * 4 * base.hidden_size


def fitting_tokens(base: BaseModel, site: FFNSite, wanted: int) -> int:
    """`wanted` padded tokens a batch, or as many as half of the free memory holds."""
    return max(SMALLEST, min(wanted, int(SHARE * free_memory(base.devices)) // bytes_per_token(base, site)))
