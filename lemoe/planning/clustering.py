"""Rounds of similar edits: none above the round size, each subject in one, neighbours that differ (paper, 3.3).

A set of up to `BALANCED_LIMIT` edits is clustered as a whole. A larger one is cut in two, again and again, until its
parts are small, so that every step of more than linear cost stays inside a part.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy
from k_means_constrained import KMeansConstrained
from numpy.typing import NDArray
from sklearn.cluster import KMeans

BALANCED_LIMIT = 1000  # edits that are clustered as a whole, and rounds that are ordered as a whole
PART_ROUNDS = 50  # at most in a part of a larger set; clustering costs edits times rounds
MIN_SIDE_DIVISOR = 8  # the smaller side of a cut has at least 1/8 of the edits, so that there are few cuts
CUT_SAMPLE = 10_000  # edits by which a cut is found
COPIED_ROWS = 8192  # rows that are copied at a time

Vectors = NDArray[numpy.float32]
Indices = NDArray[numpy.intp]


def cluster_rounds(vectors: Vectors, subjects: Sequence[str], round_size: int, seed: int) -> list[list[int]]:
    """Rounds of rows of `vectors` `[edits, hidden]`, in training order; `subjects` names each row's subject.

    Time and memory grow with the number of edits, not with its square.
    """
    means = _SubjectMeans(vectors, subjects)
    parts = [_cluster_balanced(means, part, round_size, seed) for part in _split_parts(means, round_size, seed)]
    del means
    parts = _gather_subjects(parts, subjects)
    rounds = [members for part in parts for members in _enforce_round_size(part, subjects, vectors, round_size)]
    return _order_rounds([sorted(members) for members in rounds], vectors)


class _SubjectMeans:
    """Vectors of edits, each replaced by its subject's mean, so that clustering tends to keep a subject together."""

    def __init__(self, vectors: Vectors, subjects: Sequence[str]):
        groups: dict[str, list[int]] = defaultdict(list)
        for index, subject in enumerate(subjects):
            groups[subject].append(index)
        several = [members for members in groups.values() if len(members) > 1]
        self._vectors = vectors
        self._means = numpy.empty((len(several), vectors.shape[1]), vectors.dtype)
        self._mean_of = numpy.full(len(vectors), -1)  # -1: the only edit of its subject
        for number, members in enumerate(several):
            self._means[number] = vectors[members].mean(0)
            self._mean_of[members] = number

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, rows: Indices) -> Vectors:
        found, numbers = self._vectors[rows], self._mean_of[rows]
        found[numbers >= 0] = self._means[numbers[numbers >= 0]]
        return found


def _split_parts(vectors: _SubjectMeans, round_size: int, seed: int) -> Iterator[Indices]:
    """Split the edits into sets small enough for size-constrained k-means."""
    whole, part = (max(round_size, edits) for edits in (BALANCED_LIMIT, min(BALANCED_LIMIT, PART_ROUNDS * round_size)))
    limit = whole if len(vectors) <= whole else part
    pending = [numpy.arange(len(vectors))]
    while pending:
        members = pending.pop()
        if len(members) <= limit:
            yield members
        else:
            pending += _split_in_two(vectors, members, seed)


def _split_in_two(vectors: _SubjectMeans, members: Indices, seed: int) -> tuple[Indices, Indices]:
    """The members on either side of the plane between two clusters, each at least an eighth of them."""
    sample = vectors[members[:: -(-len(members) // CUT_SAMPLE)]]
    if (sample == sample[0]).all():
        return members[: len(members) // 2], members[len(members) // 2 :]
    one, other = KMeans(2, n_init=1, random_state=seed).fit(sample).cluster_centers_
    projections = _project_members(vectors, members, other - one)
    nearer_one = int((projections < (other @ other - one @ one) / 2).sum())
    smallest = len(members) // MIN_SIDE_DIVISOR
    order = projections.argsort(kind="stable")
    cut = min(max(nearer_one, smallest), len(members) - smallest)
    return members[numpy.sort(order[cut:])], members[numpy.sort(order[:cut])]


def _project_members(vectors: _SubjectMeans, members: Indices, direction: Vectors) -> Vectors:
    """The projection of each member onto `direction`, without a copy of them all."""
    starts = range(0, len(members), COPIED_ROWS)
    return numpy.concatenate([vectors[members[start : start + COPIED_ROWS]] @ direction for start in starts])


def _cluster_balanced(vectors: _SubjectMeans, part: Indices, round_size: int, seed: int) -> list[list[int]]:
    """The part in as few rounds as possible, whose sizes differ by at most one."""
    count = -(-len(part) // round_size)
    if count == 1:
        return [part.tolist()]
    model = KMeansConstrained(
        n_clusters=count,
        size_min=len(part) // count,
        size_max=-(-len(part) // count),
        n_init=3,
        max_iter=50,
        random_state=seed,
        n_jobs=1,
    )
    labels = model.fit_predict(vectors[part])
    return [part[labels == label].tolist() for label in range(count)]


def _gather_subjects(parts: list[list[list[int]]], subjects: Sequence[str]) -> list[list[list[int]]]:
    """Bring a subject's scattered edits into the round that has most of them."""
    rounds = [members for part in parts for members in part]
    round_of: dict[str, int] = {}
    counts = Counter((subjects[index], number) for number, members in enumerate(rounds) for index in members)
    for (subject, number), _ in sorted(counts.items(), key=lambda item: (-item[1], item[0][1])):
        round_of.setdefault(subject, number)
    gathered: list[list[int]] = [[] for _ in rounds]
    for index, subject in enumerate(subjects):
        gathered[round_of[subject]].append(index)
    remaining = iter(gathered)
    return [[next(remaining) for _ in part] for part in parts]


def _enforce_round_size(
    rounds: list[list[int]], subjects: Sequence[str], vectors: Vectors, round_size: int
) -> list[list[int]]:
    """Move the least typical subjects out of rounds that are too large, into others of the part or new ones."""
    sizes = Counter(subjects[index] for members in rounds for index in members)
    number = 0
    while number < len(rounds):
        while len(members := rounds[number]) > round_size:
            if len(members) <= sizes[subjects[members[0]]]:  # a single subject
                rounds[number], moving = members[:round_size], members[round_size:]
            else:
                farthest = _farthest_subject(members, subjects, vectors, sizes)
                rounds[number] = [index for index in members if subjects[index] != farthest]
                moving = [index for index in members if subjects[index] == farthest]
            target = _find_room(rounds, moving, vectors, round_size)
            if target is None:
                rounds.append(moving)
            else:
                rounds[target].extend(moving)
        number += 1
    return [members for members in rounds if members]


def _farthest_subject(members: Sequence[int], subjects: Sequence[str], vectors: Vectors, sizes: Counter[str]) -> str:
    """Of the round's subjects with the fewest edits, the one farthest from its centre."""
    centre = vectors[members].mean(0)
    groups: dict[str, list[int]] = defaultdict(list)
    for index in members:
        groups[subjects[index]].append(index)
    fewest = min(sizes[name] for name in groups)
    smallest = sorted(name for name in groups if sizes[name] == fewest)
    return min(smallest, key=lambda name: float(vectors[groups[name]].mean(0) @ centre))


def _find_room(rounds: Sequence[Sequence[int]], moving: Sequence[int], vectors: Vectors, round_size: int) -> int | None:
    """The most similar round with room for the `moving` edits, None if there is none."""
    if len(moving) > round_size:
        return None
    centre = vectors[moving].mean(0)
    open_ = [number for number, members in enumerate(rounds) if members and len(members) + len(moving) <= round_size]
    return max(open_, key=lambda number: float(vectors[rounds[number]].mean(0) @ centre), default=None)


def _order_rounds(rounds: list[list[int]], vectors: Vectors) -> list[list[int]]:
    """Order rounds so that neighbours differ: from the most typical round, always to the least similar one.

    Above `BALANCED_LIMIT` rounds, each is compared with every second (third, ...) round only.
    """
    centres = numpy.stack([vectors[members].mean(0) for members in rounds])
    strides = -(-len(rounds) // BALANCED_LIMIT)
    order: list[int] = []
    for first in range(strides):
        order += _chain_dissimilar(centres, numpy.arange(first, len(rounds), strides), order[-1] if order else None)
    return [rounds[number] for number in order]


def _chain_dissimilar(centres: Vectors, numbers: Indices, previous: int | None) -> list[int]:
    """The rounds `numbers`, each followed by the least similar of the remaining ones."""
    chosen = centres[numbers]
    similarity = chosen @ chosen.T
    index = int(similarity.sum(1).argmax() if previous is None else (chosen @ centres[previous]).argmin())
    order = [index]
    while len(order) < len(numbers):
        similarity[:, index] = numpy.inf
        index = int(similarity[index].argmin())
        order.append(index)
    chained: list[int] = numbers[order].tolist()
    return chained
