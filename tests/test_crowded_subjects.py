"""Many edits of one subject: the routes of comparing each edit by itself, at a cost that hardly grows."""

from collections.abc import Sequence
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import lemoe
from lemoe.base.tokens import encode_passage
from lemoe.routing.anchor import comparisons, gate
from lemoe.routing.anchor.anchors import build_gate, get_lexicon
from lemoe.routing.anchor.gate import Anchor, Gate
from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.questions import Comparison, Question, compare_questions, question_words
from lemoe.routing.anchor.route import Candidate, GateState, Route
from lemoe.routing.anchor.subjects import Mention
from lemoe.routing.anchor.words import Word
from lemoe.routing.router import Scope

SUBJECTS = ("Marie Curie", "Lake Como", "Windows 95", "Mozart")
WORDS = "town born largest fish river daughter played year company made colours named ended prize of the in".split()
TARGETS = ("Rome", "the town", "born in a year", "Lake Como", "prize money")

few_examples = hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

phrases = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)
questions = st.tuples(st.sampled_from(SUBJECTS), phrases, phrases, st.sampled_from(TARGETS))
texts = st.lists(st.one_of(st.sampled_from([*SUBJECTS, *TARGETS, "M. Curie", ".", "?\n"]), phrases), max_size=8)


class PairwiseRoute(Route):
    """The reference: compares each anchor of each mentioned subject by itself."""

    def __init__(self, gate: Gate):
        super().__init__(gate)
        self._matched_weights: dict[int, float] = {}

    def _forget_sentence(self, words: Sequence[Word]) -> None:
        super()._forget_sentence(words)
        self._matched_weights = {}

    def _update_state(self, time: int, answered: frozenset[int] = frozenset()) -> None:
        best: tuple[tuple[float, float, int], Mention, Comparison, bool] | None = None
        nearest: tuple[int, Mention, Comparison] | None = None
        fits: dict[int, float] = {}
        for subject, mention in self._mentions.items():
            if not self._gate.decision.admits(self._gate.index.subjects[subject], mention):
                continue
            read = Question.from_words(
                question_words(self._reader.words, mention, mention.positions), self._gate.lexicon
            )
            for number in [n for n, of in enumerate(self._gate.subjects) if of == subject]:
                compared = compare_questions(self._gate.stored_question(number), read, self._gate.lexicon)
                compared = compared._replace(score=self._gate.threshold - compared.conflict)
                fresh = compared.matched > self._matched_weights.get(number, -1.0) + 1e-6
                self._matched_weights[number] = max(compared.matched, self._matched_weights.get(number, -1.0))
                fits[number] = compared.fit
                in_scope = compared.enough_evidence and compared.conflict <= self._gate.threshold
                if in_scope:
                    weight = mention.coverage * self._gate.index.subjects[subject].total_weight
                    key = (round(compared.fit, 3), weight, number)
                    if best is None or key > best[0]:
                        best = (key, mention, compared, fresh)
                if nearest is None or compared.score > nearest[2].score:
                    nearest = (number, mention, compared)
        if self._discard_evidence:
            self._discard_evidence = False
        elif best is not None:
            active = [fits[self._state.edit]] if self._state.edit in fits else []
            self._apply_best(Candidate(*best), active, time)
        elif nearest is not None and self._state.edit < 0:
            number, mention, compared = nearest
            self._state = make_state(-1, number, mention, compared)


def make_state(edit: int, nearest: int, mention: Mention, compared: Comparison) -> GateState:
    """The state of a gate that compares words alone."""
    scope: Scope = "in" if edit >= 0 else "relation"
    return GateState(
        edit, scope, nearest, mention.coverage, compared.conflict, compared.fit, meaning=0.0, score=compared.score
    )


def read_states(route: Route, ids: Sequence[int]) -> list[GateState]:
    return [route.push(token) for token in ids]


def make_gate(base: lemoe.BaseModel, asked: Sequence[tuple[str, str, str, str]], conflict: float) -> Gate:
    """Anchors of questions, given as subject, the words before it, the words behind it, and target."""
    passages = [encode_passage(base, f"The {before} {name} {behind}", target) for name, before, behind, target in asked]
    anchors = [Anchor(p.prompt, p.target, name) for p, (name, *_) in zip(passages, asked, strict=True)]
    return build_gate(base, anchors, lemoe.resolve_settings("anchor", None, {"gate_conflict": conflict}))


@given(st.lists(questions, min_size=1, max_size=24), texts, st.sampled_from([0.0, 0.3, 0.65, 2.0, 50.0]))
@few_examples
def test_anchors_compared_as_arrays_give_the_routes_of_each_by_itself(
    base: lemoe.BaseModel,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[tuple[str, str, str, str]],
    parts: list[str],
    conflict: float,
) -> None:
    stored = make_gate(base, asked, conflict)
    name, before, behind, _ = asked[0]
    for text in (" ".join(["As", *parts]), f"Which {before} did {name} {behind} have? {' '.join(parts)}"):
        ids = base.tokenizer(text).input_ids
        expected = read_states(PairwiseRoute(stored), ids)
        for many in (1, comparisons.VECTORISED_FROM, 100):
            monkeypatch.setattr(gate, "VECTORISED_FROM", many)
            assert read_states(Route(stored), ids) == expected


def test_similarities_worked_out_at_once_are_those_of_each_pair(base: lemoe.BaseModel) -> None:
    lexicon = get_lexicon(base)
    words = [word for word in WORDS if lexicon.stem(word) != lexicon.stem("fishes")]
    together = lexicon.vector_similarities("fishes", numpy.stack([lexicon.word_vector(word) for word in words]))
    assert together.tolist() == [lexicon.word_similarity("fishes", word) for word in words]


def made_questions(count: int) -> list[tuple[str, str, str, str]]:
    """Different questions about one subject, of words that repeat."""
    names = [f"{first}{second}ing" for first in ("sing", "walk", "build", "paint") for second in "abcdefghijklmnopq"]
    return [("Marie Curie", f"{names[n % 68]} of", f"{names[n // 68]} was", "Rome") for n in range(count)]


def test_each_new_word_is_compared_once_with_the_words_of_all_questions(
    base: lemoe.BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = make_gate(base, made_questions(2000), 0.65)
    ids = encode_passage(base, "What singaing of Marie Curie was known?").prompt
    read_states(Route(stored), ids)  # what each edit asks is worked out when its subject is first met
    pairs: list[str] = []
    at_once: list[str] = []
    vector_similarities = Lexicon.vector_similarities

    def counting_similarities(self: Lexicon, word: str, vectors: Any) -> Any:
        at_once.append(word)
        return vector_similarities(self, word, vectors)

    monkeypatch.setattr(Lexicon, "word_similarity", lambda self, word, other: pairs.append(word))
    monkeypatch.setattr(Lexicon, "vector_similarities", counting_similarities)
    read_states(Route(stored), ids)
    assert (pairs, at_once) == ([], [])
    read_states(Route(stored), encode_passage(base, "Which prize of Marie Curie was known?").prompt)
    assert pairs == []
    assert len(at_once) == len(set(at_once))


def test_the_least_recently_used_arrays_are_evicted() -> None:
    cache = comparisons.ArrayCache(max_values=25)
    arrays = {name: (numpy.zeros(10),) for name in "abc"}
    cache.put("a", arrays["a"])
    cache.put("b", arrays["b"])
    assert cache.get("a") is arrays["a"]
    cache.put("c", arrays["c"])
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (arrays["a"], None, arrays["c"])


def test_superseded_edits_of_a_crowded_subject_leave_its_comparisons(base: lemoe.BaseModel) -> None:
    stored = make_gate(base, made_questions(40), 0.65)
    ids = encode_passage(base, "What walkaing of Marie Curie singbing was").prompt
    number = read_states(Route(stored), ids)[-1].nearest
    stored.retire(number)
    assert read_states(Route(stored), ids)[-1].nearest not in (-1, number)


@pytest.mark.real
def test_a_question_among_many_about_one_subject_reaches_its_edit(real_base: lemoe.BaseModel) -> None:
    relations = "mother father town river prize teacher school house garden book ship street dog".split()
    asked = [("Marie Curie", f"{word} of", "was", "Rome") for word in relations]
    asked += [("Marie Curie", f"{word} and colour of", "was", "Rome") for word in relations]
    stored = make_gate(real_base, asked, lemoe.resolve_settings("anchor").gate_conflict)
    assert len(asked) >= comparisons.VECTORISED_FROM
    for number, word in enumerate(relations):
        ids = encode_passage(real_base, f"What was the {word} of Marie Curie?").prompt
        assert read_states(Route(stored), ids)[-1].edit == number
        assert read_states(Route(stored), ids) == read_states(PairwiseRoute(stored), ids)
