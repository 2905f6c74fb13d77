"""`--layer auto`: choosing the layer to edit by a short measurement on the user's own first edits."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from lemoe.base.embedded import Notify, cache_root
from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit, Probe, digest_edits
from lemoe.data.files import write_atomically
from lemoe.errors import OutputError
from lemoe.evaluation.evaluate import evaluate
from lemoe.settings import Settings
from lemoe.training.anchor.examples import make_paraphrases
from lemoe.training.rounds import train_round

CANDIDATE_DEPTHS = (0.6, 0.7, 0.8, 0.87, 0.94)  # of the layers that are measured, as shares of all layers
MEASURED_EDITS = 8
PARAPHRASES_PER_EDIT = 3  # of each edit, none of them trained on


@dataclass(frozen=True)
class LayerScore:
    """How well a layer learned the edits: perplexity of their targets after prompts and after unseen paraphrases."""

    layer: int
    reliability: float
    generality: float


@dataclass(frozen=True)
class MeasuredLayers:
    """The layers that were measured; `unsaved`: why the scores could not be cached, empty if they could."""

    scores: tuple[LayerScore, ...]
    unsaved: str = field(default="", compare=False)

    @property
    def best_layer(self) -> int:
        """By generality, then by reliability."""
        return min(self.scores, key=lambda score: (score.generality, score.reliability)).layer


def choose_layer(
    base: BaseModel, edits: Sequence[Edit], settings: Settings, notify: Notify = lambda stage: None
) -> MeasuredLayers:
    """Measure which layer's experts answer unseen paraphrases of the first edits best; measured once, then cached.

    The edits' own rephrases are not used, so that generality can still be measured on them.

    Raises:
        InputError: listing the edits that cannot be used with this model.
    """
    first = list(edits[:MEASURED_EDITS])
    cache = _cache_file(base, first, settings)
    layers = _candidate_layers(len(base.layers))
    cached = _read_cached_scores(cache)
    if cached is not None and [score.layer for score in cached] == layers:
        return MeasuredLayers(cached)
    scores = tuple(_score_layer(base, first, settings, layer, notify) for layer in layers)
    try:
        write_atomically(cache, json.dumps([vars(score) for score in scores], indent=1).encode(), overwrite=True)
    except OutputError as error:
        return MeasuredLayers(scores, str(error))
    return MeasuredLayers(scores)


def _read_cached_scores(cache: Path) -> tuple[LayerScore, ...] | None:
    """What was measured before; None if the file is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return tuple(LayerScore(**score) for score in json.loads(cache.read_text()))
    return None


def _candidate_layers(layers: int) -> list[int]:
    return sorted({min(layers - 1, round(depth * layers)) for depth in CANDIDATE_DEPTHS})


def _score_layer(base: BaseModel, edits: Sequence[Edit], settings: Settings, layer: int, notify: Notify) -> LayerScore:
    notify(f"choosing the layer: trying {layer} of {len(base.layers)}")
    state = train_round(base, edits, replace(settings, layer=layer, retries=0))
    rng = random.Random(settings.seed + 1)
    probed = [
        replace(edit, rephrases=tuple(Probe(text, edit.target, "paraphrase") for text in texts))
        for edit, texts in zip(edits, make_paraphrases(edits, PARAPHRASES_PER_EDIT, rng), strict=True)
    ]
    result = evaluate(base, state, probed, only=("reliability", "generality"))
    reliability, generality = (result.value(name, "perplexity") for name in ("reliability", "generality"))
    return LayerScore(layer, reliability, generality if math.isfinite(generality) else reliability)


def _cache_file(base: BaseModel, edits: Sequence[Edit], settings: Settings) -> Path:
    fingerprint = base.fingerprint(len(base.layers) - 1, settings.layer_path)
    made_of = [fingerprint.as_dict(), replace(settings, layer=None).as_dict(), digest_edits(edits)]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return cache_root() / "layers" / f"{key[:32]}.json"
