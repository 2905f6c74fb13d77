"""The bank of questions as texts about subjects, as people write both, and what a base model makes of them."""

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lemoe.base.chat import encode_chat_turn
from lemoe.base.equality import TensorEquality
from lemoe.base.frozen.layer_inputs import read_layer_inputs
from lemoe.base.loading import BaseModel
from lemoe.base.tensors import rms_normalise
from lemoe.data.question_bank import ENGLISH_FORMS, KEY_FORMS, REMARK, Wording
from lemoe.routing.anchor.anchors import get_lexicon
from lemoe.routing.anchor.gate import Gate
from lemoe.routing.anchor.subjects import Subject

BATCH_TOKENS = 2048
CHUNK = 2048  # texts whose hidden states are kept at once
READ, SURROUNDED = 0.4, 0.1  # shares of the wordings that are read by themselves, and in other surroundings,
WEIGHED = 0.5  # and of the English ones of those on which the weights are fitted
COPIED, DROPPED = 0.2, 0.35  # shares of the wordings that are copied, and of the words that a copy leaves out
FRAME = "frames"  # the form of wordings that differ between relations by their names alone
_COPY_FRAMES = ("Question: *", "* Answer:", "Please answer: *", "* It is", "Do you know this? *", "*")
_RELATION_FRAMES = ("The * of {} is", "What is the * of {}?")
_SENTENCES_BEFORE = (
    "I have a question for you.",
    "We talked about this at lunch.",
    "The weather was fine, and nobody noticed the train.",
    "Please be brief.",
    "I was told that this has changed since last year.",
)


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
        weighed: whether the weights of the evidence are fitted on it.
    """

    wording: Wording
    name: str
    written: str
    ids: tuple[int, ...]
    bare: bool
    copy: bool = False
    weighed: bool = False

    @property
    def is_key(self) -> bool:
        """Whether it is as an edit's own prompt is written."""
        return self.is_plain and self.bare and self.wording.form in KEY_FORMS

    @property
    def is_plain(self) -> bool:
        """Whether it is a wording of the bank as it stands there, and asks something."""
        return not self.copy and self.wording.form != FRAME and self.wording.relation != REMARK


def make_texts(base: BaseModel, bank: Sequence[Wording], rng: random.Random) -> list[BankText]:
    """A share of the wordings by themselves, some behind a sentence or as a chat turn, and some copied; all remarks.

    Subjects are written as people write them: lower case in casual questions, some with a typo, some by surname.
    """
    texts = []
    for number, wording in enumerate(bank):
        remark = wording.relation == REMARK
        weighed = remark or (wording.form in ENGLISH_FORMS and rng.random() < WEIGHED)
        name = wording.names[number % len(wording.names)]
        if remark or rng.random() < READ:
            text = _make_text(base, wording, name, _write_name(wording, name, number, rng), "")
            texts.append(replace(text, weighed=weighed))
        if remark or rng.random() < SURROUNDED:
            name = wording.names[(number // 2 + 3) % len(wording.names)]
            before = rng.choice(_SENTENCES_BEFORE) + " " if number % 2 or not base.tokenizer.chat_template else None
            text = _make_text(base, wording, name, _write_name(wording, name, number + 1, rng), before)
            texts.append(replace(text, weighed=weighed))
        if wording.form in KEY_FORMS and rng.random() < COPIED:
            template = _copy_wording(wording.template, rng)
            text = _make_text(base, replace(wording, template=template), name, name, "")
            texts.append(replace(text, wording=wording, copy=True, weighed=True))
    for number, wording in enumerate(frame_relations(bank)):
        name = wording.names[number // len(_RELATION_FRAMES) % len(wording.names)]
        texts.append(replace(_make_text(base, wording, name, name, ""), weighed=True))
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
    return rng.choice(_COPY_FRAMES).replace("*", " ".join(kept))


def frame_relations(bank: Sequence[Wording]) -> Iterator[Wording]:
    """Each relation by its name in the same few sentences: what is nearly an edit's own prompt may ask for another."""
    examples = {wording.relation: wording for wording in bank if wording.form in KEY_FORMS}
    for relation, wording in examples.items():
        name = relation.removeprefix(f"{wording.kind}_").replace("_", " ")
        for frame in _RELATION_FRAMES:
            yield replace(wording, form=FRAME, template=frame.replace("*", name))


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
class ReadText(TensorEquality):
    """A text with the mean `[hidden]` of its question; of texts for the weights also all its tokens `[seq, hidden]`."""

    text: BankText
    mean: Tensor
    states: Tensor | None


def read_texts(base: BaseModel, layer: int, texts: Sequence[BankText]) -> Iterator[ReadText]:
    """The texts with what enters `layer`; none whose subject is all that it has."""
    gate = Gate(get_lexicon(base), threshold=0.0, slack=0)
    for first in range(0, len(texts), CHUNK):
        part = texts[first : first + CHUNK]
        states = read_layer_inputs(base, layer, [text.ids for text in part], BATCH_TOKENS)
        for text, entered in zip(part, states, strict=True):
            normalised = rms_normalise(entered).cpu()
            total, weight = gate.summarise(text.ids, normalised.numpy(), Subject(text.written, gate.lexicon))
            if total is not None and weight > 0:
                mean = torch.from_numpy(total).double() / weight
                yield ReadText(text, mean, normalised.half() if text.weighed else None)
