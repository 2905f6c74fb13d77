"""Fewer and smaller experts for edits that are trained already: those of a round are taught anew to shared ones.

Texts are made from the anchors, so that no edits file is needed, and from more rewordings than an expert of one edit is
trained on. What is kept is measured before and after on the edited model itself: own prompts, rewordings that were not
trained on, own prompts behind sentences that were not, and other questions about the subjects.

What is left of the reliability of 100 or 200 ZsRE edits at two neurons an edit: .56 with the strongest neurons of the
old experts, .61 with what those write fitted anew by least squares, .70 trained towards the old experts' outputs, 1.00
trained on the texts. Starting that from the old neurons makes no difference that could not be chance.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from itertools import accumulate

import torch

from lemoe.adaptor.state import AdaptorState, RoundRecord, check_base, stack
from lemoe.base.loading import BaseModel
from lemoe.base.matmul import fast_products
from lemoe.base.tokens import Passage, encode
from lemoe.data.edits import Edit, Probe
from lemoe.errors import AdaptorError
from lemoe.evaluation.evaluate import evaluate
from lemoe.routing.anchor.anchors import Anchors, build_gate
from lemoe.routing.anchor.gate import Anchor
from lemoe.settings import Settings
from lemoe.training.anchor.batches import LessonMaker
from lemoe.training.anchor.examples import other_questions, rewordings
from lemoe.training.anchor.round import Blocks, teach, training_seed

EDITS = 10  # of a shared expert, at most
NEURONS = (2.0, 1.0, 0.5, 0.25)  # an edit, tried in turn
STEPS = 4  # times as many as a round was trained for
REWORDINGS = 4  # times as many as a round was trained on
ROUNDING = 1e-9  # of the difference of two shares
PROBES = 3  # of each kind that are measured of each edit
PROBED = ("reliability", "generality", "locality")

_UNSEEN = (  # sentences that stand in front of no text that experts are trained on
    "Rain is expected over the weekend.",
    "The committee met again on Tuesday.",
    "Tickets sold out within an hour.",
    "Her brother plays the cello in a small orchestra.",
    "The recipe needs two eggs and a pinch of salt.",
    "Nobody saw the car leave.",
    "The museum closes at five in winter.",
    "Both teams missed a penalty in the second half.",
)


@dataclass(frozen=True)
class Quality:
    """Shares of whole answers that an edited model gives.

    Attributes:
        reliability: own prompts that give their target.
        generality: rewordings not trained on that give it.
        distracted: own prompts behind sentences not trained on that give it.
        locality: other questions about the subjects that keep the base's answer.
    """

    reliability: float
    generality: float
    distracted: float
    locality: float

    def loss(self, after: "Quality") -> float:
        """The largest fall of any of them; one that cannot be measured, since it has no probes, falls by nothing."""
        falls = [one - other for one, other in zip(astuple(self), astuple(after), strict=True)]
        return max(0.0 if math.isnan(fall) else fall for fall in falls)


@dataclass(frozen=True)
class Trial:
    """A size that was tried: neurons an edit, bytes of all experts, and the quality that they have."""

    neurons: float
    size: int
    quality: Quality


@dataclass(frozen=True)
class Compacted:
    """What a compaction gives.

    Attributes:
        state: the smallest adaptor within the tolerance; None if there is none.
        size: bytes of the experts as they were.
        before: their quality.
        trials: the sizes tried, the largest first; the last but one, or the last, is the one kept.
        left_out: how many superseded edits are left out.
    """

    state: AdaptorState | None
    size: int
    before: Quality
    trials: tuple[Trial, ...]
    left_out: int


def compact(
    base: BaseModel,
    state: AdaptorState,
    *,
    tolerance: float = 0.01,
    notify: Callable[[str], None] = lambda text: None,
) -> Compacted:
    """Teach the edits of each round to fewer, smaller experts, as few bytes as lose no more than `tolerance`.

    Sizes are tried from the largest down until one loses more. Superseded edits are left out, since they answer
    nothing; rounds whose edits share experts already stay as they are. Rounds of the result remember the round that
    they come from, and are not stacked with it.

    Args:
        tolerance: how far each share of `Quality` may fall.
        notify: told what is being done.

    Raises:
        AdaptorError: if the state was made for another base model or by another method, or has nothing to compact.
    """
    if state.settings.method != Anchors.method:
        raise AdaptorError(f"only experts of method `{Anchors.method}` can be compacted, not `{state.settings.method}`")
    check_base(base, state)
    superseded = state.router.superseded()
    gone = [expert for expert, edits in enumerate(_numbers(state)) if superseded.keys() >= set(edits)]
    state = state.without(gone) if gone else state
    if not any(_shareable(record) for record in state.rounds):
        raise AdaptorError("nothing to compact: no round has several edits with experts of their own")
    probes = [probe for part in _rounds(state) for probe in _probes(base, part)]
    if not probes:
        raise AdaptorError("nothing can be measured: no anchor's prompt and target are a text of this model")
    notify("measuring the adaptor as it is")
    before = _quality(base, state, probes)
    best, trials = None, []
    for neurons in NEURONS:
        notify(f"teaching shared experts of {neurons:g} neurons an edit")
        smaller = _smaller(base, state, neurons)
        trials.append(Trial(neurons, smaller.experts.size, _quality(base, smaller, probes)))
        if before.loss(trials[-1].quality) > tolerance + ROUNDING:
            break
        best = smaller
    return Compacted(best, state.experts.size, before, tuple(trials), len(gone))


def _numbers(state: AdaptorState) -> list[range]:
    """The numbers of the edits that each expert holds."""
    ends = list(accumulate(lineage.edits for lineage in state.lineages))
    return [range(end - lineage.edits, end) for end, lineage in zip(ends, state.lineages, strict=True)]


def _shareable(record: RoundRecord) -> bool:
    return record.of_each and len(record.edits) > 1


def _rounds(state: AdaptorState) -> list[AdaptorState]:
    """Each round as a state of its own."""
    return [state.only([place]) for place in range(len(state.rounds))]


def _smaller(base: BaseModel, state: AdaptorState, neurons: float) -> AdaptorState:
    """The state with shared experts of so many neurons an edit."""
    parts = [_shared(base, part, neurons) if _shareable(part.rounds[0]) else part for part in _rounds(state)]
    return stack(parts)


def _shared(base: BaseModel, part: AdaptorState, neurons: float) -> AdaptorState:
    """A round taught anew to shared experts of so many neurons an edit."""
    record, settings, layer = part.rounds[0], _recipe(part.settings), part.base.layer
    anchors, edits = _anchors(part), _edits(base, part)
    smaller = replace(record, experts=-(-len(edits) // EDITS), compacted_from=record.id)
    owners = [expert for expert, places in enumerate(smaller.parts) for _ in places]
    width = max(1, round(neurons * len(smaller.parts[0])))
    site = base.site(layer, settings.layer_path)
    passages = [Passage(anchor.prompt, anchor.target) for anchor in anchors]
    rng, generator = random.Random(_seed(record)), torch.Generator(base.device).manual_seed(_seed(record))
    maker = LessonMaker(base, site, layer, settings, edits, passages, anchors, rng, owners)
    blocks = Blocks(smaller.experts, site, width, float(part.experts.scale[0]), settings.seed).to(base.device)
    with fast_products(base.model):
        outcome = teach(base, blocks, maker, settings, generator, lambda step: None)
    smaller = replace(
        smaller,
        id=_id(record, smaller.experts, width, settings),
        loss=outcome.loss,
        end_loss=outcome.end_loss,
        steps=outcome.steps,
        retried=0,
        missed=None,
    )
    groups = tuple(tuple(anchors[place] for place in places) for places in smaller.parts)
    experts = blocks.experts().stored_as(part.experts.up.dtype)
    return replace(part, rounds=(smaller,), experts=experts, router=Anchors(groups))


def _recipe(settings: Settings) -> Settings:
    """How shared experts are taught: longer, on more rewordings, and again only where an answer is wrong."""
    return replace(
        settings,
        steps=STEPS * settings.steps,
        variants=REWORDINGS * settings.variants,
        loss_target=math.inf,
    )


def _id(record: RoundRecord, experts: int, width: int, settings: Settings) -> str:
    """Hash of all that decides a compacted round's tensors."""
    made_of = ["compacted", record.id, record.dropped, experts, width, settings.steps, settings.variants]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _seed(record: RoundRecord) -> int:
    return int(record.edits_sha256[:15], 16)


def _anchors(part: AdaptorState) -> tuple[Anchor, ...]:
    assert isinstance(part.router, Anchors)
    return part.router.anchors


def _edits(base: BaseModel, part: AdaptorState) -> list[Edit]:
    """The edits of a state, as its anchors tell them."""

    def text(tokens: Sequence[int]) -> str:
        return str(base.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    pairs = zip(part.edits, _anchors(part), strict=True)
    return [Edit(edit.id, text(anchor.prompt), text(anchor.target), anchor.subject) for edit, anchor in pairs]


def _probes(base: BaseModel, part: AdaptorState) -> list[Edit]:
    """The edits of a round with rewordings that it neither is nor was taught, and other questions on their subjects."""
    record, settings, edits = part.rounds[0], _recipe(part.settings), _edits(base, part)
    rng = random.Random(_seed(record) + 1)
    was_taught = rewordings(edits, part.settings.variants, random.Random(training_seed(record.id)))
    is_taught = rewordings(edits, settings.variants, random.Random(_seed(record)))
    fresh = rewordings(edits, settings.variants, rng)
    gate = build_gate(base, _anchors(part), settings)
    probed = []
    for place, edit in enumerate(edits):
        unseen = [text for text in dict.fromkeys(fresh[place]) if text not in was_taught[place] + is_taught[place]]
        distracted = [" ".join([*rng.sample(_UNSEEN, 2), edit.prompt]) for _ in range(PROBES)]
        others = other_questions(gate, edits, place, PROBES, rng)
        rephrases = [Probe(text, edit.target, "reworded") for text in rng.sample(unseen, min(PROBES, len(unseen)))]
        rephrases += [Probe(text, edit.target, "distracted") for text in distracted]
        locality = [Probe(text, edit.target, "other question") for text in others]
        if _usable(base, Probe(edit.prompt, edit.target, "edit")):
            fine, other = (tuple(probe for probe in group if _usable(base, probe)) for group in (rephrases, locality))
            probed.append(replace(edit, rephrases=fine, locality=other))
    return probed


def _usable(base: BaseModel, probe: Probe) -> bool:
    """Whether this tokenizer and context can take it."""
    with suppress(ValueError):
        encode(base, probe.prompt, probe.target)
        return True
    return False


def _quality(base: BaseModel, state: AdaptorState, probes: Sequence[Edit]) -> Quality:
    found = evaluate(base, state, probes, only=PROBED)
    return Quality(
        reliability=found.value("reliability", "exact_match"),
        generality=found.value("generality", "exact_match", "reworded"),
        distracted=found.value("generality", "exact_match", "distracted"),
        locality=found.value("locality", "exact_match"),
    )
