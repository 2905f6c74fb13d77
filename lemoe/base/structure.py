"""The parts of a causal language model, found by its structure rather than by family names.

Editing needs four: the decoder (the stack of layers), one layer's FFN with the residual stream it adds
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
        output_module: the module that returns its output: `entry` itself in most families (`mlp`), another in OPT
            (`fc1`, `fc2`) and in Gemma 2 and 3 (`mlp` and the norm after it).
        path: the FFN's name in the model, as adaptors store it.
        hidden, intermediate: its widths.
        gated: whether it multiplies two up-projections (GLU).
        self_contained: whether `entry` is the whole FFN, so that nothing else reads its input.
    """

    output_module: nn.Module
    path: str
    hidden: int
    intermediate: int
    gated: bool
    self_contained: bool

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every parameter of the frozen FFN, in a stable order."""
        for part in dict.fromkeys((self.entry, self.output_module)):
            for name, tensor in sorted(named_weights(part)):
                yield f"{type(part).__name__}.{name}", tensor


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out features, in features) of a linear map, None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None


@contextmanager
def raise_as_model_error(what: str) -> Iterator[None]:
    """Turn the errors of a model with an unexpected structure into a ModelError that begins with `what`."""
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
        ModelError: if the model has no list of layers of one class.
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
    """The FFN inside one decoder layer, or the one at `given` (a path inside the layer).

    An FFN is a module outside attention that maps `hidden` to a wider space and back, or, where there is none, one
    that chooses among such maps (a mixture of experts). One that is a module by itself is
    preferred to linear maps among the layer's other modules.

    Raises:
        ModelError: if there is none or several, listing the candidates and how to choose one.
    """
    candidates = _find_linear_ffns(layer, hidden, layer_path) or _find_moe_ffns(layer, hidden, layer_path)
    sites = [site for site in candidates if given in (None, _path_in_layer(site, layer_path))]
    for chosen in (sites, [site for site in sites if site.self_contained]):
        if len(chosen) == 1:
            return chosen[0]
    choices = [_path_in_layer(site, layer_path) for site in candidates]
    tree = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
    raise ModelError(
        f"{layer_path}: {'no FFN' if not sites else 'several FFNs'} found"
        + (f" at {given!r}" if given else "")
        + f". Candidates: {', '.join(choices) or 'none'}. The layer holds: {tree}. "
        "Name the right one with `layer_path` (a path inside the layer, for example `mlp`)."
    )


def _path_in_layer(site: FFNSite, layer_path: str) -> str:
    return site.path[len(layer_path) + 1 :]


def _find_linear_ffns(layer: nn.Module, hidden: int, layer_path: str) -> list[FFNSite]:
    found = []
    for path, module in layer.named_modules():
        if _is_attention(path, module):
            continue
        linears = {name: child for name, child in module.named_children() if linear_shape(child)}
        site = _match_ffn(module, linears, hidden)
        if site:
            entry, output_module, intermediate, gated = site
            activation = _find_activation(module)
            if activation is not None:
                output_module = (_norm_after_ffn(layer) if path else None) or output_module
                full = f"{layer_path}.{path or '+'.join(linears)}"
                shape = (hidden, intermediate, gated)
                found.append(FFNSite(entry, layer, activation, output_module, full, *shape, entry is module))
    return found


def _find_moe_ffns(layer: nn.Module, hidden: int, layer_path: str) -> list[FFNSite]:
    """Mixtures of experts: modules of a layer that hold the matrices of all experts in one tensor."""
    found = []
    for path, module in layer.named_children():
        owners = [part for part in module.modules() if any(each.dim() == 3 for each in part.parameters(recurse=False))]
        shapes = [each.shape[1:] for each in module.parameters() if each.dim() == 3 and hidden in each.shape[1:]]
        activation = next((each for part in (*owners, module) if (each := _find_activation(part)) is not None), None)
        if _is_attention(path, module) or len(shapes) < 2 or activation is None:
            continue
        widths = [shape.numel() // hidden for shape in shapes]
        gated = len(shapes) > 2 or max(widths) == 2 * min(widths)
        full = f"{layer_path}.{path}"
        found.append(FFNSite(module, layer, activation, module, full, hidden, min(widths), gated, self_contained=False))
    return found


def _is_attention(path: str, module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or bool(re.search(r"attn|attention", path.lower()))


def _match_ffn(
    module: nn.Module, linears: dict[str, nn.Module], hidden: int
) -> tuple[nn.Module, nn.Module, int, bool] | None:
    """The first and the last module, width and whether it is gated, if the linear children form an FFN."""
    shapes = {name: shape for name, child in linears.items() if (shape := linear_shape(child))}
    for down_name, (out, width) in shapes.items():
        if out != hidden or width == hidden:
            continue
        ups = [name for name, shape in shapes.items() if shape == (width, hidden)]
        fused_ups = [name for name, shape in shapes.items() if shape == (2 * width, hidden)]
        if not ups and not fused_ups:
            continue
        own_module = len(ups) + len(fused_ups) + 1 == len(linears) and not _has_own_norms(module)
        entry = module if own_module else linears[(ups or fused_ups)[0]]
        output_module = module if own_module else linears[down_name]
        return entry, output_module, width, len(ups) == 2 or bool(fused_ups)
    return None


def _has_own_norms(module: nn.Module) -> bool:
    return any("norm" in type(child).__name__.lower() for child in module.children())


def _find_activation(module: nn.Module) -> Activation | None:
    for child in module.children():
        if not list(child.parameters()) and not isinstance(child, (nn.Dropout, nn.Identity)):
            return child
    return None


def _norm_after_ffn(layer: nn.Module) -> nn.Module | None:
    """The norm of the FFN's output, which Gemma 2 and 3 have before it is added to the residual stream."""
    return getattr(layer, "post_feedforward_layernorm", None)


def run_decoder(owner: nn.Module, layers: nn.ModuleList, probe: dict[str, Tensor]) -> tuple[list[nn.Module], Any]:
    """The modules that the decoder runs after its last layer (final norm, projections), in order, and its output.

    Raises:
        ModelError: if the module that owns the layers is not a decoder that runs on token ids and runs all layers.
    """
    order: list[nn.Module] = []
    handles: list[RemovableHandle] = []
    last = layers[-1]
    others = [child for child in owner.children() if child is not layers]
    for module in (*others, last):
        handles.append(module.register_forward_hook(lambda module, *_: order.append(module)))
    try:
        with torch.no_grad(), raise_as_model_error(f"{type(owner).__name__}: does not run on token ids by itself"):
            output = owner(**probe, use_cache=False)
            return order[order.index(last) + 1 :], output
    finally:
        for handle in handles:
            handle.remove()
