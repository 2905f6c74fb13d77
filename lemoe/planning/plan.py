"""Order planning: which edits are trained together, and in which order (paper, 3.3).

The edits of a round are similar and rounds differ from each other, so that each expert learns one region and
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

from lemoe.base.loading import BaseLike, BaseModel, resolve_base
from lemoe.base.tokens import encode_edits
from lemoe.data.conflicts import Conflict, find_conflicts, normalise_question, redundant_edit_ids
from lemoe.data.counting import edits_in_rounds, format_count
from lemoe.data.edits import Edit, Edits, check_ids, resolve_edits
from lemoe.errors import InputError
from lemoe.planning.clustering import Vectors, cluster_rounds
from lemoe.routing.anchor.anchors import get_lexicon
from lemoe.routing.anchor.lexicon import infer_subject
from lemoe.settings import Order, Settings

EMBEDDED_TOKENS = 8192  # tokens that are embedded at a time
SLOW_DUMPER_LIMIT = 10_000  # edits; libyaml writes larger plans ten times as fast, with emoji as numbers

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
        inferred_subjects: the subjects that were inferred, by edit id, where the file names none.

    Example:
        >>> import lemoe
        >>> planned = lemoe.plan("llama", "edits.jsonl")
        >>> planned
        Plan(3 edits in 1 round, 0 conflicts)
        >>> sorted(planned.rounds[0])
        ['eiffel-tower-city', 'eiffel-tower-material', 'france-capital-2031']
    """

    rounds: tuple[tuple[str, ...], ...]
    conflicts: tuple[Conflict, ...]
    similarity: dict[str, Similarity]
    cohesion: tuple[float, ...]
    inferred_subjects: dict[str, str]

    def __repr__(self) -> str:
        size = edits_in_rounds(sum(map(len, self.rounds)), len(self.rounds))
        return f"Plan({size}, {format_count(len(self.conflicts), 'conflict')})"


def plan(base: BaseLike, edits: Edits, settings: Settings | None = None) -> Plan:
    """Plan the rounds of `edits`, at most `settings.round_size` in each, in the order that the settings name.

    Args:
        base: or what `load_base` takes.
        edits: or their records, or the path of their file.
        settings: those of preset `anchor` if None.

    Raises:
        InputError: listing the edits that cannot be used with this model, or that have the id of another.

    Example:
        >>> import lemoe
        >>> base = lemoe.load_base("llama")
        >>> len(lemoe.plan(base, "edits.jsonl", lemoe.Settings(round_size=2)).rounds)
        2
    """
    edits, base, settings = resolve_edits(edits), resolve_base(base), settings or Settings()
    if not edits:
        raise InputError("there are no edits to plan")
    check_ids(edits)
    inferred = _infer_subjects(base, edits)
    named = [edit if edit.subject else replace(edit, subject=inferred[edit.id]) for edit in edits]
    conflicts = find_conflicts(named)
    dropped = redundant_edit_ids(conflicts)
    planned = [edit for edit in named if edit.id not in dropped]
    vectors = embed_prompts(base, planned)
    orders: dict[Order, list[list[int]]] = {
        "planned": cluster_rounds(vectors, _subject_keys(planned), settings.round_size, settings.seed),
        "file": _split_chunks(list(range(len(planned))), settings.round_size),
        "random": _split_chunks(
            random.Random(settings.seed).sample(range(len(planned)), len(planned)), settings.round_size
        ),
    }
    chosen = orders[settings.order]
    return Plan(
        rounds=tuple(tuple(planned[index].id for index in members) for members in chosen),
        conflicts=tuple(conflicts),
        similarity={name: measure_similarity(vectors, rounds) for name, rounds in orders.items()},
        cohesion=tuple(mean_pair_similarity(vectors[members]) for members in chosen),
        inferred_subjects=inferred,
    )


def edits_by_round(chosen: Plan, edits: Sequence[Edit]) -> list[list[Edit]]:
    """The rounds of the plan `chosen`, as edits instead of ids."""
    by_id = {edit.id: edit for edit in edits}
    return [[by_id[name] for name in members] for members in chosen.rounds]


def _infer_subjects(base: BaseModel, edits: Sequence[Edit]) -> dict[str, str]:
    """The subject, as the gate infers it, of each edit that names none."""
    nameless = [edit for edit in edits if not edit.subject]
    return {edit.id: infer_subject(edit.prompt, get_lexicon(base)) for edit in nameless} if nameless else {}


@torch.no_grad()
def embed_prompts(base: BaseModel, edits: Sequence[Edit]) -> Vectors:
    """Unit vectors `[edits, hidden]`: the mean over each prompt of the embedding layer's output (paper, 3.2)."""
    prompts = [passage.prompt for passage in encode_edits(base, edits)]
    vectors = numpy.empty((len(prompts), base.embedding.weight.shape[1]), numpy.float32)
    for rows in _group_by_length(prompts):
        ids = torch.tensor([prompts[row] for row in rows], device=base.device)
        means = base.embedding(ids).float().mean(1)
        vectors[rows] = torch.nn.functional.normalize(means, dim=-1).cpu().numpy()
    return vectors


def _group_by_length(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of prompts of one length, which are embedded together without padding."""
    lengths: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        lengths[len(prompt)].append(index)
    for length, indices in lengths.items():
        yield from _split_chunks(indices, max(1, EMBEDDED_TOKENS // length))


def _subject_keys(edits: Sequence[Edit]) -> list[str]:
    return [normalise_question(edit.subject) if edit.subject else f"? {edit.id}" for edit in edits]


def _split_chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def mean_pair_similarity(vectors: Vectors) -> float:
    """Mean similarity of the pairs of a round; 1 for a round of one."""
    n = len(vectors)
    total = vectors.sum(0)
    return float((total @ total - n) / (n * (n - 1))) if n > 1 else 1.0


def measure_similarity(vectors: Vectors, rounds: Sequence[Sequence[int]]) -> Similarity:
    """The similarity of the rows of `vectors` within each round, and between the rounds."""
    within, means = [], []
    for members in rounds:
        rows = vectors[list(members)]
        means.append(rows.mean(0))
        within += [(mean_pair_similarity(rows), len(rows))] if len(rows) > 1 else []
    centres = numpy.stack(means)
    centres /= numpy.linalg.norm(centres, axis=1, keepdims=True)
    weight = sum(size for _, size in within)
    return Similarity(
        within=sum(value * size for value, size in within) / weight if weight else 1.0,
        between=mean_pair_similarity(centres) if len(rounds) > 1 else 0.0,
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
        **({"inferred_subjects": chosen.inferred_subjects} if chosen.inferred_subjects else {}),
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
    dumper = _QUICK_DUMPER if len(edits) > SLOW_DUMPER_LIMIT else yaml.SafeDumper
    return head + yaml.dump(document, Dumper=dumper, sort_keys=False, allow_unicode=True, width=10_000)
