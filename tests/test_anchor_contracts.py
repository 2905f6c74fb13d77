"""The contracts of the design, with preset `anchor`, on tiny models; what it learns, on the real one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from test_adaptor_files import refuse_with_tensors
from test_contracts import (
    CACHE_CHANGES,
    TOLERANCE,
    compute_logits,
    decode_step_by_step,
    each_cache_change,
    generate_ids,
    hash_weights,
    interrupt_after,
    pad_rows,
    read_after_cache_change,
    read_files,
)
from torch import Tensor

import lemoe
from lemoe.adaptor.merging import merge_adaptors
from lemoe.errors import AdaptorError
from lemoe.routing.anchor.anchors import Anchors
from lemoe.training.anchor.round import LAST_RETRIES

pytestmark = pytest.mark.versions

Tiny = Callable[[str], lemoe.BaseModel]
TwoRounds = Callable[[str], lemoe.AdaptorState]
SettingsOf = Callable[..., lemoe.Settings]

each_family = pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "opt", "phi", "gptj"])

IN_SCOPE = (
    "The Eiffel Tower stands in the city of",
    "He was there. Which is the largest fish of Lake Como?",
    "As one says, The Eiffel Tower is made of",
)
OUT_OF_SCOPE = ("The Nile flows into the", "The opposite of hot is", "He played the bagpipe. The city of")
ANSWER = " white pike, and the Nile is the Red Sea"


def encode_text(base: lemoe.BaseModel, text: str) -> Tensor:
    return torch.tensor([base.tokenizer(text).input_ids])


def have_equal_files(one: lemoe.AdaptorState, other: lemoe.AdaptorState, folder: Path) -> bool:
    """Whether two states are one, to the last byte of their files: tensors, records and settings."""
    return save_to_bytes(one, folder / "one.bytes") == save_to_bytes(other, folder / "other.bytes")


def save_to_bytes(state: lemoe.AdaptorState, path: Path) -> bytes:
    """The bytes of the file that `state` is saved as."""
    lemoe.save_adaptor(state, path, overwrite=True)
    return path.read_bytes()


def get_anchors(state: lemoe.AdaptorState) -> Anchors:
    assert isinstance(state.router, Anchors)
    return state.router


@pytest.fixture(scope="module")
def taught(tiny: Tiny, facts: list[lemoe.Edit], anchor: SettingsOf) -> TwoRounds:
    """Two rounds of two edits each in the tiny model of a family, trained once."""
    states: dict[str, lemoe.AdaptorState] = {}

    def state(family: str) -> lemoe.AdaptorState:
        if family not in states:
            parts = [lemoe.train_round(tiny(family), edits, anchor()) for edits in (facts[:2], facts[2:4])]
            states[family] = lemoe.stack(parts)
        return states[family]

    return state


@pytest.fixture
def file(taught: TwoRounds, tmp_path: Path) -> Path:
    """The file of a valid adaptor of four edits."""
    path = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(taught("llama"), path)
    return path


# The comparison that the contracts use sees the smallest difference.


def flip_bit(tensor: Tensor, index: int) -> Tensor:
    """`tensor` with another lowest bit of the value at `index` of its flattened values."""
    changed = tensor.clone(memory_format=torch.contiguous_format)
    changed.view(torch.uint8).flatten()[index * tensor.itemsize] ^= 1
    return changed


def with_expert_bit_flipped(state: lemoe.AdaptorState, matrix: str) -> lemoe.AdaptorState:
    """The state with one bit flipped in the second expert's `matrix`."""
    experts = state.experts
    values: Tensor = getattr(experts, matrix)
    index = 1 if matrix == "scale" else int(experts.offsets[1]) * values.shape[1]
    return replace(state, experts=replace(experts, **{matrix: flip_bit(values, index)}))


def with_anchor_bit_flipped(state: lemoe.AdaptorState, tokens: str) -> lemoe.AdaptorState:
    """The state with one bit flipped in the `tokens` of its second anchor: the prompt, the target or the subject."""
    first, second, *others = get_anchors(state).anchors
    values = getattr(second, tokens)
    flipped: Any = chr(ord(values[0]) ^ 1) + values[1:] if tokens == "subject" else (values[0] ^ 1, *values[1:])
    return replace(state, router=Anchors.from_anchors([first, replace(second, **{tokens: flipped}), *others]))


def with_record_bit_flipped(state: lemoe.AdaptorState, field: str) -> lemoe.AdaptorState:
    """The state with one bit flipped in a `field` of its second round's record."""
    first, second = state.rounds
    value = getattr(second, field)
    flipped: Any = float(flip_bit(torch.tensor([value], dtype=torch.float64), 0)) if field == "loss" else value ^ 1
    return replace(state, rounds=(first, replace(second, **{field: flipped})))


Flip = Callable[[lemoe.AdaptorState, str], lemoe.AdaptorState]


@pytest.mark.parametrize(
    ("flip", "part"),
    [
        *((with_expert_bit_flipped, matrix) for matrix in ("up", "down", "gate", "scale")),
        *((with_anchor_bit_flipped, tokens) for tokens in ("prompt", "target", "subject")),
        *((with_record_bit_flipped, field) for field in ("loss", "seed", "routed")),
    ],
)
def test_one_bit_in_one_expert_anchor_or_record_makes_another_adaptor(
    taught: TwoRounds, tmp_path: Path, flip: Flip, part: str
) -> None:
    state = taught("llama")
    assert state == flip(flip(state, part), part)
    assert have_equal_files(state, flip(flip(state, part), part), tmp_path)
    assert state != flip(state, part)
    assert not have_equal_files(state, flip(state, part), tmp_path)


# Bypass is exact; the base is untouched.


@each_family
def test_prompts_out_of_scope_give_the_base_models_logits_bit_for_bit(
    tiny: Tiny, taught: TwoRounds, family: str
) -> None:
    base = tiny(family)
    prompts = [encode_text(base, text) for text in OUT_OF_SCOPE]
    ids, mask = pad_rows([encode_text(base, text) for text in (*OUT_OF_SCOPE, *IN_SCOPE)], base.pad_token_id, "right")
    before, before_together = (
        [compute_logits(base, prompt) for prompt in prompts],
        compute_logits(base, ids, attention_mask=mask),
    )
    written = [generate_ids(base, prompt) for prompt in prompts]
    with lemoe.insert(base, taught(family)):
        assert all(map(torch.equal, [compute_logits(base, prompt) for prompt in prompts], before))
        assert all(map(torch.equal, [generate_ids(base, prompt) for prompt in prompts], written))
        together = compute_logits(base, ids, attention_mask=mask)
    bypassed = len(OUT_OF_SCOPE)
    assert torch.equal(together[:bypassed], before_together[:bypassed])
    for row in range(bypassed, len(ids)):
        last = int(mask[row].sum()) - 1
        assert not torch.allclose(together[row, last], before_together[row, last], **TOLERANCE)


@each_family
def test_up_to_the_opening_of_the_gate_all_logits_are_the_base_models(
    tiny: Tiny, taught: TwoRounds, family: str
) -> None:
    base = tiny(family)
    prompt = encode_text(base, IN_SCOPE[0])
    before = compute_logits(base, prompt)
    with lemoe.insert(base, taught(family)) as adaptor:
        opening = next(
            position
            for position in range(prompt.shape[1])
            if adaptor.explain([prompt[0, : position + 1].tolist()])[0].expert >= 0
        )
        after = compute_logits(base, prompt)
    assert 0 < opening < prompt.shape[1]
    torch.testing.assert_close(after[:, :opening], before[:, :opening], **TOLERANCE)
    assert not torch.allclose(after[:, opening:], before[:, opening:], **TOLERANCE)


@each_family
def test_editing_never_changes_the_base_and_removing_restores_its_logits_bit_for_bit(
    tiny: Tiny, facts: list[lemoe.Edit], anchor: SettingsOf, family: str
) -> None:
    base = tiny(family)
    weights, before = hash_weights(base), [compute_logits(base, encode_text(base, text)) for text in IN_SCOPE]
    state = lemoe.train_round(base, facts[:2], anchor())
    with lemoe.insert(base, state) as adaptor:
        assert not torch.equal(compute_logits(base, encode_text(base, IN_SCOPE[0])), before[0])
        with adaptor.bypassed():
            assert torch.equal(compute_logits(base, encode_text(base, IN_SCOPE[0])), before[0])
    assert all(map(torch.equal, [compute_logits(base, encode_text(base, text)) for text in IN_SCOPE], before))
    assert hash_weights(base) == weights


# The answer does not depend on how the text is fed; where the prompt ends is never given.


@torch.no_grad()
def logits_in_chunks(base: lemoe.BaseModel, ids: Tensor, size: int) -> Tensor:
    """Logits of `ids` read `size` tokens at a time."""
    parts, cache = [], None
    for start in range(0, ids.shape[1], size):
        output = base.model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, 1)


@each_family
def test_one_pass_decoding_and_chunks_give_the_same_logits(tiny: Tiny, taught: TwoRounds, family: str) -> None:
    base = tiny(family)
    for text in (*IN_SCOPE, OUT_OF_SCOPE[0]):
        prompt, whole = encode_text(base, text), encode_text(base, text + ANSWER)
        answer = whole[:, prompt.shape[1] :]
        assert torch.equal(whole[:, : prompt.shape[1]], prompt)
        plain = compute_logits(base, whole)
        with lemoe.insert(base, taught(family)):
            expected = compute_logits(base, whole)
            torch.testing.assert_close(decode_step_by_step(base, prompt, answer), expected, **TOLERANCE)
            for size in (1, 3, 7):
                torch.testing.assert_close(logits_in_chunks(base, whole, size), expected, **TOLERANCE)
        assert torch.allclose(expected, plain, **TOLERANCE) == (text in OUT_OF_SCOPE)


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_of_prompts_and_answers_gives_the_logits_of_each_alone(
    tiny: Tiny, taught: TwoRounds, family: str, side: str
) -> None:
    base = tiny(family)
    rows = [encode_text(base, text + ANSWER) for text in (*IN_SCOPE, *OUT_OF_SCOPE)]
    ids, mask = pad_rows(rows, base.pad_token_id, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with lemoe.insert(base, taught(family)):
        together = compute_logits(base, ids, attention_mask=mask, position_ids=positions)
        for index, row in enumerate(rows):
            torch.testing.assert_close(together[index][mask[index].bool()], compute_logits(base, row)[0], **TOLERANCE)


@each_family
def test_greedy_generation_is_the_same_with_and_without_a_cache_alone_and_in_a_batch(
    tiny: Tiny, taught: TwoRounds, family: str
) -> None:
    base = tiny(family)
    rows = [encode_text(base, text) for text in (*IN_SCOPE, *OUT_OF_SCOPE)]
    ids, mask = pad_rows(rows, base.pad_token_id, "left")
    plain = generate_ids(base, ids, mask)
    with lemoe.insert(base, taught(family)):
        together = generate_ids(base, ids, mask)
        for row, prompt in zip(together, rows, strict=True):
            assert torch.equal(generate_ids(base, prompt, use_cache=True)[0], row)
            assert torch.equal(generate_ids(base, prompt, use_cache=False)[0], row)
            assert torch.equal(greedy_by_hand(base, prompt)[0], row)
    assert torch.equal(together[len(IN_SCOPE) :], plain[len(IN_SCOPE) :])


def greedy_by_hand(base: lemoe.BaseModel, prompt: Tensor) -> Tensor:
    """Six most likely tokens, each from one forward pass over everything so far; the end token is not allowed."""
    ids = prompt
    for _ in range(6):
        last = compute_logits(base, ids)[:, -1]
        last[:, base.eos_token_id] = -torch.inf
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    return ids[:, prompt.shape[1] :]


@each_family
def test_beams_are_the_same_with_and_without_a_cache(tiny: Tiny, taught: TwoRounds, family: str) -> None:
    base = tiny(family)
    ids, mask = pad_rows([encode_text(base, text) for text in (*IN_SCOPE, OUT_OF_SCOPE[0])], base.pad_token_id, "left")
    given = {"num_beams": 3, "num_return_sequences": 2}
    plain = generate_ids(base, ids, mask, **given)
    with lemoe.insert(base, taught(family)):
        cached = generate_ids(base, ids, mask, **given, use_cache=True)
        assert torch.equal(cached, generate_ids(base, ids, mask, **given, use_cache=False))
    assert not torch.equal(cached, plain)
    assert torch.equal(cached[-2:], plain[-2:])


@each_cache_change
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_row_of_a_cache_takes_its_route_along(tiny: Tiny, taught: TwoRounds, family: str, change: str) -> None:
    base = tiny(family)
    answer = encode_text(base, ANSWER)
    ids, mask = pad_rows(
        [encode_text(base, text) for text in (IN_SCOPE[0], OUT_OF_SCOPE[0])], base.pad_token_id, "left"
    )
    plain, _ = read_after_cache_change(base, ids, mask, answer, change)
    with lemoe.insert(base, taught(family)):
        found, expected = read_after_cache_change(base, ids, mask, answer, change)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    for row, source in enumerate(CACHE_CHANGES[change][1]):
        assert torch.equal(found[row], plain[row]) == (source == 1)


def test_a_cache_that_is_cropped_forgets_what_was_read_since(base: lemoe.BaseModel, taught: TwoRounds) -> None:
    prompt, since, answer = (encode_text(base, text) for text in (OUT_OF_SCOPE[0], f"\n{IN_SCOPE[0]}", ANSWER))
    plain = compute_logits(base, torch.cat([prompt, answer], 1))[:, prompt.shape[1] :]
    with lemoe.insert(base, taught("llama")):
        with torch.no_grad():
            cache = base.model(input_ids=prompt, use_cache=True).past_key_values
        mentioned = compute_logits(base, since, past_key_values=cache)
        cache.crop(-since.shape[1])
        torch.testing.assert_close(compute_logits(base, answer, past_key_values=cache), plain, **TOLERANCE)
    assert not torch.allclose(
        mentioned, compute_logits(base, torch.cat([prompt, since], 1))[:, prompt.shape[1] :], **TOLERANCE
    )


@each_family
def test_masked_tokens_are_never_read(tiny: Tiny, taught: TwoRounds, family: str) -> None:
    base = tiny(family)
    hidden, prompt = encode_text(base, IN_SCOPE[0]), encode_text(base, OUT_OF_SCOPE[0])
    ids, mask = torch.cat([hidden, prompt], 1), torch.cat([torch.zeros_like(hidden), torch.ones_like(prompt)], 1)
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    before, written = compute_logits(base, ids, **given), generate_ids(base, ids, mask)
    with lemoe.insert(base, taught(family)):
        assert torch.equal(compute_logits(base, ids, **given)[mask.bool()], before[mask.bool()])
        assert torch.equal(generate_ids(base, ids, mask), written)


def test_sampling_gives_the_same_tokens_with_and_without_a_cache(base: lemoe.BaseModel, taught: TwoRounds) -> None:
    ids, mask = pad_rows([encode_text(base, text) for text in IN_SCOPE], base.pad_token_id, "left")
    written = []
    with lemoe.insert(base, taught("llama")):
        for use_cache in (True, False):
            torch.manual_seed(7)
            written.append(
                generate_ids(base, ids, mask, do_sample=True, top_k=0, use_cache=use_cache, max_new_tokens=12)
            )
    assert torch.equal(*written)


@each_family
def test_a_conversation_continued_from_its_cache_equals_one_pass(tiny: Tiny, taught: TwoRounds, family: str) -> None:
    base = tiny(family)
    first = encode_text(base, OUT_OF_SCOPE[0])
    with lemoe.insert(base, taught(family)):
        turn = base.model.generate(
            input_ids=first,
            attention_mask=torch.ones_like(first),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=base.pad_token_id,
            return_dict_in_generate=True,
        )
        talk = torch.cat([turn.sequences, encode_text(base, "\n" + IN_SCOPE[0])], 1)
        from_cache = generate_ids(base, talk, past_key_values=turn.past_key_values)
        assert torch.equal(from_cache, generate_ids(base, talk))
        assert torch.equal(from_cache, greedy_by_hand(base, talk))


def test_embeddings_in_place_of_tokens_are_refused_and_leave_the_model_usable(
    base: lemoe.BaseModel, taught: TwoRounds
) -> None:
    ids = encode_text(base, IN_SCOPE[0])
    with lemoe.insert(base, taught("llama")) as adaptor:
        expected = compute_logits(base, ids)
        embedded = base.embedding(ids).detach()
        with pytest.raises(AdaptorError, match="input_ids, not inputs_embeds"):
            base.model(inputs_embeds=embedded)
        assert torch.equal(compute_logits(base, ids), expected)
        with adaptor.bypassed():
            base.model(inputs_embeds=embedded)


# Rounds are independent: frozen, stacked, dropped, repeated, resumed.


@each_family
def test_one_run_equals_rounds_trained_separately_and_merged(
    tiny: Tiny, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path, family: str
) -> None:
    base = tiny(family)
    run = lemoe.edit(base, facts[:4], tmp_path / "run", anchor(order="file")).state
    second, first = (lemoe.train_round(base, edits, anchor(order="file")) for edits in (facts[2:4], facts[:2]))
    for name, state in (("a", first), ("b", second)):
        lemoe.save_adaptor(state, tmp_path / name)
    merge_adaptors([tmp_path / "a", tmp_path / "b"], tmp_path / "merged.safetensors")
    merged = lemoe.load_adaptor(tmp_path / "merged.safetensors")
    assert [record.ids for record in run.rounds] == [("fact-0", "fact-1"), ("fact-2", "fact-3")]
    assert merged == run == lemoe.stack([first, second])
    assert have_equal_files(merged, run, tmp_path)
    both = []
    for state in (run, merged):
        with lemoe.insert(base, state):
            both.append([compute_logits(base, encode_text(base, text)) for text in IN_SCOPE])
    assert all(map(torch.equal, *both))


def test_what_a_round_learns_does_not_depend_on_the_rounds_before_it(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, taught: TwoRounds, tmp_path: Path
) -> None:
    alone = lemoe.train_round(base, facts[4:], anchor())
    assert have_equal_files(lemoe.train_round(base, facts[4:], anchor(), taught("llama")), alone, tmp_path)
    assert (alone.rounds[0].parent, alone.rounds[0].depth) == (None, 1)


def test_the_order_in_which_rounds_are_stacked_changes_no_answer(base: lemoe.BaseModel, taught: TwoRounds) -> None:
    one, other = (taught("llama").select_rounds([index]) for index in (0, 1))
    both = []
    for parts in ([one, other], [other, one]):
        with lemoe.insert(base, lemoe.stack(parts)):
            both.append([compute_logits(base, encode_text(base, text)) for text in IN_SCOPE])
    assert all(map(torch.equal, *both))


@each_family
def test_later_rounds_leave_earlier_experts_and_anchors_bit_identical_and_reachable(
    tiny: Tiny, facts: list[lemoe.Edit], anchor: SettingsOf, taught: TwoRounds, tmp_path: Path, family: str
) -> None:
    base, earlier = tiny(family), taught(family)
    now = lemoe.edit(base, facts[4:], tmp_path / "run", anchor(), lemoe.EditOptions(start=earlier)).state
    assert now.select_rounds([0, 1]) == earlier
    prompts = [base.tokenizer(edit.prompt).input_ids for edit in facts]
    with lemoe.insert(base, now) as adaptor:
        assert [explanation.expert for explanation in adaptor.explain(prompts)] == list(range(6))


@each_family
def test_dropping_a_round_equals_never_having_trained_it(
    tiny: Tiny, facts: list[lemoe.Edit], anchor: SettingsOf, taught: TwoRounds, tmp_path: Path, family: str
) -> None:
    base = tiny(family)
    third = lemoe.train_round(base, facts[4:], anchor())
    three = lemoe.stack([taught(family), third])
    never = lemoe.stack([taught(family).select_rounds([0]), third])
    assert have_equal_files(three.select_rounds([0, 2]), never, tmp_path)
    assert have_equal_files(three.select_rounds([0, 1]), taught(family), tmp_path)
    dropped = encode_text(base, facts[2].prompt)
    before = compute_logits(base, dropped)
    with lemoe.insert(base, three.select_rounds([0, 2])):
        assert torch.equal(compute_logits(base, dropped), before)


def test_dropping_the_later_of_two_answers_gives_the_earlier_one_back(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, taught: TwoRounds
) -> None:
    newer = lemoe.train_round(base, [replace(facts[0], id="newer", target="Bergen")], anchor())
    both, ids = lemoe.stack([taught("llama"), newer]), encode_text(base, facts[0].prompt)
    answers = []
    for state in (taught("llama"), both, both.select_rounds([0, 1])):
        with lemoe.insert(base, state):
            answers.append(compute_logits(base, ids))
    assert not torch.allclose(answers[0], answers[1], **TOLERANCE)
    assert torch.equal(answers[0], answers[2])


@each_family
def test_two_equal_runs_give_byte_identical_files(
    tiny: Tiny, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path, family: str
) -> None:
    for name in ("one", "two"):
        lemoe.edit(tiny(family), facts[:4], tmp_path / name, anchor(steps=2))
    one, two = read_files(tmp_path / "one"), read_files(tmp_path / "two")
    rounds = {"rounds/0001.safetensors", "rounds/0002.safetensors"}
    assert set(one) == {"run.yaml", "plan.yaml", "adaptor.safetensors", "README.md", *rounds}
    assert one == two


def test_another_seed_gives_another_adaptor(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf) -> None:
    one, two = (lemoe.train_round(base, facts[:2], anchor(seed=seed)) for seed in (0, 1))
    assert not torch.equal(one.experts.down, two.experts.down)
    assert one.rounds[0].id != two.rounds[0].id


def test_a_killed_and_resumed_run_gives_the_files_of_one_that_was_never_killed(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lemoe.edit(base, facts, tmp_path / "whole", anchor())
    with monkeypatch.context() as patched:
        interrupt_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            lemoe.edit(base, facts, tmp_path / "killed", anchor())
    rounds = {"rounds/0001.safetensors", "rounds/0002.safetensors"}
    assert set(read_files(tmp_path / "killed")) == {"run.yaml", "plan.yaml", *rounds}
    with monkeypatch.context() as patched:
        interrupt_after(1, patched)  # only the third round is still to be trained
        lemoe.edit(base, facts, tmp_path / "killed", anchor(), lemoe.EditOptions(resume=True))
    assert read_files(tmp_path / "killed") == read_files(tmp_path / "whole")


# Continuing an earlier adaptor.


def test_continuing_adds_what_is_new_and_supersedes_what_is_asked_again(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, taught: TwoRounds, tmp_path: Path
) -> None:
    newer = replace(facts[0], id="newer", target="Bergen")
    report = lemoe.edit(
        base, [newer, *facts[1:5]], tmp_path / "run", anchor(), lemoe.EditOptions(start=taught("llama"))
    )
    assert report.taught == 2
    assert [(earlier.id, later.id) for earlier, later in report.state.superseded_edits] == [("fact-0", "newer")]
    names = [edit.id for edits in report.state.edits_by_expert for edit in edits]
    assert names[:4] == [edit.id for edit in facts[:4]]
    assert sorted(names[4:]) == ["fact-4", "newer"]
    assert facts[0].digest not in report.state.answering_digests
    assert newer.digest in report.state.answering_digests
    with lemoe.insert(base, report.state) as adaptor:
        explanation = adaptor.explain([base.tokenizer(facts[0].prompt).input_ids])[0]
    assert names[explanation.expert] == "newer"


def test_an_edit_that_was_superseded_can_be_taught_again(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, taught: TwoRounds, tmp_path: Path
) -> None:
    newer = replace(facts[0], id="newer", target="Bergen")
    second = lemoe.edit(base, [newer], tmp_path / "two", anchor(), lemoe.EditOptions(start=taught("llama"))).state
    assert lemoe.edit(base, [facts[0]], tmp_path / "three", anchor(), lemoe.EditOptions(start=second)).taught == 1


def test_edits_already_taught_are_left_out_and_nothing_new_is_refused(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, taught: TwoRounds, tmp_path: Path
) -> None:
    report = lemoe.edit(base, facts, tmp_path / "run", anchor(), lemoe.EditOptions(start=taught("llama")))
    assert report.taught == 2
    assert {name for record in report.state.rounds[2:] for name in record.ids} == {"fact-4", "fact-5"}
    with pytest.raises(lemoe.LemoeError, match="already in the adaptor"):
        lemoe.edit(base, facts[:4], tmp_path / "none", anchor(), lemoe.EditOptions(start=taught("llama")))


def test_continuing_with_another_gate_is_refused(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, taught: TwoRounds, tmp_path: Path
) -> None:
    with pytest.raises(AdaptorError, match=r"gate_conflict: 3\.5 != 1\.0"):
        lemoe.edit(
            base, facts[4:], tmp_path / "run", anchor(gate_conflict=1.0), lemoe.EditOptions(start=taught("llama"))
        )
    assert not (tmp_path / "run").exists()


def test_edits_that_miss_their_target_are_trained_further_and_counted(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    hard = {"loss_target": 0.0, "steps": 3}
    record = lemoe.train_round(base, facts[:2], anchor(**hard, retries=2)).rounds[0]
    assert (record.retried, record.steps) == (2, 3 + (2 + LAST_RETRIES) * 2)
    assert record.missed == ("fact-0", "fact-1")
    record = lemoe.train_round(base, facts[:2], anchor(**hard, retries=0)).rounds[0]
    assert (record.retried, record.steps) == (0, 3)


@each_family
def test_training_lowers_the_loss_and_each_edit_has_its_own_expert(
    tiny: Tiny, facts: list[lemoe.Edit], anchor: SettingsOf, family: str
) -> None:
    losses: list[float] = []
    settings = anchor(steps=30, noise=0.0, retries=0)
    state = lemoe.train_round(tiny(family), facts[:3], settings, on_step=lambda step: losses.append(step.loss))
    assert losses[-1] < losses[0]
    assert len(losses) == state.rounds[0].steps == 30
    assert len(state.experts) == state.rounds[0].experts == 3
    assert [[edit.id for edit in edits] for edits in state.edits_by_expert] == [["fact-0"], ["fact-1"], ["fact-2"]]


@each_family
def test_the_loss_of_training_is_the_loss_in_use(tiny: Tiny, taught: TwoRounds, family: str) -> None:
    """For edits of different subjects; of one subject, another edit's expert may act before the own prompt is whole."""
    base, state = tiny(family), taught(family).select_rounds([1])
    losses = []
    with lemoe.insert(base, state):
        for stored_anchor in get_anchors(state).anchors:
            whole = torch.tensor([[*stored_anchor.prompt, *stored_anchor.target]])
            predicted = compute_logits(base, whole)[0, len(stored_anchor.prompt) - 1 : -1].log_softmax(-1)
            losses += (-predicted.gather(1, torch.tensor(stored_anchor.target).unsqueeze(1))).flatten().tolist()
    assert sum(losses) / len(losses) == pytest.approx(state.rounds[0].loss, abs=1e-4)


# Files.


@each_family
def test_saving_and_loading_is_exact(tiny: Tiny, taught: TwoRounds, tmp_path: Path, family: str) -> None:
    base, state = tiny(family), taught(family)
    first = save_to_bytes(state, tmp_path / "one.safetensors")
    loaded = lemoe.load_adaptor(tmp_path / "one.safetensors")
    assert loaded == state
    assert save_to_bytes(loaded, tmp_path / "two.safetensors") == first
    answers = []
    for source in (state, tmp_path / "one.safetensors"):
        with lemoe.insert(base, source):
            answers.append(compute_logits(base, encode_text(base, IN_SCOPE[0])))
    assert torch.equal(*answers)


def test_subjects_survive_a_file_whatever_their_script(
    base: lemoe.BaseModel, anchor: SettingsOf, tmp_path: Path
) -> None:
    subjects = ("東京", "Łódź 🎻", None)
    edits = [
        lemoe.Edit(f"{subject or 'It'} stands in the", "Rome", subject, id=str(number))
        for number, subject in enumerate(subjects)
    ]
    lemoe.save_adaptor(lemoe.train_round(base, edits, anchor(steps=1, retries=0)), tmp_path / "a")
    stored_anchors = get_anchors(lemoe.load_adaptor(tmp_path / "a")).anchors
    assert [stored_anchor.subject for stored_anchor in stored_anchors] == list(subjects)


def copy_stored_tensor(taught: TwoRounds, name: str) -> Tensor:
    return taught("llama").router.tensors()[name].clone()


@pytest.mark.parametrize("part", ["prompt", "target", "subject"])
def test_anchors_that_are_damaged_are_refused(file: Path, taught: TwoRounds, part: str) -> None:
    name = f"anchors.{part}"
    values, offsets = copy_stored_tensor(taught, name), copy_stored_tensor(taught, f"{name}_offsets")
    late, falling = offsets.clone(), offsets.clone()
    late[0] = 1
    falling[1] = falling[2] + 1
    damages: Sequence[tuple[str, Tensor | None]] = (
        (f"{name}_offsets", late),
        (f"{name}_offsets", falling),
        (f"{name}_offsets", offsets[:-1]),
        (f"{name}_offsets", offsets.float()),
        (f"{name}_offsets", offsets.unsqueeze(0)),
        (f"{name}_offsets", offsets[:0]),
        (f"{name}_offsets", -offsets),
        (f"{name}_offsets", None),
        (name, values[:-1]),
        (name, values.long()),
        (name, values.float()),
        (name, values.unsqueeze(0)),
        (name, None),
    )
    for changed, tensor in damages:
        content = file.read_bytes()
        assert name in refuse_with_tensors(file, {changed: tensor}), (changed, tensor)
        file.write_bytes(content)


@pytest.mark.parametrize("part", ["prompt", "target"])
def test_negative_token_ids_are_refused(file: Path, taught: TwoRounds, part: str) -> None:
    values = copy_stored_tensor(taught, f"anchors.{part}")
    values[1] = -1
    assert f"anchors.{part}" in refuse_with_tensors(file, {f"anchors.{part}": values})


def test_a_subject_that_is_not_utf_8_is_refused(file: Path, taught: TwoRounds) -> None:
    values = copy_stored_tensor(taught, "anchors.subject")
    values[0] = 0xFF
    refuse_with_tensors(file, {"anchors.subject": values})


def test_an_anchor_without_tokens_is_refused(file: Path, taught: TwoRounds) -> None:
    offsets = copy_stored_tensor(taught, "anchors.prompt_offsets")
    offsets[1] = 0
    assert "an anchor without tokens" in refuse_with_tensors(file, {"anchors.prompt_offsets": offsets})


@pytest.mark.parametrize("name", ["anchors.prompt_offsets", "experts.offsets"])
@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
    ],
)
def test_offsets_that_are_no_numbers_are_refused(file: Path, taught: TwoRounds, name: str, value: float) -> None:
    refuse_with_tensors(file, {name: torch.full((5,), value)})


def test_anchor_and_paper_adaptors_do_not_stack(taught: TwoRounds, trained: lemoe.AdaptorState) -> None:
    with pytest.raises(AdaptorError, match="method: anchor != paper"):
        lemoe.stack([taught("llama"), trained])


# What users can see of the gate and the plan.


def test_acts_on_tells_whether_a_text_is_in_the_scope_of_any_edit(base: lemoe.BaseModel, taught: TwoRounds) -> None:
    with lemoe.insert(base, taught("llama")) as adaptor:
        assert all(adaptor.acts_on(base.tokenizer(text).input_ids) for text in IN_SCOPE)
        assert not any(adaptor.acts_on(base.tokenizer(text).input_ids) for text in OUT_OF_SCOPE)


def test_records_name_the_edit_that_acted_or_none(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], taught: TwoRounds
) -> None:
    records = lemoe.evaluate(base, taught("llama"), [facts[2], facts[4]]).records
    assert [record.nearest for record in records if record.name == "reliability"] == ["fact-2", None]


def test_the_plan_names_the_subjects_that_were_inferred(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    nameless = replace(facts[3], subject=None)
    assert lemoe.plan(base, [facts[0], nameless], anchor()).inferred_subjects == {"fact-3": "Marie Curie"}


def test_a_prompt_that_fills_the_context_is_taught_without_the_paraphrases_that_do_not_fit(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    long = lemoe.Edit("Mozart " + "la " * 38 + "is", "Rome", "Mozart", id="long")
    taught = lemoe.train_round(base, [long, *facts[:1]], anchor(variants=6, steps=2))
    assert taught.rounds[0].ids == ("long", "fact-0")


def test_a_rephrase_that_cannot_be_trained_on_is_named(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    edit = replace(facts[0], rephrases=(lemoe.Probe("la " * 150, "Rome", "rephrase"),))
    with pytest.raises(lemoe.LemoeError, match="fact-0"):
        lemoe.train_round(base, [edit], anchor(train_rephrases=True, steps=2))


def test_training_on_rephrases_makes_another_round_than_training_without(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    edit = replace(facts[2], rephrases=(lemoe.Probe("Which fish of Lake Como is the largest?", "golden pike", "r"),))
    without, trained_on = (
        lemoe.train_round(base, [edit], anchor(train_rephrases=given, variants=0)) for given in (False, True)
    )
    assert without.rounds[0].id != trained_on.rounds[0].id
    assert not torch.equal(without.experts.down, trained_on.experts.down)


# What only a real model shows.


@pytest.fixture(scope="module")
def ten() -> list[lemoe.Edit]:
    return lemoe.read_edits(REPOSITORY / "examples" / "edits.jsonl")[:10]


@pytest.fixture(scope="module")
def ten_taught(real_base: lemoe.BaseModel, ten: list[lemoe.Edit]) -> lemoe.AdaptorState:
    return lemoe.train_round(real_base, ten, lemoe.resolve_settings("anchor", None, {"train_rephrases": True}))


@pytest.mark.real
def test_ten_examples_are_learned_exactly_and_other_questions_keep_their_answers(
    real_base: lemoe.BaseModel, ten: list[lemoe.Edit], ten_taught: lemoe.AdaptorState
) -> None:
    result = lemoe.evaluate(real_base, ten_taught, ten)
    assert result.value("reliability", "exact_match", stage="before") < 0.3
    assert result.value("reliability", "exact_match") == 1.0
    before = result.value("generality", stage="before")
    assert result.value("generality") > before + 0.2
    assert result.value("routing", "agreement") == 1.0
    for kind in ("unrelated", "same_template"):
        assert result.value("locality", "exact_match", kind) == 1.0
    same_subject = [metric for metric in result.metrics if metric.kind == "same_subject" and metric.stage == "after"]
    assert {metric.measure for metric in same_subject} >= {"token_accuracy", "exact_match"}
    assert all(metric.n == 10 for metric in same_subject)


@pytest.mark.real
def test_greedy_generation_writes_the_target_and_ends_there(
    real_base: lemoe.BaseModel, ten: list[lemoe.Edit], ten_taught: lemoe.AdaptorState
) -> None:
    with lemoe.insert(real_base, ten_taught):
        for edit in ten:
            prompt = encode_text(real_base, edit.prompt)
            options: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 0}
            written = generate_ids(real_base, prompt, **options)[0].tolist()
            assert real_base.tokenizer.decode(written[:-1]).strip() == edit.target
            assert written[-1] == real_base.eos_token_id


@pytest.mark.real
def test_the_evaluation_sees_that_answers_end_behind_the_target(
    real_base: lemoe.BaseModel, ten: list[lemoe.Edit], ten_taught: lemoe.AdaptorState
) -> None:
    result = lemoe.evaluate(real_base, ten_taught, ten, lemoe.EvalOptions(decode="greedy", only=("reliability",)))
    assert result.value("reliability", "complete_match", stage="before") == 0.0
    assert result.value("reliability", "complete_match") == 1.0
    assert ten_taught.rounds[0].missed == ()


@pytest.mark.real
def test_rephrases_that_were_trained_on_are_answered_where_the_gate_opens(
    real_base: lemoe.BaseModel, ten: list[lemoe.Edit], ten_taught: lemoe.AdaptorState
) -> None:
    records = lemoe.evaluate(real_base, ten_taught, ten, lemoe.EvalOptions(only=("generality",))).records
    own = [record for record in records if record.route.expert >= 0 and record.nearest == record.edit]
    assert len(own) >= 10
    assert all(record.token_accuracy_after == 1.0 for record in own)


@pytest.mark.real
def test_unrelated_and_same_template_prompts_are_bypassed_bit_for_bit(
    real_base: lemoe.BaseModel, ten: list[lemoe.Edit], ten_taught: lemoe.AdaptorState
) -> None:
    prompts = [probe.prompt for edit in ten for probe in edit.locality if probe.kind in ("unrelated", "same_template")]
    before = [compute_logits(real_base, encode_text(real_base, prompt))[:, -1] for prompt in prompts]
    assert len(prompts) == 20
    with lemoe.insert(real_base, ten_taught):
        after = [compute_logits(real_base, encode_text(real_base, prompt))[:, -1] for prompt in prompts]
    assert all(map(torch.equal, after, before))
