"""Where the parts of a base model are: on one device, on several, or away until they run.

A model loaded with a device map has accelerate's hooks on its modules: they move what a module is called with to the
module's device, and bring its weights in from memory or disk while it runs; in between, those stand on `meta`. What
lemoe adds (ids, experts, kept activations, losses) stays on one device, that of the embeddings.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """Where a module that has weights runs."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def is_offloaded(module: nn.Module) -> bool:
    """Whether some weights of a module are away while it does not run."""
    return any(parameter.is_meta for parameter in module.parameters())


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters by name, not those of modules inside it; brought in if they are away."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return dict(module.named_parameters(recurse=False))
    hook.pre_forward(module)
    try:
        return dict(module.named_parameters(recurse=False))
    finally:
        hook.post_forward(module, None)


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter, each tied one once, with those of one module in memory at a time."""
    first = {name for name, _ in module.named_parameters()}
    sources = getattr(module, "all_tied_weights_keys", {})  # those that are away are no longer one and the same
    seen: set[str] = set()
    for path, part in module.named_modules():
        for name, value in own_weights(part).items():
            full = f"{path}.{name}" if path else name
            source = sources.get(full, full)
            if full in first and source not in seen:
                seen.add(source)
                yield full, value


def taken(values: Tensor, *places: Tensor) -> Tensor:
    """`values[places]`, on the device of `values`."""
    return values[tuple(place.to(values.device) for place in places)]
