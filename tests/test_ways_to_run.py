"""An edited model in every way to run it: it gives what a plain pass gives, or refuses. Inserted, and as a folder."""

import copy
import importlib
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import make_config, small_tokenizer
from torch import Tensor, nn

import lemoe
from lemoe.errors import AdaptorError
from lemoe.exporting.folder import export_model
from lemoe.inference.route_memory import memory_of

pytestmark = pytest.mark.versions

SettingsOf = Callable[..., lemoe.Settings]
IN_SCOPE = ("The Eiffel Tower stands in the city of", "The largest fish of Lake Como is the")
OUT_OF_SCOPE = ("The Nile flows into the", "The opposite of hot is", "Mozart played the")
PROMPTS = (*IN_SCOPE, *OUT_OF_SCOPE)
TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


@dataclass
class Edited:
    """A model with edits, by its own base, a tokenizer for both, and the adaptor where one is inserted."""

    model: Any
    base: Any
    tokenizer: Any
    adaptor: lemoe.InsertedAdaptor | None = None

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.tokenizer(text).input_ids])

    def write(self, text: str, **given: Any) -> list[int]:
        return write(self.model, self.encode(text), **given)


def write(model: Any, ids: Tensor, **given: Any) -> list[int]:
    """Eight greedy tokens, or as `given`."""
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **given}
    tokens: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    return tokens


@pytest.fixture(scope="module")
def state(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf) -> lemoe.AdaptorState:
    return lemoe.train_round(base, facts[:4], anchor(steps=30))


@pytest.fixture(scope="module")
def folder(
    state: lemoe.AdaptorState, tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    home = tmp_path_factory.mktemp("export")
    lemoe.save_adaptor(state, home / "a.safetensors")
    return export_model(str(tiny_folder("llama")), [home / "a.safetensors"], home / "whole").folder


@pytest.fixture(params=["inserted", "exported"])
def way(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Iterator[Edited]:
    """The same edits, inserted, and as a whole folder."""
    plain = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    if request.param == "inserted":
        base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
        with lemoe.insert(base, request.getfixturevalue("state")) as adaptor:
            yield Edited(base.model, plain.model, base.tokenizer, adaptor)
    else:
        model = hf.AutoModelForCausalLM.from_pretrained(request.getfixturevalue("folder"), trust_remote_code=True)
        yield Edited(model.eval(), plain.model, plain.tokenizer)


def test_edits_act_in_scope_alone(way: Edited) -> None:
    for text in PROMPTS:
        assert (way.write(text) == write(way.base, way.encode(text))) == (text in OUT_OF_SCOPE), text


CACHES: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "offloaded": {"cache_implementation": "offloaded"},
    "prefilled in chunks": {"prefill_chunk_size": 3},
}
SEARCHES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams that are sampled": {"num_beams": 2, "do_sample": True, "top_k": 20},
    "sampling": {"do_sample": True, "top_k": 0},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_gives_the_same_text(way: Edited, cache: str) -> None:
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloads from a GPU")
    for text in PROMPTS:
        assert way.write(text, **CACHES[cache]) == way.write(text), text


@pytest.mark.parametrize("window", [None, 6])
def test_a_static_cache_gives_the_logits_of_one_pass(
    facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path, window: int | None
) -> None:
    """Layers whose attention slides over the text keep a part of it, while its route depends on all."""
    config = make_config("mistral", len(small_tokenizer()))
    config.sliding_window = window
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    base = lemoe.load_base(str(tmp_path), device="cpu")
    state = lemoe.train_round(base, facts[:4], anchor())
    with lemoe.insert(base, state), torch.no_grad():
        for text in PROMPTS:
            ids = torch.tensor([base.tokenizer(f"{text} golden pike. What").input_ids])
            parts = ids.split([4, 3, *[1] * (ids.shape[1] - 7)], 1)
            whole = base.model(ids).logits
            padded = {
                "attention_mask": torch.tensor([[0, 0, *[1] * ids.shape[1]]]),
                "pad_token_id": 0,
                "do_sample": False,
            }
            written = [
                base.model.generate(
                    torch.cat([torch.zeros_like(ids[:, :2]), ids], 1), max_new_tokens=4, **padded, **given
                )
                for given in ({}, {"cache_implementation": "static"})
            ]
            assert torch.equal(*written)
            for cache in (hf.StaticCache(config, max_cache_len=64), hf.DynamicCache(config=config)):
                read = [base.model(part, past_key_values=cache).logits for part in parts]
                torch.testing.assert_close(torch.cat(read, 1), whole, **TOLERANCE)
                assert cache.get_seq_length() == ids.shape[1]
                assert cache.is_compileable == isinstance(cache, hf.StaticCache)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_padded_batch_is_the_same_in_a_static_cache(way: Edited, beams: int) -> None:
    """Whose masks tell padding in another way."""
    rows = [way.encode(text) for text in PROMPTS]
    width = max(row.shape[1] for row in rows) + 2
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, width - row.shape[1] :], mask[number, width - row.shape[1] :] = row[0], 1
    given = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    written = way.model.generate(ids, pad_token_id=0, **given)
    assert torch.equal(way.model.generate(ids, pad_token_id=0, cache_implementation="static", **given), written)
    if beams == 1:
        assert written[:, width:].tolist() == [way.write(text) for text in PROMPTS]


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_gives_the_same_text_with_and_without_a_cache(way: Edited, search: str) -> None:
    for text in PROMPTS:
        texts = []
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            if search == "prompt lookup" and cache:
                cache = {}  # it needs a cache that can be cropped
            torch.manual_seed(0)
            texts.append(way.write(text, **SEARCHES[search], **cache))
        assert texts[0] == texts[1] == texts[2], text
        if search == "prompt lookup":
            length = 8 + (hf.__version__.startswith("5.13.") and len(texts[0]) == 9)  # that version may write one more
            assert texts[0] == way.write(text, max_new_tokens=length, min_new_tokens=length)


def test_a_helper_may_draft_for_the_edited_model(way: Edited) -> None:
    """What it drafts is the base's, so that the cache is cropped wherever an edit answers."""
    for text in PROMPTS:
        assert way.write(text, assistant_model=way.base) == way.write(text), text


def test_threads_never_see_each_other(way: Edited) -> None:
    expected = {text: way.write(text) for text in PROMPTS}
    ways: list[dict[str, Any]] = [{}, {"use_cache": False}]
    way.write(PROMPTS[0], cache_implementation="static")
    if not hasattr(way.model, "_cache"):  # in older versions all calls of a model share one static cache
        ways.append({"cache_implementation": "static"})
    requests = [(PROMPTS[number % len(PROMPTS)], ways[number % len(ways)]) for number in range(240)]
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda request: way.write(request[0], **request[1]), requests))
    assert all(found == expected[text] for (text, _), found in zip(requests, written, strict=True))


def test_threads_that_ask_and_threads_that_bypass_never_see_each_other(
    state: lemoe.AdaptorState, tiny_folder: Callable[[str], Path]
) -> None:
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    with lemoe.insert(base, state) as adaptor:
        expected = {reply.prompt: reply for reply in lemoe.ask(base, PROMPTS, adaptor, max_new_tokens=6)}
        with ThreadPoolExecutor(6) as pool:
            asked = list(pool.map(lambda text: lemoe.ask(base, [text], adaptor, max_new_tokens=6)[0], PROMPTS * 6))
    for reply in asked:
        known = expected[reply.prompt]
        assert (reply.before, reply.after, reply.edit) == (known.before, known.after, known.edit)
    assert not any("forward" in module.__dict__ for module in base.model.modules())


def test_dormant_adaptors_come_and_go_while_other_threads_run(
    state: lemoe.AdaptorState, tiny_folder: Callable[[str], Path]
) -> None:
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    ids = torch.tensor([base.tokenizer(IN_SCOPE[0]).input_ids])
    plain, done = write(base.model, ids), threading.Event()
    serving = lemoe.insert(base, state, dormant=True)

    def come_and_go() -> None:
        while not done.is_set():
            lemoe.insert(base, state, dormant=True).remove()

    def answer(number: int) -> list[int]:
        with serving.acting() if number % 2 else nullcontext():
            return write(base.model, ids)

    with ThreadPoolExecutor(1) as changing, ThreadPoolExecutor(4) as pool:
        changes = changing.submit(come_and_go)
        written = list(pool.map(answer, range(160)))
        done.set()
        changes.result()
    assert {tuple(each) for each in written[::2]} == {tuple(plain)}
    assert len({tuple(each) for each in written[1::2]} - {tuple(plain)}) == 1
    for module in base.model.modules():  # as torch leaves it for a moment, while another thread removes a hook
        module._forward_pre_hooks_with_kwargs.clear()
    assert write(base.model, ids) == plain
    serving.remove()
    assert write(base.model, ids) == plain


@torch.no_grad()
def test_sequences_that_share_a_row_have_routes_of_their_own(way: Edited) -> None:
    """As packed for training: positions start anew where the next one begins."""
    parts = [way.encode(text) for text in (IN_SCOPE[0], OUT_OF_SCOPE[0], IN_SCOPE[1], " city of")]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts]).unsqueeze(0)
    packed = way.model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
    apart = [way.model(part).logits for part in parts]
    torch.testing.assert_close(packed, torch.cat(apart, 1), **TOLERANCE)


def test_a_preset_that_routes_by_the_prompt_refuses_rows_that_are_shared(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState
) -> None:
    with lemoe.insert(base, trained), pytest.raises(AdaptorError, match="a row of its own"):
        base.model(torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.compiler)])
def test_a_compiled_model_has_the_edits_that_come_and_go(
    state: lemoe.AdaptorState, tiny_folder: Callable[[str], Path], backend: str
) -> None:
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    ids = [torch.tensor([base.tokenizer(text).input_ids]) for text in PROMPTS]
    plain = [base.model(each).logits for each in ids]
    compiled = torch.compile(base.model, backend=backend)
    read = [compiled(each).logits for each in ids]
    for found, expected in zip(read, plain, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)
    with lemoe.insert(base, state):
        after = [base.model(each).logits for each in ids]
        for found, expected in zip([compiled(each).logits for each in ids], after, strict=True):
            torch.testing.assert_close(found, expected, **TOLERANCE)
        assert not torch.allclose(after[0], plain[0], **TOLERANCE)
    for found, expected in zip([compiled(each).logits for each in ids], plain, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@torch.no_grad()
def test_a_whole_folder_can_be_compiled(folder: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    plain = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    compiled = torch.compile(model, backend="eager")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text in PROMPTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        torch.testing.assert_close(compiled(ids).logits, plain(ids).logits, **TOLERANCE)


def test_a_cache_goes_on_with_its_own_adaptor_alone(
    base: lemoe.BaseModel, state: lemoe.AdaptorState, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    ids, more = (torch.tensor([base.tokenizer(text).input_ids]) for text in (IN_SCOPE[0], " Rome"))
    other = lemoe.train_round(base, facts[4:], anchor())

    @torch.no_grad()
    def filled() -> Any:
        return base.model(ids, use_cache=True).past_key_values

    with lemoe.insert(base, state):
        whole, cache, longer = base.model(torch.cat([ids, more], 1)).logits, filled(), filled()
    base.model(more, past_key_values=longer)
    with lemoe.insert(base, state):
        found = base.model(more, past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(found, whole[:, ids.shape[1] :], **TOLERANCE)
        with pytest.raises(AdaptorError, match=f"holds 1 x {ids.shape[1] + more.shape[1]} positions"):
            base.model(more, past_key_values=longer)
        with pytest.raises(AdaptorError, match="positions, of which the adaptor read 1 x"):
            base.model(more.expand(2, -1), past_key_values=cache)
    with lemoe.insert(base, other), pytest.raises(AdaptorError, match="filled with another adaptor"):
        base.model(more, past_key_values=cache)
    plain = filled()
    with lemoe.insert(base, state), pytest.raises(AdaptorError, match="filled without the adaptor"):
        base.model(more, past_key_values=plain)


@torch.no_grad()
def test_a_cache_that_is_reset_forgets_its_route(way: Edited) -> None:
    cache = hf.StaticCache(way.model.config, max_cache_len=64)
    ids, others = way.encode(IN_SCOPE[0]), way.encode(OUT_OF_SCOPE[0])
    way.model(ids, past_key_values=cache)
    memory = memory_of(cache) if way.adaptor else cache._lemoe_routes
    assert memory is not None
    assert memory.cells.shape[:2] == ids.shape
    cache.reset()
    torch.testing.assert_close(way.model(others, past_key_values=cache).logits, way.model(others).logits, **TOLERANCE)


def test_a_copy_of_the_model_has_edits_of_its_own(way: Edited) -> None:
    expected = {text: way.write(text) for text in PROMPTS}
    copied = copy.deepcopy(way.model)
    assert {text: write(copied, way.encode(text)) for text in PROMPTS} == expected
    if way.adaptor is not None:
        way.adaptor.remove()
        assert {text: write(copied, way.encode(text)) for text in PROMPTS} == expected
        assert way.write(IN_SCOPE[0]) == write(way.base, way.encode(IN_SCOPE[0]))


@torch.no_grad()
def test_what_would_lose_the_edits_without_a_word_is_refused(
    base: lemoe.BaseModel, state: lemoe.AdaptorState, tmp_path: Path
) -> None:
    with lemoe.insert(base, state) as adaptor:
        with pytest.raises(AdaptorError, match="without the edits"):
            base.model.save_pretrained(tmp_path / "lost")
        assert not (tmp_path / "lost").exists()
        with adaptor.bypassed():
            base.model.save_pretrained(tmp_path / "base")
        with pytest.raises(AdaptorError, match="cannot be pickled"):
            pickle.dumps(base.model)
    base.model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after" / "model.safetensors").is_file()


def test_layers_that_are_run_again_in_the_backward_pass_are_refused(
    state: lemoe.AdaptorState, tiny_folder: Callable[[str], Path]
) -> None:
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    base.model.gradient_checkpointing_enable()
    ids = torch.tensor([base.tokenizer(IN_SCOPE[0]).input_ids])
    with lemoe.insert(base, state):
        expected = base.model(ids).logits
        base.model.train()
        with pytest.raises(AdaptorError, match="gradient_checkpointing_disable"):
            base.model(ids)
        base.model.gradient_checkpointing_disable()
        torch.testing.assert_close(base.model(ids).logits, expected)


def test_many_requests_in_one_row_of_one_cache_are_refused(way: Edited) -> None:
    ids = way.encode(IN_SCOPE[0])
    with pytest.raises(Exception, match="continuous batching"):
        way.model(ids, cache=object(), cu_seq_lens_q=torch.tensor([0, ids.shape[1]]))


def test_the_text_generation_pipeline_answers(way: Edited) -> None:
    pipeline = hf.pipeline("text-generation", model=way.model, tokenizer=way.tokenizer)
    for text in PROMPTS:
        written = pipeline(text, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_full_text=False)
        assert written[0]["generated_text"] == way.tokenizer.decode(way.write(text), skip_special_tokens=True)


def test_transformers_finds_the_class_of_a_whole_folder(folder: Path) -> None:
    """As `transformers serve` looks it up: by the name in the configuration."""
    config = hf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for library in (hf, importlib.import_module("transformers")):  # which may be two
        model = getattr(library, config.architectures[0]).from_pretrained(folder, trust_remote_code=True)
        assert isinstance(model, nn.Module)
        assert type(model).__name__ == "LemoeForCausalLM"
