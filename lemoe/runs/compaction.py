"""Fewer and smaller experts for edits that are trained already: the edits of a round are trained again on shared ones.

Training texts are made from the anchors, so that no edits file is needed, with more synthetic paraphrases than an
expert of one edit is trained on. Quality is measured before and after on the edited model itself: on own prompts,
paraphrases that were not trained on, own prompts behind sentences that were not, and negative prompts.

Measured: the reliability that is left of 100 or 200 ZsRE edits at two neurons per edit is .56 with the strongest
neurons of the old experts, .61 with their down projections fitted again by least squares, .70 trained towards the old
experts' outputs, 1.00 trained on the texts. Starting from the old neurons made no significant difference.
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
from lemoe.base.matmul import use_onednn
from lemoe.base.tokens import Passage, encode_passage
from lemoe.data.edits import Edit, Probe
from lemoe.errors import AdaptorError
from lemoe.evaluation.evaluate import EvalOptions, evaluate
from lemoe.routing.anchor.anchors import Anchors, build_gate
from lemoe.routing.anchor.gate import Anchor
from lemoe.settings import Settings
from lemoe.training.anchor.batches import TrainingBatchBuilder
from lemoe.training.anchor.examples import find_subject, make_negative_prompts, make_paraphrases
from lemoe.training.anchor.round import TrainableExperts, train_experts, training_seed
from lemoe.training.anchor.wordings import Wordings, choose_wordings

EDITS_PER_EXPERT = 10  # at most
NEURONS_PER_EDIT = (2.0, 1.0, 0.5, 0.25)  # tried in turn
STEPS_FACTOR = 4  # times the steps of the original round
PARAPHRASES_FACTOR = 6  # times the paraphrases of the original round
ROUNDING_TOLERANCE = 1e-9  # of the difference of two shares
PROBES_PER_KIND = 3  # for each edit
PROBED_METRICS = ("reliability", "generality", "locality")

_UNSEEN_SENTENCES = (  # in front of no text that experts are trained on
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
    """Shares of prompts whose whole answer is right.

    Attributes:
        reliability: own prompts answered with their target.
        generality: paraphrases not trained on that are answered with it.
        distracted: own prompts behind sentences not trained on that are answered with it.
        locality: negative prompts that keep the base's answer.
    """

    reliability: float
    generality: float
    distracted: float
    locality: float

    def largest_drop(self, after: "Quality") -> float:
        """The largest drop of any share; a share without probes, which is NaN, counts as no drop."""
        drops = [one - other for one, other in zip(astuple(self), astuple(after), strict=True)]
        return max(0.0 if math.isnan(drop) else drop for drop in drops)


@dataclass(frozen=True)
class CompactionTrial:
    """A size that was tried: neurons per edit, bytes of all experts, and their quality."""

    neurons: float
    size: int
    quality: Quality


@dataclass(frozen=True)
class CompactionResult:
    """The outcome of a compaction.

    Attributes:
        state: the smallest adaptor within the tolerance; None if there is none.
        size: bytes of the original experts.
        before: quality of the original experts.
        trials: the sizes tried, the largest first; the last but one, or the last, is the one in `state`.
        left_out: how many superseded edits are left out.
    """

    state: AdaptorState | None
    size: int
    before: Quality
    trials: tuple[CompactionTrial, ...]
    left_out: int


def compact_adaptor(
    base: BaseModel,
    state: AdaptorState,
    *,
    tolerance: float = 0.01,
    notify: Callable[[str], None] = lambda text: None,
) -> CompactionResult:
    """Train the edits of each round again on fewer, smaller experts, as small as lose no more than `tolerance`.

    Sizes are tried from the largest down until one loses more. Superseded edits are left out, since nothing is routed
    to them; rounds whose edits share experts already stay as they are. Rounds of the result record the round that they
    come from, and are not stacked with it.

    Args:
        tolerance: how far each share of `Quality` may drop.
        notify: called with one line for each stage.

    Raises:
        AdaptorError: if the state was made for another base model or by another method, or has nothing to compact.
    """
    if state.settings.method != Anchors.method:
        raise AdaptorError(f"only experts of method `{Anchors.method}` can be compacted, not `{state.settings.method}`")
    check_base(base, state)
    superseded = state.router.superseded()
    unused = [expert for expert, edits in enumerate(_edit_indices(state)) if superseded.keys() >= set(edits)]
    state = state.drop_experts(unused) if unused else state
    if not any(_has_own_experts(record) for record in state.rounds):
        raise AdaptorError("nothing to compact: no round has several edits with experts of their own")
    probes = [probe for part in _split_rounds(state) for probe in _make_probes(base, part)]
    if not probes:
        raise AdaptorError("nothing can be measured: no anchor's prompt and target are a text of this model")
    notify("measuring the adaptor as it is")
    before = _measure_quality(base, state, probes)
    best, trials = None, []
    for neurons in NEURONS_PER_EDIT:
        notify(f"training shared experts of {neurons:g} neurons per edit")
        smaller = _compact_state(base, state, neurons)
        trials.append(CompactionTrial(neurons, smaller.experts.nbytes, _measure_quality(base, smaller, probes)))
        if before.largest_drop(trials[-1].quality) > tolerance + ROUNDING_TOLERANCE:
            break
        best = smaller
    return CompactionResult(best, state.experts.nbytes, before, tuple(trials), len(unused))


def _edit_indices(state: AdaptorState) -> list[range]:
    """The indices of the edits that each expert holds."""
    ends = list(accumulate(lineage.edits for lineage in state.lineages))
    return [range(end - lineage.edits, end) for end, lineage in zip(ends, state.lineages, strict=True)]


def _has_own_experts(record: RoundRecord) -> bool:
    return record.one_expert_per_edit and len(record.edits) > 1


def _split_rounds(state: AdaptorState) -> list[AdaptorState]:
    """Each round as a state of its own."""
    return [state.select_rounds([index]) for index in range(len(state.rounds))]


def _compact_state(base: BaseModel, state: AdaptorState, neurons: float) -> AdaptorState:
    """The state with shared experts of so many neurons per edit."""
    parts = [
        _compact_round(base, part, neurons) if _has_own_experts(part.rounds[0]) else part
        for part in _split_rounds(state)
    ]
    smaller = stack(parts)
    return replace(smaller, router=_stored_router(smaller).with_updates(_stored_router(state).updates))


def _compact_round(base: BaseModel, part: AdaptorState, neurons: float) -> AdaptorState:
    """A round, trained again on shared experts of so many neurons per edit."""
    record, settings, layer = part.rounds[0], _compaction_settings(part.settings), part.base.layer
    anchors, edits = _state_anchors(part), _decode_edits(base, part)
    smaller = replace(record, experts=-(-len(edits) // EDITS_PER_EXPERT), compacted_from=record.id)
    owners = [expert for expert, edit_range in enumerate(smaller.edit_ranges) for _ in edit_range]
    width = max(1, round(neurons * len(smaller.edit_ranges[0])))
    site = base.ffn_site(layer, settings.layer_path)
    passages = [Passage(anchor.prompt, anchor.target) for anchor in anchors]
    seed = _compaction_seed(record)
    meaning = _stored_router(part).meaning
    rng, generator = random.Random(seed), torch.Generator(base.device).manual_seed(seed)
    builder = TrainingBatchBuilder(base, site, layer, settings, edits, passages, anchors, rng, meaning, owners)
    trainable = TrainableExperts([width] * smaller.experts, site, float(part.experts.scale[0]), settings.seed).to(
        base.device
    )
    with use_onednn(base.model):
        outcome = train_experts(base, trainable, builder, settings, generator, lambda step: None)
    smaller = replace(
        smaller,
        id=_compacted_id(record, smaller.experts, width, settings),
        loss=outcome.loss,
        end_loss=outcome.end_loss,
        steps=outcome.steps,
        retried=0,
        missed=None,
    )
    groups = tuple(tuple(anchors[index] for index in edit_range) for edit_range in smaller.edit_ranges)
    experts = trainable.to_experts().to_dtype(part.experts.up.dtype)
    return replace(part, rounds=(smaller,), experts=experts, router=replace(_stored_router(part), groups=groups))


def _compaction_settings(settings: Settings) -> Settings:
    """How shared experts are trained: longer, on more paraphrases, and retried only where an answer is wrong."""
    return replace(
        settings,
        steps=STEPS_FACTOR * settings.steps,
        variants=PARAPHRASES_FACTOR * settings.variants,
        loss_target=math.inf,
    )


def _compacted_id(record: RoundRecord, experts: int, width: int, settings: Settings) -> str:
    """Hash of all that decides a compacted round's tensors."""
    made_of = ["compacted", record.id, record.dropped, experts, width, settings.steps, settings.variants]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _compaction_seed(record: RoundRecord) -> int:
    return int(record.edits_sha256[:15], 16)


def _state_anchors(part: AdaptorState) -> tuple[Anchor, ...]:
    return _stored_router(part).anchors


def _stored_router(part: AdaptorState) -> Anchors:
    assert isinstance(part.router, Anchors)
    return part.router


def _decode_edits(base: BaseModel, part: AdaptorState) -> list[Edit]:
    """The edits of a state, decoded from its anchors."""

    def decode_text(tokens: Sequence[int]) -> str:
        return str(base.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    pairs = zip(part.edits, _state_anchors(part), strict=True)
    return [
        Edit(decode_text(anchor.prompt), decode_text(anchor.target), anchor.subject, id=edit.id)
        for edit, anchor in pairs
    ]


def _make_probes(base: BaseModel, part: AdaptorState) -> list[Edit]:
    """The edits of a round with paraphrases that no expert of it, old or new, is trained on, and negative prompts."""
    record, settings, edits = part.rounds[0], _compaction_settings(part.settings), _decode_edits(base, part)
    rng = random.Random(_compaction_seed(record) + 1)
    wordings = _bank_wordings(base, part, edits)
    trained_before = make_paraphrases(edits, part.settings.variants, random.Random(training_seed(record.id)), wordings)
    trained_now = make_paraphrases(edits, settings.variants, random.Random(_compaction_seed(record)), wordings)
    fresh = make_paraphrases(edits, settings.variants, rng, wordings)
    gate = build_gate(base, _state_anchors(part), settings)
    probed = []
    for index, edit in enumerate(edits):
        trained_on = trained_before[index] + trained_now[index]
        unseen = [text for text in dict.fromkeys(fresh[index]) if text not in trained_on]
        distracted = [" ".join([*rng.sample(_UNSEEN_SENTENCES, 2), edit.prompt]) for _ in range(PROBES_PER_KIND)]
        negatives = make_negative_prompts(gate, edits, index, PROBES_PER_KIND, rng)
        rephrases = [
            Probe(text, edit.target, "paraphrase") for text in rng.sample(unseen, min(PROBES_PER_KIND, len(unseen)))
        ]
        rephrases += [Probe(text, edit.target, "distracted") for text in distracted]
        locality = [Probe(text, edit.target, "negative") for text in negatives]
        if _is_encodable(base, Probe(edit.prompt, edit.target, "edit")):
            usable_rephrases, usable_locality = (
                tuple(probe for probe in group if _is_encodable(base, probe)) for group in (rephrases, locality)
            )
            probed.append(replace(edit, rephrases=usable_rephrases, locality=usable_locality))
    return probed


def _bank_wordings(base: BaseModel, part: AdaptorState, edits: Sequence[Edit]) -> list[Wordings]:
    """How the bank of questions asks for each edit of a round, as its training found it."""
    router = _stored_router(part)
    if router.meaning is None:
        return []
    gate = build_gate(base, router.anchors, part.settings)
    subjects = [find_subject(edit, gate.lexicon) for edit in edits]
    return choose_wordings(router.meaning, router.split_keys(), gate, subjects)


def _is_encodable(base: BaseModel, probe: Probe) -> bool:
    """Whether the tokenizer and the context length allow it."""
    with suppress(ValueError):
        encode_passage(base, probe.prompt, probe.target)
        return True
    return False


def _measure_quality(base: BaseModel, state: AdaptorState, probes: Sequence[Edit]) -> Quality:
    found = evaluate(base, state, probes, EvalOptions(only=PROBED_METRICS))
    return Quality(
        reliability=found.value("reliability", "exact_match"),
        generality=found.value("generality", "exact_match", "paraphrase"),
        distracted=found.value("generality", "exact_match", "distracted"),
        locality=found.value("locality", "exact_match"),
    )
