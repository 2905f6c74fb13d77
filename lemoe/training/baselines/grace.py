"""Baseline `grace`: a codebook of hidden states, beside which the model is as it was (arXiv 2211.11031).

Hartvigsen et al. 2023, algorithm 1. Each edit has a key, what the FFN reads at its prompt's last token; a value, which
replaces the FFN's output there and is trained until the target follows; and a radius. Wherever the FFN reads something
within the radius of its nearest key, that key's value takes the place of the FFN's output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lemoe.base.equality import TensorEquality
from lemoe.base.hooks import hooked_ffn
from lemoe.base.loading import BaseModel
from lemoe.base.placement import index_on_device
from lemoe.base.structure import FFNSite
from lemoe.base.tokens import encode_edits
from lemoe.data.edits import Edit
from lemoe.settings import Settings
from lemoe.training.baselines.live_batches import LiveBatch, live_batches, live_losses
from lemoe.training.baselines.weight_change import WeightChange
from lemoe.training.steps import OnStep, fit_round

Label = tuple[int, ...]  # an edit's target, as token ids
Replaced = Callable[[Tensor, Tensor], Tensor]  # of the FFN's input and output, each `[..., hidden]`, its new output


@dataclass(frozen=True, eq=False)
class Codebook(TensorEquality, WeightChange):
    """Keys, what takes the FFN's output near them, and how near.

    Attributes:
        layer, layer_path: where the FFN is; see `BaseModel.ffn_site`.
        labels: of each key, the target that its value is for.
        keys, values: `[keys, hidden]`.
        radii: `[keys]`, Euclidean distances.
    """

    layer: int
    layer_path: str | None
    labels: tuple[Label, ...]
    keys: Tensor
    values: Tensor
    radii: Tensor

    def tensors(self) -> Sequence[Tensor]:
        return self.keys, self.values, self.radii

    def applied(self, base: BaseModel) -> AbstractContextManager[None]:
        return _replaced_output(base.ffn_site(self.layer, self.layer_path), self.replace_near_keys)

    def replace_near_keys(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The FFN's output, or the nearest key's value where that key is near enough; of equal keys, the latest."""
        if not len(self.keys):
            return output
        nearest, distance = self._find_nearest(inputs.float().reshape(-1, inputs.shape[-1]))
        hit = (distance <= self.radii.to(distance.device)[nearest]).view(output.shape[:-1]).unsqueeze(-1)
        return torch.where(hit, self.values.to(output)[nearest].view(output.shape), output)

    def place(self, key: Tensor, value: Tensor, label: Label, radius: float) -> tuple["Codebook", int]:
        """The codebook with an edit whose FFN reads `key` `[hidden]`, and the number of the entry that answers it.

        It is a new entry unless its circle meets that of the nearest key and that has the same label: then that key's
        radius grows to hold it. Where labels differ, both take half the way.
        """
        if len(self.keys):
            nearest, distance = self._find_nearest(key.unsqueeze(0))
            number, apart = int(nearest[0]), float(distance[0])
            if apart <= float(self.radii[number]) + radius:
                radii = self.radii.clone()
                if self.labels[number] == label:
                    radii[number] = max(float(radii[number]), apart)
                    return replace(self, radii=radii), number
                radii[number] = radius = apart / 2
                return replace(self, radii=radii)._append(key, value, label, radius), len(self.keys)
        return self._append(key, value, label, radius), len(self.keys)

    def _append(self, key: Tensor, value: Tensor, label: Label, radius: float) -> "Codebook":
        return replace(
            self,
            labels=(*self.labels, label),
            keys=torch.cat([self.keys, key.unsqueeze(0)]),
            values=torch.cat([self.values, value.unsqueeze(0)]),
            radii=torch.cat([self.radii, self.radii.new_tensor([radius])]),
        )

    def _find_nearest(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Number and distance `[rows]` of the key nearest to each of `inputs` `[rows, hidden]`; of equals, the latest.

        Without matrix products, whose rounding would part a key from itself.
        """
        keys = self.keys.to(inputs.device).flip(0)
        distances = torch.cdist(inputs, keys, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.argmin(1)
        return len(keys) - 1 - nearest, distances.gather(1, nearest.unsqueeze(1)).squeeze(1)


def train_round(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, before: Codebook | None, on_step: OnStep
) -> Codebook:
    """Give each of `edits` an entry of the codebook `before`, and train those entries' values."""
    layer = settings.resolve_layer(len(base.layers), base.source.layers)
    site = base.ffn_site(layer, settings.layer_path)
    passages = encode_edits(base, edits)
    batches = live_batches(base, layer, passages, settings.batch_tokens)
    inputs, outputs = _read_prompt_ends(site, batches)
    none = inputs.new_zeros(0, inputs.shape[1])
    book = before or Codebook(layer, settings.layer_path, (), none, none, inputs.new_zeros(0))
    entries = []
    for key, value, passage in zip(inputs, outputs, passages, strict=True):
        book, entry = book.place(key, value, passage.target, settings.radius)
        entries.append(entry)
    trained, places = torch.tensor(entries).unique(return_inverse=True)
    values = book.values[trained].to(base.device).requires_grad_()
    optimiser = torch.optim.AdamW([values], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    fit_round(optimiser, lambda: _value_losses(base, site, batches, values, places), settings, on_step)
    return replace(book, values=book.values.index_copy(0, trained, values.detach().cpu()))


def _value_losses(
    base: BaseModel, site: FFNSite, batches: Sequence[LiveBatch], values: Tensor, places: Tensor
) -> Iterator[Tensor]:
    """The loss of each batch, with row `places[edit]` of `values` as the FFN's output at each prompt's last token."""
    parts = live_losses(base, batches)
    for live in batches:
        chosen = values[places[list(live.batch.rows)].to(values.device)]
        with _replaced_output(site, partial(_put_at_prompt_ends, live, chosen)):
            yield next(parts)


def _put_at_prompt_ends(live: LiveBatch, values: Tensor, inputs: Tensor, output: Tensor) -> Tensor:
    """`output` with `values` `[batch, hidden]` at the last tokens of prompts."""
    ends = tuple(index.to(output.device) for index in _prompt_ends(live))
    return live.by_text(output).index_put(ends, values.to(output)).view(output.shape)


@torch.no_grad()
def _read_prompt_ends(site: FFNSite, batches: Sequence[LiveBatch]) -> tuple[Tensor, Tensor]:
    """What the FFN reads and gives at the last token of each prompt, `[edits, hidden]`, in float32 on the CPU."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for live in batches:
        with _replaced_output(site, partial(_record_prompt_ends, live, found)):
            live.run()
    inputs, outputs = zip(*(found[row] for row in range(len(found))), strict=True)
    return torch.stack(inputs), torch.stack(outputs)


def _record_prompt_ends(
    live: LiveBatch, found: dict[int, tuple[Tensor, Tensor]], inputs: Tensor, output: Tensor
) -> Tensor:
    read, given = (index_on_device(live.by_text(each), *_prompt_ends(live)).float().cpu() for each in (inputs, output))
    found.update(zip(live.batch.rows, zip(read, given, strict=True), strict=True))
    return output


def _prompt_ends(live: LiveBatch) -> tuple[Tensor, Tensor]:
    """Row and column of the last token of each prompt of a batch."""
    columns = live.batch.prompt_lengths - 1
    return torch.arange(len(columns), device=columns.device), columns


def _replaced_output(site: FFNSite, replaced: Replaced) -> AbstractContextManager[None]:
    """While open, the FFN gives `replaced(its input, its output)`."""
    seen: list[Tensor] = []

    def record_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    def replace_output(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        if isinstance(output, tuple):  # a mixture of experts also returns how it routed
            return (replaced(seen.pop(), output[0]), *output[1:])
        return replaced(seen.pop(), output)

    return hooked_ffn(replace(site, exit=site.output_module), record_input, replace_output)
