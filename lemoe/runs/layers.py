"""Which layer to edit: given, the model's preset, or measured on made-up facts, the same for everyone.

A layer is judged by how well edits that were taught there answer wordings they were not trained on. A method's usual
depth is tried first, and taken where it does well: most models are measured in one trial. Since the facts are the same
for everyone, adaptors of all users of a model edit the same layer and stack.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from lemoe.base.embedded import Notify, cache_root
from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit, Probe, digest_edits
from lemoe.data.files import write_atomically
from lemoe.data.yaml_file import parse_yaml
from lemoe.errors import OutputError
from lemoe.evaluation.evaluate import EvalOptions, evaluate
from lemoe.settings import Settings, resolve_settings
from lemoe.training.rounds import train_round

OTHER_DEPTHS = (0.6, 0.83, 0.5, 0.94)  # of the layers that are tried where the usual depth is not good enough
GOOD_ENOUGH = 2.5  # perplexity of targets after unseen wordings, up to which no other is tried
MIN_LAYERS = 8  # of a model in which layers differ enough to choose one
# A short training of preset `anchor`, whose gates open wherever their subject is asked about:
TRIAL = {"steps": 15, "variants": 2, "retries": 0, "gate_probability": 1e-6}
MEASURED_METHODS = frozenset({"anchor"})  # which are measured where nobody asks for it


@dataclass(frozen=True)
class LayerScore:
    """Perplexity of the targets of edits taught at a layer, after wordings that they were not trained on."""

    layer: int
    perplexity: float


@dataclass(frozen=True)
class ChosenLayer:
    """The layer to edit.

    Attributes:
        scores: of the layers that were tried, in order; empty where none was.
        unsaved: why the scores could not be cached, empty if they could.
    """

    layer: int
    scores: tuple[LayerScore, ...] = ()
    unsaved: str = field(default="", compare=False)

    @property
    def reason(self) -> str:
        """One line: the layer, and how well each that was tried does."""
        found = ", ".join(f"{score.layer}: {score.perplexity:.2f}" for score in self.scores)
        return f"layer {self.layer}; perplexity of made-up facts after unseen wordings, by layer: {found}"


def settle_layer(
    base: BaseModel, settings: Settings, notify: Notify = lambda stage: None, *, measure: bool = False
) -> ChosenLayer:
    """The layer to edit by `settings`; measured where neither they nor the model's preset say one.

    Args:
        notify: told what is tried, and the choice and its reason.
        measure: also where the preset says one, and for methods that take their usual depth else.
    """
    usual = settings.resolve_layer(len(base.layers), base.source.layers)
    if settings.layer is not None or not (measure or _is_unknown(base, settings)):
        return ChosenLayer(usual)
    chosen = measure_layers(base, settings, notify)
    notify(chosen.reason)
    if chosen.unsaved:
        notify(f"the layer will be measured again next time: {chosen.unsaved}")
    return chosen


def _is_unknown(base: BaseModel, settings: Settings) -> bool:
    """Whether nobody has said which layer of this model is best."""
    if settings.method not in MEASURED_METHODS or settings.method in base.source.layers:
        return False
    return len(base.layers) >= MIN_LAYERS and settings.depth == resolve_settings(settings.method).depth


def measure_layers(base: BaseModel, settings: Settings, notify: Notify = lambda stage: None) -> ChosenLayer:
    """Try layers on made-up facts, by the method's own preset; tried once, then cached."""
    facts = read_trial_facts()
    short = TRIAL if settings.method == "anchor" else {}
    same = {"layer_path": settings.layer_path, "gate": settings.gate}
    trial = resolve_settings(settings.method, None, {**short, **same})
    layers = _candidate_layers(len(base.layers), trial.depth)
    cache = _cache_file(base, facts, trial)
    scores = _read_cached_scores(cache, layers)
    if scores is not None:
        return ChosenLayer(_best_layer(scores), scores)
    tried: list[LayerScore] = []
    for layer in layers:
        notify(f"no layer is known to be best for this model: trying {layer} of {len(base.layers)}")
        tried.append(LayerScore(layer, _measure_perplexity(base, facts, replace(trial, layer=layer))))
        if tried[-1].perplexity <= GOOD_ENOUGH:
            break
    scores = tuple(tried)
    unsaved = ""
    try:
        write_atomically(cache, json.dumps([vars(score) for score in scores], indent=1).encode(), overwrite=True)
    except OutputError as error:
        unsaved = str(error)
    return ChosenLayer(_best_layer(scores), scores, unsaved)


def read_trial_facts() -> list[Edit]:
    """The made-up facts that come with lemoe, with wordings to ask for them as rephrases."""
    content = parse_yaml(resources.files("lemoe").joinpath("data/trial_facts.yaml").read_text("utf-8"))
    return [
        Edit(
            id=f"trial-{number}",
            prompt=fact["prompt"],
            target=fact["target"],
            subject=fact["subject"],
            rephrases=tuple(Probe(text, fact["target"], "unseen") for text in fact["rewordings"]),
        )
        for number, fact in enumerate(content)
    ]


def _best_layer(scores: Sequence[LayerScore]) -> int:
    """Of several that do as well, the first that was tried."""
    return min(scores, key=lambda score: score.perplexity).layer


def _read_cached_scores(cache: Path, layers: Sequence[int]) -> tuple[LayerScore, ...] | None:
    """What was measured before; None if the file is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        scores = tuple(LayerScore(**score) for score in json.loads(cache.read_text()))
        if scores and [score.layer for score in scores] == list(layers[: len(scores)]):
            return scores
    return None


def _candidate_layers(layers: int, usual: float) -> list[int]:
    """In the order in which they are tried."""
    return list(dict.fromkeys(min(layers - 1, round(depth * layers)) for depth in (usual, *OTHER_DEPTHS)))


def _measure_perplexity(base: BaseModel, facts: Sequence[Edit], trial: Settings) -> float:
    state = train_round(base, facts, trial)
    return evaluate(base, state, facts, EvalOptions(only=("generality",))).value("generality", "perplexity")


def _cache_file(base: BaseModel, facts: Sequence[Edit], trial: Settings) -> Path:
    fingerprint = base.fingerprint(len(base.layers) - 1, trial.layer_path)
    made_of = [fingerprint.as_dict(), trial.as_dict(), digest_edits(facts), [fact.rephrases for fact in facts]]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()
    return cache_root() / "layers" / f"{key[:32]}.json"
