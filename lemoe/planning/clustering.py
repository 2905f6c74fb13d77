"""Rounds of edits that are alike: none larger than asked, every subject in one, neighbours that differ (paper, 3.3).

A set of up to `BALANCED_LIMIT` edits is clustered as a whole. A larger one is cut in two, again and again, until its
parts are small; all that costs more than in proportion to the number of edits then stays inside a part.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy
from k_means_constrained import KMeansConstrained
from numpy.typing import NDArray
from sklearn.cluster import KMeans

BALANCED_LIMIT = 1000  # edits that are clustered as a whole, and rounds that are ordered as a whole
PART_ROUNDS = 50  # in a part of a larger set, at most; the cost of clustering grows with edits times rounds
LEAST = 8  # the smaller side of a cut has a share of one in so many at least, so that there are few cuts
SAMPLE = 10_000  # edits that tell where to cut
GATHERED = 8192  # rows that are copied at a time

Vectors = NDArray[numpy.float32]
Indices = NDArray[numpy.intp]


def clustered(vectors: Vectors, subjects: Sequence[str], round_size: int, seed: int) -> list[list[int]]:
    """Rounds of rows of `vectors` `[edits, hidden]`, in training order; `subjects` names each row's subject.

    Time and memory grow with the number of edits, not with its square.
    """
    together = _Together(vectors, subjects)
    parts = [_balanced(together, part, round_size, seed) for part in _parts(together, round_size, seed)]
    del together
    parts = _one_round_a_subject(parts, subjects)
    rounds = [members for part in parts for members in _levelled(part, subjects, vectors, round_size)]
    return _apart([sorted(members) for members in rounds], vectors)


class _Together:
    """Vectors of edits, each at the mean of its subject's edits, so that clustering tends to keep those together."""

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


def _parts(vectors: _Together, round_size: int, seed: int) -> Iterator[Indices]:
    """Sets small enough for size-constrained k-means."""
    whole, part = (max(round_size, limit) for limit in (BALANCED_LIMIT, min(BALANCED_LIMIT, PART_ROUNDS * round_size)))
    most = whole if len(vectors) <= whole else part
    pending = [numpy.arange(len(vectors))]
    while pending:
        members = pending.pop()
        if len(members) <= most:
            yield members
        else:
            pending += _halves(vectors, members, seed)


def _halves(vectors: _Together, members: Indices, seed: int) -> tuple[Indices, Indices]:
    """The members on either side of the plane between two clusters, each an eighth of them at least."""
    sample = vectors[members[:: -(-len(members) // SAMPLE)]]
    if (sample == sample[0]).all():
        return members[: len(members) // 2], members[len(members) // 2 :]
    one, other = KMeans(2, n_init=1, random_state=seed).fit(sample).cluster_centers_
    heights = _heights(vectors, members, other - one)
    near = int((heights < (other @ other - one @ one) / 2).sum())
    least = len(members) // LEAST
    order = heights.argsort(kind="stable")
    cut = min(max(near, least), len(members) - least)
    return members[numpy.sort(order[cut:])], members[numpy.sort(order[:cut])]


def _heights(vectors: _Together, members: Indices, direction: Vectors) -> Vectors:
    """How far each member lies in a direction, without a copy of them all."""
    starts = range(0, len(members), GATHERED)
    return numpy.concatenate([vectors[members[start : start + GATHERED]] @ direction for start in starts])


def _balanced(vectors: _Together, part: Indices, round_size: int, seed: int) -> list[list[int]]:
    """The part in as few rounds as hold it, whose sizes differ by one at most."""
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


def _one_round_a_subject(parts: list[list[list[int]]], subjects: Sequence[str]) -> list[list[list[int]]]:
    """Bring a subject's scattered edits into the round that has most of them."""
    rounds = [members for part in parts for members in part]
    home: dict[str, int] = {}
    counts = Counter((subjects[index], number) for number, members in enumerate(rounds) for index in members)
    for (subject, number), _ in sorted(counts.items(), key=lambda item: (-item[1], item[0][1])):
        home.setdefault(subject, number)
    gathered: list[list[int]] = [[] for _ in rounds]
    for index, subject in enumerate(subjects):
        gathered[home[subject]].append(index)
    left = iter(gathered)
    return [[next(left) for _ in part] for part in parts]


def _levelled(rounds: list[list[int]], subjects: Sequence[str], vectors: Vectors, round_size: int) -> list[list[int]]:
    """Move a part's loosely held subjects out of rounds that are too large, into others of the part or new ones."""
    sizes = Counter(subjects[index] for members in rounds for index in members)
    number = 0
    while number < len(rounds):
        while len(members := rounds[number]) > round_size:
            if len(members) <= sizes[subjects[members[0]]]:  # nothing but one subject
                rounds[number], moving = members[:round_size], members[round_size:]
            else:
                loosest = _loosest(members, subjects, vectors, sizes)
                rounds[number] = [index for index in members if subjects[index] != loosest]
                moving = [index for index in members if subjects[index] == loosest]
            target = _room_for(rounds, moving, vectors, round_size)
            if target is None:
                rounds.append(moving)
            else:
                rounds[target].extend(moving)
        number += 1
    return [members for members in rounds if members]


def _loosest(members: Sequence[int], subjects: Sequence[str], vectors: Vectors, sizes: Counter[str]) -> str:
    """Of the round's subjects with the fewest edits, the one farthest from its centre."""
    centre = vectors[members].mean(0)
    groups: dict[str, list[int]] = defaultdict(list)
    for index in members:
        groups[subjects[index]].append(index)
    fewest = min(sizes[name] for name in groups)
    smallest = sorted(name for name in groups if sizes[name] == fewest)
    return min(smallest, key=lambda name: float(vectors[groups[name]].mean(0) @ centre))


def _room_for(rounds: Sequence[Sequence[int]], moving: Sequence[int], vectors: Vectors, round_size: int) -> int | None:
    if len(moving) > round_size:
        return None
    centre = vectors[moving].mean(0)
    open_ = [number for number, members in enumerate(rounds) if members and len(members) + len(moving) <= round_size]
    return max(open_, key=lambda number: float(vectors[rounds[number]].mean(0) @ centre), default=None)


def _apart(rounds: list[list[int]], vectors: Vectors) -> list[list[int]]:
    """Order rounds so that neighbours differ: from the most typical round, always to the least alike one.

    Where there are many, the least alike one is looked for among every so-many-th round.
    """
    centres = numpy.stack([vectors[members].mean(0) for members in rounds])
    strides = -(-len(rounds) // BALANCED_LIMIT)
    order: list[int] = []
    for first in range(strides):
        order += _chain(centres, numpy.arange(first, len(rounds), strides), order[-1] if order else None)
    return [rounds[number] for number in order]


def _chain(centres: Vectors, numbers: Indices, previous: int | None) -> list[int]:
    """The rounds `numbers`, each the least alike to the one before of those that are left."""
    mine = centres[numbers]
    alike = mine @ mine.T
    place = int(alike.sum(1).argmax() if previous is None else (mine @ centres[previous]).argmin())
    order = [place]
    while len(order) < len(numbers):
        alike[:, place] = numpy.inf
        place = int(alike[place].argmin())
        order.append(place)
    chained: list[int] = numbers[order].tolist()
    return chained
