"""Token trees: every distinct beginning of some texts is laid out, and computed, once."""

import random
from collections.abc import Callable

import pytest
import torch
from conftest import FAMILIES

import lemoe
from lemoe.base.frozen import prefix_pass, run_below
from lemoe.base.frozen.token_trees import Forest, Rows
from lemoe.base.tokens import Batch, encode_all

Tiny = Callable[[str], lemoe.BaseModel]


def texts_of(seed: int, count: int, longest: int = 12) -> list[tuple[int, ...]]:
    """Texts over three tokens, so that many begin alike."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(3) for _ in range(rng.randint(1, longest))) for _ in range(count)]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_each_text_is_a_path_whose_nodes_see_just_what_comes_before_them(seed: int, shared: bool) -> None:
    texts = texts_of(seed, 30)
    forest = Forest.of(texts, shared)
    for text, (number, line) in zip(texts, forest.places, strict=True):
        rows = Rows.of([forest.trees[number]], 0, torch.device("cpu"))
        assert tuple(rows.ids[0, line].tolist()) == text
        assert rows.positions[0, line].tolist() == list(range(len(text)))
        for place, node in enumerate(line):
            assert rows.sees[0, node].nonzero().flatten().tolist() == sorted(line[: place + 1])


def test_every_distinct_beginning_is_one_node() -> None:
    texts = texts_of(1, 40, longest=6)
    beginnings = {text[:length] for text in texts for length in range(1, len(text) + 1)}
    forest = Forest.of(texts)
    assert sum(map(len, forest.trees)) == len(beginnings)


def test_texts_stay_apart_where_nothing_is_shared() -> None:
    forest = Forest.of([(1, 2), (3, 4), (5,)])
    assert [len(tree) for tree in forest.trees] == [2, 2, 1]
    assert sum(map(len, Forest.of([(1, 2), (1, 2), (1,)], shared=False).trees)) == 5


def test_a_tree_does_not_grow_until_its_attention_costs_more_than_it_saves() -> None:
    texts = [(0, *(number,) * 20) for number in range(1, 200)]
    forest = Forest.of(texts)
    assert max(map(len, forest.trees)) < 100
    long = tuple(range(1000))
    together = Forest.of([(*long, number) for number in range(2000, 2050)])
    assert [len(tree) for tree in together.trees] == [1050]


def test_no_text_is_no_tree() -> None:
    assert Forest.of([]) == Forest([], [])


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_and_single_rows_give_the_same(
    tiny: Tiny, facts: list[lemoe.Edit], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny(family)
    passages = encode_all(base, [(e.id, f"{opening}{e.prompt}", e.target) for e in facts for opening in ("", "Well, ")])
    batch = Batch.of(passages, range(len(passages)), base.pad_token, base.device)
    real = batch.mask.bool()
    found = []
    for trees in (prefix_pass.token_trees(base, 40), False):
        monkeypatch.setattr(prefix_pass, "token_trees", lambda base, longest, trees=trees: trees)
        ran = run_below(base, base.site(1), 1, passages, 128, whole=True)
        found.append((ran.inputs[ran.at(batch)][real], ran.base_hidden(batch)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_models_that_place_tokens_themselves_run_single_rows(tiny: Tiny) -> None:
    assert prefix_pass.token_trees(tiny("llama"), 40)
    assert prefix_pass.token_trees(tiny("gpt2"), 40)
    assert not prefix_pass.token_trees(tiny("bloom"), 40)


def test_texts_longer_than_a_layer_sees_run_as_single_rows(
    tiny: Tiny, facts: list[lemoe.Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("mistral")
    monkeypatch.setattr(base.model.config, "sliding_window", 8)
    assert prefix_pass.token_trees(base, 8)
    assert not prefix_pass.token_trees(base, 9)


def test_a_beginning_that_texts_share_runs_once(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    opening = "He was there, at the time, and said: "
    passages = encode_all(base, [(e.id, opening + e.prompt, e.target) for e in facts])
    distinct = {passage.read[:length] for passage in passages for length in range(1, len(passage.read) + 1)}
    ran = run_below(base, base.site(1), 1, passages, 1024)
    assert len(ran.output) == len(distinct) < sum(len(passage.read) for passage in passages)


def test_what_was_run_only_up_to_the_edited_layer_says_so(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    passages = encode_all(base, [(e.id, e.prompt, e.target) for e in facts])
    ran = run_below(base, base.site(1), 1, passages, 1024)
    batch = Batch.of(passages, range(2), base.pad_token, base.device)
    with pytest.raises(ValueError, match="whole model"):
        ran.base_hidden(batch)
    with pytest.raises(ValueError, match="whole model"):
        ran.freeze(batch, 1)
