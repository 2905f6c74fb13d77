"""The plan as a picture: the prompts of each round, in the plane that shows most of how they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit
from lemoe.planning.plan import Similarity, cohesion_of, embed_prompts, similarity_of
from lemoe.report.rounds import spread

ROUNDS_DRAWN = 12  # more cannot be told apart
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
    """The rounds that are drawn, and how alike prompts are within and between all of them.

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


def clusters_of(base: BaseModel, rounds: Sequence[tuple[int, Sequence[Edit]]]) -> Clusters | None:
    """The rounds, each with its number; None for fewer than three prompts, or if all are the same.

    The plane is that of the first two principal components, in which nothing is random.
    """
    vectors = embed_prompts(base, [edit for _, members in rounds for edit in members])
    if len(vectors) < 3 or numpy.allclose(vectors, vectors[0]):
        return None
    model = PCA(n_components=2, svd_solver="full")
    plane = model.fit_transform(vectors.astype(numpy.float64))
    bounds = numpy.cumsum([0, *(len(members) for _, members in rounds)])
    places = [list(range(first, last)) for first, last in pairwise(bounds.tolist())]
    chosen = spread(range(len(rounds)), ROUNDS_DRAWN)
    most = max(2, POINTS_DRAWN // len(chosen))
    rest = [row for place, members in enumerate(places) if place not in chosen for row in members]
    return Clusters(
        drawn=tuple(
            Cluster(
                number=rounds[place][0],
                edits=len(places[place]),
                cohesion=cohesion_of(vectors[places[place]]),
                points=_points(plane[spread(places[place], most)]),
                centre=_points(plane[places[place]].mean(0, keepdims=True))[0],
            )
            for place in chosen
        ),
        others=_points(plane[spread(rest, POINTS_DRAWN)]),
        rounds=len(rounds),
        similarity=similarity_of(vectors, places),
        variance=float(model.explained_variance_ratio_.sum()),
    )


def _points(rows: NDArray[numpy.float64]) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in rows)
