"""Rounds of many edits: limits are kept, neighbours differ, and the cost per edit does not grow with their number."""

import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
from k_means_constrained import KMeansConstrained
from sklearn.cluster import KMeans

import lemoe
from lemoe.data import conflicts
from lemoe.data.conflicts import find_conflicts, redundant_edit_ids
from lemoe.planning import clustering
from lemoe.planning.clustering import Vectors, cluster_rounds
from lemoe.planning.plan import embed_prompts, mean_pair_similarity, measure_similarity

pytestmark = pytest.mark.versions

SettingsOf = Callable[..., lemoe.Settings]

KINDS = ("was born in", "works for the", "plays", "died near", "is married to", "likes to eat", "has a house in")


def make_edits(count: int) -> list[lemoe.Edit]:
    """Edits about made-up names; the first, fourth, seventh ... subject has three, far apart, the others one."""
    names = [f"{chr(65 + n % 26)}{chr(97 + n % 23)}{n % 7}{chr(97 + n % 19)} {n * 7919 % 1009}" for n in range(count)]
    again = names[: count * 3 // 5] + [name for name in names[: count * 3 // 5 : 3] for _ in range(2)]
    return [
        lemoe.Edit(f"{name} {KINDS[number % 7]} {number}", "x", name, id=str(number))
        for number, name in enumerate(again[:count])
    ]


def make_vectors(count: int, width: int = 8) -> Vectors:
    """Unit vectors around twelve centres."""
    rng = numpy.random.default_rng(0)
    centres = rng.normal(size=(12, width))
    rows = centres[rng.integers(12, size=count)] + 0.4 * rng.normal(size=(count, width))
    return (rows / numpy.linalg.norm(rows, axis=1, keepdims=True)).astype(numpy.float32)


def distinct_subjects(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def neighbour_similarity(vectors: Vectors, rounds: Sequence[Sequence[int]]) -> float:
    """Mean similarity of the centres of a round and the next one."""
    centres = numpy.stack([vectors[list(members)].mean(0) for members in rounds])
    centres /= numpy.linalg.norm(centres, axis=1, keepdims=True)
    return float((centres[1:] * centres[:-1]).sum(1).mean())


def test_a_plan_of_thousands_keeps_round_size_and_subjects_and_comes_out_the_same_again(
    base: lemoe.BaseModel, paper: SettingsOf
) -> None:
    edits, settings = make_edits(2500), paper(round_size=9)
    planned = lemoe.plan(base, edits, settings)
    dropped = redundant_edit_ids(planned.conflicts)
    subject = {edit.id: edit.subject for edit in edits}
    placed = [name for members in planned.rounds for name in members]
    assert sorted(placed) == sorted(edit.id for edit in edits if edit.id not in dropped)
    assert max(map(len, planned.rounds)) <= 9
    rounds_of_subject = Counter(name for members in planned.rounds for name in {subject[name] for name in members})
    assert set(rounds_of_subject.values()) == {1}
    assert planned.similarity["planned"].within > planned.similarity["random"].within + 0.02
    assert lemoe.plan(base, edits, settings).rounds == planned.rounds


@pytest.mark.parametrize(("edits", "round_size"), [(600, 3), (3300, 3)])
def test_neighbouring_rounds_differ_more_than_rounds_do_in_general(edits: int, round_size: int) -> None:
    vectors = make_vectors(edits)
    rounds = cluster_rounds(vectors, distinct_subjects(edits), round_size, 0)
    assert neighbour_similarity(vectors, rounds) < measure_similarity(vectors, rounds).between - 0.3


def test_rounds_of_a_set_cut_into_parts_are_about_as_similar_as_those_of_one_clustered_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = make_vectors(1000)
    whole = measure_similarity(vectors, cluster_rounds(vectors, distinct_subjects(1000), 20, 0))
    monkeypatch.setattr(clustering, "BALANCED_LIMIT", 300)
    cut = measure_similarity(vectors, cluster_rounds(vectors, distinct_subjects(1000), 20, 0))
    assert cut.within > whole.within - 0.02


def count_distances(monkeypatch: pytest.MonkeyPatch, edits: int) -> int:
    """How many distances between an edit and a centre are computed."""
    counted = 0

    def count_fits(model: type[Any]) -> type[Any]:
        class Counting(model):
            def fit(self, rows: Vectors, y: None = None, **options: object) -> Any:
                nonlocal counted
                counted += len(rows) * self.n_clusters
                return super().fit(rows, y, **options)

        return Counting

    with monkeypatch.context() as patch:
        patch.setattr(clustering, "KMeans", count_fits(KMeans))
        patch.setattr(clustering, "KMeansConstrained", count_fits(KMeansConstrained))
        cluster_rounds(make_vectors(edits), distinct_subjects(edits), 50, 0)
    return counted


def test_the_comparisons_per_edit_do_not_grow_with_the_number_of_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < count_distances(monkeypatch, 6000) / 6000 < 1.5 * count_distances(monkeypatch, 1500) / 1500


class RoundRobin:
    """A stand-in for k-means that puts rows into clusters in turn."""

    def __init__(self, n_clusters: int, **options: object):
        self.n_clusters = n_clusters

    def fit_predict(self, rows: Vectors) -> Any:
        return numpy.arange(len(rows)) % self.n_clusters


def test_memory_grows_with_the_edits_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "KMeansConstrained", RoundRobin)
    vectors, subjects = make_vectors(8000), distinct_subjects(8000)
    tracemalloc.start()
    try:
        rounds = cluster_rounds(vectors, subjects, 2, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(rounds) ** 2 / 4  # bytes; a matrix of all rounds would take four times that


@pytest.mark.parametrize("subject", ["one", "each its own"])
def test_thousands_of_equal_prompts_are_planned_within_the_limit(subject: str) -> None:
    vectors = numpy.full((2500, 4), 0.5, numpy.float32)
    rounds = cluster_rounds(vectors, ["one"] * 2500 if subject == "one" else distinct_subjects(2500), 40, 0)
    assert sorted(index for members in rounds for index in members) == list(range(2500))
    assert max(map(len, rounds)) <= 40


def test_the_vector_of_a_prompt_does_not_depend_on_the_batch(base: lemoe.BaseModel) -> None:
    edits = make_edits(200)
    together = embed_prompts(base, edits)
    alone = numpy.concatenate([embed_prompts(base, [edit]) for edit in edits])
    assert (together == alone).all()
    assert mean_pair_similarity(together) < 0.999


def test_a_repeated_question_is_found_however_far_away_and_a_contradiction_close_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conflicts, "COMPARED", 2)
    texts = ["What is the capital city of Oz?", "Oz sings", "Oz eats", "Oz reads", "Which capital city of Oz is it?"]
    edits = [lemoe.Edit(text, str(n), "Oz", id=str(n)) for n, text in enumerate([*texts, texts[1], texts[4] + "?"])]
    found = [(conflict.relation, conflict.earlier, conflict.later) for conflict in find_conflicts(edits)]
    assert found == [("superseded", "1", "5"), ("superseded", "4", "6")]
    close = [edits[0], edits[1], edits[4]]
    assert [conflict.relation for conflict in find_conflicts(close)] == ["contradiction"]
