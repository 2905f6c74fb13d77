"""Baseline `ultraedit`: weights changed in closed form, from one forward and backward pass (arXiv 2505.14679).

Gu et al. 2025, section 3. Of each linear map that reads an FFN's input, at each target token of a round:

1. its input `h` and the gradient `g` of the loss with respect to its output are joined to one feature;
2. features are normalised by their mean and deviation over all rounds so far (lifelong normalisation), which maps of
   the same shape share;
3. the wanted change of the output is `v = -rate |h'|^2 g'`, of the normalised parts;
4. the weight's change is the ridge regression of `v` on `h`: `(H^T H + I)^-1 H^T V`, added to the weight.

Nothing is iterated: `steps` does not count here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lemoe.base.equality import TensorEquality
from lemoe.base.hooks import removed_on_exit
from lemoe.base.loading import BaseModel
from lemoe.base.placement import index_on_device
from lemoe.base.structure import linear_shape
from lemoe.base.tokens import encode_edits
from lemoe.data.edits import Edit
from lemoe.settings import Settings
from lemoe.training.baselines.live_batches import LiveBatch, live_batches, live_losses
from lemoe.training.baselines.weight_change import AddedWeights, add_up, check_resident
from lemoe.training.steps import OnStep, Step

Shape = tuple[int, int]  # out and in features


@dataclass(frozen=True, eq=False)
class Statistics(TensorEquality):
    """Mean `[features]` and summed squared deviation from it `[features]` of `count` features."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Statistics":
        """Those of `features` `[count, features]`."""
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean).square().sum(0))

    def join(self, other: "Statistics") -> "Statistics":
        """Those of the features of both (Chan et al. 1983)."""
        count, apart = self.count + other.count, other.mean - self.mean
        squares = self.squares + other.squares + apart.square() * self.count * other.count / count
        return Statistics(count, self.mean + apart * other.count / count, squares)

    def normalise(self, features: Tensor) -> Tensor:
        deviation = (self.squares / max(self.count - 1, 1)).sqrt()
        return (features - self.mean) / (deviation + torch.finfo(features.dtype).eps)


@dataclass(frozen=True, eq=False)
class ClosedForm(AddedWeights):
    """Changed weights, and what later rounds need: the statistics of features, by the maps' shapes."""

    statistics: Mapping[Shape, Statistics] = field(default_factory=dict)

    def tensors(self) -> Sequence[Tensor]:
        return (*self.changes, *(part for each in self.statistics.values() for part in (each.mean, each.squares)))


def train_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: ClosedForm | None, on_step: OnStep
) -> ClosedForm:
    """Change the weights for `edits`, on those of `before`."""
    check_resident(base)
    first = settings.resolve_layer(len(base.layers), base.source.layers)
    maps = {path: base.model.get_submodule(path) for path in _input_map_paths(base, first, settings.layer_path)}
    with before.applied(base) if before else nullcontext():
        batches = live_batches(base, first, encode_edits(base, edits), settings.batch_tokens)
        read = _read_features(base, batches, maps, on_step)
    statistics = dict(before.statistics) if before else {}
    for path, (inputs, gradients) in read.items():
        shape, found = _shape_of(maps[path]), Statistics.of(torch.cat([inputs, gradients], 1))
        statistics[shape] = statistics[shape].join(found) if shape in statistics else found
    changes = [
        _orient(maps[path], solve_change(*features, statistics[_shape_of(maps[path])], settings.learning_rate))
        for path, features in read.items()
    ]
    return ClosedForm(tuple(read), add_up(before, changes), statistics)


def solve_change(inputs: Tensor, gradients: Tensor, statistics: Statistics, rate: float) -> Tensor:
    """The change `[in, out]` of a map's weight.

    Args:
        inputs: `[targets, in]`, at the target tokens.
        gradients: `[targets, out]`, of the loss with respect to the map's output there.
        statistics: of both, joined, over all rounds up to this one.
    """
    normalised = statistics.normalise(torch.cat([inputs, gradients], 1))
    read, wanted = normalised.split([inputs.shape[1], gradients.shape[1]], 1)
    values = -rate * read.square().sum(1, keepdim=True) * wanted
    if len(inputs) < inputs.shape[1]:  # the same by the push-through identity, with the smaller matrix
        return inputs.T @ torch.linalg.solve(inputs @ inputs.T + torch.eye(len(inputs)), values)
    return torch.linalg.solve(inputs.T @ inputs + torch.eye(inputs.shape[1]), inputs.T @ values)


def _input_map_paths(base: BaseModel, first: int, layer_path: str | None) -> Iterator[str]:
    """The paths of the linear maps that read the FFN's input, of all layers from `first` on."""
    names = {id(module): path for path, module in base.model.named_modules()}
    for layer in range(first, len(base.layers)):
        site = base.ffn_site(layer, layer_path)
        for module in site.entry.modules():
            shape = linear_shape(module)
            if shape is not None and shape[1] == site.hidden and shape[0] >= site.intermediate:
                yield names[id(module)]


def _shape_of(module: nn.Module) -> Shape:
    shape = linear_shape(module)
    assert shape is not None
    return shape


def _orient(module: nn.Module, change: Tensor) -> Tensor:
    """A change `[in, out]` as the map stores its weight."""
    return change.T.contiguous() if isinstance(module, nn.Linear) else change


def _read_features(
    base: BaseModel, batches: Sequence[LiveBatch], maps: Mapping[str, nn.Module], on_step: OnStep
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input `[targets, in]` and gradient `[targets, out]` at all target tokens, of each map, on the CPU in float32."""
    inputs: dict[str, list[Tensor]] = {path: [] for path in maps}
    gradients: dict[str, list[Tensor]] = {path: [] for path in maps}
    loss = 0.0
    parts = live_losses(base, batches)
    for live in batches:
        with _recorded_calls(maps) as calls:
            part = next(parts)
            part.backward()
        loss += float(part.detach())
        for path, (read, output) in calls.items():
            assert output.grad is not None
            inputs[path].append(_at_targets(live, read.detach()))
            gradients[path].append(_at_targets(live, output.grad))
    on_step(Step(0, 0, loss))
    return {path: (torch.cat(inputs[path]), torch.cat(gradients[path])) for path in maps}


def _at_targets(live: LiveBatch, values: Tensor) -> Tensor:
    """The rows `[targets, features]` of a module's values of all tokens."""
    return index_on_device(live.by_text(values), live.batch.target_rows, live.batch.target_columns).float().cpu()


@contextmanager
def _recorded_calls(maps: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While open, records what each map reads and returns, and has its output keep its gradient."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def record_as(path: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            output.retain_grad()
            calls[path] = (args[0], output)

        return record

    with removed_on_exit([module.register_forward_hook(record_as(path)) for path, module in maps.items()]):
        yield calls
