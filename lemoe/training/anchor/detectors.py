"""The closed-form start of experts: neurons that are active at one position of an answer each.

Where an answer begins, the base model would often say something else first, or nothing, however the question is put;
further on it would go on as such words mostly go on. So the first neurons of each expert start as the ridge regressions
that tell the positions of its answer apart, by what the expert reads there. The others start at random. Of an answer
with more positions than these neurons, each detects some that follow each other, and the end has its own.

Where the answers of other edits begin, the first of these neurons is active too, and the later ones are not: an expert
whose few texts do not show it how else a question may end would mostly take that for the end of its answer. In a round
of few edits some short questions, which belong to no edit, show it that.

Where an answer begins with a token of white space alone, as years do in many vocabularies, and its question is short,
some models make that token an attention sink (Xiao et al. 2024): it holds one massive activation (Sun et al. 2024) and
next to nothing of the text, and the base goes on with any word. Experts read about the same at all of them, so that one
such text, which belongs to no edit, shows a detector what it has to expect; training on more of them hardly does.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lemoe.base.frozen import FrozenBatch

DETECTORS = 8  # neurons of an expert that detect positions of its answer, and of its end, at most
RIDGE = 1.0  # variance of the noise on inputs that the regression allows for
ACTIVE = 3.0  # wanted activation at a neuron's position; at the other ones it is the negative of it
OTHER_BEGINNINGS = (
    256  # positions at which answers of other edits begin that an expert's detectors are fitted to, at most
)
FEW_EDITS = 8  # up to so many in a round these questions are read as well
OTHER_QUESTIONS = (
    "When was it published",
    "when was it founded",
    "who wrote it",
    "Who is the founder?",
    "where is it based",
    "whats the official language",
    "What does she do for a living",
    "what is his religion",
    "who is she married to?",
    "Where was he born?",
    "its release date",
    "Tell me where the story is set.",
)
SINK_PROMPT = "When was it founded?"
SINK_SHARE = 0.6  # of the square of what an expert reads at a sink, from which on its largest element holds it
SINK_ACTIVE = 15.0  # wanted activation at a sink of the neuron for that position: there is more to outweigh
SINK_WEIGHT = 6  # positions of an answer that a sink counts as


class AnswerBatch(Protocol):
    """Texts that end in an answer; see `lemoe.training.anchor.batches.PositiveBatch`."""

    @property
    def frozen(self) -> FrozenBatch: ...
    @property
    def owners(self) -> Tensor: ...
    @property
    def normalised_inputs(self) -> Tensor: ...
    @property
    def ends(self) -> Tensor: ...


@torch.no_grad()
def fit_detectors(
    batches: Sequence[AnswerBatch], widths: Sequence[int], sinks: Mapping[int, Tensor], other_beginnings: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each expert with texts: what detects positions of its answer, and what is 1 at all of them.

    Args:
        widths: neurons of each expert.
        sinks: by the expert's index, what it may read `[hidden]` at the first token of its answer besides what it reads
            there in the texts.
        other_beginnings: `[positions, hidden]`, what an expert may read where the answer to no edit begins.

    Returns:
        by the expert's index, `[detectors, hidden]` and `[hidden]`, to be multiplied with what the expert reads.
    """
    inputs, owners, places, ends = (torch.cat(parts) for parts in zip(*map(_answer_positions, batches), strict=True))
    beginnings, beginners = inputs[places == 0].float(), owners[places == 0]
    fitted = {}
    for expert, width in enumerate(widths):
        own = owners == expert
        if bool(own.any()):
            rows, last = inputs[own].float(), int(places[own].max())
            count = min(DETECTORS, width, last + 1)
            detected = torch.arange(count, device=rows.device)
            hit = choose_detectors(places[own], ends[own], last, count).unsqueeze(1) == detected
            wanted = torch.cat([ACTIVE * (2 * hit.float() - 1), rows.new_ones(len(rows), 1)], 1)
            shown = [(rows, wanted)]
            if count > 1:
                others = _take_evenly(beginnings[beginners != expert], OTHER_BEGINNINGS)
                others = torch.cat([others, other_beginnings.float()])
                shown.append((others, _activations(0, ACTIVE, count, others)))
                if expert in sinks:
                    at_sink = sinks[expert].expand(SINK_WEIGHT, -1)
                    shown.append((at_sink, _activations(1, SINK_ACTIVE, count, at_sink)))
            rows, wanted = (torch.cat(parts) for parts in zip(*shown, strict=True))
            penalty = RIDGE * len(rows) * torch.eye(len(rows), device=rows.device)
            found = (rows.T @ torch.linalg.solve(rows @ rows.T + penalty, wanted)).T
            fitted[expert] = (found[:-1], found[-1])
    return fitted


def choose_detectors(places: Tensor, ends: Tensor, last: int, count: int) -> Tensor:
    """Which of `count` neurons detects each of these places of an answer, whose last one is `last`: `[targets]`.

    Where not every place has one of its own, the first and the end do, and what is between is shared out evenly; a
    single neuron detects the first alone.
    """
    if count > last:
        return places
    end = max(count - 1, 1)
    inner = 1 + (places - 1) * max(count - 2, 0) // max(last - 1, 1)
    return torch.where(ends, end, torch.where(places == 0, 0, inner.clamp(max=end)))


def _activations(place: int, active: float, count: int, rows: Tensor) -> Tensor:
    """What `count` detectors shall be at `rows`, all at this place of an answer, and 1: `[rows, count + 1]`."""
    wanted = rows.new_full((len(rows), count + 1), -ACTIVE)
    wanted[:, place], wanted[:, -1] = active, 1.0
    return wanted


def _take_evenly(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows, the same distance apart."""
    return rows[:: max(1, -(-len(rows) // most))]


def _answer_positions(batch: AnswerBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input `[targets, hidden]` at each position of an answer, its expert, how far into it, and whether at its end."""
    rows, columns = batch.frozen.batch.target_rows, batch.frozen.batch.target_columns
    first = batch.frozen.batch.prompt_lengths[rows] - 1
    inputs = batch.normalised_inputs[rows, columns - batch.frozen.start]
    return inputs, batch.owners[rows], columns - first, batch.ends


def is_sink(inputs: Tensor) -> bool:
    """Whether what an expert reads `[hidden]` is that of an attention sink."""
    squares = inputs.pow(2)
    return bool(squares.max() > SINK_SHARE * squares.sum())
