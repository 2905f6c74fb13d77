"""Order planning: which edits are learned together, and in which order (paper, 3.3).

A round takes edits that are alike and rounds differ from each other, so that each expert learns one region and
routes stay apart. Edits of one subject share a round.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
import yaml

from lemoe.base.loading import BaseModel
from lemoe.base.tokens import encode_edits
from lemoe.data.conflicts import Conflict, find_conflicts, left_out, question
from lemoe.data.edits import Edit
from lemoe.errors import InputError
from lemoe.planning.clustering import Vectors, clustered
from lemoe.routing.anchor.anchors import lexicon_of
from lemoe.routing.anchor.lexicon import infer_subject
from lemoe.settings import Order, Settings

EMBEDDED = 8192  # tokens whose embeddings are looked up at a time
BY_HAND = 10_000  # edits; libyaml writes larger plans ten times as fast, with emoji as numbers

_QUICK_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@dataclass(frozen=True)
class Similarity:
    """Mean cosine similarity of prompts, -1 to 1: of pairs inside a round, and of the centres of different rounds."""

    within: float
    between: float


@dataclass(frozen=True)
class Plan:
    """Rounds of edit ids in training order.

    Attributes:
        rounds: ids of each round's edits.
        conflicts: edits that repeat or contradict each other; duplicates and superseded edits are in no round.
        similarity: of this plan, and of the same edits in the file's and in a random order.
        cohesion: mean similarity inside each round.
        inferred: the subjects that were inferred, by edit id, where the file names none.
    """

    rounds: tuple[tuple[str, ...], ...]
    conflicts: tuple[Conflict, ...]
    similarity: dict[str, Similarity]
    cohesion: tuple[float, ...]
    inferred: dict[str, str]


def plan(base: BaseModel, edits: Sequence[Edit], settings: Settings) -> Plan:
    """Plan the rounds of `edits`, at most `settings.round_size` in each, in the order that the settings name.

    Raises:
        InputError: listing the edits that cannot be used with this model.
    """
    if not edits:
        raise InputError("there are no edits to plan")
    inferred = _inferred_subjects(base, edits)
    named = [edit if edit.subject else replace(edit, subject=inferred[edit.id]) for edit in edits]
    conflicts = find_conflicts(named)
    dropped = left_out(conflicts)
    kept = [edit for edit in named if edit.id not in dropped]
    vectors = embed_prompts(base, kept)
    orders: dict[Order, list[list[int]]] = {
        "planned": clustered(vectors, _subjects(kept), settings.round_size, settings.seed),
        "file": _chunks(list(range(len(kept))), settings.round_size),
        "random": _chunks(random.Random(settings.seed).sample(range(len(kept)), len(kept)), settings.round_size),
    }
    chosen = orders[settings.order]
    return Plan(
        rounds=tuple(tuple(kept[index].id for index in members) for members in chosen),
        conflicts=tuple(conflicts),
        similarity={name: similarity_of(vectors, rounds) for name, rounds in orders.items()},
        cohesion=tuple(cohesion_of(vectors[members]) for members in chosen),
        inferred=inferred,
    )


def rounds_of(chosen: Plan, edits: Sequence[Edit]) -> list[list[Edit]]:
    """The rounds of a plan of `edits`, as edits."""
    by_id = {edit.id: edit for edit in edits}
    return [[by_id[name] for name in members] for members in chosen.rounds]


def _inferred_subjects(base: BaseModel, edits: Sequence[Edit]) -> dict[str, str]:
    """What the gate takes as subject of the edits that name none."""
    nameless = [edit for edit in edits if not edit.subject]
    return {edit.id: infer_subject(edit.prompt, lexicon_of(base)) for edit in nameless} if nameless else {}


@torch.no_grad()
def embed_prompts(base: BaseModel, edits: Sequence[Edit]) -> Vectors:
    """Unit vectors `[edits, hidden]`: the mean over each prompt of the embedding layer's output (paper, 3.2)."""
    prompts = [passage.prompt for passage in encode_edits(base, edits)]
    vectors = numpy.empty((len(prompts), base.embedding.weight.shape[1]), numpy.float32)
    for rows in _of_one_length(prompts):
        ids = torch.tensor([prompts[row] for row in rows], device=base.device)
        means = base.embedding(ids).float().mean(1)
        vectors[rows] = torch.nn.functional.normalize(means, dim=-1).cpu().numpy()
    return vectors


def _of_one_length(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of prompts that can be looked up together without padding."""
    lengths: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        lengths[len(prompt)].append(place)
    for length, places in lengths.items():
        yield from _chunks(places, max(1, EMBEDDED // length))


def _subjects(edits: Sequence[Edit]) -> list[str]:
    return [question(edit.subject) if edit.subject else f"? {edit.id}" for edit in edits]


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def cohesion_of(vectors: Vectors) -> float:
    """Mean similarity of the pairs of a round; 1 for a round of one."""
    n = len(vectors)
    total = vectors.sum(0)
    return float((total @ total - n) / (n * (n - 1))) if n > 1 else 1.0


def similarity_of(vectors: Vectors, rounds: Sequence[Sequence[int]]) -> Similarity:
    """How alike the rows of `vectors` that make up each round are, and the rounds."""
    within, means = [], []
    for members in rounds:
        mine = vectors[list(members)]
        means.append(mine.mean(0))
        within += [(cohesion_of(mine), len(mine))] if len(mine) > 1 else []
    centres = numpy.stack(means)
    centres /= numpy.linalg.norm(centres, axis=1, keepdims=True)
    weight = sum(size for _, size in within)
    return Similarity(
        within=sum(value * size for value, size in within) / weight if weight else 1.0,
        between=cohesion_of(centres) if len(rounds) > 1 else 0.0,
    )


def save_plan(chosen: Plan, edits: Sequence[Edit], source: str) -> str:
    """The plan as YAML that people can read and edit by hand."""
    texts = {edit.id: edit.fact for edit in edits}
    document: dict[str, Any] = {
        "edits": source,
        "similarity": {
            name: {"within": round(s.within, 4), "between": round(s.between, 4)}
            for name, s in chosen.similarity.items()
        },
        **({"inferred_subjects": chosen.inferred} if chosen.inferred else {}),
        "conflicts": [
            {
                "relation": c.relation,
                "earlier": {c.earlier: texts[c.earlier]},
                "later": {c.later: texts[c.later]},
            }
            for c in chosen.conflicts
        ],
        "rounds": [{name: texts[name] for name in members} for members in chosen.rounds],
    }
    head = "# Rounds in training order. Move, drop or reorder lines at will; `lemoe edit --plan` follows the ids.\n"
    dumper = _QUICK_DUMPER if len(edits) > BY_HAND else yaml.SafeDumper
    return head + yaml.dump(document, Dumper=dumper, sort_keys=False, allow_unicode=True, width=10_000)
