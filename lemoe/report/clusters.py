"""The plan as a picture: the prompts of each round, in the plane that shows most of how they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
from sklearn.decomposition import PCA

from lemoe.edits import Edit
from lemoe.models import BaseModel
from lemoe.planning import Similarity, cohesion_of, embed_prompts, similarity_of
from lemoe.report.rounds import ROUNDS_SHOWN, spread

POINTS_SHOWN = 1000

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
    """The rounds that are shown, and how alike prompts are within and between all of them.

    Attributes:
        rounds: how many there are.
        variance: share of all variance that the plane holds.
    """

    shown: tuple[Cluster, ...]
    rounds: int
    similarity: Similarity
    variance: float


def clusters_of(base: BaseModel, rounds: Sequence[tuple[int, Sequence[Edit]]]) -> Clusters | None:
    """The rounds, each with its number; None for fewer than three prompts, or if all are the same.

    The plane is that of the first two principal components: nothing in it is random, and distances keep their meaning.
    """
    vectors = embed_prompts(base, [edit for _, members in rounds for edit in members])
    if len(vectors) < 3 or numpy.allclose(vectors, vectors[0]):
        return None
    model = PCA(n_components=2, svd_solver="full")
    plane = model.fit_transform(vectors.astype(numpy.float64))
    bounds = numpy.cumsum([0, *(len(members) for _, members in rounds)])
    places = [list(range(first, last)) for first, last in pairwise(bounds.tolist())]
    chosen = spread(range(len(rounds)), ROUNDS_SHOWN)
    most = max(2, POINTS_SHOWN // len(chosen))
    return Clusters(
        shown=tuple(
            Cluster(
                number=rounds[place][0],
                edits=len(places[place]),
                cohesion=cohesion_of(vectors[places[place]]),
                points=tuple((float(x), float(y)) for x, y in plane[spread(places[place], most)]),
                centre=(float(plane[places[place], 0].mean()), float(plane[places[place], 1].mean())),
            )
            for place in chosen
        ),
        rounds=len(rounds),
        similarity=similarity_of(vectors, places),
        variance=float(model.explained_variance_ratio_.sum()),
    )
