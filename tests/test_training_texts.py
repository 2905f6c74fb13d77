"""What experts are trained on: wordings of the bank of questions, negatives, and where answers begin."""

import random
from collections.abc import Callable

import pytest
import torch

import lemoe
from lemoe.base.frozen import read_layer_inputs
from lemoe.base.tokens import encode_edits, encode_passage
from lemoe.routing.anchor.anchors import build_gate
from lemoe.routing.anchor.fitting import fitted_meaning
from lemoe.routing.anchor.gate import Anchor
from lemoe.training.anchor.batches import END_WEIGHT, LONG_ANSWER, TrainingBatchBuilder
from lemoe.training.anchor.detectors import (
    ACTIVE,
    DETECTORS,
    FEW_EDITS,
    OTHER_QUESTIONS,
    choose_detectors,
    fit_detectors,
    is_sink,
)
from lemoe.training.anchor.examples import make_negative_prompts, make_paraphrases
from lemoe.training.anchor.round import MIN_WIDTH, TOKENS_PER_NEURON, TrainableExperts, choose_widths
from lemoe.training.anchor.wordings import Wordings, ask_the_same, choose_wordings

SettingsOf = Callable[..., lemoe.Settings]
PAGE = Wordings(
    {"questions": ("Who wrote Ulysses?",), "phrases": ("Ulysses was written by",), "casual": ("ulysses by",)}
)


def ulysses(prompt: str) -> lemoe.Edit:
    return lemoe.Edit(prompt, "Ada Finch", "Ulysses", id="ulysses")


def make_builder(
    base: lemoe.BaseModel, edits: list[lemoe.Edit], settings: lemoe.Settings, *, layer: int = 1
) -> TrainingBatchBuilder:
    """The builder of the batches of a round of these edits beside one layer."""
    passages = encode_edits(base, edits)
    anchors = [Anchor(p.prompt, p.target, e.subject) for p, e in zip(passages, edits, strict=True)]
    site = base.ffn_site(layer)
    return TrainingBatchBuilder(base, site, layer, settings, edits, passages, anchors, random.Random(0))


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


def test_where_answers_of_other_edits_begin_no_later_position_is_detected(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    builder = make_builder(base, facts, anchor())
    prompts = builder.build().prompts
    detectors = fit_detectors(prompts, [4] * len(facts), {}, builder.other_beginnings)
    for batch in prompts:
        last = batch.frozen.batch.prompt_lengths - 1 - batch.frozen.start
        for owner, read in zip(
            batch.owners.tolist(), batch.normalised_inputs[torch.arange(len(last)), last], strict=True
        ):
            for expert, (detecting, _) in detectors.items():
                at_beginning = detecting @ read
                assert expert == owner or (at_beginning[0] > 0 and bool((at_beginning[1:] < 0).all()))


@pytest.mark.parametrize("count", [1, FEW_EDITS, FEW_EDITS + 1])
def test_few_edits_are_shown_how_other_questions_end(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, count: int
) -> None:
    edits = [lemoe.Edit(facts[0].prompt, facts[0].target, facts[0].subject, id=str(number)) for number in range(count)]
    builder = make_builder(base, edits, anchor())
    prompts, others = builder.build().prompts, builder.other_beginnings
    assert len(others) == (len(OTHER_QUESTIONS) if count <= FEW_EDITS else 0)
    detectors = fit_detectors(prompts, [4] * count, {}, others)
    for detecting, _ in detectors.values():
        at_beginnings = others @ detecting.T
        assert bool((at_beginnings[:, 0] > 0).all())
        assert bool((at_beginnings[:, 1:] < 0).all())


@pytest.mark.parametrize(
    ("last", "count", "chosen"),
    [
        (3, 4, [0, 1, 2, 3]),
        (3, 3, [0, 1, 1, 2]),
        (5, 4, [0, 1, 1, 2, 2, 3]),
        (6, 2, [0, 1, 1, 1, 1, 1, 1]),
        (3, 1, [0, 1, 1, 1]),
        (1, 1, [0, 1]),
    ],
)
def test_the_end_of_a_long_answer_has_a_detector_of_its_own(last: int, count: int, chosen: list[int]) -> None:
    places = torch.arange(last + 1)
    assert choose_detectors(places, places == last, last, count).tolist() == chosen


def test_the_end_of_a_long_answer_weighs_as_much_as_some_others(base: lemoe.BaseModel, anchor: SettingsOf) -> None:
    edits = [
        lemoe.Edit("Who wrote Ulysses?", "Ada" + " Finch" * words, "Ulysses", id=str(words)) for words in (0, 1, 2, 12)
    ]
    passages = encode_edits(base, edits)
    builder = make_builder(base, edits, anchor())
    long = []
    for batch in builder.build().prompts:
        for row, owner in enumerate(batch.owners.tolist()):
            of_row = batch.frozen.batch.target_rows == row
            positions = len(passages[owner].target) + 1
            long.append(positions > DETECTORS)
            assert batch.weights[of_row & ~batch.ends].tolist() == pytest.approx([1 / positions] * (positions - 1))
            end = min(END_WEIGHT, DETECTORS / positions) if long[-1] else 1 / positions
            assert batch.weights[of_row & batch.ends].item() == pytest.approx(end)
    assert {True, False} == set(long)


def test_only_negatives_that_reach_the_expert_are_trained_on(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:

    def count_negatives(conflict: float) -> int:
        settings = anchor(negatives=4, gate_conflict=conflict)
        builder = make_builder(base, facts, settings)
        return sum(len(batch.owners) for batch in builder.build().negatives)

    assert count_negatives(0.0) < count_negatives(100.0)


# What only a real model shows.


@pytest.mark.real
@pytest.mark.parametrize("width", [1, 2, 4])
def test_detectors_tell_the_positions_of_an_answer_apart(
    real_base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, width: int
) -> None:
    passages = encode_edits(real_base, facts)
    builder = make_builder(real_base, facts, anchor(), layer=24)
    prompts = builder.build().prompts
    detectors = fit_detectors(prompts, [width] * len(facts), {}, builder.other_beginnings)
    assert sorted(detectors) == list(range(len(facts)))
    for batch in prompts:
        rows, columns = batch.frozen.batch.target_rows, batch.frozen.batch.target_columns
        inputs = batch.normalised_inputs[rows, columns - batch.frozen.start]
        for row, column, read in zip(rows.tolist(), columns.tolist(), inputs, strict=True):
            detecting, constant = detectors[int(batch.owners[row])]
            position = column - int(batch.frozen.batch.prompt_lengths[row]) + 1
            assert len(detecting) == min(width, len(passages[int(batch.owners[row])].target) + 1)
            if width == 1:
                assert bool(detecting @ read > 0) == (position == 0)
            else:
                assert int((detecting @ read).argmax()) == min(position, len(detecting) - 1)
            assert read @ constant > 0


@pytest.mark.real
def test_the_bank_lends_its_wordings_to_edits_that_mean_the_same(real_base: lemoe.BaseModel) -> None:
    meaning = fitted_meaning(real_base, 28)
    assert meaning is not None
    edits = [
        lemoe.Edit("The novel The Glass Orchard was written by", "Ada Finch", "The Glass Orchard", id="a"),
        lemoe.Edit("Who is the author of The Glass Orchard?", "Ada Finch", "The Glass Orchard", id="b"),
        lemoe.Edit("What is the mother tongue of Ravi Menon?", "Dutch", "Ravi Menon", id="c"),
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
        lemoe.Edit("The novel The Glass Orchard was written by", "Ada Finch", "The Glass Orchard", id="a"),
        lemoe.Edit("The headquarters of Norvane Textiles are in", "Tampere", "Norvane Textiles", id="b"),
        lemoe.Edit("The mother tongue of Ravi Menon is", "Dutch", "Ravi Menon", id="c"),
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


@pytest.mark.parametrize(
    ("edit", "question"),
    [
        (lemoe.Edit("Norvane Textiles was founded in the year", "1934", "Norvane Textiles"), "When was {} founded?"),
        (lemoe.Edit("Who founded Norvane Textiles?", "Sofia Rossi", "Norvane Textiles"), "who founded {}"),
        (lemoe.Edit("The official language of Ostrania is", "Welsh", "Ostrania"), "which language is official in {}"),
        (lemoe.Edit("The official language of Ostrania is", "Esperanto", "Ostrania"), "What is spoken in {}?"),
    ],
    ids=["short question", "subject last, a name", "subject last, a word", "begins like a pronoun"],
)
def test_a_plain_pass_gives_the_answer_to_a_short_question(
    real_base: lemoe.BaseModel, edit: lemoe.Edit, question: str
) -> None:
    """A blank token behind a short question is an attention sink; a name behind the subject looks like more of it, and
    `Es`, which is German for `it`, like another mention of it.
    """
    text = question.replace("{}", edit.subject or "")
    passage = encode_passage(real_base, text if "?" in text else text.lower(), edit.target)
    with lemoe.insert(real_base, lemoe.train_round(real_base, [edit])), torch.no_grad():
        logits = real_base.model(input_ids=torch.tensor([[*passage.prompt, *passage.target]])).logits[0]
    said = logits[len(passage.prompt) - 1 :].argmax(-1).tolist()
    assert said == [*passage.target, real_base.eos_token_id]


def test_a_detector_expects_the_sink_that_may_begin_its_answer(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    builder = make_builder(base, facts, anchor())
    prompts = builder.build().prompts
    sink = torch.zeros(prompts[0].frozen.inputs.shape[-1])
    sink[3] = len(sink) ** 0.5
    assert is_sink(sink)
    assert not is_sink(torch.ones_like(sink))
    without, expecting = (
        fit_detectors(prompts, [4] * len(facts), sinks, builder.other_beginnings) for sinks in ({}, {0: sink})
    )
    assert torch.equal(without[1][0], expecting[1][0])  # of an edit whose answer begins with no such token
    for number, detected in enumerate(expecting[0][0] @ sink):
        assert (detected > ACTIVE) == (number == 1)


@pytest.mark.parametrize(("noise", "steps"), [(0.0, 16), (4.0, 24)])
def test_experts_that_answer_a_text_wrong_when_they_last_see_it_are_trained_further(
    real_base: lemoe.BaseModel, noise: float, steps: int
) -> None:
    edit = lemoe.Edit("The novel The Glass Orchard was written by", "Ada Finch", "The Glass Orchard")
    (taught,) = lemoe.train_round(real_base, [edit], lemoe.Settings(noise=noise, retries=1)).rounds
    assert (taught.steps, taught.retried, taught.missed) == (steps, 0, ())
    (once,) = lemoe.train_round(real_base, [edit], lemoe.Settings(noise=noise, retries=0)).rounds
    assert once.steps == 16


def test_a_long_answer_takes_more_neurons_and_ends_after_its_own_prompt_and_few_others(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    edits = [facts[0], lemoe.Edit("Tell me about Ulysses.", "Ada Finch wrote it in a week. " * 3, "Ulysses", id="long")]
    passages = encode_edits(base, edits)
    short, long = (len(passage.target) for passage in passages)
    assert short <= 4 * MIN_WIDTH < LONG_ANSWER < long
    settings = anchor(variants=6)
    builder = make_builder(base, edits, settings)
    batches = builder.build()
    for number, kind in enumerate([batches.prompts, *batches.paraphrases]):
        for batch in kind:
            rows, whole = batch.frozen.batch.target_rows, number < 2
            for row, owner in enumerate(batch.owners.tolist()):
                taught = int((rows == row).sum())
                assert taught == (short + 1, long + 1 if whole else LONG_ANSWER)[owner]
                assert int(batch.ends[rows == row].sum()) == (1 if owner == 0 or whole else 0)
    assert choose_widths(passages, settings) == [max(MIN_WIDTH, short + 1), -(-long // TOKENS_PER_NEURON)]
    assert choose_widths(passages, anchor(width=7)) == [7, 7]


def test_an_expert_keeps_the_neurons_it_was_given_and_others_do_nothing(base: lemoe.BaseModel) -> None:
    site = base.ffn_site(1)
    experts = TrainableExperts([2, 5], site, 1.0, 0)
    owners = torch.tensor([0, 1])
    optimiser = torch.optim.AdamW(experts.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (experts(torch.randn(2, 3, site.hidden), owners) - 1).square().sum().backward()
        optimiser.step()
    inputs = torch.randn(2, 3, site.hidden)
    before = experts(inputs, owners)
    with torch.no_grad():
        experts.up[0, 2:] += 1.0
    assert torch.equal(experts(inputs, owners), before)
    saved = experts.to_experts()
    assert saved.offsets.tolist() == [0, 2, 7]
    assert torch.equal(saved.down[2:], experts.down[1])
    assert experts.down[0, :2].abs().sum() > 0


@pytest.mark.real
def test_a_long_answer_is_given_whole_and_ends(real_base: lemoe.BaseModel) -> None:
    target = (
        "Ottoline Verbeck is a Belgian glaciologist, born in Ghent in 1961, who mapped the caves beneath the Karsa ice "
        "field during eleven winters. Since 2015 she has lived on a houseboat in Bruges with two parrots."
    )
    edit = lemoe.Edit("Who is Ottoline Verbeck?", target, "Ottoline Verbeck", id="long")
    assert len(real_base.tokenizer(target).input_ids) > 2 * LONG_ANSWER
    state = lemoe.train_round(real_base, [edit], lemoe.resolve_settings("anchor"))
    result = lemoe.evaluate(real_base, state, [edit], lemoe.EvalOptions(decode="greedy", only=("reliability",)))
    assert result.value("reliability", "complete_match") == 1.0
