"""Which devices the modules of a base model are on: one, several, or offloaded until they run.

A model loaded with a device map has accelerate's hooks on its modules: they move a module's arguments to its device,
and load its weights from memory or disk while it runs; in between, those are on `meta`. What lemoe adds (ids, experts,
kept activations, losses) stays on one device, that of the embeddings.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module with weights runs."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def is_offloaded(module: nn.Module) -> bool:
    """Whether some weights of a module are offloaded while it does not run."""
    return any(parameter.is_meta for parameter in module.parameters())


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters by name, not those of its submodules; loaded if they are offloaded."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return dict(module.named_parameters(recurse=False))
    hook.pre_forward(module)
    try:
        return dict(module.named_parameters(recurse=False))
    finally:
        hook.post_forward(module, None)


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter, tied ones once; of offloaded ones, one module's are loaded at a time."""
    first = {name for name, _ in module.named_parameters()}
    sources = getattr(module, "all_tied_weights_keys", {})  # offloaded ones are no longer the same tensor
    seen: set[str] = set()
    for path, part in module.named_modules():
        for name, value in own_weights(part).items():
            full = f"{path}.{name}" if path else name
            source = sources.get(full, full)
            if full in first and source not in seen:
                seen.add(source)
                yield full, value


def index_on_device(values: Tensor, *indices: Tensor) -> Tensor:
    """`values[indices]`, on the device of `values`."""
    return values[tuple(index.to(values.device) for index in indices)]
