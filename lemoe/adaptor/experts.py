"""Experts: small FFNs of the base's own form, kept as one stack of neurons.

Expert `i` is the neurons `offsets[i]` to `offsets[i + 1]`; neuron `n` reads `gate[n]` and `up[n]` and writes
`down[n]`, all of them `[hidden]`. Experts of any widths stack by concatenation, and one expert's neurons can be
read from a file without the others'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.base.tensors import rms_normalise
from lemoe.routing.router import Routing

MAX_GATHERED_WIDTH = 64  # neurons per expert up to which the experts are gathered and run in one matmul
MAX_GATHERED_ROWS = 4  # mean rows per expert up to which gathering is cheaper than running them one by one

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Experts(TensorEquality):
    """A stack of experts.

    Attributes:
        up, down: `[neurons, hidden]`.
        gate: `[neurons, hidden]`, or None where the base's FFN has no gate.
        offsets: `[experts + 1]`, int64, on the CPU.
        scale: `[experts]`, the residual stream's RMS at the edited layer times the expert's own factor.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None
    offsets: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices."""
        return sum(matrix.nbytes for matrix in (self.up, self.down, self.gate) if matrix is not None)

    def prefetch(self, routing: Routing) -> None:
        """Nothing to do: all experts are in memory; see `ExpertCache.prefetch`."""

    def to(self, device: torch.device) -> "Experts":
        """The same experts with parameters on `device`."""
        return replace(self._map_matrices(lambda matrix: matrix.to(device)), scale=self.scale.to(device))

    def to_dtype(self, dtype: torch.dtype) -> "Experts":
        """The same experts with matrices of another floating-point type."""
        return self._map_matrices(lambda matrix: matrix.to(dtype))

    def to_meta(self) -> "Experts":
        """The same experts with matrices that have shapes and no values (device `meta`)."""
        return self._map_matrices(lambda matrix: matrix.to("meta"))

    def _map_matrices(self, change: Callable[[Tensor], Tensor]) -> "Experts":
        """The same experts with changed matrices."""
        gate = None if self.gate is None else change(self.gate)
        return replace(self, up=change(self.up), down=change(self.down), gate=gate)

    def select(self, chosen: Sequence[int]) -> "Experts":
        """The experts `chosen`, in that order."""
        spans = [range(int(self.offsets[index]), int(self.offsets[index + 1])) for index in chosen]
        neurons = torch.tensor([neuron for span in spans for neuron in span], dtype=torch.long)
        widths = torch.tensor([0, *(len(span) for span in spans)], dtype=torch.long)
        return Experts(
            self.up[neurons],
            self.down[neurons],
            None if self.gate is None else self.gate[neurons],
            widths.cumsum(0),
            self.scale[torch.tensor(list(chosen), dtype=torch.long)],
        )

    @classmethod
    def stack(cls, parts: Sequence["Experts"]) -> "Experts":
        """All experts of all parts, in order."""
        widths = torch.cat([torch.zeros(1, dtype=torch.long), *(part.offsets.diff() for part in parts)])
        gates = [part.gate for part in parts if part.gate is not None]
        return cls(
            torch.cat([part.up for part in parts]),
            torch.cat([part.down for part in parts]),
            torch.cat(gates) if gates else None,
            widths.cumsum(0),
            torch.cat([part.scale for part in parts]),
        )

    def delta(self, inputs: Tensor, routing: Routing, activation: Activation) -> Tensor | None:
        """What the routed experts add to the FFN's output.

        Args:
            inputs: `[batch, seq, hidden]`, the FFN's input.
            routing: the experts that act at each position.
            activation: the base FFN's own.

        Returns:
            `[batch, seq, hidden]` in float32, or None if no expert acts anywhere.
        """
        rows, columns, slots = (routing.experts >= 0).nonzero(as_tuple=True)
        if not len(rows):
            return None
        normal = rms_normalise(inputs[rows, columns])
        output = self._expert_outputs(routing.experts[rows, columns, slots], normal, activation)
        output = output * routing.weights[rows, columns, slots].unsqueeze(-1)
        return torch.zeros(inputs.shape, device=inputs.device).index_put((rows, columns), output, accumulate=True)

    def _expert_outputs(self, chosen: Tensor, normal: Tensor, activation: Activation) -> Tensor:
        """Each row of `normal` `[n, hidden]` through its expert, `chosen` `[n]`."""
        acting = chosen.unique()
        if self._uniform_width and len(acting) > 1 and len(acting) * MAX_GATHERED_ROWS >= len(chosen):
            return self._gathered_outputs(chosen, normal, activation)
        output = torch.empty_like(normal)
        for index in acting.tolist():
            routed = chosen == index
            output[routed] = self._run_expert(index, normal[routed], activation)
        return output

    @cached_property
    def _uniform_width(self) -> int:
        """Neurons of each expert if all have the same number, up to `MAX_GATHERED_WIDTH`; else 0."""
        widths = self.offsets.diff().unique()
        return int(widths) if len(widths) == 1 and int(widths) <= MAX_GATHERED_WIDTH else 0

    def _gathered_outputs(self, chosen: Tensor, normal: Tensor, activation: Activation) -> Tensor:
        """All rows at once, each with its own expert's neurons."""
        neurons = (chosen * self._uniform_width).unsqueeze(1) + torch.arange(self._uniform_width, device=chosen.device)
        gate = None if self.gate is None else self.gate[neurons]
        output = expert_output(normal.unsqueeze(1), gate, self.up[neurons], self.down[neurons], activation)
        return self.scale[chosen].unsqueeze(1) * output.squeeze(1)

    def _run_expert(self, index: int, normal: Tensor, activation: Activation) -> Tensor:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        gate = None if self.gate is None else self.gate[start:end]
        return self.scale[index] * expert_output(normal, gate, self.up[start:end], self.down[start:end], activation)


def expert_output(normal: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """The FFN `down(act(gate x) * up x)`, or `down(act(up x))` without a gate, for `normal` `[..., n, hidden]`."""
    inner = torch.matmul(normal, up.float().mT)
    if gate is None:
        inner = activation(inner)
    else:
        inner = activation(torch.matmul(normal, gate.float().mT)) * inner
    return torch.matmul(inner, down.float())
