"""What questions mean: the projection, the likelihood ratio, the sums of tokens, and the states they are read from."""

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy
import pytest
import torch
from conftest import FAMILIES, REPOSITORY
from numpy.typing import NDArray

import lemoe
from lemoe.base.frozen import read_layer_inputs
from lemoe.routing.anchor.meaning import (
    BETWEEN_SHRINKAGE,
    WITHIN_SHRINKAGE,
    Keys,
    Meaning,
    Vector,
    build_projection,
)
from lemoe.routing.anchor.token_sums import TokenSums

sys.path.insert(0, str(REPOSITORY / "tests" / "benchmarks"))

from meaning import area_under_curve

Tiny = Callable[[str], lemoe.BaseModel]
Values = NDArray[numpy.float64]


def made_vectors(seed: int, relations: int = 40, wordings: int = 20, width: int = 48) -> tuple[Values, list[str]]:
    """Questions whose wordings vary far more, and in other directions, than relations do."""
    rng = numpy.random.default_rng(seed)
    centres = rng.normal(size=(relations, width))
    noise = 3 * rng.normal(size=(relations * wordings, width)) @ rng.normal(size=(width, width)) / width**0.5
    return numpy.tile(centres, (wordings, 1)) + noise, [f"relation {n % relations}" for n in range(len(noise))]


@pytest.fixture(scope="module")
def fitted() -> Meaning:
    return build_projection(2, *made_vectors(0), rank=16)


def embed_all(meaning: Meaning, vectors: Values) -> Vector:
    projected = (vectors @ meaning.directions.double().numpy()).astype(numpy.float32)
    return numpy.stack([meaning.embed(row, 1.0) for row in projected])


def log_density(point: Values, covariance: Values) -> float:
    """Of a Gaussian with mean zero."""
    sign, determinant = numpy.linalg.slogdet(covariance)
    assert sign > 0
    return float(-0.5 * (point @ numpy.linalg.solve(covariance, point) + determinant + len(point) * math.log(math.tau)))


@pytest.mark.parametrize("seed", range(5))
def test_the_ratio_is_that_of_the_densities_of_one_relation_and_of_two(fitted: Meaning, seed: int) -> None:
    rng = numpy.random.default_rng(seed)
    between = rng.uniform(0.01, 9, fitted.rank)
    meaning = replace(fitted, between=torch.from_numpy(between.astype(numpy.float32)))
    keys, read = rng.normal(size=(6, fitted.rank)), rng.normal(size=(4, fitted.rank))
    alone, shared = numpy.eye(fitted.rank) + numpy.diag(between), numpy.diag(between)
    together = numpy.block([[alone, shared], [shared, alone]])
    expected = [
        [log_density(numpy.append(k, q), together) - log_density(k, alone) - log_density(q, alone) for k in keys]
        for q in read
    ]
    stored = Keys(meaning, keys.astype(numpy.float32))
    asked = read.astype(numpy.float32)
    assert numpy.allclose(stored.compare_all(asked), expected, atol=1e-3)
    assert numpy.allclose([stored.compare(question) for question in asked], expected, atol=1e-3)


def test_relations_that_no_fit_has_seen_are_told_apart_better_than_by_cosine() -> None:
    vectors, relations = made_vectors(1)
    unseen = numpy.array([int(name.split()[1]) >= 30 for name in relations])
    names = numpy.array(relations)
    meaning = build_projection(2, vectors[~unseen], names[~unseen].tolist(), 24)
    rows, names = vectors[unseen], names[unseen]
    pairs = numpy.triu_indices(len(rows), 1)
    same = (names[:, None] == names[None])[pairs]
    unit = rows / numpy.linalg.norm(rows, axis=1, keepdims=True)
    embedded = embed_all(meaning, rows)
    cosine, ratio = (unit @ unit.T)[pairs], Keys(meaning, embedded).compare_all(embedded)[pairs]
    assert area_under_curve(ratio[same], ratio[~same]) > area_under_curve(cosine[same], cosine[~same]) + 0.1


def test_on_its_own_axes_wordings_vary_by_one_and_relations_apart(fitted: Meaning) -> None:
    vectors, relations = made_vectors(0)
    embedded = embed_all(fitted, vectors)
    means = numpy.stack([embedded[[each == name for each in relations]].mean(0) for name in dict.fromkeys(relations)])
    apart = embedded - means[[int(name.split()[1]) for name in relations]]
    rotation = fitted.rotation.double().numpy()
    back = numpy.linalg.inv(rotation)
    spread = [back.T @ each @ back for each in (apart.T @ apart / len(apart), numpy.cov(means.T))]
    means_of = [numpy.trace(each) / fitted.rank * numpy.eye(fitted.rank) for each in spread]
    within = spread[0] + WITHIN_SHRINKAGE * means_of[0]
    between = (1 - BETWEEN_SHRINKAGE) * spread[1] + BETWEEN_SHRINKAGE * means_of[1]
    assert numpy.allclose(rotation.T @ within @ rotation, numpy.eye(fitted.rank), atol=1e-3)
    assert numpy.allclose(rotation.T @ between @ rotation, numpy.diag(fitted.between.numpy()), atol=1e-2)
    assert numpy.allclose(means, fitted.cohort.numpy(), atol=1e-3)


def test_axes_have_fixed_signs_and_a_fit_does_not_depend_on_the_order_of_the_bank(fitted: Meaning) -> None:
    for axes in (fitted.directions, fitted.rotation):
        assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()
    vectors, relations = made_vectors(0)
    order = numpy.random.default_rng(0).permutation(len(vectors))
    shuffled = [relations[row] for row in order]
    again = build_projection(2, vectors[order], shuffled, rank=16)
    rows = [list(dict.fromkeys(shuffled)).index(name) for name in dict.fromkeys(relations)]
    assert fitted.is_close_to(replace(again, cohort=again.cohort[rows]))


def test_a_fit_is_close_to_itself_in_another_rounding_and_to_no_other(fitted: Meaning) -> None:
    rounded = replace(fitted, directions=fitted.directions.bfloat16().float(), rotation=fitted.rotation * 1.01)
    assert fitted.is_close_to(fitted)
    assert fitted.is_close_to(rounded)
    assert rounded.is_close_to(fitted)
    others = [
        build_projection(2, *made_vectors(3), rank=16),
        build_projection(2, *made_vectors(0), rank=15),
        build_projection(3, *made_vectors(0), rank=16),
        replace(fitted, directions=-fitted.directions),
        replace(fitted, weights=fitted.weights + 0.1),
        replace(fitted, rotation=fitted.rotation * 1.05),
    ]
    assert not any(fitted.is_close_to(other) or other.is_close_to(fitted) for other in others)


def test_no_more_directions_are_kept_than_tell_relations_apart() -> None:
    assert build_projection(0, *made_vectors(0, relations=8), rank=96).rank == 7
    assert build_projection(0, *made_vectors(0, width=12), rank=96).rank == 12


def test_a_question_without_tokens_is_the_mean_of_all(fitted: Meaning) -> None:
    empty = fitted.embed(None, 0.0)
    assert numpy.array_equal(empty, fitted.embed(numpy.zeros(fitted.rank, numpy.float32), 0.0))
    assert numpy.array_equal(empty, fitted.embed(2 * fitted.origin.numpy(), 2.0))
    assert numpy.isfinite(Keys(fitted, empty[None]).compare(empty)).all()
    assert numpy.isfinite(fitted.profile(empty)).all()


def test_a_questions_length_and_the_weight_of_its_tokens_change_nothing(fitted: Meaning) -> None:
    total = numpy.random.default_rng(0).normal(size=fitted.rank).astype(numpy.float32)
    assert numpy.allclose(fitted.embed(5 * total, 5.0), fitted.embed(total, 1.0), atol=1e-4)
    origin = fitted.origin.numpy()
    assert numpy.allclose(fitted.embed(origin + 7 * (total - origin), 1.0), fitted.embed(total, 1.0), atol=1e-4)


def test_a_profile_is_a_unit_vector_that_points_to_the_likeliest_relation(fitted: Meaning) -> None:
    vectors, _ = made_vectors(0)
    embedded = embed_all(fitted, vectors)
    profiles = fitted.profile(embedded)
    assert profiles.shape == (len(vectors), 40)
    assert numpy.allclose(numpy.linalg.norm(profiles, axis=1), 1, atol=1e-5)
    assert numpy.allclose(profiles.sum(1), 0, atol=1e-4)
    ratios = numpy.clip(Keys(fitted, fitted.cohort.numpy()).compare_all(embedded), -40, 40)
    assert (profiles.argmax(1) == ratios.argmax(1)).all()
    assert numpy.allclose(fitted.profile(embedded[3]), profiles[3], atol=1e-5)


def test_states_are_read_by_their_direction_alone(fitted: Meaning) -> None:
    hidden = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    projected = fitted.project(hidden)
    assert projected.shape == (2, 3, fitted.rank)
    assert projected.dtype == fitted.project(hidden.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(fitted.project(hidden * 100), projected, atol=1e-4, rtol=1e-4)
    rms = hidden.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(projected, (hidden / rms) @ fitted.directions, atol=1e-4, rtol=1e-4)


# Sums of tokens.


@pytest.mark.parametrize("seed", range(20))
def test_leaving_words_out_is_summing_what_touches_the_others(seed: int) -> None:
    """A token that touches several words counts in equal parts for each, one without letters for the sentence."""
    rng, numbers = random.Random(seed), numpy.random.default_rng(seed)
    sums, read, words = TokenSums(), [], 0
    for _ in range(rng.randint(0, 12)):
        first = max(words - rng.randint(0, 1), 0)  # goes on with the last word, or begins another one
        touched = range(0) if rng.random() < 0.3 else range(first, first + rng.randint(1, 3))
        words = max(words, touched.stop)
        vector, weight = numbers.normal(size=4).astype(numpy.float32), rng.uniform(0.2, 5)
        read.append((vector, weight, touched))
        sums.add(vector, weight, touched)
    for left_out in ((), (0,), range(words), rng.sample(range(words), words // 2)):
        total, amount = sums.without(frozenset(left_out))
        shares = [
            weight * (1.0 if not touched else sum(word not in left_out for word in touched) / len(touched))
            for _, weight, touched in read
        ]
        expected = sum((share * vector for (vector, *_), share in zip(read, shares, strict=True)), numpy.zeros(4))
        assert amount == pytest.approx(sum(shares), abs=1e-4)
        assert not any(shares) if total is None else numpy.allclose(total, expected, atol=1e-4)


def test_a_copy_of_sums_goes_its_own_way() -> None:
    sums = TokenSums()
    sums.add(numpy.ones(3, numpy.float32), 1.0, range(1))
    sums.add(numpy.ones(3, numpy.float32), 1.0, range(0))
    other = sums.copy()
    for touched in (range(1), range(1, 2), range(0)):
        other.add(numpy.ones(3, numpy.float32), 1.0, touched)
    assert (sums.without(())[1], other.without(())[1]) == (2.0, 5.0)
    assert TokenSums().without(()) == (None, 0.0)


# States that enter a layer.

TEXTS = ("The Eiffel Tower stands in the city of", "The Eiffel Tower is made", "The", "Mozart played the bagpipe. Who?")


def encode_texts(base: lemoe.BaseModel, texts: Sequence[str]) -> list[list[int]]:
    return [base.tokenizer(text).input_ids for text in texts]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_states_that_enter_a_layer_are_those_of_a_plain_forward_pass(tiny: Tiny, family: str, layer: int) -> None:
    base = tiny(family)
    ids = encode_texts(base, TEXTS)
    for groups in (None, range(len(ids))):
        for text, found in zip(ids, read_layer_inputs(base, layer, ids, 64, groups), strict=True):
            with torch.no_grad():
                expected = base.model(torch.tensor([text]), output_hidden_states=True).hidden_states[layer][0]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_the_states_of_a_text_do_not_depend_on_other_groups(tiny: Tiny, family: str) -> None:
    base = tiny(family)
    ids = encode_texts(base, [*TEXTS, *(f"{text}, said number {n}" for n in range(9) for text in TEXTS)])
    groups = [number // 2 for number in range(len(ids))]
    together = read_layer_inputs(base, 1, ids, 4096, groups)
    order = random.Random(0).sample(range(len(ids)), len(ids))
    shuffled = read_layer_inputs(base, 1, [ids[row] for row in order], 200, [groups[row] for row in order])
    for group in range(0, len(ids) // 2, 3):
        rows = [2 * group, 2 * group + 1]
        alone = read_layer_inputs(base, 1, [ids[row] for row in rows], 4096, [0, 0])
        for row, states in zip(rows, alone, strict=True):
            assert torch.equal(states, together[row])
            assert torch.equal(states, shuffled[order.index(row)])


def test_reading_ends_at_its_layer_and_no_text_is_no_state(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("llama")
    ids = encode_texts(base, TEXTS)
    read_layer_inputs(base, 1, ids, 64)  # whether texts may share a pass is tried once, on the whole model

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the layer ran")

    monkeypatch.setattr(base.layers[1], "forward", refuse)
    assert [len(states) for states in read_layer_inputs(base, 1, ids, 64)] == list(map(len, ids))
    assert read_layer_inputs(base, 1, [], 64) == []
