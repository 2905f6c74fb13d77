"""What is fitted on texts of the bank in closed form: the projection, and the words that mark relations."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lemoe.data.question_bank import Wording
from lemoe.routing.anchor.bank_texts import ReadText
from lemoe.routing.anchor.meaning import Meaning, Vector, build_projection
from lemoe.routing.anchor.relation_words import RelationWords

RANK = 96  # directions that are kept


def fit_projection(layer: int, questions: Sequence[ReadText]) -> Meaning:
    vectors = torch.stack([each.mean for each in questions])
    return build_projection(layer, vectors.numpy(), [each.text.wording.relation for each in questions], RANK)


def count_words(fit: Meaning, wordings: Sequence[Wording]) -> Meaning:
    """`fit` with the words of `wordings`."""
    numbers = {relation: number for number, relation in enumerate(sorted({wording.relation for wording in wordings}))}
    counted = RelationWords.from_wordings(
        [wording.template for wording in wordings], [numbers[wording.relation] for wording in wordings]
    )
    return replace(fit, terms=counted.terms, marked=counted.relations, ratios=counted.ratios)


def embed_mean(fit: Meaning, mean: Tensor) -> Vector:
    return fit.embed(mean.float().numpy() @ fit.directions.numpy(), 1.0)
