"""How a base model tells what questions mean: fitted on the bank of questions, once for each model, then fixed.

1. Texts of the bank run through the layers up to the one that is read (`lemoe.routing.anchor.bank_texts`).
2. The projection and the words that mark relations are fitted in closed form (`lemoe.routing.anchor.bank_fit`).
3. The weights of the evidence are fitted by a logistic regression (`lemoe.routing.anchor.weight_fit`).
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lemoe.base.embedded import cache_root
from lemoe.base.fingerprint import tokenizer_sha256, weights_sha256
from lemoe.base.loading import BaseModel
from lemoe.data.files import write_atomically
from lemoe.data.question_bank import REMARK, Wording, digest_bank, read_question_bank
from lemoe.errors import OutputError
from lemoe.routing.anchor.bank_fit import RANK, count_words, fit_projection
from lemoe.routing.anchor.bank_texts import make_texts, read_texts
from lemoe.routing.anchor.meaning import Meaning
from lemoe.routing.anchor.weight_fit import fit_weights

VERSION = 5  # of the fit; raised whenever an equal bank would give another one
DEPTH = 1 / 3  # relative depth of the layer that is read
SEED = 0

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


def fit_meaning(base: BaseModel, layer: int, bank: Sequence[Wording]) -> Meaning:
    """Fit to `base`, by the hidden states that enter `layer`."""
    rng = random.Random(SEED)
    read = list(read_texts(base, layer, make_texts(base, bank, rng)))
    fit = fit_projection(layer, [each for each in read if each.text.is_plain])
    fit = count_words(fit, [wording for wording in bank if wording.relation != REMARK])
    return replace(fit, weights=torch.from_numpy(fit_weights(base, layer, bank, read, rng)))
