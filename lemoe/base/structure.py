"""Where things are inside a causal language model, found by its structure rather than by family names.

Editing needs four places: the decoder (the stack of layers), one layer's FFN with the residual stream it adds
to, the steps after the last layer, and the head that turns hidden states into logits.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Conv1D

from lemoe.base.hooks import Site
from lemoe.base.placement import named_weights
from lemoe.errors import ModelError

Activation = nn.Module


@dataclass(frozen=True)
class FFNSite(Site):
    """One layer's FFN.

    Attributes:
        last: the module that gives its output: `entry` itself in most families (`mlp`), another in OPT (`fc1`, `fc2`)
            and in Gemma 2 and 3 (`mlp` and the norm behind it).
        whole: whether `entry` holds all of it, so that nothing else reads its input.
    """

    last: nn.Module
    path: str
    hidden: int
    intermediate: int
    gated: bool
    whole: bool

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every parameter of the frozen FFN, in a stable order."""
        for part in dict.fromkeys((self.entry, self.last)):
            for name, tensor in sorted(named_weights(part)):
                yield f"{type(part).__name__}.{name}", tensor


def _out_in(module: nn.Module) -> tuple[int, int] | None:
    """(out features, in features) of a linear map, None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever a model that is built in another way raises into a ModelError that begins with `what`."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{what} ({type(error).__name__}: {reason}); lemoe cannot edit this model") from error


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

    An FFN is a module outside attention that maps `hidden` to a wider space and back, or, where there is none, one
    that chooses among such maps (a mixture of experts). One that is a module by itself goes before linear maps that
    stand in the layer among others.

    Raises:
        ModelError: if there is none or several, listing the candidates and how to choose one.
    """
    candidates = _candidates(layer, hidden, layer_path) or _mixtures(layer, hidden, layer_path)
    sites = [site for site in candidates if given in (None, _below(site, layer_path))]
    for chosen in (sites, [site for site in sites if site.whole]):
        if len(chosen) == 1:
            return chosen[0]
    choices = [_below(site, layer_path) for site in candidates]
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
            entry, last, intermediate, gated = site
            activation = _activation(module)
            if activation is not None:
                last = (_norm_behind(layer) if path else None) or last
                full = f"{layer_path}.{path or '+'.join(linears)}"
                whole = entry is module
                found.append(FFNSite(entry, layer, activation, last, full, hidden, intermediate, gated, whole))
    return found


def _mixtures(layer: nn.Module, hidden: int, layer_path: str) -> list[FFNSite]:
    """The parts of a layer that hold the matrices of several FFNs, all experts' in one tensor."""
    found = []
    for path, module in layer.named_children():
        owners = [part for part in module.modules() if any(each.dim() == 3 for each in part.parameters(recurse=False))]
        shapes = [each.shape[1:] for each in module.parameters() if each.dim() == 3 and hidden in each.shape[1:]]
        activation = next((each for part in (*owners, module) if (each := _activation(part)) is not None), None)
        if _is_attention(path, module) or len(shapes) < 2 or activation is None:
            continue
        widths = [shape.numel() // hidden for shape in shapes]
        gated = len(shapes) > 2 or max(widths) == 2 * min(widths)
        full = f"{layer_path}.{path}"
        found.append(FFNSite(module, layer, activation, module, full, hidden, min(widths), gated, whole=False))
    return found


def _is_attention(path: str, module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or bool(re.search(r"attn|attention", path.lower()))


def _site(
    module: nn.Module, linears: dict[str, nn.Module], hidden: int
) -> tuple[nn.Module, nn.Module, int, bool] | None:
    """The first and the last module, width and whether it is gated, if the linear children form an FFN."""
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
        last = module if alone else linears[down_name]
        return entry, last, width, len(ups) == 2 or bool(fused)
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


def run_decoder(owner: nn.Module, layers: nn.ModuleList, probe: dict[str, Tensor]) -> tuple[list[nn.Module], Any]:
    """The modules that the decoder runs after its last layer (final norm, projections), in order, and what it gives.

    Raises:
        ModelError: if the module that holds the layers is no decoder, which runs on token ids and runs them all.
    """
    order: list[nn.Module] = []
    handles: list[RemovableHandle] = []
    last = layers[-1]
    watched = [child for child in owner.children() if child is not layers]
    for module in (*watched, last):
        handles.append(module.register_forward_hook(lambda module, *_: order.append(module)))
    try:
        with torch.no_grad(), refusing(f"{type(owner).__name__}: does not run on token ids by itself"):
            output = owner(**probe, use_cache=False)
            return order[order.index(last) + 1 :], output
    finally:
        for handle in handles:
            handle.remove()
