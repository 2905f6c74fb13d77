"""Order planning: which edits are learned together, and in which order (paper, 3.3).

A round takes edits that are alike and rounds differ from each other, so that each expert learns one region and
routes stay apart. Edits of one subject share a round.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from k_means_constrained import KMeansConstrained
from numpy.typing import NDArray
from sklearn.cluster import BisectingKMeans

from lemoe.anchor.anchors import lexicon_of
from lemoe.anchor.lexicon import infer_subject
from lemoe.conflicts import Conflict, find_conflicts, left_out, question
from lemoe.edits import Edit
from lemoe.errors import InputError
from lemoe.models import BaseModel
from lemoe.settings import Order, Settings
from lemoe.training import encode_edits

BALANCED_LIMIT = 1000  # edits; size-constrained k-means grows faster than the set, larger sets are split first

Vectors = NDArray[numpy.float32]


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


@dataclass(frozen=True)
class Round:
    """Edits that are trained together: the round `number`, from 1, `of` all that the plan has."""

    number: int
    of: int
    edits: Sequence[Edit]


def plan(base: BaseModel, edits: Sequence[Edit], settings: Settings) -> Plan:
    """Plan the rounds of `edits`, at most `settings.round_size` in each, in the order that the settings name.

    Raises:
        InputError: listing the edits that cannot be used with this model.
    """
    if not edits:
        raise InputError("there are no edits to plan")
    inferred = _inferred_subjects(base, edits)
    named = [replace(edit, subject=edit.subject or inferred[edit.id]) for edit in edits]
    conflicts = find_conflicts(named)
    dropped = left_out(conflicts)
    kept = [edit for edit in named if edit.id not in dropped]
    vectors = embed_prompts(base, kept)
    orders: dict[Order, list[list[int]]] = {
        "planned": _planned(kept, vectors, settings),
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
    passages = encode_edits(base, edits)
    rows = []
    for passage in passages:
        ids = torch.tensor(passage.prompt, device=base.device)
        rows.append(base.embedding(ids).float().mean(0))
    vectors = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    return vectors.cpu().numpy()


def _planned(edits: Sequence[Edit], vectors: Vectors, settings: Settings) -> list[list[int]]:
    subjects = _subjects(edits)
    together = _pulled_together(vectors, subjects)
    rounds = []
    for part in _parts(together, settings):
        count = -(-len(part) // settings.round_size)
        for members in _balanced(together[part], count, settings.seed):
            rounds.append([part[index] for index in members])
    rounds = _one_round_a_subject(rounds, subjects, vectors, settings.round_size)
    return _apart([sorted(members) for members in rounds], vectors)


def _subjects(edits: Sequence[Edit]) -> list[str]:
    return [question(edit.subject) if edit.subject else f"? {edit.id}" for edit in edits]


def _pulled_together(vectors: Vectors, subjects: Sequence[str]) -> Vectors:
    """Each edit at the mean of its subject's edits, so that clustering tends to keep them together."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, subject in enumerate(subjects):
        groups[subject].append(index)
    moved = vectors.copy()
    for members in groups.values():
        moved[members] = vectors[members].mean(0)
    return moved


def _parts(vectors: Vectors, settings: Settings) -> list[list[int]]:
    """Sets small enough for size-constrained k-means."""
    count = -(-len(vectors) // BALANCED_LIMIT)
    if count == 1:
        return [list(range(len(vectors)))]
    model = BisectingKMeans(
        n_clusters=count, random_state=settings.seed, bisecting_strategy="largest_cluster", n_init=3
    )
    labels = model.fit_predict(vectors)
    return [numpy.flatnonzero(labels == label).tolist() for label in range(count) if (labels == label).any()]


def _balanced(vectors: Vectors, count: int, seed: int) -> list[list[int]]:
    if count == 1:
        return [list(range(len(vectors)))]
    model = KMeansConstrained(
        n_clusters=count,
        size_min=len(vectors) // count,
        size_max=-(-len(vectors) // count),
        n_init=3,
        max_iter=50,
        random_state=seed,
        n_jobs=1,
    )
    labels = model.fit_predict(vectors)
    return [numpy.flatnonzero(labels == label).tolist() for label in range(count)]


def _one_round_a_subject(
    rounds: list[list[int]], subjects: Sequence[str], vectors: Vectors, round_size: int
) -> list[list[int]]:
    """Bring a subject's scattered edits into one round, and move loosely held ones out where that overfills it."""
    home: dict[str, int] = {}
    counts = Counter((subjects[index], number) for number, members in enumerate(rounds) for index in members)
    for (subject, number), _ in sorted(counts.items(), key=lambda item: (-item[1], item[0][1])):
        home.setdefault(subject, number)
    gathered: list[list[int]] = [[] for _ in rounds]
    for index in sorted(index for members in rounds for index in members):
        gathered[home[subjects[index]]].append(index)
    return _levelled(gathered, subjects, vectors, round_size)


def _levelled(rounds: list[list[int]], subjects: Sequence[str], vectors: Vectors, round_size: int) -> list[list[int]]:
    sizes = Counter(subjects[index] for members in rounds for index in members)
    number = 0
    while number < len(rounds):
        while len(rounds[number]) > round_size:
            centre = vectors[rounds[number]].mean(0)
            groups = sorted({subjects[index] for index in rounds[number]}, key=lambda name: (sizes[name], name))
            smallest = [name for name in groups if sizes[name] == sizes[groups[0]]]
            loosest = min(smallest, key=lambda name: _nearness(rounds[number], subjects, name, vectors, centre))
            moving = [index for index in rounds[number] if subjects[index] == loosest]
            moving = moving if len(moving) < len(rounds[number]) else moving[round_size:]
            rounds[number] = [index for index in rounds[number] if index not in moving]
            target = _room_for(rounds, len(moving), vectors, vectors[moving].mean(0), round_size)
            if target is None:
                rounds.append(moving)
            else:
                rounds[target].extend(moving)
        number += 1
    return [members for members in rounds if members]


def _nearness(
    members: Sequence[int], subjects: Sequence[str], subject: str, vectors: Vectors, centre: Vectors
) -> float:
    return float(vectors[[index for index in members if subjects[index] == subject]].mean(0) @ centre)


def _room_for(
    rounds: Sequence[Sequence[int]], count: int, vectors: Vectors, centre: Vectors, round_size: int
) -> int | None:
    open_ = [n for n, members in enumerate(rounds) if members and len(members) + count <= round_size]
    return max(open_, key=lambda number: float(vectors[list(rounds[number])].mean(0) @ centre), default=None)


def _apart(rounds: list[list[int]], vectors: Vectors) -> list[list[int]]:
    """Order rounds so that neighbours differ: from the most typical round, always to the least alike one."""
    centres = numpy.stack([vectors[members].mean(0) for members in rounds])
    alike = centres @ centres.T
    order = [int(alike.sum(1).argmax())]
    left = set(range(len(rounds))) - set(order)
    while left:
        order.append(min(left, key=lambda number: (alike[order[-1], number], number)))
        left.remove(order[-1])
    return [rounds[number] for number in order]


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def cohesion_of(vectors: Vectors) -> float:
    """Mean similarity of the pairs of a round; 1 for a round of one."""
    n = len(vectors)
    total = vectors.sum(0)
    return float((total @ total - n) / (n * (n - 1))) if n > 1 else 1.0


def similarity_of(vectors: Vectors, rounds: Sequence[Sequence[int]]) -> Similarity:
    """How alike the rows of `vectors` that make up each round are, and the rounds."""
    within = [(cohesion_of(vectors[list(members)]), len(members)) for members in rounds if len(members) > 1]
    centres = numpy.stack([vectors[list(members)].mean(0) for members in rounds])
    centres /= numpy.linalg.norm(centres, axis=1, keepdims=True)
    weight = sum(size for _, size in within)
    return Similarity(
        within=sum(value * size for value, size in within) / weight if weight else 1.0,
        between=cohesion_of(centres) if len(rounds) > 1 else 0.0,
    )


def save_plan(chosen: Plan, edits: Sequence[Edit], source: str) -> str:
    """The plan as YAML that people can read and edit by hand."""
    texts = {edit.id: f"{edit.prompt} -> {edit.target}" for edit in edits}
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
    return head + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000)


def load_plan(path: Path | str, edits: Sequence[Edit]) -> list[list[Edit]]:
    """The rounds of a plan file, as edits.

    Raises:
        InputError: if the file is no plan, or names edits that are not there or names one twice; all are listed.
    """
    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    rounds = document.get("rounds") if isinstance(document, dict) else None
    if not isinstance(rounds, list) or not all(isinstance(members, (dict, list)) for members in rounds):
        raise InputError(f"{path}: not a plan; expected `rounds:` with a list of edit ids in each")
    named = [[str(name) for name in members] for members in rounds if members]
    by_id = {edit.id: edit for edit in edits}
    counts = Counter(name for members in named for name in members)
    problems = [f"edit {name!r} is not among the edits read" for name in counts if name not in by_id]
    problems += [f"edit {name!r} is in {count} places" for name, count in counts.items() if count > 1]
    if problems or not named:
        raise InputError.listing(f"{path}: the plan does not fit the edits", problems or ["it has no rounds"])
    return [[by_id[name] for name in members] for members in named]
