"""Token trees: every distinct prefix of some texts is laid out, and computed, once."""

import random
from collections.abc import Callable

import pytest
import torch
from conftest import FAMILIES

import lemoe
from lemoe.base.frozen import compute_prefix_activations, prefix_pass
from lemoe.base.frozen.prefix_pass import Reach
from lemoe.base.frozen.token_trees import TokenForest, TreeBatch
from lemoe.base.hooks import removed_on_exit
from lemoe.base.tokens import Batch, encode_passages

Tiny = Callable[[str], lemoe.BaseModel]


def random_texts(seed: int, count: int, longest: int = 12) -> list[tuple[int, ...]]:
    """Texts over three tokens, so that many have a common prefix."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(3) for _ in range(rng.randint(1, longest))) for _ in range(count)]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_each_text_is_a_path_whose_nodes_attend_to_their_prefix_only(seed: int, shared: bool) -> None:
    texts = random_texts(seed, 30)
    forest = TokenForest.from_texts(texts, shared)
    for text, (number, path) in zip(texts, forest.locations, strict=True):
        rows = TreeBatch.from_trees([forest.trees[number]], 0, torch.device("cpu"))
        assert tuple(rows.ids[0, path].tolist()) == text
        assert rows.positions[0, path].tolist() == list(range(len(text)))
        for position, node in enumerate(path):
            assert rows.visible[0, node].nonzero().flatten().tolist() == sorted(path[: position + 1])


def test_every_distinct_prefix_is_one_node() -> None:
    texts = random_texts(1, 40, longest=6)
    prefixes = {text[:length] for text in texts for length in range(1, len(text) + 1)}
    forest = TokenForest.from_texts(texts)
    assert sum(map(len, forest.trees)) == len(prefixes)


def test_texts_stay_apart_where_nothing_is_shared() -> None:
    forest = TokenForest.from_texts([(1, 2), (3, 4), (5,)])
    assert [len(tree) for tree in forest.trees] == [2, 2, 1]
    assert sum(map(len, TokenForest.from_texts([(1, 2), (1, 2), (1,)], shared=False).trees)) == 5


def test_a_tree_does_not_grow_until_its_attention_costs_more_than_it_saves() -> None:
    texts = [(0, *(number,) * 20) for number in range(1, 200)]
    forest = TokenForest.from_texts(texts)
    assert max(map(len, forest.trees)) < 100
    long = tuple(range(1000))
    together = TokenForest.from_texts([(*long, number) for number in range(2000, 2050)])
    assert [len(tree) for tree in together.trees] == [1050]


def test_no_text_is_no_tree() -> None:
    assert TokenForest.from_texts([]) == TokenForest([], [])


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_and_single_rows_give_the_same(
    tiny: Tiny, facts: list[lemoe.Edit], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny(family)
    prompts = [(edit, start + edit.prompt) for edit in facts for start in ("", "Well, ")]
    passages = encode_passages(base, [(edit.id, prompt, edit.target) for edit, prompt in prompts])
    batch = Batch.from_passages(passages, range(len(passages)), base.pad_token_id, base.device)
    real = batch.mask.bool()
    found = []
    for trees in (prefix_pass.supports_token_trees(base, 40), False):
        monkeypatch.setattr(prefix_pass, "supports_token_trees", lambda base, longest, trees=trees: trees)
        ran = compute_prefix_activations(base, base.ffn_site(1), 1, passages, 128, reach="end")
        found.append((ran.inputs[ran.node_index(batch)][real], ran.base_hidden(batch)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_models_that_compute_positions_themselves_run_single_rows(tiny: Tiny) -> None:
    assert prefix_pass.supports_token_trees(tiny("llama"), 40)
    assert prefix_pass.supports_token_trees(tiny("gpt2"), 40)
    assert not prefix_pass.supports_token_trees(tiny("bloom"), 40)


def test_texts_longer_than_an_attention_window_run_as_single_rows(
    tiny: Tiny, facts: list[lemoe.Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("mistral")
    monkeypatch.setattr(base.model.config, "sliding_window", 8)
    assert prefix_pass.supports_token_trees(base, 8)
    assert not prefix_pass.supports_token_trees(base, 9)


def test_a_shared_prefix_runs_once(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    prefix = "He was there, at the time, and said: "
    passages = encode_passages(base, [(e.id, prefix + e.prompt, e.target) for e in facts])
    distinct = {passage.input_ids[:length] for passage in passages for length in range(1, len(passage.input_ids) + 1)}
    ran = compute_prefix_activations(base, base.ffn_site(1), 1, passages, 1024)
    assert len(ran.output) == len(distinct) < sum(len(passage.input_ids) for passage in passages)


def test_activations_that_stop_on_the_way_refuse_what_needs_more(
    base: lemoe.BaseModel, facts: list[lemoe.Edit]
) -> None:
    passages = encode_passages(base, [(e.id, e.prompt, e.target) for e in facts])
    batch = Batch.from_passages(passages, range(2), base.pad_token_id, base.device)
    reaches: tuple[Reach, ...] = ("layer", "keys_values")
    lower, keyed = (
        compute_prefix_activations(base, base.ffn_site(1), 1, passages, 1024, reach=reach) for reach in reaches
    )
    for ran in (lower, keyed):
        with pytest.raises(ValueError, match="to the end of the model"):
            ran.base_hidden(batch)
    with pytest.raises(ValueError, match="beyond the edited layer"):
        lower.freeze_batch(batch, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_enough_for_replays_and_the_last_layer_runs_no_ffn_for_them(
    tiny: Tiny, facts: list[lemoe.Edit], family: str
) -> None:
    base = tiny(family)
    passages = encode_passages(base, [(e.id, e.prompt, e.target) for e in facts])
    batch = Batch.from_passages(passages, range(len(passages)), base.pad_token_id, base.device)
    site, ran_last = base.ffn_site(0), []
    compute_prefix_activations(base, site, 0, passages, 1024)  # the replay is checked, once, by the whole model
    handle = base.ffn_site(len(base.layers) - 1).entry.register_forward_hook(lambda *call: ran_last.append(call))
    with removed_on_exit([handle]):
        keyed = compute_prefix_activations(base, site, 0, passages, 1024, reach="keys_values")
        assert not ran_last
        whole = compute_prefix_activations(base, site, 0, passages, 1024, reach="end")
        assert ran_last
    delta = torch.randn(whole.inputs[whole.node_index(batch, 2)].shape, generator=torch.Generator().manual_seed(0))
    one, other = (ran.freeze_batch(batch, 2).replay(delta) for ran in (keyed, whole))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
