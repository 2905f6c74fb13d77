"""The plan as a picture: the prompts of each round, in the plane that shows most of how they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit
from lemoe.planning.plan import Similarity, embed_prompts, mean_pair_similarity, measure_similarity
from lemoe.report.rounds import pick_evenly

ROUNDS_DRAWN = 12  # more cannot be distinguished by colour
POINTS_DRAWN = 600

Point = tuple[float, float]


@dataclass(frozen=True)
class Cluster:
    """A round.

    Attributes:
        edits: how many it has.
        cohesion: mean cosine similarity of its prompts.
        points: of its edits, evenly spread ones where there are too many.
        centre: mean of all its points.
    """

    number: int
    edits: int
    cohesion: float
    points: tuple[Point, ...]
    centre: Point


@dataclass(frozen=True)
class Clusters:
    """The rounds that are drawn, and the similarity of prompts within and between all of them.

    Attributes:
        drawn: all, or evenly spread ones.
        others: points of the other rounds.
        rounds: how many there are.
        variance: share of all variance that the plane holds.
    """

    drawn: tuple[Cluster, ...]
    others: tuple[Point, ...]
    rounds: int
    similarity: Similarity
    variance: float


def build_clusters(base: BaseModel, rounds: Sequence[tuple[int, Sequence[Edit]]]) -> Clusters | None:
    """The rounds, each with its number; None for fewer than three prompts, or if all are the same.

    The plane is that of the first two principal components, computed without randomness.
    """
    vectors = embed_prompts(base, [edit for _, members in rounds for edit in members])
    if len(vectors) < 3 or numpy.allclose(vectors, vectors[0]):
        return None
    model = PCA(n_components=2, svd_solver="full")
    plane = model.fit_transform(vectors.astype(numpy.float64))
    bounds = numpy.cumsum([0, *(len(members) for _, members in rounds)])
    rows_by_round = [list(range(first, last)) for first, last in pairwise(bounds.tolist())]
    chosen = pick_evenly(range(len(rounds)), ROUNDS_DRAWN)
    most = max(2, POINTS_DRAWN // len(chosen))
    rest = [row for index, members in enumerate(rows_by_round) if index not in chosen for row in members]
    return Clusters(
        drawn=tuple(
            Cluster(
                number=rounds[index][0],
                edits=len(rows_by_round[index]),
                cohesion=mean_pair_similarity(vectors[rows_by_round[index]]),
                points=_make_points(plane[pick_evenly(rows_by_round[index], most)]),
                centre=_make_points(plane[rows_by_round[index]].mean(0, keepdims=True))[0],
            )
            for index in chosen
        ),
        others=_make_points(plane[pick_evenly(rest, POINTS_DRAWN)]),
        rounds=len(rounds),
        similarity=measure_similarity(vectors, rows_by_round),
        variance=float(model.explained_variance_ratio_.sum()),
    )


def _make_points(rows: NDArray[numpy.float64]) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in rows)
