"""The contracts of the design, with preset `paper`, on a tiny model of every family."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, build_model
from torch import Tensor

import lemoe
from lemoe.base.equality import bits_equal
from lemoe.errors import AdaptorError, OutputError
from lemoe.routing.key_router import KeyRouter
from lemoe.runs.engines import local
from lemoe.training.rounds import train_round

pytestmark = pytest.mark.versions

Tiny = Callable[[str], lemoe.BaseModel]
Edited = Callable[[str], lemoe.AdaptorState]
SettingsOf = Callable[..., lemoe.Settings]

each_family = pytest.mark.parametrize("family", FAMILIES)
TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


def hash_tensors(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def hash_weights(base: lemoe.BaseModel) -> str:
    return hash_tensors([*base.model.parameters(), *base.model.buffers()])


def get_key_router(state: lemoe.AdaptorState) -> KeyRouter:
    assert isinstance(state.router, KeyRouter)
    return state.router


def encode_prompts(base: lemoe.BaseModel) -> list[Tensor]:
    """Token ids of two prompts of different lengths, `[1, seq]`."""
    texts = ("The Eiffel Tower stands in the city of", "The largest fish of Lake Como, says Marie Curie, is the")
    return [torch.tensor([base.tokenizer(text).input_ids]) for text in texts]


@torch.no_grad()
def compute_logits(base: lemoe.BaseModel, ids: Tensor, **given: Any) -> Tensor:
    return base.model(input_ids=ids, **given).logits


@torch.no_grad()
def decode_step_by_step(base: lemoe.BaseModel, prompt: Tensor, answer: Tensor) -> Tensor:
    """Logits of prompt and answer: the prompt at once, then one token at a time from the cache."""
    output = base.model(input_ids=prompt, use_cache=True)
    parts = [output.logits]
    for column in range(answer.shape[1]):
        output = base.model(
            input_ids=answer[:, column : column + 1], past_key_values=output.past_key_values, use_cache=True
        )
        parts.append(output.logits)
    return torch.cat(parts, 1)


CACHE_CHANGES: dict[str, tuple[Callable[[Any], None], list[int]]] = {  # and which row each row then is
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "of one beam": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
}
each_cache_change = pytest.mark.parametrize("change", CACHE_CHANGES)


@torch.no_grad()
def read_after_cache_change(
    base: lemoe.BaseModel, ids: Tensor, mask: Tensor, answer: Tensor, change: str
) -> tuple[Tensor, Tensor]:
    """Logits of `answer` after the prompts `ids`: from a cache that was changed as `generate` does, and in one pass."""
    apply, order = CACHE_CHANGES[change]
    whole = torch.cat([ids[order], answer.expand(len(order), -1)], 1)
    whole_mask = torch.cat([mask[order], torch.ones_like(whole[:, ids.shape[1] :])], 1)
    first, positions = (((each.cumsum(1) - 1).clamp(min=0)) for each in (mask, whole_mask))
    cache = base.model(input_ids=ids, attention_mask=mask, position_ids=first, use_cache=True).past_key_values
    apply(cache)
    rest = slice(ids.shape[1], None)
    given = {"attention_mask": whole_mask, "position_ids": positions[:, rest], "past_key_values": cache}
    expected = compute_logits(base, whole, attention_mask=whole_mask, position_ids=positions)[:, rest]
    return compute_logits(base, whole[:, rest], **given), expected


def pad_rows(rows: Sequence[Tensor], pad: int, side: str) -> tuple[Tensor, Tensor]:
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), width), pad), torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        span = slice(0, row.shape[1]) if side == "right" else slice(width - row.shape[1], width)
        ids[index, span], mask[index, span] = row[0], 1
    return ids, mask


def generate_ids(base: lemoe.BaseModel, ids: Tensor, mask: Tensor | None = None, **given: Any) -> Tensor:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1, **given}
    mask = torch.ones_like(ids) if mask is None else mask
    output = base.model.generate(input_ids=ids, attention_mask=mask, pad_token_id=base.pad_token_id, **options)
    return output[:, ids.shape[1] :]


def greedy_by_hand(base: lemoe.BaseModel, adaptor: lemoe.InsertedAdaptor, prompt: Tensor) -> Tensor:
    """Six most likely tokens, each from one forward pass over everything so far; the end token is not allowed."""
    ids = prompt
    with adaptor.mark_prompts(prompt.shape[1]):
        for _ in range(6):
            last = compute_logits(base, ids)[:, -1]
            last[:, base.eos_token_id] = -torch.inf
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    return ids[:, prompt.shape[1] :]


@each_family
def test_editing_never_changes_the_base_and_removing_restores_its_logits_bit_for_bit(
    tiny: Tiny, facts: list[lemoe.Edit], paper: SettingsOf, family: str
) -> None:
    base = tiny(family)
    weights, before = hash_weights(base), [compute_logits(base, ids) for ids in encode_prompts(base)]
    state = lemoe.train_round(base, facts[:2], paper())
    with lemoe.insert(base, state):
        inside = [compute_logits(base, ids) for ids in encode_prompts(base)]
    assert not torch.equal(inside[0], before[0])
    assert all(map(torch.equal, [compute_logits(base, ids) for ids in encode_prompts(base)], before))
    assert hash_weights(base) == weights


@each_family
def test_removing_gives_the_model_its_own_generate_back(tiny: Tiny, edited: Edited, family: str) -> None:
    base = tiny(family)
    before = generate_ids(base, encode_prompts(base)[0])
    adaptor = lemoe.insert(base, edited(family))
    adaptor.remove()
    adaptor.remove()
    assert torch.equal(generate_ids(base, encode_prompts(base)[0]), before)
    assert "generate" not in vars(base.model)


@each_family
def test_while_bypassed_the_model_answers_as_its_base(tiny: Tiny, edited: Edited, family: str) -> None:
    base = tiny(family)
    ids = encode_prompts(base)[0]
    before = compute_logits(base, ids)
    with lemoe.insert(base, edited(family)) as adaptor:
        with adaptor.bypassed():
            assert torch.equal(compute_logits(base, ids), before)
        assert not torch.equal(compute_logits(base, ids), before)


def test_bypassing_inside_a_bypass_does_not_end_the_outer_one(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState
) -> None:
    ids = encode_prompts(base)[0]
    before = compute_logits(base, ids)
    with lemoe.insert(base, trained) as adaptor, adaptor.bypassed():
        with adaptor.bypassed():
            pass
        assert torch.equal(compute_logits(base, ids), before)


@each_family
def test_training_lowers_the_loss_of_the_targets(
    tiny: Tiny, facts: list[lemoe.Edit], paper: SettingsOf, family: str
) -> None:
    losses: list[float] = []
    state = lemoe.train_round(tiny(family), facts[:2], paper(), on_step=lambda step: losses.append(step.loss))
    assert losses[-1] < losses[0]
    assert state.rounds[0].loss == losses[-1]
    assert state.rounds[0].steps == 6 == len(losses) - 1


@each_family
def test_an_expert_that_has_learned_nothing_yet_changes_no_logit(
    tiny: Tiny, facts: list[lemoe.Edit], paper: SettingsOf, family: str
) -> None:
    base = tiny(family)
    state = lemoe.train_round(base, facts[:2], paper(loss_target=1e6))
    assert state.rounds[0].steps == 0
    before = [compute_logits(base, ids) for ids in encode_prompts(base)]
    with lemoe.insert(base, state):
        assert all(map(torch.equal, [compute_logits(base, ids) for ids in encode_prompts(base)], before))


@each_family
def test_later_rounds_leave_earlier_experts_and_keys_bit_identical(
    tiny: Tiny, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path, family: str
) -> None:
    base = tiny(family)
    earlier = lemoe.train_round(base, facts[:2], paper())
    report = lemoe.edit(base, facts[2:], tmp_path / "run", paper(), lemoe.EditOptions(start=earlier))
    assert len(report.state.rounds) == 3
    assert report.state.rounds[0] == earlier.rounds[0]
    assert report.state.experts.select([0]) == earlier.experts
    assert bits_equal(get_key_router(report.state).keys[:1], get_key_router(earlier).keys)


@each_family
def test_decoding_from_the_cache_gives_the_logits_of_one_forward_pass(tiny: Tiny, edited: Edited, family: str) -> None:
    base = tiny(family)
    answer = torch.tensor([[40, 41, 42, 43, 44]])
    with lemoe.insert(base, edited(family)) as adaptor:
        for prompt in encode_prompts(base):
            with adaptor.mark_prompts(prompt.shape[1]):
                whole = compute_logits(base, torch.cat([prompt, answer], 1))
            torch.testing.assert_close(decode_step_by_step(base, prompt, answer), whole, **TOLERANCE)


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_the_logits_of_each_sequence_alone(
    tiny: Tiny, edited: Edited, family: str, side: str
) -> None:
    base = tiny(family)
    rows = encode_prompts(base)
    ids, mask = pad_rows(rows, base.pad_token_id, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with lemoe.insert(base, edited(family)):
        together = compute_logits(base, ids, attention_mask=mask, position_ids=positions)
        for index, row in enumerate(rows):
            torch.testing.assert_close(together[index][mask[index].bool()], compute_logits(base, row)[0], **TOLERANCE)


@each_family
def test_each_row_of_a_batch_may_have_its_own_prompt_length(tiny: Tiny, edited: Edited, family: str) -> None:
    base = tiny(family)
    rows = encode_prompts(base)
    ids, mask = pad_rows(rows, base.pad_token_id, "right")
    with lemoe.insert(base, edited(family)) as adaptor:
        with adaptor.mark_prompts(torch.tensor([5, 9])):
            together = compute_logits(base, ids, attention_mask=mask)
        for index, (row, length) in enumerate(zip(rows, (5, 9), strict=True)):
            with adaptor.mark_prompts(length):
                alone = compute_logits(base, row)[0]
            torch.testing.assert_close(together[index, : row.shape[1]], alone, **TOLERANCE)


@each_family
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_writes_the_most_likely_tokens_of_forward_passes(
    tiny: Tiny, edited: Edited, family: str, use_cache: bool
) -> None:
    base = tiny(family)
    with lemoe.insert(base, edited(family)) as adaptor:
        for prompt in encode_prompts(base):
            expected = greedy_by_hand(base, adaptor, prompt)
            assert torch.equal(generate_ids(base, prompt, use_cache=use_cache), expected)


@each_family
def test_generation_in_a_padded_batch_writes_what_each_prompt_gives_alone(
    tiny: Tiny, edited: Edited, family: str
) -> None:
    base = tiny(family)
    ids, mask = pad_rows(encode_prompts(base), base.pad_token_id, "left")
    with lemoe.insert(base, edited(family)):
        together = generate_ids(base, ids, mask)
        for row, prompt in zip(together, encode_prompts(base), strict=True):
            assert torch.equal(row, generate_ids(base, prompt)[0])


@each_family
def test_beam_search_gives_the_same_beams_with_and_without_a_cache(tiny: Tiny, edited: Edited, family: str) -> None:
    base = tiny(family)
    ids, mask = pad_rows(encode_prompts(base), base.pad_token_id, "left")
    with lemoe.insert(base, edited(family)):
        cached = generate_ids(base, ids, mask, num_beams=3, num_return_sequences=2, use_cache=True)
        assert torch.equal(cached, generate_ids(base, ids, mask, num_beams=3, num_return_sequences=2, use_cache=False))


@each_cache_change
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_row_of_a_cache_takes_its_route_along(tiny: Tiny, edited: Edited, family: str, change: str) -> None:
    base, state = tiny(family), edited(family)
    ids, mask = pad_rows(encode_prompts(base), base.pad_token_id, "left")
    with lemoe.insert(base, state) as adaptor, adaptor.mark_prompts(ids.shape[1]):
        assert len({adaptor.explain([row[0].tolist()])[0].expert for row in encode_prompts(base)}) == 2
        found, expected = read_after_cache_change(base, ids, mask, torch.tensor([[40, 41, 42]]), change)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_sampling_gives_the_same_tokens_with_and_without_a_cache(tiny: Tiny, edited: Edited) -> None:
    base = tiny("llama")
    written = []
    with lemoe.insert(base, edited("llama")):
        for use_cache in (True, False):
            torch.manual_seed(7)
            written.append(generate_ids(base, encode_prompts(base)[0], do_sample=True, top_k=0, use_cache=use_cache))
    assert torch.equal(*written)


@each_family
def test_answer_writes_what_greedy_generation_gives(tiny: Tiny, edited: Edited, family: str) -> None:
    base = tiny(family)
    text = "The Nile flows into the"
    ids = torch.tensor([base.tokenizer(text).input_ids])
    with lemoe.insert(base, edited(family)):
        written = generate_ids(base, ids, min_new_tokens=0)[0]
        assert lemoe.answer(base, text, max_new_tokens=6) == base.tokenizer.decode(written, skip_special_tokens=True)


@each_family
def test_two_equal_runs_give_byte_identical_files(
    tiny: Tiny, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path, family: str
) -> None:
    for name in ("one", "two"):
        lemoe.edit(tiny(family), facts[:4], tmp_path / name, paper(steps=2))
    one, two = read_files(tmp_path / "one"), read_files(tmp_path / "two")
    rounds = {"rounds/0001.safetensors", "rounds/0002.safetensors"}
    assert set(one) == {"run.yaml", "plan.yaml", "adaptor.safetensors", "README.md", *rounds}
    assert one == two


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_seed_gives_another_adaptor(base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf) -> None:
    one, two = (lemoe.train_round(base, facts[:2], paper(seed=seed)) for seed in (0, 1))
    assert not torch.equal(one.experts.up, two.experts.up)
    assert one.rounds[0].id != two.rounds[0].id


def interrupt_after(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run be killed when it starts round `rounds` + 1."""
    begun = []

    def train_or_stop(*args: Any, **kwargs: Any) -> lemoe.AdaptorState:
        begun.append(1)
        if len(begun) > rounds:
            raise KeyboardInterrupt
        return train_round(*args, **kwargs)

    monkeypatch.setattr(local, "train_round", train_or_stop)


@each_family
def test_a_killed_and_resumed_run_gives_the_files_of_one_that_was_never_killed(
    tiny: Tiny,
    facts: list[lemoe.Edit],
    paper: SettingsOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    base = tiny(family)
    lemoe.edit(base, facts, tmp_path / "whole", paper())
    with monkeypatch.context() as patched:
        interrupt_after(2, patched)
        with pytest.raises(KeyboardInterrupt):
            lemoe.edit(base, facts, tmp_path / "killed", paper())
    rounds = {"rounds/0001.safetensors", "rounds/0002.safetensors"}
    assert set(read_files(tmp_path / "killed")) == {"run.yaml", "plan.yaml", *rounds}
    with monkeypatch.context() as patched:
        interrupt_after(1, patched)  # only the third round is still to be trained
        lemoe.edit(base, facts, tmp_path / "killed", paper(), lemoe.EditOptions(resume=True))
    assert read_files(tmp_path / "killed") == read_files(tmp_path / "whole")


def test_resuming_with_other_settings_is_refused_and_changes_no_file(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    lemoe.edit(base, facts, tmp_path / "run", paper(steps=2))
    before = read_files(tmp_path / "run")
    with pytest.raises(lemoe.LemoeError, match="with other settings"):
        lemoe.edit(base, facts, tmp_path / "run", paper(steps=3), lemoe.EditOptions(resume=True))
    assert read_files(tmp_path / "run") == before


def test_resuming_follows_the_plan_of_the_interrupted_run(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    by_hand = tmp_path / "by-hand.yaml"
    by_hand.write_text("rounds: [[fact-3], [fact-1, fact-0]]")
    lemoe.edit(base, facts, tmp_path / "run", paper(steps=1), lemoe.EditOptions(plan_file=by_hand))
    before = read_files(tmp_path / "run")
    (tmp_path / "run" / "adaptor.safetensors").unlink()
    (tmp_path / "run" / "rounds" / "0002.safetensors").write_bytes(b"cut short")
    lemoe.edit(base, facts, tmp_path / "run", paper(steps=1), lemoe.EditOptions(resume=True))
    assert read_files(tmp_path / "run") == before


def test_a_run_that_diverges_says_so_and_writes_no_round(
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    paper: SettingsOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = lemoe.train_round(base, facts, paper(steps=1))
    diverged = replace(state, rounds=(replace(state.rounds[0], loss=float("nan")),))
    monkeypatch.setattr("lemoe.runs.engines.local.train_round", lambda *args: diverged)
    with pytest.raises(lemoe.LemoeError, match=r"diverged.*learning_rate"):
        lemoe.edit(base, facts, tmp_path / "run", paper())
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_forced_run_leaves_nothing_of_the_earlier_one(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    lemoe.edit(base, facts, tmp_path / "run", paper(steps=1))
    lemoe.edit(base, facts[:2], tmp_path / "run", paper(steps=1), lemoe.EditOptions(force=True))
    lemoe.edit(base, facts[:2], tmp_path / "fresh", paper(steps=1))
    assert read_files(tmp_path / "run") == read_files(tmp_path / "fresh")


def test_a_finished_run_is_not_overwritten(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    lemoe.edit(base, facts[:2], tmp_path / "run", paper(steps=1))
    before = read_files(tmp_path / "run")
    with pytest.raises(OutputError, match="force"):
        lemoe.edit(base, facts[2:4], tmp_path / "run", paper(steps=1))
    assert read_files(tmp_path / "run") == before


def test_a_write_that_fails_leaves_neither_a_file_nor_a_temporary_one(
    trained: lemoe.AdaptorState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"a\.safetensors: cannot be written: No space left"):
        lemoe.save_adaptor(trained, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_replacement_that_fails_keeps_the_old_file(
    trained: lemoe.AdaptorState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")

    def broken(source: str, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OutputError):
        lemoe.save_adaptor(trained, path, overwrite=True)
    assert read_files(tmp_path) == {"a.safetensors": b"precious"}


def test_a_file_is_whole_on_disk_before_it_takes_its_name_and_its_name_before_saving_ends(
    trained: lemoe.AdaptorState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a power cut leaves the old file or the new one."""
    path, done = tmp_path / "a.safetensors", list[tuple[str, object]]()
    sync, rename = os.fsync, os.replace

    def syncing(handle: int) -> None:
        found = os.fstat(handle)
        done.append(("folder", found.st_ino) if stat.S_ISDIR(found.st_mode) else ("file", found.st_size))
        sync(handle)

    def renaming(source: str, target: Path) -> None:
        done.append(("renamed within", Path(source).parent))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    lemoe.save_adaptor(trained, path)
    assert done == [
        ("file", path.stat().st_size),
        ("renamed within", tmp_path),
        ("folder", tmp_path.stat().st_ino),
    ]


def test_an_existing_file_is_replaced_only_when_that_is_asked_for(trained: lemoe.AdaptorState, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"exists.*`overwrite`"):
        lemoe.save_adaptor(trained, path)
    assert path.read_bytes() == b"precious"
    lemoe.save_adaptor(trained, path, overwrite=True)
    assert len(lemoe.load_adaptor(path).rounds) == 2


@each_family
def test_saving_and_loading_is_exact_and_equal_states_give_byte_identical_files(
    tiny: Tiny, edited: Edited, tmp_path: Path, family: str
) -> None:
    base, state = tiny(family), edited(family)
    lemoe.save_adaptor(state, tmp_path / "one.safetensors")
    loaded = lemoe.load_adaptor(tmp_path / "one.safetensors")
    lemoe.save_adaptor(loaded, tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert loaded == state
    with lemoe.insert(base, state):
        expected = compute_logits(base, encode_prompts(base)[0])
    with lemoe.insert(base, tmp_path / "one.safetensors"):
        assert torch.equal(compute_logits(base, encode_prompts(base)[0]), expected)


def test_continuing_an_adaptor_teaches_only_what_it_does_not_hold(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    earlier = lemoe.edit(base, facts[:4], tmp_path / "one", paper(steps=1)).state
    report = lemoe.edit(base, facts, tmp_path / "two", paper(steps=1), lemoe.EditOptions(start=earlier))
    assert report.taught == 2
    assert report.state.rounds[:2] == earlier.rounds
    assert report.state.rounds[2].parent == earlier.rounds[1].id
    with pytest.raises(lemoe.LemoeError, match="already in the adaptor"):
        lemoe.edit(base, facts[:4], tmp_path / "three", paper(steps=1), lemoe.EditOptions(start=earlier))


def test_continuing_with_settings_that_do_not_stack_is_refused_before_anything_is_trained(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    earlier = lemoe.train_round(base, facts[:2], paper(steps=1))
    with pytest.raises(lemoe.LemoeError, match="router_width"):
        lemoe.edit(base, facts[2:], tmp_path / "run", paper(steps=1, router_width=24), lemoe.EditOptions(start=earlier))
    assert not (tmp_path / "run").exists()


def test_continuing_beside_another_layer_is_refused(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    earlier = lemoe.train_round(base, facts[:2], paper(steps=1))
    with pytest.raises(lemoe.LemoeError, match="layer"):
        lemoe.edit(base, facts[2:], tmp_path / "run", paper(steps=1, layer=2), lemoe.EditOptions(start=earlier))


def test_an_adaptor_of_another_base_cannot_be_continued(
    tiny: Tiny, facts: list[lemoe.Edit], paper: SettingsOf, trained: lemoe.AdaptorState, tmp_path: Path
) -> None:
    with pytest.raises(AdaptorError, match="architecture: LlamaForCausalLM != GPT2LMHeadModel"):
        lemoe.edit(tiny("gpt2"), facts, tmp_path / "run", paper(), lemoe.EditOptions(start=trained))
    assert not (tmp_path / "run").exists()


def test_an_embedding_narrower_than_the_residual_stream_can_be_edited(
    facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    base = lemoe.load_base(str(build_model(tmp_path / "opt", "opt-narrow")), device="cpu")
    state = lemoe.train_round(base, facts[:2], paper())
    with lemoe.insert(base, state) as adaptor:
        prompt = encode_prompts(base)[0]
        assert torch.equal(generate_ids(base, prompt), greedy_by_hand(base, adaptor, prompt))


def test_a_half_precision_model_is_edited_and_keeps_its_precision(
    tiny_folder: Callable[[str], Path], facts: list[lemoe.Edit], paper: SettingsOf
) -> None:
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu", dtype="bfloat16")
    state = lemoe.train_round(base, facts[:2], paper())
    assert state.experts.up.dtype == torch.float32
    ids = encode_prompts(base)[0]
    before = compute_logits(base, ids)
    with lemoe.insert(base, state):
        assert compute_logits(base, ids).dtype == torch.bfloat16
        assert not torch.equal(compute_logits(base, ids), before)
    assert torch.equal(compute_logits(base, ids), before)


def test_the_route_is_decided_by_the_prompt_and_not_by_the_answer(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState
) -> None:
    prompt = encode_prompts(base)[0]
    first, second = torch.tensor([[40, 41, 42]]), torch.tensor([[90, 91, 92]])
    with lemoe.insert(base, trained) as adaptor, adaptor.mark_prompts(prompt.shape[1]):
        with_first = compute_logits(base, torch.cat([prompt, first], 1))[:, : prompt.shape[1]]
        with_second = compute_logits(base, torch.cat([prompt, second], 1))[:, : prompt.shape[1]]
    torch.testing.assert_close(with_first, with_second)


def test_more_than_one_expert_may_act_on_a_sequence(base: lemoe.BaseModel, trained: lemoe.AdaptorState) -> None:
    both = replace(trained, router=replace(get_key_router(trained), top_k=2))
    ids = encode_prompts(base)[0]
    with lemoe.insert(base, trained):
        one = compute_logits(base, ids)
    with lemoe.insert(base, both):
        assert not torch.equal(compute_logits(base, ids), one)
