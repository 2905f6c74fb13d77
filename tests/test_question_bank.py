"""The bank of questions that benchmarks measure meaning on: complete, and every wording about one subject."""

import sys
from collections import Counter

import numpy
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests" / "benchmarks"))

from meaning import ENGLISH, LANGUAGES, Projection, area_under_curve, read_bank


def test_every_relation_has_wordings_of_every_form() -> None:
    wordings = read_bank()
    counts = Counter((wording.relation, wording.form) for wording in wordings)
    relations = {wording.relation for wording in wordings}
    assert len(relations) >= 150
    for relation in relations:
        assert sum(counts[relation, form] for form in ENGLISH) >= 12, relation
        assert all(counts[relation, form] >= 3 for form in (*ENGLISH, *LANGUAGES)), relation


def test_a_wording_says_where_its_subject_stands_and_stands_in_one_relation() -> None:
    wordings = read_bank()
    for wording in wordings:
        assert 0 <= wording.start < wording.end <= len(wording.text), wording
        assert "{" not in wording.text, wording
    homes: dict[tuple[str, str], set[str]] = {}
    for wording in wordings:
        template = wording.text[: wording.start] + "{}" + wording.text[wording.end :]
        homes.setdefault((wording.kind, template), set()).add(wording.relation)
    assert not {template: names for template, names in homes.items() if len(names) > 1}


def test_wordings_that_differ_by_their_relation_alone_are_told_apart() -> None:
    rng = numpy.random.default_rng(0)
    relations = [f"relation {number % 40}" for number in range(800)]
    centres = rng.normal(size=(40, 48)).astype(numpy.float32)
    noise = 3 * rng.normal(size=(800, 48)) @ rng.normal(size=(48, 48)) / 7  # far wider than relations are apart
    vectors = (centres[[number % 40 for number in range(800)]] + noise).astype(numpy.float32)
    fitted = Projection(vectors[:400], relations[:400], rank=32)
    scores = fitted.score_ratio(vectors[400:440], vectors[440:])
    same = numpy.array(relations[400:440])[:, None] == numpy.array(relations[440:])[None]
    plain = vectors[400:440] @ vectors[440:].T
    assert area_under_curve(scores[same], scores[~same]) > area_under_curve(plain[same], plain[~same]) + 0.05
