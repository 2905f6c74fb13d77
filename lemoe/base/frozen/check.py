"""Check that the replay matches the model itself, once per layer, before anything is trained or measured with it.

An architecture may do more than its modules show: scale, gate or normalise what a layer adds, keep a state besides keys
and values, or look ahead. So a few tokens run

1. through the whole model, with a random delta added where an adaptor adds its own, and
2. through the prefix pass and the replay with the same delta,

and every quantity that training reads is compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lemoe.base.equality import TensorEquality
from lemoe.base.frozen.replay import extract_hidden
from lemoe.base.frozen.scale import CALIBRATION_TEXTS
from lemoe.base.hooks import added_to_residual, removed_on_exit
from lemoe.base.loading import BaseModel
from lemoe.base.structure import FFNSite, raise_as_model_error
from lemoe.base.tokens import Batch, Passage
from lemoe.errors import ModelError

if TYPE_CHECKING:
    from lemoe.base.frozen.prefix_pass import PrefixActivations

TEXT_LENGTH = 7  # tokens of a test passage
SHARED_PREFIX = 3  # tokens of it that both test passages start with
REPLAY_START = 2  # column at which the second replay starts; the first starts at 0

RunPrefix = Callable[..., "PrefixActivations"]

_problems: "WeakKeyDictionary[BaseModel, dict[tuple[int, str], str | None]]" = WeakKeyDictionary()


def check_replay(base: BaseModel, site: FFNSite, layer: int, run_prefix: RunPrefix) -> None:
    """Compare replays above the FFN at `site` of `layer` with the model itself; once per model and layer.

    Args:
        run_prefix: `compute_prefix_activations` without this check.

    Raises:
        ModelError: if they differ, naming the quantity and its relative error, or if the layers cannot run alone.
    """
    problems = _problems.setdefault(base, {})
    key = (layer, site.path)
    if key not in problems:
        with raise_as_model_error(f"{base.source}: the layers above layer {layer} cannot be run by themselves"):
            problems[key] = _find_problem(base, site, layer, run_prefix)
    if problem := problems[key]:
        raise ModelError(problem)


@dataclass(frozen=True, eq=False)
class _Comparison(TensorEquality):
    """One quantity as the model itself computes it and as training would.

    `baseline` is subtracted from both, to compare changes. A change is a difference of two rounded values and may be
    off by `tolerance_factor` times as much: in bfloat16, changes at the first layers of Gemma 3 (270M) and SmolLM2
    (135M) are up to 8.6 % off, their logits 1.3 %.
    """

    name: str
    model: Tensor
    replay: Tensor
    baseline: Tensor | float = 0.0
    tolerance_factor: int = 1

    @property
    def error(self) -> float:
        """The norm of the difference relative to the model's own value."""
        expected, actual = (each.double() - self.baseline for each in (self.model, self.replay))
        return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


@torch.no_grad()
def _find_problem(base: BaseModel, site: FFNSite, layer: int, run_prefix: RunPrefix) -> str | None:
    ids = torch.tensor([[0, 1]], device=base.device)
    if not isinstance(getattr(base.decoder(input_ids=ids, use_cache=True), "past_key_values", None), Cache):
        return (
            f"{base.source}: cannot be edited: {type(base.decoder).__name__} returns no key/value cache, which "
            "carries the routes of texts during generation"
        )
    for pair in _compare_outputs(base, site, layer, run_prefix):
        tolerance = pair.tolerance_factor * torch.finfo(base.dtype).eps ** 0.5
        if not pair.error <= tolerance:
            return (
                f"{base.source}: layer {layer} cannot be edited: {pair.name} would be {pair.error:.2%} off in "
                f"training ({float(pair.replay.double().norm()):.4g} in size where the model itself gives "
                f"{float(pair.model.double().norm()):.4g}; {tolerance:.2%} is rounding). Try another layer (`layer`) "
                f"or FFN (`layer_path`), or report the architecture, {type(base.model).__name__}"
            )
    return None


def _compare_outputs(base: BaseModel, site: FFNSite, layer: int, run_prefix: RunPrefix) -> Iterator[_Comparison]:
    passages = _make_test_passages(base)
    batch = Batch.from_passages(passages, range(len(passages)), base.pad_token_id, base.device)
    targets = (batch.target_rows, batch.target_columns)
    prefix = run_prefix(base, site, layer, passages, batch.ids.numel(), reach="end")
    replayable = run_prefix(base, site, layer, passages, batch.ids.numel(), reach="keys_values")
    delta = _random_delta(prefix, batch)
    real = _run_model(base, site, layer, batch, delta)
    mask = batch.mask.bool()

    plain, edited = real.logits.chunk(2)
    shared = plain[:, :SHARED_PREFIX]
    yield _Comparison("the logits before a token, which should not depend on it,", shared[0], shared[1])
    yield _Comparison("the FFN's input", real.inputs[mask], prefix.inputs[prefix.node_index(batch)][mask])
    yield _Comparison("the layer's output", real.output[mask], prefix.output[prefix.node_index(batch)][mask])
    yield _Comparison("what an edit adds to the layer's output", (real.edited - real.output)[mask], delta[mask])
    yield _Comparison("the logits", plain[targets], base.logits(prefix.base_hidden(batch)))
    for start in (0, REPLAY_START):
        replayed = base.logits(replayable.freeze_batch(batch, start).replay(delta[:, start:]))
        yield _Comparison(
            "an edit's change of the logits", edited[targets], replayed, plain[targets].double(), tolerance_factor=3
        )
    token_ids = batch.labels.unique()
    some = base.logits_over(token_ids)(prefix.base_hidden(batch))
    yield _Comparison("the logits of some tokens", plain[targets][:, token_ids], some)


def _make_test_passages(base: BaseModel) -> list[Passage]:
    """Two passages with a common prefix, one longer than the other."""
    ids = list(base.tokenizer(CALIBRATION_TEXTS[0]).input_ids)
    long = tuple((ids * TEXT_LENGTH)[:TEXT_LENGTH])
    short = long[:SHARED_PREFIX] + long[SHARED_PREFIX + 1 :]
    cut = SHARED_PREFIX
    return [Passage(long[: cut + 1], long[cut + 1 :]), Passage(short[:cut], short[cut:])]


def _random_delta(prefix: "PrefixActivations", batch: Batch) -> Tensor:
    """`[batch, seq, hidden]`, as large as the layer's output, from column `REPLAY_START` on."""
    output = prefix.output.float()
    delta = torch.randn((*batch.ids.shape, output.shape[-1]), generator=torch.Generator().manual_seed(0))
    delta[:, :REPLAY_START] = 0.0
    return delta.to(output.device) * output.pow(2).mean(-1).sqrt().median()


@dataclass(frozen=True, eq=False)
class _ModelOutputs(TensorEquality):
    """What the model itself computes: logits `[2 * batch, seq, vocab]`, without, then with a delta; and the layer's
    inputs, output without, and output with it, `[batch, seq, hidden]`.
    """

    logits: Tensor
    inputs: Tensor
    output: Tensor
    edited: Tensor


def _run_model(base: BaseModel, site: FFNSite, layer: int, batch: Batch, delta: Tensor) -> _ModelOutputs:
    seen: dict[str, Tensor] = {}
    added = torch.cat([torch.zeros_like(delta), delta])

    def add_delta(inputs: Tensor) -> Tensor:
        seen["inputs"] = inputs.to(base.device).reshape(added.shape)
        return added.reshape(inputs.shape)

    def record_output(module: torch.nn.Module, args: object, output: object) -> None:
        seen["output"] = extract_hidden(output).to(base.device)

    with added_to_residual(site, add_delta), removed_on_exit([base.layers[layer].register_forward_hook(record_output)]):
        result = base.model(input_ids=batch.ids.repeat(2, 1), attention_mask=batch.mask.repeat(2, 1), use_cache=False)
    output, edited = seen["output"].reshape(added.shape).chunk(2)
    return _ModelOutputs(result.logits.to(base.device), seen["inputs"].chunk(2)[0], output, edited)
