"""How well a base model's own hidden states tell which wordings ask the same of a subject.

    python tests/benchmarks/meaning.py --model llama --layer 10

Every wording of the bank (`lemoe/data/questions/`) is read as the gate reads a question. The projection is fitted on
the relations of three folds, and wordings of the fourth are compared with questions and phrases of it: the same
relation, or another one of the same kind of subject? Three ways of comparing:

    whitened      cosine after whitening by the covariance within relations
    discriminant  the same, on the directions that are kept, in which relations differ most
    two-cov       log-likelihood ratio of one relation against two, which the gate uses

Printed are the area under the curve, and the share of wordings that are recognised where 2 and 5 % of those of other
relations are, for English and by form; then what the fit costs. No relation is ever measured that took part in the fit.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

import lemoe
from lemoe.base.frozen import read_layer_inputs
from lemoe.base.tensors import rms_normalise
from lemoe.data.question_bank import ENGLISH_FORMS, KEY_FORMS, LANGUAGE_FORMS, REMARK, Wording, read_question_bank
from lemoe.routing.anchor.anchors import get_lexicon
from lemoe.routing.anchor.bank_fit import RANK
from lemoe.routing.anchor.bank_texts import BATCH_TOKENS, CHUNK
from lemoe.routing.anchor.fitting import layer_to_read
from lemoe.routing.anchor.gate import Gate
from lemoe.routing.anchor.meaning import SHRINKAGE, Keys, Meaning, Vector, build_projection, covariance_within
from lemoe.routing.anchor.subjects import Subject
from lemoe.routing.anchor.weight_fit import FOLDS

Vectors = NDArray[numpy.float64]


def read_vectors(base: lemoe.BaseModel, layer: int, wordings: Sequence[Wording]) -> Vectors:
    """What each wording asks, `[wordings, hidden]`, with the names of its kind of subject in turn."""
    gate = Gate(get_lexicon(base), threshold=0.0, slack=0)
    names = [wording.names[number % len(wording.names)] for number, wording in enumerate(wordings)]
    texts = [wording.template.replace("{}", name) for wording, name in zip(wordings, names, strict=True)]
    ids = base.tokenizer(texts).input_ids
    vectors = numpy.zeros((len(texts), base.hidden_size))
    for first in range(0, len(texts), CHUNK):
        states = read_layer_inputs(base, layer, ids[first : first + CHUNK], BATCH_TOKENS)
        for row, hidden in enumerate(states, first):
            normalised = rms_normalise(hidden).cpu().numpy()
            total, weight = gate.summarise(ids[row], normalised, Subject(names[row], gate.lexicon))
            if total is not None:
                vectors[row] = total / weight
    return vectors


@dataclass
class Fit:
    """What was fitted on some relations: the projection, and the whitening alone."""

    meaning: Meaning
    mean: Vectors
    whiten: Vectors

    @classmethod
    def from_vectors(cls, layer: int, vectors: Vectors, relations: Sequence[str]) -> "Fit":
        within, _ = covariance_within(vectors, relations)
        within += SHRINKAGE * numpy.trace(within) / len(within) * numpy.eye(len(within))
        values, axes = numpy.linalg.eigh(within)
        return cls(build_projection(layer, vectors, relations, RANK), vectors.mean(0), axes * values**-0.5)

    def score_whitened(self, keys: Vectors, wordings: Vectors) -> Vectors:
        """Cosine `[keys, wordings]`."""
        return _cosine((keys - self.mean) @ self.whiten, (wordings - self.mean) @ self.whiten)

    def score_discriminant(self, keys: Vectors, wordings: Vectors) -> Vectors:
        """Cosine `[keys, wordings]` on the directions that are kept."""
        directions, origin = self.meaning.directions.numpy(), self.meaning.origin.numpy()
        return _cosine(keys @ directions - origin, wordings @ directions - origin)

    def score_ratio(self, keys: Vectors, wordings: Vectors) -> Vectors:
        """Log-likelihood ratio `[keys, wordings]`, in nats."""
        return Keys(self.meaning, self._embed(wordings)).compare_all(self._embed(keys)).astype(numpy.float64)

    def _embed(self, vectors: Vectors) -> Vector:
        projected = (vectors @ self.meaning.directions.numpy()).astype(numpy.float32)
        return numpy.stack([self.meaning.embed(row, 1.0) for row in projected])


def _cosine(one: Vectors, other: Vectors) -> Vectors:
    one, other = (vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (one, other))
    cosine: Vectors = one @ other.T
    return cosine


SCORES: dict[str, Callable[[Fit, Vectors, Vectors], Vectors]] = {
    "whitened": Fit.score_whitened,
    "discriminant": Fit.score_discriminant,
    "two-cov": Fit.score_ratio,
}


@dataclass
class Scored:
    """Scores of one way of comparing: of wordings of the same relation by form, and of others in English."""

    same: dict[str, list[Vectors]]
    other: list[Vectors]


def cross_validate(layer: int, vectors: Vectors, wordings: Sequence[Wording]) -> dict[str, Scored]:
    """Every relation's wordings against keys of its own and of neighbouring relations, none of them in the fit."""
    relations = numpy.array([wording.relation for wording in wordings])
    kinds = numpy.array([wording.kind for wording in wordings])
    forms = numpy.array([wording.form for wording in wordings])
    names = numpy.random.default_rng(0).permutation(sorted(set(relations)))
    fold = numpy.array([dict(zip(names, range(len(names)), strict=True))[name] % FOLDS for name in relations])
    scored = {name: Scored({form: [] for form in (*ENGLISH_FORMS, *LANGUAGE_FORMS)}, []) for name in SCORES}
    for number in range(FOLDS):
        fit = Fit.from_vectors(layer, vectors[fold != number], relations[fold != number].tolist())
        rows = numpy.flatnonzero(fold == number)
        keys = rows[numpy.isin(forms[rows], KEY_FORMS)]
        same = relations[keys][:, None] == relations[rows][None]
        itself = keys[:, None] == rows[None]
        neighbour = ~same & (kinds[keys][:, None] == kinds[rows][None]) & numpy.isin(forms[rows], ENGLISH_FORMS)[None]
        for name, score in SCORES.items():
            scores = score(fit, vectors[keys], vectors[rows])
            scored[name].other.append(scores[neighbour])
            for form in scored[name].same:
                scored[name].same[form].append(scores[same & ~itself & (forms[rows] == form)[None]])
    return scored


def area_under_curve(same: NDArray[numpy.floating], other: NDArray[numpy.floating]) -> float:
    """How often a pair of one relation scores above a pair of two."""
    ranks = numpy.concatenate([same, other]).argsort().argsort()[: len(same)] + 1
    return float((ranks.sum() - len(same) * (len(same) + 1) / 2) / len(same) / len(other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--layer", type=int, help="the one that the gate reads if not given")
    options = parser.parse_args()
    base = lemoe.load_base(options.model)
    layer = layer_to_read(len(base.layers), len(base.layers) - 1) if options.layer is None else options.layer
    wordings = [wording for wording in read_question_bank() if wording.relation != REMARK]
    relations = [wording.relation for wording in wordings]
    began = time.process_time()
    vectors = read_vectors(base, layer, wordings)
    read = time.process_time()
    build_projection(layer, vectors, relations, RANK)
    print(f"{len(wordings)} wordings of {len(set(relations))} relations, layer {layer}")
    print(f"reading them {read - began:.1f} s, fitting {time.process_time() - read:.1f} s of processor time")
    for name, scored in cross_validate(layer, vectors, wordings).items():
        other = numpy.concatenate(scored.other)
        english = numpy.concatenate([part for form in ENGLISH_FORMS for part in scored.same[form]])
        limits = [float(numpy.quantile(other, 1 - share)) for share in (0.02, 0.05)]
        found = [f"{(english > limit).mean():.3f}" for limit in limits]
        print(f"{name:13s} area {area_under_curve(english, other):.3f}  at 2 % {found[0]}  at 5 % {found[1]}", end="  ")
        print("  ".join(f"{f} {(numpy.concatenate(p) > limits[1]).mean():.2f}" for f, p in scored.same.items()))


if __name__ == "__main__":
    main()
