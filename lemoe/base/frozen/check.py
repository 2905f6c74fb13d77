"""Whether the replay gives what the model itself gives: measured before anything is trained or measured through it.

An architecture may do more than its modules tell: scale, gate or normalise what a layer adds, keep a state besides
keys and values, or look ahead. So a few tokens go through the real model, with something added where an adaptor adds
it, and through the frozen pass and the replay, and all that training reads is compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lemoe.base.frozen.replay import hidden_of
from lemoe.base.frozen.scale import CALIBRATION
from lemoe.base.hooks import beside, released
from lemoe.base.loading import BaseModel
from lemoe.base.structure import FFNSite, refusing
from lemoe.base.tokens import Batch, Passage
from lemoe.errors import ModelError

if TYPE_CHECKING:
    from lemoe.base.frozen.prefix_pass import Below

LENGTH = 7  # tokens of a text
ALIKE = 3  # of them begin two texts alike
START = 2  # the column at which a replay starts that does not start at the first

RunTexts = Callable[..., "Below"]

_known: "WeakKeyDictionary[BaseModel, dict[tuple[int, str], str | None]]" = WeakKeyDictionary()


def check_replay(base: BaseModel, site: FFNSite, layer: int, run_texts: RunTexts) -> None:
    """Compare the replay above the FFN at `site` of `layer` with the model itself; measured once.

    Args:
        run_texts: the frozen pass, as `lemoe.base.frozen.run_below`.

    Raises:
        ModelError: if they differ, with what differs and how far, or if the layers cannot run by themselves.
    """
    known = _known.setdefault(base, {})
    key = (layer, site.path)
    if key not in known:
        with refusing(f"{base.source}: the layers above layer {layer} cannot be run by themselves"):
            known[key] = _problem(base, site, layer, run_texts)
    if problem := known[key]:
        raise ModelError(problem)


@dataclass(frozen=True)
class _Pair:
    """One quantity as the model itself gives it and as training would.

    `beyond` is what both have in common. What is left beyond it is the difference of two roundings, `slack` times as
    far from right as one: in bfloat16, changes at the first layers of Gemma 3 (270M) and SmolLM2 (135M) are up to
    8.6 % off, their logits 1.3 %.
    """

    name: str
    model: Tensor
    replay: Tensor
    beyond: Tensor | float = 0.0
    slack: int = 1

    @property
    def error(self) -> float:
        """Size of the difference, in sizes of what is right."""
        right, found = (each.double() - self.beyond for each in (self.model, self.replay))
        return float((found - right).norm() / right.norm().clamp(min=1e-30))


@torch.no_grad()
def _problem(base: BaseModel, site: FFNSite, layer: int, run_texts: RunTexts) -> str | None:
    ids = torch.tensor([[0, 1]], device=base.device)
    if not isinstance(getattr(base.decoder(input_ids=ids, use_cache=True), "past_key_values", None), Cache):
        return (
            f"{base.source}: cannot be edited: {type(base.decoder).__name__} gives back no key/value cache, in which "
            "the routes of texts travel while the model writes"
        )
    for pair in _pairs(base, site, layer, run_texts):
        allowed = pair.slack * torch.finfo(base.dtype).eps ** 0.5
        if not pair.error <= allowed:
            return (
                f"{base.source}: layer {layer} cannot be edited: {pair.name} would be {pair.error:.2%} off in training "
                f"({float(pair.replay.double().norm()):.4g} in size where the model itself gives "
                f"{float(pair.model.double().norm()):.4g}; {allowed:.2%} is rounding). Try another layer (--layer) or "
                f"FFN (--layer-path), or report the architecture, {type(base.model).__name__}"
            )
    return None


def _pairs(base: BaseModel, site: FFNSite, layer: int, run_texts: RunTexts) -> Iterator[_Pair]:
    passages = _passages(base)
    batch = Batch.of(passages, range(len(passages)), base.pad_token, base.device)
    spots = (batch.target_rows, batch.target_columns)
    below = run_texts(base, site, layer, passages, batch.ids.numel(), whole=True)
    delta = _random_change(below, batch)
    real = _run_model(base, site, layer, batch, delta)
    mask = batch.mask.bool()

    plain, edited = real.logits.chunk(2)
    yield _Pair("the logits before a token, which should not depend on it,", plain[0, :ALIKE], plain[1, :ALIKE])
    yield _Pair("the FFN's input", real.inputs[mask], below.inputs[below.at(batch)][mask])
    yield _Pair("the layer's output", real.output[mask], below.output[below.at(batch)][mask])
    yield _Pair("what an edit adds to the layer's output", (real.edited - real.output)[mask], delta[mask])
    yield _Pair("the logits", plain[spots], base.logits(below.base_hidden(batch)))
    for start in (0, START):
        replayed = base.logits(below.freeze(batch, start).replay(delta[:, start:]))
        yield _Pair("an edit's change of the logits", edited[spots], replayed, plain[spots].double(), slack=3)
    words = batch.labels.unique()
    some = base.logits_over(words)(below.base_hidden(batch))
    yield _Pair("the logits of some tokens", plain[spots][:, words], some)


def _passages(base: BaseModel) -> list[Passage]:
    """Two texts that begin alike, one longer than the other."""
    ids = list(base.tokenizer(CALIBRATION[0]).input_ids)
    long = tuple((ids * LENGTH)[:LENGTH])
    short = long[:ALIKE] + long[ALIKE + 1 :]
    return [Passage(long[: ALIKE + 1], long[ALIKE + 1 :]), Passage(short[:ALIKE], short[ALIKE:])]


def _random_change(below: "Below", batch: Batch) -> Tensor:
    """`[batch, seq, hidden]`, as large as what the layer gives, from column `START` on."""
    output = below.output.float()
    delta = torch.randn((*batch.ids.shape, output.shape[-1]), generator=torch.Generator().manual_seed(0))
    delta[:, :START] = 0.0
    return delta.to(output.device) * output.pow(2).mean(-1).sqrt().median()


@dataclass(frozen=True)
class _Real:
    """What the model itself gives: logits `[2 * batch, seq, vocab]`, of the base, then with something added; and
    inputs, output and edited output of the layer, `[batch, seq, hidden]`.
    """

    logits: Tensor
    inputs: Tensor
    output: Tensor
    edited: Tensor


def _run_model(base: BaseModel, site: FFNSite, layer: int, batch: Batch, delta: Tensor) -> _Real:
    seen: dict[str, Tensor] = {}
    added = torch.cat([torch.zeros_like(delta), delta])

    def change(inputs: Tensor) -> Tensor:
        seen["inputs"] = inputs.to(base.device).reshape(added.shape)
        return added.reshape(inputs.shape)

    def watch(module: torch.nn.Module, args: object, output: object) -> None:
        seen["output"] = hidden_of(output).to(base.device)

    with beside(site, change), released([base.layers[layer].register_forward_hook(watch)]):
        given = base.model(input_ids=batch.ids.repeat(2, 1), attention_mask=batch.mask.repeat(2, 1), use_cache=False)
    output, edited = seen["output"].reshape(added.shape).chunk(2)
    return _Real(given.logits.to(base.device), seen["inputs"].chunk(2)[0], output, edited)
