"""Probes for edits that come without: wordings of each edit, and other questions about its subject, both made up.

They come from the bank of questions, as the paraphrases that preset `anchor` is trained on do, so that the generality
which they measure is that of wordings like those; and where the bank has no relation that is quite the edit's, a
wording may ask for something else. So they give a rough estimate. What was written by people is better.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from lemoe.base.loading import BaseModel
from lemoe.base.tokens import encode_edits
from lemoe.data.edits import Edit, Probe
from lemoe.routing.anchor.anchors import build_gate
from lemoe.routing.anchor.fitting import fitted_meaning
from lemoe.routing.anchor.gate import Anchor, Gate
from lemoe.routing.anchor.keys import embed_prompts
from lemoe.settings import Settings, resolve_settings
from lemoe.training.anchor.examples import find_subject, make_negative_prompts, make_paraphrases
from lemoe.training.anchor.wordings import Wordings, choose_wordings

MADE_UP = "made_up"  # the kind of these probes
PROBES_PER_EDIT = 3  # of each metric


def find_missing_probes(edits: Sequence[Edit]) -> tuple[str, ...]:
    """The metrics, of generality and locality, for which no edit has a probe."""
    there = {
        "generality": any(edit.rephrases for edit in edits),
        "locality": any(edit.locality for edit in edits),
    }
    return tuple(name for name, found in there.items() if not found)


def find_made_up(edits: Sequence[Edit]) -> tuple[str, ...]:
    """The metrics for which `add_made_up_probes` makes up probes of some edit."""
    lacking = {
        "generality": any(not edit.rephrases for edit in edits),
        "locality": any(not edit.locality for edit in edits),
        "overfit": any(edit.subject and not edit.locality for edit in edits),
    }
    return tuple(name for name, found in lacking.items() if found)


def add_made_up_probes(
    base: BaseModel, edits: Sequence[Edit], settings: Settings | None = None, *, seed: int = 0
) -> list[Edit]:
    """The edits, those without rephrases or locality prompts with some that are made up, of kind `made_up`.

    Args:
        settings: of the adaptor to measure; by default those of the default preset.
        seed: the same one gives the same probes.

    Raises:
        InputError: listing the edits that cannot be used with this model.
    """
    settings = settings or resolve_settings()
    anchors = [
        Anchor(passage.prompt, passage.target, edit.subject)
        for edit, passage in zip(edits, encode_edits(base, edits), strict=True)
    ]
    gate = build_gate(base, anchors, settings)
    wordings = _find_wordings(base, edits, anchors, gate, settings)
    rng = random.Random(seed)
    paraphrases = make_paraphrases(edits, PROBES_PER_EDIT, rng, wordings)
    return [
        _add_probes(edit, texts, make_negative_prompts(gate, edits, index, PROBES_PER_EDIT, rng, (), wordings[index]))
        for index, (edit, texts) in enumerate(zip(edits, paraphrases, strict=True))
    ]


def _find_wordings(
    base: BaseModel, edits: Sequence[Edit], anchors: Sequence[Anchor], gate: Gate, settings: Settings
) -> list[Wordings]:
    """How the bank asks for each edit; nothing for a model that is too small to read what questions mean."""
    meaning = fitted_meaning(base, settings.resolve_layer(len(base.layers), base.source.layers))
    if meaning is None:
        return [Wordings() for _ in edits]
    prompts = [anchor.prompt for anchor in anchors]
    keys = embed_prompts(base, meaning, gate, prompts, range(len(anchors)), settings.batch_tokens)
    return choose_wordings(meaning, [key[None] for key in keys], gate, [find_subject(e, gate.lexicon) for e in edits])


def _add_probes(edit: Edit, paraphrases: Sequence[str], others: Sequence[str]) -> Edit:
    asking = [text for text in dict.fromkeys(paraphrases) if text != edit.prompt]
    return replace(
        edit,
        rephrases=edit.rephrases or tuple(Probe(text, edit.target, MADE_UP) for text in asking),
        locality=edit.locality or tuple(Probe(text, None, MADE_UP) for text in others),
    )
