"""How well a base model's own hidden states tell which wordings ask the same of a subject.

    python tests/benchmarks/meaning.py --model llama --layer 10

The bank beside this file (`questions/`) holds relations, each in many wordings of six languages, written for this
project. A wording is read as one vector: the mean, by rarity, of the hidden states (each divided by its RMS) that enter
`layer`, over its tokens without the subject's. A projection is fitted on the relations of three folds, and wordings of
the fourth are compared with questions and phrases of it: the same relation, or another one of the same kind of subject?
Three ways of comparing:

    whitened      cosine after whitening by the covariance within relations
    discriminant  the same, on the 128 directions in which relations differ most
    two-cov       log-likelihood ratio of one relation against two, relations and wordings both Gaussian (Ioffe 2006)

Printed are the area under the curve, and the share of wordings that are recognised where 2 and 5 % of those of other
relations are, for English and by form; then what the fit costs. No relation is ever measured that took part in the fit.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from numpy.typing import NDArray
from torch import nn

import lemoe

BANK = Path(__file__).with_name("questions")
ENGLISH = ("questions", "phrases", "requests", "casual")
LANGUAGES = ("de", "fr", "es", "ja", "zh")
KEYS = ("questions", "phrases")  # the forms in which edits are written
FOLDS = 4
RANK = 128  # directions that are kept
SHRINKAGE = 0.1  # of the covariance within relations, towards a multiple of the identity
RARE = 200.0  # a token weighs log(1 + id / RARE): ids of byte-pair encodings grow with rarity
BATCH = 32  # texts

Vectors = NDArray[numpy.float32]


@dataclass(frozen=True)
class Wording:
    """A text of the bank about one subject: characters `start` to `end` name the subject."""

    relation: str
    kind: str
    form: str
    text: str
    start: int
    end: int


def read_bank(folder: Path = BANK) -> list[Wording]:
    """Every wording of the bank, with the names of its kind of subject in turn."""
    wordings: list[Wording] = []
    for path in sorted(folder.glob("*.yaml")):
        content = yaml.safe_load(path.read_text("utf-8"))
        for relation, forms in content["relations"].items():
            names = content["kinds"][forms["of"]]
            for form in (*ENGLISH, *LANGUAGES):
                for template in forms[form]:
                    pool = names[form] if form in ("ja", "zh") else names["names"]
                    name = pool[len(wordings) % len(pool)]
                    start = template.index("{}")
                    text = template.replace("{}", name)
                    wordings.append(Wording(relation, forms["of"], form, text, start, start + len(name)))
    return wordings


class _LayerReachedError(Exception):
    """Ends a forward pass where the rest of it is not needed."""


@contextmanager
def _stopped_at(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """While open, a forward pass ends at `layer`; collects what would have entered it."""
    entered: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])
        raise _LayerReachedError

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield entered
    finally:
        handle.remove()


@torch.no_grad()
def read_vectors(base: lemoe.BaseModel, layer: int, wordings: Sequence[Wording]) -> Vectors:
    """One vector `[wordings, hidden]` for each wording; see the top of this file."""
    vectors = numpy.zeros((len(wordings), base.hidden_size), numpy.float32)
    encoded = base.tokenizer([wording.text for wording in wordings], return_offsets_mapping=True)
    order = sorted(range(len(wordings)), key=lambda row: len(encoded.input_ids[row]))
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        width = max(len(encoded.input_ids[row]) for row in rows)
        ids = torch.full((len(rows), width), base.pad_token_id)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(encoded.input_ids[row])] = torch.tensor(encoded.input_ids[row])
            mask[index, : len(encoded.input_ids[row])] = 1
        with _stopped_at(base.layers[layer]) as entered, suppress(_LayerReachedError):
            base.decoder(input_ids=ids.to(base.device), attention_mask=mask.to(base.device), use_cache=False)
        hidden = torch.nn.functional.rms_norm(entered[0].float(), entered[0].shape[-1:]).cpu().numpy()
        for index, row in enumerate(rows):
            weights = _token_weights(wordings[row], encoded.input_ids[row], encoded.offset_mapping[row])
            vectors[row] = weights @ hidden[index, : len(weights)]
    return vectors


def _token_weights(wording: Wording, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Vectors:
    """Share of each token in the mean, `[tokens]`: by rarity, nothing for the subject's own."""
    weights = numpy.log1p(numpy.asarray(ids, numpy.float32) / RARE) + 0.2
    for token, (start, end) in enumerate(offsets):
        inside = start < wording.end and end > wording.start and wording.text[start:end].strip()
        if end <= start or inside:
            weights[token] = 0
    total = weights.sum()
    shares: Vectors = weights / total if total else numpy.full_like(weights, 1 / len(weights))
    return shares


def covariance_within(vectors: Vectors, relations: Sequence[str]) -> tuple[Vectors, Vectors]:
    """Covariance `[width, width]` around each relation's own mean, and those means `[relations, width]`."""
    means = {name: vectors[[each == name for each in relations]].mean(0) for name in dict.fromkeys(relations)}
    apart = vectors - numpy.stack([means[name] for name in relations])
    return apart.T @ apart / len(apart), numpy.stack(list(means.values()))


def _unit(vectors: Vectors) -> Vectors:
    length: Vectors = numpy.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / length


class Projection:
    """Fitted in closed form on some relations: `whitened`, and of that the directions in which they differ most."""

    def __init__(self, vectors: Vectors, relations: Sequence[str], rank: int = RANK):
        within, means = covariance_within(vectors, relations)
        within += SHRINKAGE * numpy.trace(within) / len(within) * numpy.eye(len(within), dtype=numpy.float32)
        values, directions = numpy.linalg.eigh(within)
        self.mean = vectors.mean(0)
        self.whiten = directions * values**-0.5
        apart = (means - means.mean(0)) @ self.whiten
        self.discriminate = self.whiten @ numpy.linalg.svd(apart, full_matrices=False)[2][:rank].T
        self._fit_ratio(self.project(vectors), relations)

    def project(self, vectors: Vectors) -> Vectors:
        """Unit vectors `[rows, rank]`, scaled so that their entries have size one."""
        projected = _unit((vectors - self.mean) @ self.discriminate)
        return projected * projected.shape[1] ** 0.5

    def _fit_ratio(self, projected: Vectors, relations: Sequence[str]) -> None:
        within, means = covariance_within(projected, relations)
        width = len(within)
        within += 0.05 * numpy.trace(within) / width * numpy.eye(width)
        between = numpy.cov(means.T)
        between = 0.9 * between + 0.1 * numpy.trace(between) / width * numpy.eye(width)
        self.centre = means.mean(0)
        both = numpy.linalg.inv(between + within)
        rest = numpy.linalg.inv(between + within - between @ both @ between)
        self.own, self.shared = both - rest, both @ between @ rest

    def score_whitened(self, keys: Vectors, wordings: Vectors) -> Vectors:
        """Cosine `[keys, wordings]`."""
        one, other = (_unit((vectors - self.mean) @ self.whiten) for vectors in (keys, wordings))
        return one @ other.T

    def score_discriminant(self, keys: Vectors, wordings: Vectors) -> Vectors:
        """Cosine `[keys, wordings]` on the directions that are kept."""
        return self.project(keys) @ self.project(wordings).T / self.discriminate.shape[1]

    def score_ratio(self, keys: Vectors, wordings: Vectors) -> Vectors:
        """Log-likelihood ratio `[keys, wordings]`, up to a constant."""
        one, other = (self.project(vectors) - self.centre for vectors in (keys, wordings))
        own = [0.5 * ((vectors @ self.own) * vectors).sum(1) for vectors in (one, other)]
        scores: Vectors = own[0][:, None] + own[1][None] + one @ self.shared @ other.T
        return scores


SCORES: dict[str, Callable[[Projection, Vectors, Vectors], Vectors]] = {
    "whitened": Projection.score_whitened,
    "discriminant": Projection.score_discriminant,
    "two-cov": Projection.score_ratio,
}


@dataclass
class Scored:
    """Scores of one way of comparing: of wordings of the same relation by form, and of others in English."""

    same: dict[str, list[Vectors]]
    other: list[Vectors]


def cross_validate(vectors: Vectors, wordings: Sequence[Wording]) -> dict[str, Scored]:
    """Every relation's wordings against keys of its own and of neighbouring relations, none of them in the fit."""
    relations = numpy.array([wording.relation for wording in wordings])
    kinds = numpy.array([wording.kind for wording in wordings])
    forms = numpy.array([wording.form for wording in wordings])
    names = numpy.random.default_rng(0).permutation(sorted(set(relations)))
    fold = numpy.array([dict(zip(names, range(len(names)), strict=True))[name] % FOLDS for name in relations])
    scored = {name: Scored({form: [] for form in (*ENGLISH, *LANGUAGES)}, []) for name in SCORES}
    for number in range(FOLDS):
        projection = Projection(vectors[fold != number], relations[fold != number].tolist())
        rows = numpy.flatnonzero(fold == number)
        keys = rows[numpy.isin(forms[rows], KEYS)]
        same = relations[keys][:, None] == relations[rows][None]
        itself = keys[:, None] == rows[None]
        neighbour = ~same & (kinds[keys][:, None] == kinds[rows][None]) & numpy.isin(forms[rows], ENGLISH)[None]
        for name, score in SCORES.items():
            scores = score(projection, vectors[keys], vectors[rows])
            scored[name].other.append(scores[neighbour])
            for form in scored[name].same:
                scored[name].same[form].append(scores[same & ~itself & (forms[rows] == form)[None]])
    return scored


def area_under_curve(same: Vectors, other: Vectors) -> float:
    """How often a pair of one relation scores above a pair of two."""
    ranks = numpy.concatenate([same, other]).argsort().argsort()[: len(same)] + 1
    return float((ranks.sum() - len(same) * (len(same) + 1) / 2) / len(same) / len(other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--layer", type=int, help="about a third of the depth if not given")
    options = parser.parse_args()
    base = lemoe.load_base(options.model)
    layer = len(base.layers) // 3 if options.layer is None else options.layer
    wordings = read_bank()
    began = time.process_time()
    vectors = read_vectors(base, layer, wordings)
    read = time.process_time()
    Projection(vectors, [wording.relation for wording in wordings])
    print(f"{len(wordings)} wordings of {len({wording.relation for wording in wordings})} relations, layer {layer}")
    print(f"reading them {read - began:.1f} s, fitting {time.process_time() - read:.1f} s of processor time")
    for name, scored in cross_validate(vectors, wordings).items():
        other = numpy.concatenate(scored.other)
        english = numpy.concatenate([part for form in ENGLISH for part in scored.same[form]])
        limits = [float(numpy.quantile(other, 1 - share)) for share in (0.02, 0.05)]
        found = [f"{(english > limit).mean():.3f}" for limit in limits]
        print(f"{name:13s} area {area_under_curve(english, other):.3f}  at 2 % {found[0]}  at 5 % {found[1]}", end="  ")
        print("  ".join(f"{f} {(numpy.concatenate(p) > limits[1]).mean():.2f}" for f, p in scored.same.items()))


if __name__ == "__main__":
    main()
