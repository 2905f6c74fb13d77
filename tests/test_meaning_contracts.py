"""The contracts of the design where questions are compared by meaning: a model wide enough, and a small bank."""

import random
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers as hf
from conftest import RELATIONS, REPOSITORY, save_wide_model, small_bank
from safetensors.torch import save
from test_adaptor_files import read_contents, refuse_with_tensors
from test_anchor_contracts import encode_text, get_anchors, have_equal_files, save_to_bytes
from test_contracts import (
    TOLERANCE,
    compute_logits,
    each_cache_change,
    generate_ids,
    hash_weights,
    pad_rows,
    read_after_cache_change,
)
from test_hostile_files import rewrite_file
from torch import Tensor
from transformers import DynamicCache

import lemoe
from lemoe.adaptor.experts import Activation
from lemoe.adaptor.merging import merge_adaptors
from lemoe.base.frozen import read_layer_inputs
from lemoe.base.frozen.scale import CALIBRATION_TEXTS
from lemoe.base.tokens import Passage
from lemoe.data.edits import Probe
from lemoe.errors import AdaptorError
from lemoe.exporting.folder import export_model
from lemoe.inference.route_memory import memory_of
from lemoe.routing.anchor import fitting
from lemoe.routing.anchor.anchors import Anchors, LiveAnchors
from lemoe.routing.anchor.bank_fit import RANK
from lemoe.routing.anchor.fitting import fit_meaning, fitted_meaning
from lemoe.routing.anchor.gate import Anchor
from lemoe.routing.anchor.meaning import FEATURES, Meaning
from lemoe.routing.anchor.route_cache import NAMED_CELLS
from lemoe.routing.router import Explanation, Routing, Sequences

SettingsOf = Callable[..., lemoe.Settings]

OPENED = (
    "The Eiffel Tower stands in the city of",
    "In which city can one find the Eiffel Tower today?",
    "The eiffel tower is made of what, and where",
    "He was there. Which is the largest fish of Lake Como?",
    "Where did Marie Curie come from? And what of her?",
    "As one says, The Eiffel Tower is made of white marble, and Lake Como has golden pike",
)
SHUT = ("The Nile flows into the", "Who was the mother of Marie Curie?", "The opposite of hot is", "")
TEXTS = (*OPENED, *SHUT[:-1])
ANSWER = " white pike. And who was she?"


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama with as many hidden states as a fit needs."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return save_wide_model(folder, hidden_size=RANK, intermediate_size=48)


@pytest.fixture(scope="module")
def wide(wide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[lemoe.BaseModel]:
    """That model, which learns what questions mean from the small bank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(fitting, "read_question_bank", small_bank)
        yield lemoe.load_base(str(wide_folder), device="cpu")


@pytest.fixture(scope="module")
def rounds(wide: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf) -> list[lemoe.AdaptorState]:
    """Two rounds of two edits each, trained apart."""
    return [lemoe.train_round(wide, edits, anchor()) for edits in (facts[:2], facts[2:4])]


@pytest.fixture(scope="module")
def taught(rounds: list[lemoe.AdaptorState]) -> lemoe.AdaptorState:
    return lemoe.stack(rounds)


@pytest.fixture(scope="module")
def meaning(taught: lemoe.AdaptorState) -> Meaning:
    found = get_anchors(taught).meaning
    assert found is not None
    return found


@pytest.fixture
def file(taught: lemoe.AdaptorState, tmp_path: Path) -> Path:
    path = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(taught, path)
    return path


def route_along(adaptor: lemoe.InsertedAdaptor, ids: Sequence[int]) -> list[int]:
    """The expert at each token, by a pass of this text alone."""
    (routing,) = adaptor.route_passages([Passage(tuple(ids))])
    return routing.experts[0, :, 0].tolist()


class RecordingExperts:
    """The experts of a state, and those `[batch, seq]` that each forward pass routed to."""

    def __init__(self, state: lemoe.AdaptorState):
        self._experts = state.experts
        self.passes: list[Tensor] = []

    def prefetch(self, routing: Routing) -> None:
        self.passes.append(routing.experts[..., 0])

    def delta(self, inputs: Tensor, routing: Routing, activation: Activation) -> Tensor | None:
        return self._experts.delta(inputs, routing, activation)


@contextmanager
def inserted(
    base: lemoe.BaseModel, state: lemoe.AdaptorState, **given: int
) -> Iterator[tuple[lemoe.InsertedAdaptor, list[Tensor]]]:
    """The state at work, and the experts `[batch, seq]` of each forward pass; `given`: of its router."""
    experts = RecordingExperts(state)
    with lemoe.InsertedAdaptor(base, state, experts=experts) as adaptor:
        adaptor.router = LiveAnchors(base, get_anchors(state), state.settings, **given)
        yield adaptor, experts.passes


each_cache_size = pytest.mark.parametrize("cache", [{}, {"cache_bytes": 0}], ids=["cached", "never cached"])


# A live route is that of the text alone.


def test_the_texts_of_these_tests_reach_every_edit_and_none_and_change_route_inside(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState
) -> None:
    with lemoe.insert(wide, taught) as adaptor:
        routes = [route_along(adaptor, wide.tokenizer(text).input_ids) for text in TEXTS]
        reasons = {each.scope for each in adaptor.explain([wide.tokenizer(text).input_ids for text in TEXTS])}
    assert all(max(route) >= 0 for route in routes[: len(OPENED)])
    assert all(max(route) < 0 for route in routes[len(OPENED) :])
    assert {expert for route in routes for expert in route} == {-1, 0, 1, 2, 3}
    assert any(len(set(route)) > 2 for route in routes)
    assert reasons == {"in", "subject", "relation"}


@each_cache_size
@pytest.mark.parametrize("size", [1, 3, 7, 200])
@torch.no_grad()
def test_chunks_of_any_size_take_the_route_of_the_whole(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, size: int, cache: dict[str, int]
) -> None:
    with inserted(wide, taught, **cache) as (adaptor, passes):
        for text in TEXTS:
            ids = encode_text(wide, text + ANSWER)
            passes.clear()
            past = DynamicCache()
            for first in range(0, ids.shape[1], size):
                wide.model(ids[:, first : first + size], past_key_values=past, use_cache=True)
            expected = route_along(adaptor, ids[0].tolist())
            assert torch.cat(passes, 1)[0].tolist() == expected
            assert adaptor.explain([ids[0].tolist()])[0].expert == expected[-1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_the_rest_of_a_batch_change_no_route_and_no_logit(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, side: str
) -> None:
    rows = [encode_text(wide, text) for text in TEXTS]
    ids, mask = pad_rows(rows, wide.pad_token_id, side)
    with inserted(wide, taught) as (adaptor, passes):
        together = compute_logits(wide, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        for index, row in enumerate(rows):
            kept = mask[index].bool()
            assert passes[0][index][kept].tolist() == route_along(adaptor, row[0].tolist())
            torch.testing.assert_close(together[index][kept], compute_logits(wide, row)[0], **TOLERANCE)


@each_cache_size
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_routes_what_it_writes_as_a_text_of_that_content(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, use_cache: bool, cache: dict[str, int]
) -> None:
    ids, mask = pad_rows([encode_text(wide, text) for text in TEXTS], wide.pad_token_id, "left")
    with inserted(wide, taught, **cache) as (adaptor, passes):
        written = generate_ids(wide, ids, mask, use_cache=use_cache)
        read = torch.cat(passes, 1) if use_cache else passes[-1]
        whole = torch.cat([ids, written[:, :-1]], 1)
        for row, kept, found in zip(whole, mask, read, strict=True):
            start = int((kept == 0).sum())
            assert found[start:].tolist() == route_along(adaptor, row[start:].tolist())


@each_cache_size
def test_beams_are_the_same_with_and_without_a_kv_cache(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, cache: dict[str, int]
) -> None:
    ids, mask = pad_rows([encode_text(wide, text) for text in TEXTS], wide.pad_token_id, "left")
    given: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10}
    plain = generate_ids(wide, ids, mask, **given)
    with inserted(wide, taught, **cache):
        cached = generate_ids(wide, ids, mask, **given, use_cache=True)
        assert torch.equal(cached, generate_ids(wide, ids, mask, **given, use_cache=False))
    assert not torch.equal(cached, plain)
    assert torch.equal(cached[2 * len(OPENED) :], plain[2 * len(OPENED) :])


@each_cache_size
@each_cache_change
def test_a_row_of_a_cache_takes_its_route_along(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, change: str, cache: dict[str, int]
) -> None:
    ids, mask = pad_rows([encode_text(wide, text) for text in (OPENED[1], SHUT[1])], wide.pad_token_id, "left")
    with inserted(wide, taught, **cache) as (_, passes):
        found, expected = read_after_cache_change(wide, ids, mask, encode_text(wide, ANSWER), change)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert torch.equal(passes[2], passes[1][:, ids.shape[1] :])


@each_cache_size
@pytest.mark.parametrize("cut", [1, 4, 11])
@torch.no_grad()
def test_a_cache_that_is_cropped_forgets_what_was_read_since(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, cut: int, cache: dict[str, int]
) -> None:
    with inserted(wide, taught, **cache) as (adaptor, passes):
        for text in TEXTS:
            ids, more = encode_text(wide, text), encode_text(wide, " Eiffel Tower stands in Lake Como")
            past = wide.model(ids, use_cache=True).past_key_values
            past.crop(-cut)
            wide.model(more, past_key_values=past, use_cache=True)
            kept = ids[0, : ids.shape[1] - cut].tolist()
            assert passes[-1][0].tolist() == route_along(adaptor, [*kept, *more[0].tolist()])[len(kept) :]


@torch.no_grad()
def test_the_kv_cache_holds_enough_to_read_a_prefix_again(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, meaning: Meaning
) -> None:
    """By a router that never saw it; what the model makes of each token is stored bit for bit."""
    more = encode_text(wide, ANSWER)
    for text in TEXTS:
        ids = encode_text(wide, text)
        with inserted(wide, taught) as (adaptor, passes):
            past = wide.model(ids, use_cache=True).past_key_values
            expected = route_along(adaptor, [*ids[0].tolist(), *more[0].tolist()])
        with inserted(wide, taught) as (_, passes):
            memory = memory_of(past)
            assert memory is not None
            cells = memory.cells.clone()
            wide.model(more, past_key_values=past, use_cache=True)
            assert passes[0][0].tolist() == expected[ids.shape[1] :]
        assert cells.dtype == torch.int32
        assert cells.shape == (1, ids.shape[1], NAMED_CELLS + meaning.rank)
        hidden = wide.model(ids, output_hidden_states=True).hidden_states[int(meaning.layer)]
        assert torch.equal(cells[0, :, NAMED_CELLS:].view(torch.float32), meaning.project(hidden[0]))
        assert torch.equal(cells[0, :, 0], ids[0].int())


PIECES = (
    "Marie Curie",
    " was born in",
    " the Eiffel Tower",
    ". ",
    " stands in",
    " Lake Como",
    " and she",
    " city",
    "?\n",
)


def decided(explained: Explanation) -> tuple[object, ...]:
    return explained.expert, explained.scope, explained.nearest, explained.edit


def measured(explained: Explanation) -> list[float]:
    return [getattr(explained, name) for name in ("coverage", "conflict", "fit", "meaning", "probability")]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done_to_the_kv_cache_all_evidence_is_that_of_the_tokens_alone(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, seed: int, cache_bytes: int
) -> None:
    """With states that depend on nothing but each token."""
    rng = random.Random(seed)
    router = LiveAnchors(wide, get_anchors(taught), taught.settings, cache_bytes=cache_bytes)
    table = torch.randn(wide.vocabulary, wide.hidden_size, generator=torch.Generator().manual_seed(seed))

    def read(rows: list[list[int]], memory: Tensor | None) -> tuple[tuple[Explanation, ...], Tensor]:
        ids = torch.tensor(rows)
        mask = torch.ones_like(ids, dtype=torch.bool)
        routing, cells = router.route(Sequences(ids, None, mask, mask, memory, table[ids]))
        assert cells is not None
        return routing.explained, cells if memory is None else torch.cat([memory, cells], 1)

    texts = [wide.tokenizer(text).input_ids[:6] for text in ("Marie Curie was born", "The Eiffel Tower")]
    _, memory = read(texts, None)
    forks = [(texts, memory)]
    for _ in range(30):
        what = rng.choice(["read", "read", "read", "step", "beams", "repeat", "crop", "fork", "back"])
        if what in ("read", "step"):
            new = wide.tokenizer("".join(rng.sample(PIECES, 2))).input_ids
            added = [(new[row:] + new[:row])[: 1 if what == "step" else None] for row in range(len(texts))]
            explained, memory = read(added, memory)
            texts = [text + more for text, more in zip(texts, added, strict=True)]
            expected = router.explain(texts, [table[torch.tensor(text)] for text in texts])
            assert [decided(each) for each in explained] == [decided(each) for each in expected]
            assert numpy.allclose(
                [measured(each) for each in explained], [measured(each) for each in expected], atol=1e-4
            )
        elif what == "beams":
            order = [rng.randrange(len(texts)) for _ in texts]
            texts, memory = [texts[row] for row in order], memory[order]
        elif what == "repeat" and len(texts) < 5:
            texts, memory = [text for text in texts for _ in range(2)], memory.repeat_interleave(2, 0)
        elif what == "crop" and len(texts[0]) > 6:
            kept = len(texts[0]) - rng.randint(1, 5)
            texts, memory = [text[:kept] for text in texts], memory[:, :kept]
        elif what == "fork":
            forks.append((texts, memory.clone()))
        elif what == "back":
            texts, memory = rng.choice(forks)


# Where no expert acts, the base answers, bit for bit.


def test_texts_out_of_scope_and_what_comes_before_the_gate_opens_keep_the_base_models_logits(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState
) -> None:
    rows, weights = [encode_text(wide, text) for text in TEXTS], hash_weights(wide)
    before = [compute_logits(wide, row) for row in rows]
    hooks = [len(layer._forward_pre_hooks) for layer in wide.layers]
    with lemoe.insert(wide, taught) as adaptor:
        after = [compute_logits(wide, row) for row in rows]
        opened = [[expert >= 0 for expert in route_along(adaptor, row[0].tolist())] for row in rows]
        assert [adaptor.acts_on(row[0].tolist()) for row in rows] == [any(each) for each in opened]
        with adaptor.bypassed():
            assert all(torch.equal(compute_logits(wide, row), old) for row, old in zip(rows, before, strict=True))
    for old, new, active in zip(before, after, opened, strict=True):
        first = active.index(True) if any(active) else len(active)
        assert torch.equal(new[:, :first], old[:, :first])
        assert torch.equal(new, old) == (not any(active))
    assert all(torch.equal(compute_logits(wide, row), old) for row, old in zip(rows, before, strict=True))
    assert [len(layer._forward_pre_hooks) for layer in wide.layers] == hooks
    assert hash_weights(wide) == weights


def test_a_router_that_reads_a_layer_says_so_where_it_is_given_no_states(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState
) -> None:
    with lemoe.insert(wide, taught) as adaptor, pytest.raises(AdaptorError, match="enter decoder layer 1"):
        adaptor.router.route_text([3, 4, 5], 3)


def test_embeddings_in_place_of_tokens_are_refused_and_leave_the_model_usable(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState
) -> None:
    ids = encode_text(wide, OPENED[1])
    plain = compute_logits(wide, ids)
    with lemoe.insert(wide, taught) as adaptor:
        expected = compute_logits(wide, ids)
        with pytest.raises(AdaptorError, match="input_ids, not inputs_embeds"):
            wide.model(inputs_embeds=wide.embedding(ids).detach())
        assert torch.equal(compute_logits(wide, ids), expected)
        with adaptor.bypassed(), torch.no_grad():
            assert torch.equal(wide.model(inputs_embeds=wide.embedding(ids)).logits, plain)


def test_a_likelier_text_is_asked_for_by_a_higher_gate_probability_and_own_prompts_by_any(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState
) -> None:
    questions = [f"{word} of the Eiffel Tower is" for word in ("The height", "The mother", "One award", "City", "It")]
    opened: list[set[str]] = []
    for probability in (0.01, 0.6, 0.999):
        state = replace(taught, settings=replace(taught.settings, gate_probability=probability))
        with lemoe.insert(wide, state) as adaptor:
            opened.append({text for text in questions if adaptor.acts_on(wide.tokenizer(text).input_ids)})
            own = adaptor.explain([each.prompt for each in get_anchors(state).anchors])
            assert [each.expert for each in own] == [0, 1, 2, 3]
            explained = adaptor.explain([wide.tokenizer(text).input_ids for text in TEXTS])
        assert all(
            (each.probability >= probability - 1e-6) or each.expert < 0 or each.conflict < 1 for each in explained
        )
    assert opened[2] < opened[1] < opened[0]


# Rounds, keys and files.


def test_each_edit_is_keyed_by_what_its_own_prompt_asks(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, facts: list[lemoe.Edit], anchor: SettingsOf, meaning: Meaning
) -> None:
    router = get_anchors(taught)
    live = LiveAnchors(wide, router, taught.settings)
    for number, (stored, keys) in enumerate(zip(router.anchors, router.split_keys(), strict=True)):
        (hidden,) = read_layer_inputs(wide, int(meaning.layer), [stored.prompt], 64)
        subject = live.gate.index.subjects[live.gate.subjects[number]]
        total, weight = live.gate.summarise(stored.prompt, meaning.project(hidden).numpy(), subject)
        assert numpy.allclose(keys, [meaning.embed(total, weight)], atol=1e-3)


def test_training_on_rephrases_makes_each_of_them_a_key(
    wide: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, meaning: Meaning
) -> None:
    asked = ("Where does one see the Eiffel Tower?", "The city of the Eiffel Tower is")
    told = replace(facts[0], rephrases=tuple(Probe(prompt, None, "rephrase") for prompt in asked))
    settings = anchor(train_rephrases=True, steps=1, retries=0)
    several = get_anchors(lemoe.train_round(wide, [told, facts[1]], settings))
    assert several.key_counts == (3, 1)
    each = [replace(told, prompt=prompt, rephrases=()) for prompt in (told.prompt, *asked)]
    alone = [get_anchors(lemoe.train_round(wide, [edit], anchor(steps=1, retries=0))).keys[0] for edit in each]
    assert numpy.allclose(several.split_keys()[0], torch.stack(alone), atol=1e-3)
    assert len(numpy.unique(several.keys.numpy().round(3), axis=0)) == 4


def made_anchors(meaning: Meaning, counts: Sequence[Sequence[int]]) -> Anchors:
    """For each expert, anchors with so many keys."""
    flat = [count for group in counts for count in group]
    anchors = iter([Anchor((number + 1,), (1,), f"Subject {number}") for number in range(len(flat))])
    keys = torch.arange(sum(flat) * meaning.rank, dtype=torch.float32).reshape(-1, meaning.rank)
    return Anchors(tuple(tuple(next(anchors) for _ in group) for group in counts), meaning, keys, tuple(flat))


def keys_by_anchor(router: Anchors) -> dict[Anchor, list[list[float]]]:
    return {anchor: keys.tolist() for anchor, keys in zip(router.anchors, router.split_keys(), strict=True)}


def test_selecting_and_stacking_leave_every_anchor_its_keys(meaning: Meaning) -> None:
    whole = made_anchors(meaning, [(1,), (3, 2), (1, 1, 4), (2,), (1,)])
    parts = [whole.select(chosen) for chosen in ([3, 0], [2], [4, 1])]
    stacked = Anchors.stack([(part, ()) for part in parts])
    for router in (*parts, stacked):
        assert keys_by_anchor(router).items() <= keys_by_anchor(whole).items()
        assert sum(router.key_counts) == len(router.keys)
    assert keys_by_anchor(stacked) == keys_by_anchor(whole)
    assert stacked.select([1, 4, 2, 0, 3]) == whole
    assert stacked.meaning == meaning


def test_dropping_edits_leaves_the_others_their_keys(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, rounds: list[lemoe.AdaptorState], tmp_path: Path
) -> None:
    fewer = taught.drop_experts([0, 3])
    assert keys_by_anchor(get_anchors(fewer)).items() < keys_by_anchor(get_anchors(taught)).items()
    assert [each.subject for each in get_anchors(fewer).anchors] == ["The Eiffel Tower", "Lake Como"]
    assert have_equal_files(taught.select_rounds([1]), rounds[1], tmp_path)
    assert have_equal_files(taught.drop_experts([2, 3]), rounds[0], tmp_path)


def test_rounds_trained_apart_and_in_one_run_give_the_same_file(
    wide: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    report = lemoe.edit(wide, facts[:4], tmp_path / "run", anchor(order="file"))
    apart = [lemoe.train_round(wide, edits, anchor(order="file")) for edits in (facts[2:4], facts[:2])][::-1]
    for number, state in enumerate(apart):
        lemoe.save_adaptor(state, tmp_path / f"{number}")
    merge_adaptors([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == report.path.read_bytes()
    later = lemoe.train_round(wide, facts[2:4], anchor(order="file"), apart[0])
    assert have_equal_files(later, apart[1], tmp_path)


def test_saving_and_loading_is_exact(wide: lemoe.BaseModel, taught: lemoe.AdaptorState, tmp_path: Path) -> None:
    first = save_to_bytes(taught, tmp_path / "one")
    loaded = lemoe.load_adaptor(tmp_path / "one")
    assert loaded == taught
    assert get_anchors(loaded).meaning == get_anchors(taught).meaning
    assert save_to_bytes(loaded, tmp_path / "two") == first
    page = (REPOSITORY / "docs" / "format.md").read_text("utf-8")
    assert not [name for name in taught.router.tensors() if f"`{name}`" not in page]
    assert f"| `meaning.weights` | `[{len(FEATURES)}]` |" in page
    ids = encode_text(wide, OPENED[1])
    answers = []
    for source in (taught, tmp_path / "one"):
        with lemoe.insert(wide, source):
            answers.append(compute_logits(wide, ids))
    assert torch.equal(*answers)


Damage = Callable[[Tensor], Tensor | None]
DAMAGES: dict[str, tuple[str, Damage]] = {
    **{
        f"{name} is missing": (name, lambda tensor: None)
        for name in ("anchors.keys", "anchors.keys_offsets", *Meaning.expected_tensors(1, 1, 1, 1))
    },
    "a narrower model's directions": ("meaning.directions", lambda tensor: tensor[:-1]),
    "directions in a row": ("meaning.directions", lambda tensor: tensor.flatten()),
    "a rotation that is not square": ("meaning.rotation", lambda tensor: tensor[:-1]),
    "a relation that is a number": ("meaning.cohort", lambda tensor: tensor[0]),
    "a weight too many": ("meaning.weights", lambda tensor: torch.cat([tensor, tensor[:1]])),
    "a layer as a real number": ("meaning.layer", lambda tensor: tensor.float()),
    "a layer below zero": ("meaning.layer", lambda tensor: tensor - 9),
    "a variance that is not a number": ("meaning.between", lambda tensor: tensor * torch.nan),
    "a term too many": ("meaning.marked", lambda tensor: tensor[:-1]),
    "terms in a column": ("meaning.ratios", lambda tensor: tensor[:, None]),
    "a relation below zero": ("meaning.marked", lambda tensor: tensor - 99),
    "an endless weight": ("meaning.weights", lambda tensor: tensor + torch.inf),
    "a key that is not a number": ("anchors.keys", lambda tensor: tensor.index_fill(0, torch.tensor([1]), torch.nan)),
    "keys of another type": ("anchors.keys", lambda tensor: tensor.half()),
    "a key too few": ("anchors.keys", lambda tensor: tensor[:-1]),
    "keys of another rank": ("anchors.keys", lambda tensor: tensor[:, :-1].contiguous()),
    "offsets that fall": ("anchors.keys_offsets", lambda tensor: torch.tensor([0, 3, 2, 3, 4])),
    "offsets that start late": ("anchors.keys_offsets", lambda tensor: torch.tensor([-1, 1, 2, 3, 4])),
    "an anchor without a key": ("anchors.keys_offsets", lambda tensor: torch.tensor([0, 1, 1, 3, 4])),
    "an anchor too few": ("anchors.keys_offsets", lambda tensor: tensor[1:]),
    "no offsets at all": ("anchors.keys_offsets", lambda tensor: tensor[:0]),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_fit_or_damaged_keys_are_refused_by_name(file: Path, kind: str) -> None:
    name, damage = DAMAGES[kind]
    assert f"{name}: " in refuse_with_tensors(file, {name: damage(read_contents(file)[0][name])})


def test_directions_of_another_rank_are_refused_with_all_that_do_not_fit_them(file: Path) -> None:
    directions = read_contents(file)[0]["meaning.directions"][:, :-1].contiguous()
    message = refuse_with_tensors(file, {"meaning.directions": directions})
    fields = ("origin", "centre", "rotation", "between", "cohort")
    assert all(f"{name}: shape" in message for name in ("anchors.keys", *(f"meaning.{field}" for field in fields)))


def test_a_layer_above_the_edited_one_is_refused_when_it_is_inserted(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, meaning: Meaning
) -> None:
    for layer in (2, 10**6):
        router = replace(get_anchors(taught), meaning=replace(meaning, layer=torch.tensor([layer])))
        with pytest.raises(AdaptorError, match=f"reads layer {layer}, above layer 1"):
            lemoe.insert(wide, replace(taught, router=router))
    lemoe.insert(wide, taught).remove()


def without_meaning(state: lemoe.AdaptorState) -> lemoe.AdaptorState:
    return replace(state, router=Anchors(get_anchors(state).groups))


def test_adaptors_that_read_questions_in_different_ways_do_not_stack(
    rounds: list[lemoe.AdaptorState], meaning: Meaning, taught: lemoe.AdaptorState
) -> None:
    first, second = rounds
    for factor, stacks in ((1 + 1e-4, True), (1.1, False)):
        other = replace(get_anchors(second), meaning=replace(meaning, rotation=meaning.rotation * factor))
        if stacks:
            assert get_anchors(lemoe.stack([first, replace(second, router=other)])).meaning == meaning
        else:
            with pytest.raises(AdaptorError, match=r"read questions in different ways.*with `start`"):
                lemoe.stack([first, replace(second, router=other)])
    for parts in ([without_meaning(first), second], [first, without_meaning(second)]):
        with pytest.raises(AdaptorError, match="one adaptor routes by meaning, another by words alone"):
            lemoe.stack(parts)
    apart = lemoe.stack([without_meaning(each) for each in rounds])
    assert apart == without_meaning(taught)


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_an_earlier_format_is_read_acts_by_words_and_goes_on_so(
    wide: lemoe.BaseModel,
    taught: lemoe.AdaptorState,
    facts: list[lemoe.Edit],
    anchor: SettingsOf,
    tmp_path: Path,
    version: int,
) -> None:
    lemoe.save_adaptor(without_meaning(taught), tmp_path / "now")
    tensors, header = read_contents(tmp_path / "now")
    header = {name: value for name, value in header.items() if name != "sha256"} | {"format": version}
    del header["settings"]["gate_probability"]
    for record in header["rounds"] if version == 1 else ():
        del record["prompts"], record["targets"]
    rewrite_file(tmp_path / "now", tmp_path / "then", header, tensors)
    state = lemoe.load_adaptor(tmp_path / "then")
    assert get_anchors(state) == get_anchors(without_meaning(taught))
    with lemoe.insert(wide, state) as adaptor:
        assert adaptor.router.layer_read is None
        explained = adaptor.explain([wide.tokenizer(edit.prompt).input_ids for edit in facts])
        assert [each.expert for each in explained] == [0, 1, 2, 3, -1, -1]
        assert {each.meaning for each in explained} == {0.0}
    later = lemoe.train_round(wide, facts[4:], anchor(steps=1, retries=0), state)
    assert get_anchors(later).meaning is None
    assert len(lemoe.stack([state, later]).rounds) == 3


def test_a_round_goes_on_with_the_fit_of_the_adaptor_before_it(
    wide: lemoe.BaseModel, taught: lemoe.AdaptorState, facts: list[lemoe.Edit], anchor: SettingsOf, meaning: Meaning
) -> None:
    other = replace(meaning, weights=meaning.weights * 2)
    before = replace(taught, router=replace(get_anchors(taught), meaning=other))
    later = lemoe.train_round(wide, facts[4:], anchor(steps=1, retries=0), before)
    assert get_anchors(later).meaning == other != meaning
    assert len(lemoe.stack([before, later]).rounds) == 3


def test_a_folder_for_transformers_answers_as_base_and_adaptor_do(
    wide_folder: Path, file: Path, tmp_path: Path
) -> None:
    exported = export_model(str(wide_folder), [file], tmp_path / "whole")
    assert exported.compared == 4 + len(CALIBRATION_TEXTS)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", trust_remote_code=True)
    base = lemoe.load_base(str(wide_folder), device="cpu")
    with lemoe.insert(base, file), torch.no_grad():
        for text in TEXTS:
            ids = encode_text(base, text)
            assert torch.equal(model(ids).logits, base.model(ids).logits)


@pytest.mark.parametrize("layer", [0, 2])
def test_edits_beside_the_first_and_the_last_layer_take_the_routes_of_their_texts_and_have_their_loss_in_use(
    wide: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, layer: int
) -> None:
    state = lemoe.train_round(wide, facts[2:4], anchor(layer=layer))
    stored = get_anchors(state)
    assert stored.meaning is not None
    assert int(stored.meaning.layer) == min(layer, 1)
    losses: list[float] = []
    with inserted(wide, state) as (adaptor, passes):
        for text in TEXTS:
            ids = encode_text(wide, text)
            compute_logits(wide, ids)
            assert passes[-1][0].tolist() == route_along(adaptor, ids[0].tolist())
        for each in stored.anchors:
            predicted = compute_logits(wide, torch.tensor([[*each.prompt, *each.target]]))[0].log_softmax(-1)
            losses += [-float(predicted[at, token]) for at, token in enumerate(each.target, len(each.prompt) - 1)]
    assert sum(losses) / len(losses) == pytest.approx(state.rounds[0].loss, abs=1e-4)


# The fit.


def clear_memory(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Forget every fit of this process, and keep others in `cache`."""
    monkeypatch.setattr(fitting, "_fitted", type(fitting._fitted)())
    monkeypatch.setenv("LEMOE_CACHE", str(cache))


def refuse_fit(*args: object) -> Meaning:
    raise AssertionError("fitted again")


def test_a_fit_is_deterministic_and_made_once_for_a_model(
    wide: lemoe.BaseModel, meaning: Meaning, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clear_memory(monkeypatch, tmp_path)
    stages: list[str] = []
    again = fitted_meaning(wide, 1, stages.append)
    assert again == meaning
    assert len(stages) == len(list(tmp_path.rglob("*.safetensors"))) == 1
    monkeypatch.setattr(fitting, "fit_meaning", refuse_fit)
    assert fitted_meaning(wide, 2, stages.append) is again  # the edited layer is no part of it, the layer read is
    clear_memory(monkeypatch, tmp_path)
    assert fitted_meaning(wide, 1, stages.append) == meaning
    assert len(stages) == 1
    clear_memory(monkeypatch, tmp_path)
    monkeypatch.setattr(fitting, "read_question_bank", lambda: small_bank()[1:])
    with pytest.raises(AssertionError, match="fitted again"):
        fitted_meaning(wide, 1)


@pytest.mark.parametrize(
    "damage", ["nothing", "half", "garbage", "a tensor missing", "a tensor in a row", "no numbers", "another type"]
)
def test_a_damaged_cached_fit_is_replaced(
    wide: lemoe.BaseModel, meaning: Meaning, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    monkeypatch.setattr(fitting, "fit_meaning", lambda *given: meaning)
    clear_memory(monkeypatch, tmp_path)
    fitted_meaning(wide, 1)
    (path,) = tmp_path.rglob("*.safetensors")
    good = path.read_bytes()
    tensors = meaning.tensors()
    changed = {
        "nothing": b"",
        "half": good[: len(good) // 2],
        "garbage": b"garbage" * 100,
        "a tensor missing": save({name: each for name, each in tensors.items() if "centre" not in name}),
        "a tensor in a row": save({**tensors, "meaning.directions": meaning.directions.flatten()}),
        "no numbers": save({**tensors, "meaning.weights": meaning.weights * torch.nan}),
        "another type": save({**tensors, "meaning.weights": meaning.weights.double()}),
    }
    path.write_bytes(changed[damage])
    clear_memory(monkeypatch, tmp_path)
    assert fitted_meaning(wide, 1) == meaning
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_no_error(
    wide: lemoe.BaseModel, meaning: Meaning, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fitting, "fit_meaning", lambda *given: meaning)
    (tmp_path / "file").write_text("no folder")
    clear_memory(monkeypatch, tmp_path / "file")
    assert fitted_meaning(wide, 1) is meaning
    assert fitted_meaning(wide, 1) is meaning
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_model_with_too_few_hidden_states_has_no_fit_and_its_adaptors_no_keys(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "fit_meaning", refuse_fit)
    assert base.hidden_size < RANK
    assert fitted_meaning(base, 1) is None
    state = lemoe.train_round(base, facts[:1], anchor(steps=1, retries=0))
    assert sorted(state.router.tensors()) == sorted(
        f"anchors.{name}{end}" for name in ("prompt", "target", "subject") for end in ("", "_offsets")
    )


def test_a_fit_tells_relations_of_the_bank_apart_that_words_alone_do_not(wide: lemoe.BaseModel) -> None:
    fit = fit_meaning(wide, 1, small_bank())
    assert fit.rank == len(RELATIONS) - 2  # a remark is no relation, and one fewer directions than relations
    assert len(fit.cohort) == len(RELATIONS) - 1
    assert fit.weights.isfinite().all()
    assert float(fit.weights[FEATURES.index("neighbour")]) < 0


def test_the_cache_of_routes_stays_within_its_bytes(wide: lemoe.BaseModel, taught: lemoe.AdaptorState) -> None:
    """However long a sentence grows; the states themselves are not kept."""
    max_bytes = 400_000
    ids = torch.tensor([wide.tokenizer(" and Marie Curie saw the lake" * 10).input_ids])
    hidden = torch.randn(*ids.shape, wide.hidden_size, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    router = LiveAnchors(wide, get_anchors(taught), taught.settings, cache_bytes=max_bytes)
    router.route(Sequences(ids[:, :2], None, mask[:, :2], mask[:, :2], hidden=hidden[:, :2]))
    tracemalloc.start()
    try:
        memory = None
        for token in range(ids.shape[1]):
            step = slice(token, token + 1)
            given = (mask[:, step], mask[:, step], memory, hidden[:, step])
            _, cells = router.route(Sequences(ids[:, step], None, *given))
            assert cells is not None
            memory = cells if memory is None else torch.cat([memory, cells], 1)
        assert tracemalloc.get_traced_memory()[0] < max_bytes
    finally:
        tracemalloc.stop()
