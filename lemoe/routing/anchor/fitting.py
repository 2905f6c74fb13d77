"""How a base model tells what questions mean: fitted on the bank of questions, once for each model, then fixed.

1. Every wording of the bank, with the name of a subject put in, runs through the layers up to the one that is read.
2. The projection is fitted on all of them in closed form (`lemoe.routing.anchor.meaning.build_projection`).
3. The weights of the evidence: for each of `FOLDS` parts of the relations, the projection is fitted on the others, and
   the gate reads wordings of the part that do and that do not ask for an edit: another question about its subject, the
   same of a near name, a remark, or only the beginning of one of these. A logistic regression tells the two apart. So
   the weights are those for relations that no fit has seen.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lemoe.base.chat import encode_chat_turn
from lemoe.base.embedded import cache_root
from lemoe.base.equality import TensorEquality
from lemoe.base.fingerprint import tokenizer_sha256, weights_sha256
from lemoe.base.frozen.layer_inputs import read_layer_inputs
from lemoe.base.loading import BaseModel
from lemoe.base.tensors import rms_normalise
from lemoe.data.files import write_atomically
from lemoe.data.question_bank import ENGLISH_FORMS, KEY_FORMS, REMARK, Wording, digest_bank, read_question_bank
from lemoe.errors import OutputError
from lemoe.routing.anchor.anchors import get_lexicon
from lemoe.routing.anchor.comparisons import Values, WordComparisons
from lemoe.routing.anchor.evidence import Decision, Judgement, question_features
from lemoe.routing.anchor.gate import Anchor, Gate
from lemoe.routing.anchor.meaning import FEATURES, Keys, Meaning, Vector, build_projection
from lemoe.routing.anchor.route import Route
from lemoe.routing.anchor.subjects import Subject

VERSION = 2  # of the fit; raised whenever an equal bank would give another one
RANK = 96  # directions that are kept
FOLDS = 4
DEPTH = 1 / 3  # relative depth of the layer that is read
KEYS_SAME, KEYS_OTHER, KEYS_HARD = 2, 2, 2  # edits that each text is read with: its own, others, and near others,
NEAREST, HARD_SHARE = 12, 0.3  # drawn from so many, each of which counts this much of an example
PREFIXES = 2  # beginnings of a text that must not open the gate,
PREFIX_SHARE = 0.15  # each of which counts this much of an example,
REMARK_SHARE = 8.0  # and an edit with a remark, of which the bank has few, this much
BATCH_TOKENS = 2048
CHUNK = 2048  # texts whose hidden states are kept at once
SEED = 0
FOR_WEIGHTS = 0.4  # share of the English texts that the gate reads for the weights
COPIED, DROPPED = 0.35, 0.35  # shares of the wordings that are copied, and of the words that a copy leaves out
COPY_SHARE = 2.0  # each of which counts this much of an example
_FRAMES = ("Question: *", "* Answer:", "Please answer: *", "* It is", "Do you know this? *", "*")
_SENTENCES_BEFORE = (
    "I have a question for you.",
    "We talked about this at lunch.",
    "The weather was fine, and nobody noticed the train.",
    "Please be brief.",
    "I was told that this has changed since last year.",
)

Notify = Callable[[str], None]


def layer_to_read(layers: int, edited: int) -> int:
    """The decoder layer whose incoming hidden states tell what is asked; no later than the edited one."""
    return min(int(layers * DEPTH), edited)


_fitted: "WeakKeyDictionary[BaseModel, dict[int, Meaning]]" = WeakKeyDictionary()


def fitted_meaning(base: BaseModel, edited: int, notify: Notify = lambda stage: None) -> Meaning | None:
    """The fit for `base` where layer `edited` is edited: from memory, from the cache, or made now and cached.

    An unwritable cache is no error: the fit is made again next time.

    Returns:
        None for a model with fewer hidden states than `RANK`: its words alone decide.
    """
    if base.hidden_size < RANK:
        return None
    layer = layer_to_read(len(base.layers), edited)
    fits = _fitted.setdefault(base, {})
    if layer not in fits:
        bank = read_question_bank()
        path = _cache_file(base, layer, bank)
        fit = _read_cached(path)
        if fit is None:
            notify("reading the bank of questions, once for this model")
            fit = fit_meaning(base, layer, bank)
            with suppress(OutputError):
                write_atomically(path, save(fit.tensors()), overwrite=True)
        fits[layer] = fit
    return fits[layer]


def _cache_file(base: BaseModel, layer: int, bank: Sequence[Wording]) -> Path:
    made_of: list[object] = [VERSION, digest_bank(bank), weights_sha256(base.model), tokenizer_sha256(base.tokenizer)]
    made_of += [base.tokenizer.chat_template, layer, str(base.dtype), base.device.type]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return cache_root() / "meaning" / f"{key[:32]}.safetensors"


def _read_cached(path: Path) -> Meaning | None:
    """The cached fit; None if the file is missing or damaged."""
    with suppress(OSError, SafetensorError, KeyError):
        fit = Meaning.from_tensors(load_file(path))
        if fit is not None and fit.is_whole:
            return fit
    return None


@dataclass(frozen=True)
class BankText:
    """A wording about one subject, as tokens.

    Attributes:
        wording: of the bank.
        name: the subject, as a subject is stored.
        written: the subject as this text writes it.
        ids: token ids.
        bare: whether nothing stands around the wording.
        copy: whether it is the wording with words left out or put around it.
    """

    wording: Wording
    name: str
    written: str
    ids: tuple[int, ...]
    bare: bool
    copy: bool = False


def make_texts(base: BaseModel, bank: Sequence[Wording], rng: random.Random) -> list[BankText]:
    """Each wording once by itself; some also behind a sentence or as a chat turn.

    Subjects are written as people write them: lower case in casual questions, some with a typo, some by surname.
    """
    texts = []
    for number, wording in enumerate(bank):
        name = wording.names[number % len(wording.names)]
        texts.append(_make_text(base, wording, name, _write_name(wording, name, number, rng), ""))
        english = wording.form in ENGLISH_FORMS or wording.relation == REMARK
        if number % (2 if english else 4) == 0:
            name = wording.names[(number // 2 + 3) % len(wording.names)]
            before = rng.choice(_SENTENCES_BEFORE) + " " if number % 8 < 4 or not base.tokenizer.chat_template else None
            texts.append(_make_text(base, wording, name, _write_name(wording, name, number + 1, rng), before))
        if wording.form in KEY_FORMS and rng.random() < COPIED:
            template = _copy_wording(wording.template, rng)
            text = _make_text(base, replace(wording, template=template), name, name, "")
            texts.append(replace(text, wording=wording, copy=True))
    return [text for text in texts if text.ids]


def _make_text(base: BaseModel, wording: Wording, name: str, written: str, before: str | None) -> BankText:
    """The text behind a sentence `before`, or as a chat turn if that is None; without tokens if it cannot be read."""
    text = wording.template.replace("{}", written)
    ids: tuple[int, ...] = ()
    with suppress(ValueError):
        if before is None:
            ids = encode_chat_turn(base, text).prompt
        else:
            ids = tuple(base.tokenizer(before + text).input_ids)
    too_long = base.max_length is not None and len(ids) > base.max_length
    return BankText(wording, name, written, () if too_long else ids, before == "")


def _copy_wording(template: str, rng: random.Random) -> str:
    """The wording without some of its words, in a frame: what is nearly an edit's own prompt asks the same."""
    words = template.split()
    last = len(words) - 1
    kept = [word for at, word in enumerate(words) if "{}" in word or at == last or rng.random() >= DROPPED]
    return rng.choice(_FRAMES).replace("*", " ".join(kept))


def _write_name(wording: Wording, name: str, number: int, rng: random.Random) -> str:
    if wording.form == "casual":
        return name.lower()
    if wording.form == "requests" and number % 3 == 0:
        return _misspell(name, rng)
    if wording.kind == "person" and wording.form in ("questions", "requests") and number % 5 == 0:
        return name.split()[-1]
    return name


def _misspell(name: str, rng: random.Random) -> str:
    """The name with one letter of its longest word lost, doubled or swapped with the next."""
    word = max(name.split(), key=len)
    if len(word) < 5:
        return name
    at = rng.randrange(1, len(word) - 1)
    kinds = (word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:])
    swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return name.replace(word, rng.choice([*kinds, swapped]))


@dataclass(frozen=True, eq=False)
class _ReadText(TensorEquality):
    """A text with the mean `[hidden]` of its question; of texts for the weights also all its tokens `[seq, hidden]`."""

    text: BankText
    mean: Tensor
    states: Tensor | None


def fit_meaning(base: BaseModel, layer: int, bank: Sequence[Wording]) -> Meaning:
    """Fit to `base`, by the hidden states that enter `layer`."""
    rng = random.Random(SEED)
    texts = make_texts(base, bank, rng)
    for_weights = {
        index
        for index, text in enumerate(texts)
        if text.copy
        or text.wording.relation == REMARK
        or (text.wording.form in ENGLISH_FORMS and rng.random() < FOR_WEIGHTS)
    }
    read = list(_read_texts(base, layer, texts, for_weights))
    questions = [each for each in read if each.text.wording.relation != REMARK and not each.text.copy]
    fit = _fit_projection(layer, questions)
    features, wanted, shares = _collect_evidence(base, layer, read, rng)
    return replace(fit, weights=torch.from_numpy(_fit_weights(features, wanted, shares).astype(numpy.float32)))


def _read_texts(base: BaseModel, layer: int, texts: Sequence[BankText], for_weights: set[int]) -> Iterator[_ReadText]:
    gate = Gate(get_lexicon(base), threshold=0.0, slack=0)
    for first in range(0, len(texts), CHUNK):
        part = texts[first : first + CHUNK]
        states = read_layer_inputs(base, layer, [text.ids for text in part], BATCH_TOKENS)
        for index, (text, entered) in enumerate(zip(part, states, strict=True), first):
            normalised = rms_normalise(entered).cpu()
            total, weight = gate.summarise(text.ids, normalised.numpy(), Subject(text.written, gate.lexicon))
            if total is not None and weight > 0:
                mean = torch.from_numpy(total).double() / weight
                yield _ReadText(text, mean, normalised.half() if index in for_weights else None)


def _fit_projection(layer: int, questions: Sequence[_ReadText]) -> Meaning:
    vectors = torch.stack([each.mean for each in questions])
    return build_projection(layer, vectors.numpy(), [each.text.wording.relation for each in questions], RANK)


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

    def judge(self, subject: tuple[float, ...], words: WordComparisons, meaning: Values, profile: Values) -> Judgement:
        asked = question_features(words, meaning, profile)
        self.seen.append(numpy.concatenate([numpy.repeat(numpy.array(subject)[:, None], len(meaning), 1), asked]).T)
        shut = numpy.full(len(meaning), -1.0)
        return shut, shut, shut


def _collect_evidence(
    base: BaseModel, layer: int, read: Sequence[_ReadText], rng: random.Random
) -> tuple[Values, NDArray[numpy.bool_], Values]:
    """Features `[examples, features]`, whether the edit is asked for, and the weight of each example."""
    relations = sorted({each.text.wording.relation for each in read} - {REMARK})
    rng.shuffle(relations)
    features: list[Values] = []
    wanted: list[bool] = []
    shares: list[float] = []
    for fold in range(FOLDS):
        members = set(relations[fold::FOLDS])
        outside = [each for each in read if each.text.wording.relation not in members | {REMARK} and not each.text.copy]
        inside = [each for each in read if each.text.wording.relation in members]
        written = [
            each for each in inside if each.text.bare and not each.text.copy and each.text.wording.form in KEY_FORMS
        ]
        if not outside or not written:
            continue
        fit = _fit_projection(layer, outside)
        keys = [_Key(each.text.wording, _embed_mean(fit, each.mean)) for each in written]
        remarks = [each for each in read if each.text.wording.relation == REMARK][fold::FOLDS]
        for each in (*inside, *remarks):
            if each.states is None:
                continue
            for found, is_wanted, share in _read_examples(base, fit, each, keys, rng):
                features.append(found)
                wanted.append(is_wanted)
                shares.append(share)
    return numpy.stack(features), numpy.array(wanted), numpy.array(shares)


def _read_examples(
    base: BaseModel, fit: Meaning, each: _ReadText, keys: Sequence[_Key], rng: random.Random
) -> Iterator[tuple[Values, bool, float]]:
    """Features of one text with edits that it asks for, and with others."""
    assert each.states is not None
    projected = fit.project(each.states.float()).numpy()
    if each.text.copy:
        own = [key for key in keys if key.wording == each.text.wording]
        runs = iter([(each.text.name, own, list[_Key](), COPY_SHARE)])
    else:
        runs = _choose_runs(fit, each, keys, rng)
    for name, same, other, share in runs:
        for features, wanted, weight in _run_gate(base, fit, each.text, projected, name, same, other, rng):
            yield features, wanted, weight * share


def _choose_runs(
    fit: Meaning, each: _ReadText, keys: Sequence[_Key], rng: random.Random
) -> Iterator[tuple[str, list[_Key], list[_Key], float]]:
    """What a text is read with: subject, edits that it asks for, others, and what each example counts."""
    wording, name = each.text.wording, each.text.name
    same = [key for key in keys if key.wording.relation == wording.relation and key.wording != wording]
    other = [key for key in keys if key.wording.relation != wording.relation and wording.kind in ("", key.wording.kind)]
    same = rng.sample(same, min(KEYS_SAME, len(same)))
    nearest = _nearest_keys(fit, each, other)
    hard = rng.sample(nearest, min(KEYS_HARD, len(nearest)))
    yield name, same, rng.sample(other, min(KEYS_OTHER, len(other))), 1.0
    yield name, [], hard, HARD_SHARE
    near = _near_name(each.text, rng)
    if near and same:
        yield near, [], same[:1], 1.0


def _nearest_keys(fit: Meaning, each: _ReadText, keys: Sequence[_Key]) -> list[_Key]:
    """The `NEAREST` keys whose questions are the most alike to that of a text."""
    if not keys:
        return []
    ratios = Keys(fit, numpy.stack([key.vector for key in keys])).compare(_embed_mean(fit, each.mean))
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
    same: Sequence[_Key],
    other: Sequence[_Key],
    rng: random.Random,
) -> Iterator[tuple[Values, bool, float]]:
    recorder = _Recorder()
    gate = Gate(get_lexicon(base), threshold=0.0, slack=0, meaning=fit, decision=recorder)
    for key in (*same, *other):
        prompt = tuple(base.tokenizer(key.wording.template.replace("{}", subject)).input_ids)
        gate.add(Anchor(prompt, (), subject), key.vector[None])
    route = Route(gate)
    for token, row in zip(text.ids, projected, strict=True):
        route.push(token, row)
    if not recorder.seen:
        return
    for index in range(len(same)):
        yield recorder.seen[-1][index], True, 1.0
    earlier = rng.sample(recorder.seen[:-1], min(PREFIXES, len(recorder.seen) - 1))
    for index in range(len(same), len(same) + len(other)):
        share = REMARK_SHARE if text.wording.relation == REMARK else 1.0
        yield recorder.seen[-1][index], False, share
        for seen in earlier:
            yield seen[index], False, PREFIX_SHARE


def _embed_mean(fit: Meaning, mean: Tensor) -> Vector:
    return fit.embed(mean.float().numpy() @ fit.directions.numpy(), 1.0)


def _fit_weights(features: Values, wanted: NDArray[numpy.bool_], shares: Values) -> Values:
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
