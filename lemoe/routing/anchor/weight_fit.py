"""The weights of the evidence: what texts of the bank show of edits that they ask for, and of others.

For each of `FOLDS` parts of the relations, the projection is fitted on the others, and the gate reads texts of the part
that do and that do not ask for an edit: another question about its subject, in other words or nearly the same ones, the
same of a near name, a remark, or only the beginning of one of these. A logistic regression tells the two apart. So the
weights are those for relations that no projection has seen; of half of the wordings the words are known.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from lemoe.base.loading import BaseModel
from lemoe.data.question_bank import REMARK, Wording
from lemoe.routing.anchor.anchors import get_lexicon
from lemoe.routing.anchor.bank_fit import count_words, embed_mean, fit_projection
from lemoe.routing.anchor.bank_texts import FRAME, BankText, ReadText, frame_relations
from lemoe.routing.anchor.comparisons import Values
from lemoe.routing.anchor.evidence import Decision, Evidence, Judgement, question_features
from lemoe.routing.anchor.gate import Anchor, Gate
from lemoe.routing.anchor.meaning import FEATURES, Keys, Meaning, Vector
from lemoe.routing.anchor.route import Route

FOLDS = 4
KEYS_SAME, KEYS_OTHER, KEYS_HARD = 2, 2, 2  # edits that each text is read with: its own, others, and near others,
NEAREST, HARD_SHARE = 12, 0.3  # drawn from so many, each of which counts this much of an example
PREFIXES = 4  # beginnings of a text that must not open the gate,
PREFIX_SHARE = 0.8  # each of which counts this much of an example,
REMARK_SHARE = 8.0  # and an edit with a remark, of which the bank has few, this much
COPY_SHARE = 2.0  # each of which counts this much of an example
FRAMES_READ = 3  # edits of other relations in the same words that each of these is read with


def fit_weights(
    base: BaseModel, layer: int, bank: Sequence[Wording], read: Sequence[ReadText], rng: random.Random
) -> NDArray[numpy.float32]:
    """`[features]`, see `lemoe.routing.anchor.meaning.FEATURES`."""
    features, wanted, shares = _collect_evidence(base, layer, bank, read, rng)
    return _regress(features, wanted, shares).astype(numpy.float32)


@dataclass(frozen=True)
class _Key:
    """A wording as an edit's own prompt, and what it means `[rank]`."""

    wording: Wording
    vector: Vector


class _Recorder(Decision):
    """Keeps the features of every comparison, and never opens the gate."""

    margin = 0.0
    shut_below = 0.0

    def __init__(self) -> None:
        self.seen: list[Values] = []

    def judge(self, evidence: Evidence) -> Judgement:
        asked = question_features(evidence.words, evidence.meaning)
        anchors = asked.shape[1]
        found = numpy.repeat(numpy.array(evidence.subject)[:, None], anchors, 1)
        self.seen.append(numpy.concatenate([found, asked]).T)
        shut = numpy.full(anchors, -1.0)
        return shut, shut, shut


def _collect_evidence(
    base: BaseModel, layer: int, bank: Sequence[Wording], read: Sequence[ReadText], rng: random.Random
) -> tuple[Values, NDArray[numpy.bool_], Values]:
    """Features `[examples, features]`, whether the edit is asked for, and the weight of each example."""
    relations = sorted({each.text.wording.relation for each in read} - {REMARK})
    rng.shuffle(relations)
    features: list[Values] = []
    wanted: list[bool] = []
    shares: list[float] = []
    for fold in range(FOLDS):
        members = set(relations[fold::FOLDS])
        outside = [each for each in read if each.text.is_plain and each.text.wording.relation not in members]
        inside = [each for each in read if each.text.wording.relation in members]
        remarks = [each for each in read if each.text.wording.relation == REMARK][fold::FOLDS]
        if not outside:
            continue
        fit = fit_projection(layer, outside)
        for fitted, part in _share_out(fit, bank, members, [*inside, *remarks]):
            written = [each for each in part if each.text.is_key or each.text.wording.form == FRAME]
            keys = [_Key(each.text.wording, embed_mean(fit, each.mean)) for each in written]
            for each in part:
                if each.states is not None:
                    for found, is_wanted, share in _read_examples(base, fitted, each, keys, rng):
                        features.append(found)
                        wanted.append(is_wanted)
                        shares.append(share)
    return numpy.stack(features), numpy.array(wanted), numpy.array(shares)


def _share_out(
    fit: Meaning, bank: Sequence[Wording], members: set[str], texts: Sequence[ReadText]
) -> Iterator[tuple[Meaning, list[ReadText]]]:
    """Two halves of the wordings of a part of the relations, each with words that were counted without it.

    For the first half the words of the other one are known, as those of a relation of the bank are; for the second
    half nothing of its relations is.
    """
    outside = [wording for wording in bank if wording.relation not in members | {REMARK}]
    inside = [wording for wording in bank if wording.relation in members]
    halves = {wording: number % 2 for number, wording in enumerate(inside)}
    halves |= {wording: number % 2 for number, wording in enumerate(frame_relations(inside))}
    second = [wording for wording in inside if halves[wording]]
    for half, known in enumerate(([*outside, *second], outside)):
        part = [each for each in texts if halves.get(each.text.wording, 0) == half]
        yield count_words(fit, known), part


@dataclass(frozen=True)
class _Probe:
    """An edit that a text is read with: its key, whether the text asks for it, and what this example counts."""

    key: _Key
    wanted: bool
    share: float


def _read_examples(
    base: BaseModel, fit: Meaning, each: ReadText, keys: Sequence[_Key], rng: random.Random
) -> Iterator[tuple[Values, bool, float]]:
    """Features of one text with edits that it asks for, and with others."""
    assert each.states is not None
    projected = fit.project(each.states.float()).numpy()
    for subject, probes in _choose_probes(fit, each, keys, rng):
        yield from _run_gate(base, fit, each.text, projected, subject, probes, rng)


def _choose_probes(
    fit: Meaning, each: ReadText, keys: Sequence[_Key], rng: random.Random
) -> Iterator[tuple[str, list[_Probe]]]:
    """The edits that a text is read with, of its own subject, and of one of a near name."""
    text, wording = each.text, each.text.wording
    if text.copy:
        yield text.name, [_Probe(key, True, COPY_SHARE) for key in keys if key.wording == wording]
        return
    if wording.form == FRAME:
        yield text.name, _choose_framed(fit, each, keys, rng)
        return
    keys = [key for key in keys if key.wording.form != FRAME]
    same = [key for key in keys if key.wording.relation == wording.relation and key.wording != wording]
    other = [key for key in keys if key.wording.relation != wording.relation and wording.kind in ("", key.wording.kind)]
    same = rng.sample(same, min(KEYS_SAME, len(same)))
    nearest = _nearest_keys(fit, each, other)
    share = REMARK_SHARE if wording.relation == REMARK else 1.0
    yield (
        text.name,
        [
            *(_Probe(key, True, 1.0) for key in same),
            *(_Probe(key, False, share) for key in rng.sample(other, min(KEYS_OTHER, len(other)))),
            *(_Probe(key, False, share * HARD_SHARE) for key in rng.sample(nearest, min(KEYS_HARD, len(nearest)))),
        ],
    )
    near = _near_name(text, rng)
    if near and same:
        yield near, [_Probe(same[0], False, 1.0)]


def _choose_framed(fit: Meaning, each: ReadText, keys: Sequence[_Key], rng: random.Random) -> list[_Probe]:
    """One edit of the relation in other words, and the nearest edits of other relations in the same ones."""
    wording = each.text.wording
    frame = wording.template.split("{}")[1]
    others = [
        key
        for key in keys
        if key.wording.form == FRAME
        and key.wording.relation != wording.relation
        and key.wording.kind == wording.kind
        and key.wording.template.split("{}")[1] == frame
    ]
    same = [key for key in keys if key.wording.form != FRAME and key.wording.relation == wording.relation]
    return [
        *(_Probe(key, True, 1.0) for key in rng.sample(same, min(1, len(same)))),
        *(_Probe(key, False, 1.0) for key in _nearest_keys(fit, each, others)[:FRAMES_READ]),
    ]


def _nearest_keys(fit: Meaning, each: ReadText, keys: Sequence[_Key]) -> list[_Key]:
    """The `NEAREST` keys whose questions are the most alike to that of a text."""
    if not keys:
        return []
    ratios = Keys(fit, numpy.stack([key.vector for key in keys])).compare(embed_mean(fit, each.mean))
    return [keys[index] for index in numpy.argsort(-ratios)[:NEAREST]]


def _near_name(text: BankText, rng: random.Random) -> str | None:
    """Another subject whose name shares a word with this one's; None for names of one word, or written in part."""
    words = text.name.split()
    if len(words) < 2 or text.written.lower() != text.name.lower():
        return None
    others = [name for name in text.wording.names if name != text.name and len(name.split()) > 1]
    kinds = [" ".join(words[1:]), " ".join(words[:-1])]
    if others:
        borrowed = rng.choice(others).split()
        kinds += [" ".join([borrowed[0], *words[1:]]), " ".join([*words[:-1], borrowed[-1]])]
    return rng.choice(kinds)


def _run_gate(
    base: BaseModel,
    fit: Meaning,
    text: BankText,
    projected: Vector,
    subject: str,
    probes: Sequence[_Probe],
    rng: random.Random,
) -> Iterator[tuple[Values, bool, float]]:
    recorder = _Recorder()
    gate = Gate(get_lexicon(base), threshold=0.0, slack=0, meaning=fit, decision=recorder)
    for probe in probes:
        prompt = tuple(base.tokenizer(probe.key.wording.template.replace("{}", subject)).input_ids)
        gate.add(Anchor(prompt, (), subject), probe.key.vector[None])
    route = Route(gate)
    for token, row in zip(text.ids, projected, strict=True):
        route.push(token, row)
    if not recorder.seen:
        return
    earlier = rng.sample(recorder.seen[:-1], min(PREFIXES, len(recorder.seen) - 1))
    for index, probe in enumerate(probes):
        yield recorder.seen[-1][index], probe.wanted, probe.share
        if not probe.wanted:
            for seen in earlier:
                yield seen[index], False, PREFIX_SHARE * probe.share


def _regress(features: Values, wanted: NDArray[numpy.bool_], shares: Values) -> Values:
    """`[features]`, of a logistic regression for which both kinds of examples count the same."""
    from sklearn.linear_model import LogisticRegression

    shares = shares.copy()
    for kind in (True, False):
        shares[wanted == kind] /= max(shares[wanted == kind].sum(), 1e-9) * 2 / len(shares)
    scale = features.std(0) + 1e-6
    scale[0] = 1.0
    fitted = LogisticRegression(fit_intercept=False, max_iter=1000).fit(features / scale, wanted, sample_weight=shares)
    weights: Values = fitted.coef_[0] / scale
    assert weights.shape == (len(FEATURES),)
    return weights
