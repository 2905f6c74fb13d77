"""Where things are inside a causal language model, found by its structure rather than by family names.

Editing needs four places: the decoder (the stack of layers), one layer's FFN with the residual stream it adds
to, the steps after the last layer, and the head that turns hidden states into logits.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Conv1D

from lemoe.errors import ModelError
from lemoe.hooks import Site
from lemoe.placement import named_weights

Activation = nn.Module


@dataclass(frozen=True)
class FFNSite(Site):
    """One layer's FFN; `whole` says that `entry` holds all of it, so that nothing else reads its input."""

    path: str
    hidden: int
    intermediate: int
    gated: bool
    whole: bool

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every parameter of the frozen FFN, in a stable order."""
        for part in dict.fromkeys((self.entry, self.exit)):
            for name, tensor in sorted(named_weights(part)):
                yield f"{type(part).__name__}.{name}", tensor


def _out_in(module: nn.Module) -> tuple[int, int] | None:
    """(out features, in features) of a linear map, None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None


def find_layers(model: nn.Module) -> tuple[str, nn.Module, nn.ModuleList]:
    """The decoder stack: its path, the module that owns it, and the list of layers.

    Raises:
        ModelError: if the model has no list of alike layers.
    """
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(layer) for layer in module}) == 1
    ]
    if not stacks:
        raise ModelError(f"{type(model).__name__}: no stack of decoder layers found; lemoe edits causal decoders")
    path, layers = max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    owner = model.get_submodule(path.rpartition(".")[0])
    return path, owner, layers


def find_ffn(layer: nn.Module, hidden: int, layer_path: str, given: str | None = None) -> FFNSite:
    """The FFN inside one decoder layer, or the one at `given` (a path below the layer).

    An FFN is a module outside attention that maps `hidden` to a wider space and back.

    Raises:
        ModelError: if there is none or several, listing the candidates and how to choose one.
    """
    sites = [site for site in _candidates(layer, hidden, layer_path) if given in (None, _below(site, layer_path))]
    if len(sites) == 1:
        return sites[0]
    choices = [_below(site, layer_path) for site in _candidates(layer, hidden, layer_path)]
    tree = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
    raise ModelError(
        f"{layer_path}: {'no FFN' if not sites else 'several FFNs'} found"
        + (f" at {given!r}" if given else "")
        + f". Candidates: {', '.join(choices) or 'none'}. The layer holds: {tree}. "
        "Name the right one with --layer-path (a path below the layer, for example `mlp`)."
    )


def _below(site: FFNSite, layer_path: str) -> str:
    return site.path[len(layer_path) + 1 :]


def _candidates(layer: nn.Module, hidden: int, layer_path: str) -> list[FFNSite]:
    found = []
    for path, module in layer.named_modules():
        if _is_attention(path, module):
            continue
        linears = {name: child for name, child in module.named_children() if _out_in(child)}
        site = _site(module, linears, hidden)
        if site:
            entry, exit_, intermediate, gated = site
            activation = _activation(module)
            if activation is not None:
                exit_ = (_norm_behind(layer) if path else None) or exit_
                full = f"{layer_path}.{path or '+'.join(linears)}"
                whole = entry is module
                found.append(FFNSite(entry, exit_, activation, full, hidden, intermediate, gated, whole))
    return found


def _is_attention(path: str, module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or bool(re.search(r"attn|attention", path.lower()))


def _site(
    module: nn.Module, linears: dict[str, nn.Module], hidden: int
) -> tuple[nn.Module, nn.Module, int, bool] | None:
    """Entry, exit, width and whether it is gated, if the linear children form an FFN."""
    shapes = {name: shape for name, child in linears.items() if (shape := _out_in(child))}
    for down_name, (out, width) in shapes.items():
        if out != hidden or width == hidden:
            continue
        ups = [name for name, shape in shapes.items() if shape == (width, hidden)]
        fused = [name for name, shape in shapes.items() if shape == (2 * width, hidden)]
        if not ups and not fused:
            continue
        alone = len(ups) + len(fused) + 1 == len(linears) and not _has_own_norms(module)
        entry = module if alone else linears[(ups or fused)[0]]
        exit_ = module if alone else linears[down_name]
        return entry, exit_, width, len(ups) == 2 or bool(fused)
    return None


def _has_own_norms(module: nn.Module) -> bool:
    return any("norm" in type(child).__name__.lower() for child in module.children())


def _activation(module: nn.Module) -> Activation | None:
    for child in module.children():
        if not list(child.parameters()) and not isinstance(child, (nn.Dropout, nn.Identity)):
            return child
    return None


def _norm_behind(layer: nn.Module) -> nn.Module | None:
    """Gemma 2 and 3 normalise what the FFN gives before it joins the residual stream."""
    return getattr(layer, "post_feedforward_layernorm", None)


def steps_after_layers(owner: nn.Module, layers: nn.ModuleList, probe: dict[str, Tensor]) -> list[nn.Module]:
    """The modules that the decoder runs after its last layer (final norm, projections), in order."""
    order: list[nn.Module] = []
    handles: list[RemovableHandle] = []
    last = layers[-1]
    watched = [child for child in owner.children() if child is not layers]
    for module in (*watched, last):
        handles.append(module.register_forward_hook(lambda module, *_: order.append(module)))
    try:
        with torch.no_grad():
            owner(**probe, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return order[order.index(last) + 1 :]
