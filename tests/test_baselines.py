"""Baselines: each trains edits by its method, and leaves the base model unchanged."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Literal

import pytest
import torch
from conftest import FAMILIES

import lemoe
from lemoe.base.hooks import removed_on_exit
from lemoe.errors import InputError, LemoeError
from lemoe.training.baselines.context import Context
from lemoe.training.baselines.ft import TunedFFN
from lemoe.training.baselines.grace import Codebook
from lemoe.training.baselines.weight_change import AddedWeights, WeightChange
from lemoe.training.methods import METHODS
from lemoe.training.rounds import Edited, count_bytes, teach_rounds

pytestmark = pytest.mark.versions

PROMPTING = ("context", "rag")
BASELINES = tuple(name for name, method in METHODS.items() if method.baseline and name not in PROMPTING)
SMALL = {"layer": 1, "steps": 25, "learning_rate": 1e-2, "norm_limit": 0.3, "experts": 2, "width": 4, "radius": 0.05}
RATES = {"ultraedit": 1e-3, "grace": 0.5}  # of one step; of a vector

each_baseline = pytest.mark.parametrize("method", BASELINES)


def make_settings(method: str, **given: object) -> lemoe.Settings:
    rate = RATES.get(method, SMALL["learning_rate"])
    return lemoe.resolve_settings(method, None, {**SMALL, "learning_rate": rate, **given})


def train_rounds(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], method: str, rounds: int = 2, **given: object
) -> list[Edited]:
    """What the model is after each round of two facts."""
    return list(teach_rounds(base, [facts[2 * n : 2 * n + 2] for n in range(rounds)], make_settings(method, **given)))


def hash_weights(base: lemoe.BaseModel) -> str:
    """Hash of names and values of all weights, and of which modules there are."""
    found = hashlib.sha256()
    for name, tensor in base.model.state_dict().items():
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    found.update(repr([(name, type(module)) for name, module in base.model.named_modules()]).encode())
    found.update(repr([(name, weight.requires_grad) for name, weight in base.model.named_parameters()]).encode())
    return found.hexdigest()


@torch.no_grad()
def compute_logits(base: lemoe.BaseModel, ids: Sequence[int] = (5, 6, 7, 8)) -> torch.Tensor:
    return base.model(torch.tensor([list(ids)])).logits


@each_baseline
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_what_it_was_bit_for_bit_after_teaching_and_measuring(
    tiny: Callable[[str], lemoe.BaseModel], facts: list[lemoe.Edit], family: str, method: str
) -> None:
    base = tiny(family)
    weights, before, attributes = hash_weights(base), compute_logits(base), set(vars(base.model))
    (edited,) = train_rounds(base, facts, method, rounds=1, steps=2)
    changed = lemoe.evaluate(base, edited, facts[:2], lemoe.EvalOptions(only=("reliability",)))
    assert changed.value("reliability", "loss") < changed.value("reliability", "loss", stage="before")
    assert hash_weights(base) == weights
    assert torch.equal(compute_logits(base), before)
    assert set(vars(base.model)) == attributes


@each_baseline
def test_the_base_is_what_it_was_when_teaching_breaks_off(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], method: str
) -> None:
    weights = hash_weights(base)

    def interrupt_training(step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(teach_rounds(base, [facts[:2]], make_settings(method), interrupt_training))
    assert hash_weights(base) == weights


@pytest.mark.parametrize(
    "method", [name for name in BASELINES if name not in RATES]
)  # one step, or one vector, lowers the loss, no more
def test_a_round_is_learned(base: lemoe.BaseModel, facts: list[lemoe.Edit], method: str) -> None:
    given = {"steps": 120, "width": 16, "norm_limit": 1.0}
    (edited,) = train_rounds(base, facts, method, rounds=1, **given)
    for decode in ("teacher", "greedy"):
        result = lemoe.evaluate(base, edited, facts[:2], lemoe.EvalOptions(only=("reliability",), decode=decode))
        assert result.value("reliability", "exact_match", stage="before") == 0.0
        assert result.value("reliability", "exact_match") == 1.0


@each_baseline
def test_equal_runs_give_equal_weights_whatever_the_state_of_torchs_own_generator(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], method: str
) -> None:
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(train_rounds(base, facts, method, steps=3)[-1])
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(seed))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("method", [name for name in BASELINES if name != "grace"])
def test_its_size_does_not_grow_with_rounds_and_earlier_states_stay_as_they_were(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], method: str
) -> None:
    states = teach_rounds(base, [facts[:2], facts[2:4], facts[4:6]], make_settings(method, steps=3))
    first = next(states)
    kept = deepcopy(first)
    later = list(states)
    assert {count_bytes(state) for state in later} == {count_bytes(first)}
    assert first == kept
    assert later[-1] != kept


def test_no_weight_leaves_the_bound_of_ft_in_any_round(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    limit = 0.01
    for edited in train_rounds(base, facts, "ft", rounds=3, norm_limit=limit):
        assert isinstance(edited, TunedFFN)
        own = [weight for _, weight in base.ffn_site(1).named_tensors()]
        changes = [(value - weight).abs().max() for value, weight in zip(edited.values, own, strict=True)]
        assert max(changes) == pytest.approx(limit, rel=1e-3)  # the steps reach for more


def test_lora_holds_two_matrices_of_its_rank_for_each_linear_map_above(
    base: lemoe.BaseModel, facts: list[lemoe.Edit]
) -> None:
    (edited,) = train_rounds(base, facts, "lora", rounds=1, steps=1, width=3)
    assert isinstance(edited, WeightChange)
    maps = [each for layer in base.layers[1:] for each in layer.modules() if isinstance(each, torch.nn.Linear)]
    assert count_bytes(edited) == sum(3 * (each.in_features + each.out_features) * 4 for each in maps)
    assert sorted(tuple(value.shape) for value in edited.tensors()) == sorted(
        shape for each in maps for shape in ((3, each.in_features), (each.out_features, 3))
    )


def test_lora_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lemoe.training.baselines.lora", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LemoeError, match=r"pip install 'lemoe\[lora\]'"):
        _ = METHODS["lora"].train_round


def test_rect_keeps_the_changes_that_are_largest_relative_to_their_weights(
    base: lemoe.BaseModel, facts: list[lemoe.Edit]
) -> None:
    tuned, second = train_rounds(base, facts, "rect", change_share=0.25, steps=4)
    (whole,) = train_rounds(base, facts, "ft", rounds=1, steps=4)
    assert isinstance(tuned, TunedFFN)
    assert isinstance(second, TunedFFN)
    assert isinstance(whole, TunedFFN)
    for (_, weight), value, unlimited in zip(base.ffn_site(1).named_tensors(), tuned.values, whole.values, strict=True):
        relative = ((unlimited - weight) / weight).abs()
        kept = relative >= relative.flatten().sort(descending=True).values[weight.numel() // 4 - 1]
        assert torch.equal(value, torch.where(kept, unlimited, weight))
    for before, after in zip(tuned.values, second.values, strict=True):
        assert int((after != before).sum()) <= before.numel() // 4  # of what that round changed


def test_lora_merge_adds_a_share_of_what_new_matrices_come_to(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    half, last = train_rounds(base, facts, "lora-merge", merge_share=0.5)
    (whole,) = train_rounds(base, facts, "lora-merge", rounds=1, merge_share=1.0)
    (matrices,) = train_rounds(base, facts, "lora", rounds=1)
    assert isinstance(half, AddedWeights)
    assert isinstance(whole, AddedWeights)
    assert isinstance(matrices, WeightChange)
    assert isinstance(last, AddedWeights)
    pairs = zip(matrices.tensors()[::2], matrices.tensors()[1::2], strict=True)
    for change, halved, (down, up) in zip(whole.changes, half.changes, pairs, strict=True):
        torch.testing.assert_close(change, 2 * up @ down)  # alpha is twice the rank
        torch.testing.assert_close(halved, change / 2)
    with matrices.applied(base):
        expected = compute_logits(base)
    with whole.applied(base):
        torch.testing.assert_close(compute_logits(base), expected, atol=1e-5, rtol=1e-5)
    with half.applied(base):
        (fresh,) = train_rounds(base, facts[2:], "lora", rounds=1)
    assert isinstance(fresh, WeightChange)
    for change, before, down, up in zip(
        last.changes, half.changes, fresh.tensors()[::2], fresh.tensors()[1::2], strict=True
    ):
        torch.testing.assert_close(change, before + up @ down)


def read_features(base: lemoe.BaseModel, path: str, edits: list[lemoe.Edit]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and gradient of the output of a map at each target token, edit by edit; of the mean loss of all tokens."""
    inputs, gradients = [], []
    encoded = [(base.tokenizer(e.prompt).input_ids, base.tokenizer(f"{e.prompt} {e.target}").input_ids) for e in edits]
    count = sum(len(whole) - len(prompt) for prompt, whole in encoded)
    for prompt, whole in encoded:
        ids, bump = torch.tensor([whole]), torch.zeros(1)
        seen: list[torch.Tensor] = []

        def add_bump(module: object, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            nonlocal bump
            bump = torch.zeros_like(output, requires_grad=True)
            seen.append(args[0])  # noqa: B023
            return output + bump

        handle = base.model.get_submodule(path).register_forward_hook(add_bump)
        logits = base.model(ids).logits[0, len(prompt) - 1 : -1]
        handle.remove()
        labels = ids[0, len(prompt) :]
        (torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count).backward()
        assert bump.grad is not None
        inputs.append(seen[0][0, len(prompt) - 1 : -1].detach())
        gradients.append(bump.grad[0, len(prompt) - 1 : -1])
    return torch.cat(inputs), torch.cat(gradients)


def test_ultraedit_is_its_formula(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    rate, layers = 1e-3, (1, 2)
    states = train_rounds(base, facts, "ultraedit", learning_rate=rate)
    paths = [f"model.layers.{layer}.mlp.{name}" for layer in layers for name in ("gate_proj", "up_proj")]
    history: list[torch.Tensor] = []  # all features so far: the maps have one shape
    before = dict.fromkeys(paths, torch.zeros(()))
    for number, state in enumerate(states):
        assert isinstance(state, AddedWeights)
        assert list(state.paths) == paths
        earlier = states[number - 1] if number else AddedWeights((), ())
        assert isinstance(earlier, AddedWeights)
        with earlier.applied(base):
            read = {path: read_features(base, path, facts[2 * number : 2 * number + 2]) for path in paths}
        history += [torch.cat(features, 1) for features in read.values()]
        seen = torch.cat(history)
        mean, deviation = seen.mean(0), seen.std(0)
        for path, change in zip(state.paths, state.changes, strict=True):
            inputs, gradients = read[path]
            joined = (torch.cat([inputs, gradients], 1) - mean) / (deviation + torch.finfo(torch.float32).eps)
            norms = joined[:, : inputs.shape[1]].pow(2).sum(1)
            wanted = torch.stack([-rate * n * g for n, g in zip(norms, joined[:, inputs.shape[1] :], strict=True)])
            solved = torch.linalg.inv(inputs.T @ inputs + torch.eye(inputs.shape[1])) @ inputs.T @ wanted
            expected = before[path] + solved.T
            torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)
            before[path] = change


def make_codebook(*entries: tuple[tuple[float, float], str], radius: float = 1.0) -> Codebook:
    """Entries placed one by one: what the FFN reads, and the label; the value is ten times the key."""
    book = Codebook(1, None, (), torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0))
    for key, label in entries:
        book, _ = book.place(torch.tensor(key), 10 * torch.tensor(key), tuple(label.encode()), radius)
    return book


def test_grace_gives_each_edit_a_circle_that_meets_none_of_another_answer() -> None:
    apart = make_codebook(((0.0, 0.0), "Rome"), ((0.0, 2.5), "Bern"))
    assert apart.radii.tolist() == [1.0, 1.0]
    grown = make_codebook(((0.0, 0.0), "Rome"), ((0.0, 1.5), "Rome"))
    assert grown.radii.tolist() == [1.5]
    inside = make_codebook(((0.0, 0.0), "Rome"), ((0.0, 0.5), "Rome"))
    assert inside.radii.tolist() == [1.0]
    halved = make_codebook(((0.0, 0.0), "Rome"), ((0.0, 1.5), "Bern"), ((4.0, 0.0), "Oslo"))
    assert halved.radii.tolist() == [0.75, 0.75, 1.0]
    assert list(map(bytes, halved.labels)) == [b"Rome", b"Bern", b"Oslo"]


def test_grace_replaces_what_the_ffn_gives_near_a_key_and_nothing_else() -> None:
    book = make_codebook(((3.0, 0.0), "Rome"), ((3.0, 0.0), "Bern"), ((0.0, 4.0), "Oslo"))
    inputs = torch.tensor([[[3.0, 0.0], [0.0, 3.5], [0.0, 2.9], [9.0, 9.0]]])
    output = torch.ones(1, 4, 2)
    expected = [[[30.0, 0.0], [0.0, 40.0], [1.0, 1.0], [1.0, 1.0]]]
    assert book.replace_near_keys(inputs, output).tolist() == expected
    assert make_codebook().replace_near_keys(inputs, output) is output


def run_ffn(base: lemoe.BaseModel, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output `[seq, hidden]` of the FFN of layer 1 on a text."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    ffn = base.ffn_site(1).output_module
    with removed_on_exit([ffn.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))]):
        compute_logits(base, ids)
    return calls[0][0][0], calls[0][1][0]


def test_grace_reads_its_keys_where_prompts_end_and_trains_values_that_take_the_ffns_place(
    base: lemoe.BaseModel, facts: list[lemoe.Edit]
) -> None:
    (start,) = train_rounds(base, facts, "grace", rounds=1, steps=1, learning_rate=1e-6)
    trained, second = train_rounds(base, facts, "grace", steps=40)
    assert isinstance(start, Codebook)
    assert isinstance(trained, Codebook)
    assert isinstance(second, Codebook)
    assert torch.equal(second.values[:2], trained.values)
    answered = lemoe.evaluate(base, trained, facts[:1], lemoe.EvalOptions(only=("reliability",), decode="greedy"))
    assert (
        answered.value("reliability", "exact_match")
        == 1.0
        > answered.value("reliability", "exact_match", stage="before")
    )
    assert torch.equal(second.keys[:2], start.keys)
    ffn = base.ffn_site(1).output_module
    for number, edit in enumerate(facts[:2]):
        prompt = base.tokenizer(edit.prompt).input_ids
        read, given = run_ffn(base, prompt)
        torch.testing.assert_close(start.keys[number], read[-1])
        torch.testing.assert_close(start.values[number], given[-1], atol=1e-5, rtol=0)
        whole = base.tokenizer(f"{edit.prompt} {edit.target}").input_ids
        value = trained.values[number]

        def put_value(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
            output[0, len(prompt) - 1] = value  # noqa: B023
            return output

        with removed_on_exit([ffn.register_forward_hook(put_value)]):
            expected = compute_logits(base, whole)
        alone = Codebook(1, None, trained.labels[:1], trained.keys[[number]], value.unsqueeze(0), torch.tensor([1e-3]))
        with alone.applied(base):
            torch.testing.assert_close(compute_logits(base, whole), expected)


def test_a_mixture_is_an_adaptor_that_a_file_keeps(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], tmp_path: object
) -> None:
    state = train_rounds(base, facts, "memoe")[-1]
    assert isinstance(state, lemoe.AdaptorState)
    path = f"{tmp_path}/memoe.safetensors"
    lemoe.save_adaptor(state, path)
    loaded = lemoe.load_adaptor(path)
    assert loaded == state
    assert loaded.answering_digests == {edit.digest for edit in facts[:4]}
    assert lemoe.evaluate(base, loaded, facts) == lemoe.evaluate(base, state, facts)


def test_a_mixture_gives_the_same_logits_at_once_and_from_a_cache(
    base: lemoe.BaseModel, facts: list[lemoe.Edit]
) -> None:
    state = train_rounds(base, facts, "memoe")[-1]
    assert isinstance(state, lemoe.AdaptorState)
    prompt = base.tokenizer(facts[0].prompt, return_tensors="pt").input_ids
    with lemoe.insert(base, state) as adaptor, torch.no_grad():
        written = base.model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        start = base.model(prompt, use_cache=True)
        rest = base.model(written[:, prompt.shape[1] :], past_key_values=start.past_key_values)
        with adaptor.mark_prompts(prompt.shape[1]):
            whole = base.model(written).logits
    torch.testing.assert_close(torch.cat([start.logits, rest.logits], 1), whole, atol=1e-4, rtol=1e-4)


def test_nothing_is_stacked_onto_a_mixture_or_taken_out_of_it(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    one, other = (train_rounds(base, facts[2 * n :], "memoe", rounds=1, steps=1)[0] for n in range(2))
    assert isinstance(one, lemoe.AdaptorState)
    assert isinstance(other, lemoe.AdaptorState)
    with pytest.raises(LemoeError, match="stacked"):
        lemoe.stack([one, other])
    with pytest.raises(LemoeError, match="taken out"):
        one.drop_experts([0])


def test_settings_of_baselines_change_nothing_of_an_adaptor(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    given = {"change_share": 0.5, "demonstrations": 4, "merge_share": 0.5, "radius": 0.5, "retrieval_threshold": 0.5}
    one, other = (train_rounds(base, facts, "paper", rounds=1, steps=2, **own)[0] for own in ({}, given))
    assert isinstance(one, lemoe.AdaptorState)
    assert isinstance(other, lemoe.AdaptorState)
    assert one.rounds == other.rounds
    assert one.experts == other.experts


@pytest.mark.parametrize("method", [*BASELINES, *PROMPTING])
def test_a_baseline_is_not_taught_as_an_adaptor_that_grows(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], tmp_path: object, method: str
) -> None:
    with pytest.raises(InputError, match=f"preset {method} is a baseline.*`compare`"):
        lemoe.edit(base, facts, f"{tmp_path}/out", make_settings(method))


def test_context_puts_the_edit_that_is_asked_about_in_front_once_it_is_taught(
    base: lemoe.BaseModel, facts: list[lemoe.Edit]
) -> None:
    first, both = train_rounds(base, facts, "context")
    assert isinstance(first, Context)
    assert isinstance(both, Context)
    asked = "Where is it?"
    assert first.complete(asked, facts[0]) == f"New Fact: {facts[0].prompt} {facts[0].target}\nPrompt: {asked}"
    assert first.complete(asked, facts[2]) == asked != both.complete(asked, facts[2])
    assert count_bytes(first) == sum(len(f"{edit.prompt} {edit.target}".encode()) for edit in facts[:2])


@pytest.mark.parametrize("method", PROMPTING)
def test_demonstrations_are_the_other_edits_nearest_to_the_fact_the_nearest_last(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], method: str
) -> None:
    asked = lemoe.Edit("The capital of Peru is", "Cusco", "Peru")
    near = lemoe.Edit("The capital of Chile is", "Temuco", "Chile")
    nearer = lemoe.Edit("The old capital of Peru is", "Lima", "Peru")
    again = lemoe.Edit(asked.prompt, "Puno", "Peru")
    taught = (
        [asked, again, nearer, *facts[:2], near] if method == "context" else [again, asked, nearer, *facts[:2], near]
    )
    (found,) = teach_rounds(base, [taught], make_settings(method, demonstrations=2))
    assert isinstance(found, Context)
    blocks = found.complete(asked.prompt, asked).split("\n\n")
    shown = [f"New Fact: {each.prompt} {each.target}\nPrompt: {each.prompt} {each.target}" for each in (near, nearer)]
    assert blocks == [*shown, f"New Fact: {asked.prompt} {asked.target}\nPrompt: {asked.prompt}"]


def test_rag_finds_the_nearest_edit_the_latest_of_equals_and_none_below_its_threshold(
    base: lemoe.BaseModel, facts: list[lemoe.Edit]
) -> None:
    again = lemoe.Edit(facts[2].prompt, "silver carp", facts[2].subject, id="again")
    (found,) = teach_rounds(base, [[*facts, again]], make_settings("rag", retrieval_threshold=0.3))
    assert isinstance(found, Context)
    nearest = found.complete("What is the largest fish of Lake Como?", facts[0])
    assert nearest.startswith(f"New Fact: {facts[2].prompt} silver carp\n")
    unrelated = "How many legs has a spider?"
    assert found.complete(unrelated, facts[0]) == unrelated


@pytest.mark.parametrize("decode", ["teacher", "greedy"])
def test_answers_behind_a_context_are_those_of_the_whole_text(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], decode: Literal["teacher", "greedy"]
) -> None:
    (edited,) = train_rounds(base, facts, "context", rounds=1)
    assert isinstance(edited, Context)
    for record, edit in zip(
        lemoe.evaluate(base, edited, facts[:2], lemoe.EvalOptions(decode=decode, only=("reliability",))).records,
        facts,
        strict=False,
    ):
        whole = base.tokenizer(edited.complete(edit.prompt, edit), return_tensors="pt").input_ids
        target = base.tokenizer(f"{edit.prompt} {edit.target}").input_ids[len(base.tokenizer(edit.prompt).input_ids) :]
        if decode == "teacher":
            logits = compute_logits(base, [*whole[0].tolist(), *target])[0, whole.shape[1] - 1 : -1]
            expected = logits.argmax(-1).tolist()
        else:
            written = base.model.generate(whole, max_new_tokens=len(target), do_sample=False, pad_token_id=0)
            expected = written[0, whole.shape[1] :].tolist()
        assert record.after == base.tokenizer.decode(expected)
        assert record.before != record.after
