"""Whether two questions ask the same, by the base model's own hidden states: a projection that is fitted once.

A question is read as one vector: the mean, by rarity, of the hidden states with which its tokens enter a layer at a
third of the depth, each divided by its RMS, without the tokens of its subject. Of that vector the directions are kept
in which relations differ and wordings of one relation do not (linear discriminant analysis: Fisher 1936, Rao 1948).
It is scaled to unit length, and two of them are compared by the log-likelihood ratio of one relation against two,
relations and wordings both Gaussian (two-covariance model: Ioffe 2006; Brümmer and de Villiers 2010).

Nothing here depends on which edits are stored. `lemoe.routing.anchor.fitting` fits it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from lemoe.base.equality import TensorEquality
from lemoe.base.tensors import rms_normalise
from lemoe.routing.anchor.relation_words import RelationWords

RARE_TOKEN = 200.0  # a token weighs log(1 + id / RARE_TOKEN), since ids grow with rarity,
COMMON_WEIGHT = 0.2  # and this much more

Vector = NDArray[numpy.float32]
Values = NDArray[numpy.float64]
PREFIX = "meaning."
SUBJECT_FEATURES = ("bias", "missing", "lowered", "light", "misspelt", "neighbour", "longer")
QUESTION_FEATURES = ("meaning", "profile", "relation", "overlap", "contradiction", "agreement", "substituted")
FEATURES = (*SUBJECT_FEATURES, *QUESTION_FEATURES)  # what `Meaning.weights` weigh


def token_weight(token: int) -> float:
    """The weight of a token in the mean, by its id."""
    return math.log1p(token / RARE_TOKEN) + COMMON_WEIGHT


@dataclass(frozen=True, eq=False)
class Meaning(TensorEquality):
    """The fitted comparison of questions for one base model.

    Attributes:
        layer: `[1]`, decoder layer whose incoming hidden states are read.
        directions: `[hidden, rank]`, what is kept of them.
        origin: `[rank]`, the mean of all questions.
        centre: `[rank]`, the mean of relations, after scaling to unit length.
        rotation: `[rank, rank]`, to axes on which wordings of one relation have variance 1 and no covariance.
        between: `[rank]`, variance of the relations on these axes.
        cohort: `[relations, rank]`, the mean of each relation that was fitted, on these axes.
        terms, marked, ratios: `[entries]`, which words mark which relations; see
            `lemoe.routing.anchor.relation_words.RelationWords`.
        weights: `[features]`, of the evidence; see `lemoe.routing.anchor.evidence`.
    """

    layer: Tensor
    directions: Tensor
    origin: Tensor
    centre: Tensor
    rotation: Tensor
    between: Tensor
    cohort: Tensor
    terms: Tensor
    marked: Tensor
    ratios: Tensor
    weights: Tensor

    @property
    def rank(self) -> int:
        return self.directions.shape[1]

    def project(self, hidden: Tensor) -> Tensor:
        """`[..., rank]` in float32, of hidden states `[..., hidden]`."""
        directions = self._directions.get(hidden.device)
        if directions is None:
            directions = self._directions[hidden.device] = self.directions.to(hidden.device)
        return rms_normalise(hidden) @ directions

    @cached_property
    def _directions(self) -> dict[torch.device, Tensor]:
        """The directions on each device that they were used on."""
        return {}

    def embed(self, total: Vector | None, weight: float) -> Vector:
        """The vector `[rank]` of a question, from the weighted sum of its projected tokens and their weight.

        A question without tokens is the mean of all.
        """
        origin, centre, rotation = self._arrays
        if total is None or weight <= 0:
            return -centre @ rotation
        mean = total / numpy.float32(weight) - origin
        length = numpy.sqrt(mean @ mean)
        scaled = mean * (numpy.float32(self.rank**0.5) / length) if length > 0 else mean
        embedded: Vector = (scaled - centre) @ rotation
        return embedded

    @cached_property
    def _arrays(self) -> tuple[Vector, Vector, Vector]:
        return self.origin.numpy(), self.centre.numpy(), self.rotation.numpy()

    @cached_property
    def ratio_terms(self) -> tuple[Vector, Vector, float]:
        """Factors `[rank]` of the log-likelihood ratio for squares and for products, and its constant."""
        between = self.between.double().numpy()
        own = -0.5 * between**2 / ((1 + between) * (1 + 2 * between))
        shared = between / (1 + 2 * between)
        constant = float(numpy.log1p(between).sum() - 0.5 * numpy.log1p(2 * between).sum())
        return own.astype(numpy.float32), shared.astype(numpy.float32), constant

    def profile(self, embedded: Vector) -> Vector:
        """How alike the questions `[..., rank]` are to each fitted relation, as unit vectors `[..., relations]`."""
        profile = self._cohort_keys.compare_all(embedded)
        numpy.maximum(profile, -MAX_COHORT_RATIO, out=profile)
        numpy.minimum(profile, MAX_COHORT_RATIO, out=profile)
        profile -= numpy.add.reduce(profile, -1, keepdims=True) / numpy.float32(profile.shape[-1])
        length = numpy.sqrt(numpy.add.reduce(profile * profile, -1, keepdims=True))
        profile /= numpy.maximum(length, numpy.float32(1e-6))
        return profile

    @cached_property
    def relation_words(self) -> RelationWords:
        """Which words mark which relations."""
        return RelationWords(self.terms, self.marked, self.ratios)

    @cached_property
    def _cohort_keys(self) -> "Keys":
        return Keys(self, self.cohort.numpy())

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, as an adaptor file names them."""
        return {f"{PREFIX}{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def expected_tensors(
        cls, hidden: int, rank: int, relations: int, entries: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and type of each of its tensors in an adaptor file."""
        shapes = {
            "layer": (1,),
            "directions": (hidden, rank),
            "origin": (rank,),
            "centre": (rank,),
            "rotation": (rank, rank),
            "between": (rank,),
            "cohort": (relations, rank),
            "terms": (entries,),
            "marked": (entries,),
            "ratios": (entries,),
            "weights": (len(FEATURES),),
        }
        types = {"layer": torch.int64, "terms": torch.int64, "marked": torch.int32}
        return {f"{PREFIX}{name}": (shape, types.get(name, torch.float32)) for name, shape in shapes.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Meaning | None":
        """The reverse of `tensors`; None if there are none."""
        names = [field.name for field in fields(cls)]
        if f"{PREFIX}layer" not in tensors:
            return None
        return cls(*(tensors[f"{PREFIX}{name}"] for name in names))

    @property
    def is_whole(self) -> bool:
        """Whether its tensors have the shapes and types of one fit, and hold numbers."""
        if self.directions.dim() != 2 or self.cohort.dim() != 2 or self.terms.dim() != 1:
            return False
        expected = self.expected_tensors(len(self.directions), self.rank, len(self.cohort), len(self.terms))
        return all(
            (tuple(tensor.shape), tensor.dtype) == expected[name] and bool(tensor.isfinite().all())
            for name, tensor in self.tensors().items()
        )

    def is_close_to(self, other: "Meaning") -> bool:
        """Whether both are fits of one model, up to the rounding of other hardware."""
        pairs = [(mine.float(), other.tensors()[name].float()) for name, mine in self.tensors().items()]
        if any(one.shape != two.shape for one, two in pairs):
            return False
        return all(torch.allclose(one, two, rtol=0.0, atol=TOLERANCE * _largest(one)) for one, two in pairs)


MAX_COHORT_RATIO = 40.0  # nats, to which the ratios of a profile are cut
TOLERANCE = 0.02  # by which tensors of two fits may differ, as a share of the largest value


class Keys:
    """Questions `[keys, rank]` that others are compared with."""

    __slots__ = ("_constants", "_factors", "_own")

    def __init__(self, meaning: Meaning, embedded: Vector):
        self._own, shared, constant = meaning.ratio_terms
        self._factors = embedded * shared
        self._constants = (embedded**2) @ self._own + numpy.float32(constant)

    def compare(self, question: Vector) -> Vector:
        """Log-likelihood ratio `[keys]` of each key asking the same as `question` `[rank]`, in nats."""
        ratios: Vector = self._factors @ question + (self._constants + numpy.float32((question**2) @ self._own))
        return ratios

    def compare_all(self, questions: Vector) -> Vector:
        """The same `[..., keys]` of many questions `[..., rank]`."""
        ratios: Vector = questions @ self._factors.T + self._constants + ((questions**2) @ self._own)[..., None]
        return ratios


def build_projection(layer: int, vectors: NDArray[numpy.float64], relations: Sequence[str], rank: int) -> Meaning:
    """Fit everything but words and weights, in closed form.

    Args:
        vectors: `[questions, hidden]`, each the weighted mean of a question's hidden states.
        relations: of each.
        rank: directions kept, at most one fewer than relations, and no more than hidden states have.
    """
    within, means = covariance_within(vectors, relations)
    within += SHRINKAGE * numpy.trace(within) / len(within) * numpy.eye(len(within)) + 1e-12 * numpy.eye(len(within))
    values, axes = numpy.linalg.eigh(within)
    whiten = axes * values**-0.5
    apart = (means - means.mean(0)) @ whiten
    kept = numpy.linalg.svd(apart, full_matrices=False)[2][: min(rank, len(means) - 1, len(within))].T
    directions = _fix_signs(whiten @ kept)
    origin = vectors.mean(0) @ directions
    projected = vectors @ directions - origin
    rank = projected.shape[1]
    projected *= rank**0.5 / numpy.maximum(numpy.linalg.norm(projected, axis=1, keepdims=True), 1e-12)
    within, means = covariance_within(projected, relations)
    within += WITHIN_SHRINKAGE * numpy.trace(within) / rank * numpy.eye(rank)
    between = numpy.cov(means.T).reshape(rank, rank)
    between = (1 - BETWEEN_SHRINKAGE) * between + BETWEEN_SHRINKAGE * numpy.trace(between) / rank * numpy.eye(rank)
    values, axes = numpy.linalg.eigh(within)
    whiten = axes * values**-0.5
    variances, axes = numpy.linalg.eigh(whiten.T @ between @ whiten)
    rotation = _fix_signs(whiten @ axes)
    return Meaning(
        layer=torch.tensor([layer]),
        directions=_to_tensor(directions),
        origin=_to_tensor(origin),
        centre=_to_tensor(means.mean(0)),
        rotation=_to_tensor(rotation),
        between=_to_tensor(variances),
        cohort=_to_tensor((means - means.mean(0)) @ rotation),
        terms=torch.zeros(0, dtype=torch.int64),
        marked=torch.zeros(0, dtype=torch.int32),
        ratios=torch.zeros(0),
        weights=torch.zeros(len(FEATURES)),
    )


SHRINKAGE = 0.1  # of the covariance within relations, towards a multiple of the identity
WITHIN_SHRINKAGE = 0.05  # the same, after projection
BETWEEN_SHRINKAGE = 0.1  # of the covariance between relations


def covariance_within(
    vectors: NDArray[numpy.float64], relations: Sequence[str]
) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
    """Covariance `[width, width]` around each relation's own mean, and those means `[relations, width]`."""
    names = list(dict.fromkeys(relations))
    number = {name: index for index, name in enumerate(names)}
    owner = numpy.array([number[relation] for relation in relations])
    means = numpy.zeros((len(names), vectors.shape[1]))
    numpy.add.at(means, owner, vectors)
    means /= numpy.bincount(owner)[:, None]
    apart = vectors - means[owner]
    return apart.T @ apart / len(apart), means


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _to_tensor(array: NDArray[numpy.float64]) -> Tensor:
    return torch.from_numpy(numpy.ascontiguousarray(array, numpy.float32))


def _fix_signs(axes: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Axes `[width, rank]` whose largest entries are positive, so that a fit does not depend on the machine."""
    largest = axes[numpy.abs(axes).argmax(0), numpy.arange(axes.shape[1])]
    fixed: NDArray[numpy.float64] = axes * numpy.where(largest < 0, -1.0, 1.0)
    return fixed
