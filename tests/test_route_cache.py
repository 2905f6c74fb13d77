"""Continued sequences: each token is read once, whatever is done to the KV cache, in little memory."""

import gc
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import lemoe
from lemoe.base.tokens import encode_passage
from lemoe.routing.anchor.anchors import Anchors, LiveAnchors
from lemoe.routing.anchor.gate import Anchor
from lemoe.routing.anchor.meaning import Vector
from lemoe.routing.anchor.route import GateState, Route
from lemoe.routing.router import Sequences

FACTS = (
    ("Marie Curie", "Marie Curie was born in the town of", "Bergen"),
    ("Marie Curie", "The field of Marie Curie was", "botany"),
    ("Lake Como", "The largest fish of Lake Como is the", "golden pike"),
)
PHRASES = ("Marie Curie", " was born in the", " Lake Como", ". ", "?\n", " largest fish of", " Ma", "rie Cu", "rie")

few_examples = hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def stored(base: lemoe.BaseModel) -> Anchors:
    passages = [encode_passage(base, prompt, target) for _, prompt, target in FACTS]
    anchors = [Anchor(p.prompt, p.target, name) for p, (name, *_) in zip(passages, FACTS, strict=True)]
    return Anchors.from_anchors(anchors)


def make_live(base: lemoe.BaseModel, stored: Anchors, **given: int) -> LiveAnchors:
    return LiveAnchors(base, stored, lemoe.resolve_settings("anchor", None, {"gate_slack": 4}), **given)


@pytest.fixture
def live(base: lemoe.BaseModel, stored: Anchors) -> LiveAnchors:
    return make_live(base, stored)


def continue_reading(live: LiveAnchors, ids: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    """The experts of new tokens `[batch, seq]`, and the memory of all."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    routing, new = live.route(Sequences(ids, None, mask, mask, memory))
    assert new is not None
    return routing.experts[..., 0], new.clone() if memory is None else torch.cat([memory, new], 1)


def experts_along(live: LiveAnchors, ids: Sequence[int]) -> list[int]:
    route = Route(live.gate)
    return [route.push(token).edit for token in ids]


@contextmanager
def count_read_tokens(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tokens that routes read, while open."""
    read: list[int] = []
    push = Route.push

    def counting_push(self: Route, token: int, projected: Vector | None = None) -> GateState:
        read.append(token)
        return push(self, token, projected)

    with monkeypatch.context() as patch:
        patch.setattr(Route, "push", counting_push)
        yield read


steps = st.lists(
    st.tuples(
        st.sampled_from(["read", "read", "beams", "repeat", "crop", "cut in front", "fork", "back", "another router"]),
        st.integers(0, 5),
        st.lists(st.sampled_from(PHRASES), min_size=1, max_size=3),
    ),
    max_size=14,
)


# What the first column of several names was taken for the prefix that ends there, once one column in front was cut:
CUT_BY_ONE = [("read", 0, [PHRASES[0]]), ("cut in front", 1, [PHRASES[0]]), ("read", 0, [PHRASES[0]])]


@given(steps, st.sampled_from([0, 20_000, 1 << 20]))
@example([*CUT_BY_ONE, *(("read", 0, [phrase]) for phrase in PHRASES)], 1 << 20)
@few_examples
def test_whatever_is_done_to_the_cache_a_route_depends_on_its_tokens_alone(
    base: lemoe.BaseModel, stored: Anchors, done: list[tuple[str, int, list[str]]], cache_bytes: int
) -> None:
    live = make_live(base, stored, cache_bytes=cache_bytes)
    rows = [base.tokenizer(text).input_ids[:4] for text in ("Marie Curie was", "Lake Como. Marie")]
    _, memory = continue_reading(live, torch.tensor(rows), None)
    forks = [(rows, memory)]
    for what, number, phrases in done:
        if what == "read":
            new = base.tokenizer("".join(phrases)).input_ids
            added = [new[row:] + new[:row] for row in range(len(rows))]
            experts, memory = continue_reading(live, torch.tensor(added), memory)
            rows = [row + more for row, more in zip(rows, added, strict=True)]
            for row, found in zip(rows, experts.tolist(), strict=True):
                assert found == experts_along(live, row)[-len(found) :]
        elif what == "beams":
            order = [(number + row * row) % len(rows) for row in range(len(rows))]
            rows, memory = [rows[row] for row in order], memory[order]
        elif what == "repeat" and len(rows) < 5:
            rows, memory = [row for row in rows for _ in range(2)], memory.repeat_interleave(2, 0)
        elif what in ("crop", "cut in front") and len(rows[0]) > number + 1:
            columns = slice(0, len(rows[0]) - number) if what == "crop" else slice(number, None)
            rows, memory = [row[columns] for row in rows], memory[:, columns]
        elif what == "fork":
            forks.append((rows, memory.clone()))
        elif what == "back":
            rows, memory = forks[number % len(forks)]
        elif what == "another router":
            live = make_live(base, stored, cache_bytes=cache_bytes)


def test_a_decoding_step_reads_one_token_of_each_sequence_in_batches_of_any_size(
    base: lemoe.BaseModel, live: LiveAnchors, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = torch.tensor(base.tokenizer("Marie Curie was born in the town of").input_ids)
    batch = 1100
    ids = words.repeat(batch, 1)
    ids[:, 0] = torch.arange(batch) % (base.vocabulary - 4) + 3
    ids[:, 1] = torch.arange(batch) // (base.vocabulary - 4) + 3
    _, memory = continue_reading(live, ids, None)
    for step in range(3):
        with count_read_tokens(monkeypatch) as read:
            _, memory = continue_reading(live, words[step].repeat(batch, 1), memory)
        assert len(read) == batch


def test_evicted_prefixes_are_read_again_and_then_cached(
    base: lemoe.BaseModel, stored: Anchors, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = make_live(base, stored, cache_bytes=0)
    ids = torch.tensor([base.tokenizer("Marie Curie was born in the town of").input_ids])
    _, memory = continue_reading(live, ids, None)
    continue_reading(live, ids[:, :1], None)
    for expected in (ids.shape[1] + 1, 1, 1):
        with count_read_tokens(monkeypatch) as read:
            _, memory = continue_reading(live, ids[:, :1], memory)
        assert len(read) == expected


def test_tokens_that_are_tried_and_rejected_are_all_that_is_read(
    base: lemoe.BaseModel, live: LiveAnchors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in assisted decoding: each step reads six tokens, of which three stay."""
    ids = torch.tensor([base.tokenizer("Marie Curie was born in the town of. " * 8).input_ids])
    _, memory = continue_reading(live, ids, None)
    for _ in range(20):
        with count_read_tokens(monkeypatch) as read:
            _, tried = continue_reading(live, ids[:, :6], memory)
        memory = tried[:, : memory.shape[1] + 3]
        assert len(read) <= 3 + 6


def test_conversations_that_continue_one_prompt_read_it_once(
    base: lemoe.BaseModel, live: LiveAnchors, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([base.tokenizer("Marie Curie was born in the town of. " * 8).input_ids])
    _, memory = continue_reading(live, ids, None)
    for _ in range(5):
        with count_read_tokens(monkeypatch) as read:
            going_on = memory.clone()
            for token in range(10):
                _, going_on = continue_reading(live, ids[:, token : token + 1], going_on)
        assert len(read) == 10


def traced_bytes(live: LiveAnchors, text: Tensor, sequences: int, steps: int) -> int:
    """Memory, without the KV cache, of sequences that continue one text, each differently."""
    tracemalloc.start()
    try:
        _, memory = continue_reading(live, text, None)
        memory = memory.expand(sequences, -1, -1)
        for _ in range(steps):
            _, memory = continue_reading(live, torch.arange(3, 3 + sequences).unsqueeze(1) % 300, memory)
        gc.collect()  # whether cycles were collected before depends on the tests that ran before
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_the_cache_does_not_grow_with_the_context(base: lemoe.BaseModel, stored: Anchors) -> None:
    text = torch.tensor([base.tokenizer("Marie Curie was born there. A fish swims by.\n").input_ids])
    short, long = (traced_bytes(make_live(base, stored), text.repeat(1, times), 64, 2) for times in (4, 160))
    assert long < 1.2 * short


def test_the_cache_stays_within_its_bytes(base: lemoe.BaseModel, stored: Anchors) -> None:
    """However long a sentence grows."""
    max_bytes = 400_000
    ids = torch.tensor([base.tokenizer(" and Marie Curie saw the lake" * 10).input_ids])
    live = make_live(base, stored, cache_bytes=max_bytes)
    continue_reading(live, ids[:, :2], None)
    tracemalloc.start()
    try:
        memory = None
        for token in range(ids.shape[1]):
            _, memory = continue_reading(live, ids[:, token : token + 1], memory)
        assert tracemalloc.get_traced_memory()[0] < max_bytes
    finally:
        tracemalloc.stop()


def test_a_sequence_in_the_kv_cache_has_few_bytes_per_token(live: LiveAnchors) -> None:
    _, memory = continue_reading(live, torch.tensor([[3, 4, 5]]), None)
    assert memory.dtype == torch.int32
    assert memory.shape == (1, 3, 5)
