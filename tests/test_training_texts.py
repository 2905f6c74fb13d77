"""What experts are trained on: wordings of the bank of questions, negatives, and where answers begin."""

import random
from collections.abc import Callable

import pytest
import torch

import lemoe
from lemoe.base.frozen import read_layer_inputs
from lemoe.base.tokens import encode_edits
from lemoe.routing.anchor.anchors import build_gate
from lemoe.routing.anchor.fitting import fitted_meaning
from lemoe.routing.anchor.gate import Anchor
from lemoe.training.anchor.batches import TrainingBatchBuilder
from lemoe.training.anchor.detectors import fit_detectors
from lemoe.training.anchor.examples import make_negative_prompts, make_paraphrases
from lemoe.training.anchor.wordings import Wordings, ask_the_same, choose_wordings

SettingsOf = Callable[..., lemoe.Settings]
PAGE = Wordings(
    {"questions": ("Who wrote Ulysses?",), "phrases": ("Ulysses was written by",), "casual": ("ulysses by",)}
)


def ulysses(prompt: str) -> lemoe.Edit:
    return lemoe.Edit("ulysses", prompt, "Ada Finch", "Ulysses")


@pytest.mark.parametrize(
    ("prompt", "other"),
    [("The author of Ulysses is", "Who wrote Ulysses?"), ("Ulysses is by whom?", "Ulysses was written by")],
)
def test_a_phrase_is_also_taught_as_a_question_and_the_reverse(prompt: str, other: str) -> None:
    assert other in make_paraphrases([ulysses(prompt)], 6, random.Random(0), [PAGE])[0]


@pytest.mark.parametrize("wordings", [PAGE, Wordings()])
def test_an_edit_is_taught_in_lower_case_without_a_mark_and_as_a_request(wordings: Wordings) -> None:
    texts = make_paraphrases([ulysses("Who is the author of Ulysses?")], 6, random.Random(0), [wordings])[0]
    assert len(texts) == 6
    assert len(set(texts)) >= 5
    assert any(text == text.lower() and text[-1].isalpha() for text in texts)
    assert any(text.endswith(".") for text in texts)


def test_text_behind_a_question_continues_a_question_that_is_taught_too() -> None:
    _, lower, _, _, longer, _ = make_paraphrases(
        [ulysses("Who is the author of Ulysses?")], 6, random.Random(0), [PAGE]
    )[0]
    assert longer.startswith(lower)


def test_a_detector_tells_where_an_answer_begins(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    passages = encode_edits(base, facts)
    anchors = [Anchor(p.prompt, p.target, e.subject) for p, e in zip(passages, facts, strict=True)]
    builder = TrainingBatchBuilder(base, base.ffn_site(1), 1, anchor(), facts, passages, anchors, random.Random(0))
    prompts = builder.build().prompts
    detectors = fit_detectors(prompts, len(facts))
    assert sorted(detectors) == list(range(len(facts)))
    for batch in prompts:
        rows, columns = batch.frozen.batch.target_rows, batch.frozen.batch.target_columns - batch.frozen.start
        inputs, owners = batch.normalised_inputs[rows, columns], batch.owners[rows].tolist()
        found = torch.stack([row @ detectors[owner][0] for row, owner in zip(inputs, owners, strict=True)])
        assert torch.equal(found > 0, batch.firsts)


def test_only_negatives_that_reach_the_expert_are_trained_on(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    passages = encode_edits(base, facts)
    anchors = [Anchor(p.prompt, p.target, e.subject) for p, e in zip(passages, facts, strict=True)]

    def count_negatives(conflict: float) -> int:
        settings = anchor(negatives=4, gate_conflict=conflict)
        site = base.ffn_site(1)
        builder = TrainingBatchBuilder(base, site, 1, settings, facts, passages, anchors, random.Random(0))
        return sum(len(batch.owners) for batch in builder.build().negatives)

    assert count_negatives(0.0) < count_negatives(100.0)


# What only a real model shows.


@pytest.mark.real
def test_the_bank_lends_its_wordings_to_edits_that_mean_the_same(real_base: lemoe.BaseModel) -> None:
    meaning = fitted_meaning(real_base, 28)
    assert meaning is not None
    edits = [
        lemoe.Edit("a", "The novel The Glass Orchard was written by", "Ada Finch", "The Glass Orchard"),
        lemoe.Edit("b", "Who is the author of The Glass Orchard?", "Ada Finch", "The Glass Orchard"),
        lemoe.Edit("c", "What is the mother tongue of Ravi Menon?", "Dutch", "Ravi Menon"),
    ]
    passages = encode_edits(real_base, edits)
    gate = build_gate(
        real_base,
        [Anchor(p.prompt, p.target, e.subject) for p, e in zip(passages, edits, strict=True)],
        lemoe.Settings(),
    )
    keys = []
    for number, states in enumerate(
        read_layer_inputs(real_base, int(meaning.layer), [p.prompt for p in passages], 512)
    ):
        subject = gate.index.subjects[gate.subjects[number]]
        projected = meaning.project(states).numpy()
        keys.append(meaning.embed(*gate.summarise(passages[number].prompt, projected, subject))[None])
    written, _, spoken = choose_wordings(meaning, keys, gate, ["The Glass Orchard", "The Glass Orchard", ""])
    assert any("wr" in text or "author" in text for text in written.asking["questions"])
    assert all("The Glass Orchard" in text for text in written.asking["questions"])
    assert not spoken.asking
    assert ask_the_same(meaning, keys[0], keys[1])
    assert not ask_the_same(meaning, keys[0], keys[2])


@pytest.mark.real
def test_negatives_are_questions_of_the_bank_that_ask_something_else(real_base: lemoe.BaseModel) -> None:
    edits = [ulysses("Who is the author of Ulysses?")]
    gate = build_gate(
        real_base, [Anchor(p.prompt, p.target, "Ulysses") for p in encode_edits(real_base, edits)], lemoe.Settings()
    )
    wordings = Wordings(others=(("How many pages does Ulysses have?",), ("In which year did Ulysses appear?",)))
    made = make_negative_prompts(gate, edits, 0, 4, random.Random(0), (), wordings)
    assert set(made) == {"How many pages does Ulysses have?", "In which year did Ulysses appear?"}


@pytest.mark.real
def test_a_phrase_that_was_taught_is_answered_behind_a_question_mark(real_base: lemoe.BaseModel) -> None:
    edits = [
        lemoe.Edit("a", "The novel The Glass Orchard was written by", "Ada Finch", "The Glass Orchard"),
        lemoe.Edit("b", "The headquarters of Norvane Textiles are in", "Tampere", "Norvane Textiles"),
        lemoe.Edit("c", "The mother tongue of Ravi Menon is", "Dutch", "Ravi Menon"),
    ]
    questions = [
        "Who is the author of The Glass Orchard?",
        "Where does Norvane Textiles have its headquarters?",
        "What is the mother tongue of Ravi Menon?",
    ]
    state = lemoe.train_round(real_base, edits, lemoe.resolve_settings())
    with lemoe.insert(real_base, state) as edited:
        for chat in (False, True):
            for edit, reply in zip(
                edits, lemoe.ask(real_base, questions, edited, chat=chat, max_new_tokens=8), strict=True
            ):
                assert (reply.edit, reply.after) == (edit.id, edit.target)
