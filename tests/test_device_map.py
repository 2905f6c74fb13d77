"""A base spread over several devices, parts of it on disk: everything works as on one device."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import FACTS

import lemoe
from lemoe.adaptor.checkpoint import save_adaptor
from lemoe.base.frozen import compute_prefix_activations
from lemoe.base.tokens import Batch, encode_edits
from lemoe.errors import ModelError
from lemoe.evaluation.metrics import Decode
from lemoe.training import rounds
from lemoe_cli.main import cli

pytestmark = pytest.mark.versions

SettingsOf = Callable[..., lemoe.Settings]
Placement = Mapping[str, str | int]

MODULES = {"embedding": "model.embed_tokens", "norm": "model.norm", "rotary": "model.rotary_emb", "head": "lm_head"}
PROMPT = FACTS[0][1]
EDITED = 1  # of three layers


@pytest.fixture(scope="module")
def devices() -> tuple[str | int, str | int]:
    """The devices of the near and the far parts of a model: two devices of one kind, or this one and its disk."""
    return (0, 1) if torch.cuda.device_count() > 1 else ("cpu", "disk")


@pytest.fixture(scope="module")
def base(tiny_folder: Callable[[str], Path], devices: tuple[str | int, str | int]) -> lemoe.BaseModel:
    """The tiny llama on one device."""
    return lemoe.load_base(str(tiny_folder("llama")), device="cpu" if devices[0] == "cpu" else "cuda:0")


def make_device_map(near: str | int, far: str | int, *parts: str | int) -> Placement:
    """A map with `parts` (layers by number) on `far` and the rest on `near`."""
    layers: dict[str | int, str] = {layer: f"model.layers.{layer}" for layer in range(3)}
    return {name: far if part in parts else near for part, name in (layers | {**MODULES}).items()}


SPREADS: dict[str, tuple[str | int, ...]] = {
    "the edited layer": (EDITED,),
    "the layer above": (2,),
    "all above": (2, "norm", "head"),
    "all of it": (0, 1, 2, *MODULES),
}


@pytest.fixture(scope="module", params=list(SPREADS.values()), ids=list(SPREADS))
def spread(
    request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path], devices: tuple[str | int, str | int]
) -> lemoe.BaseModel:
    """The same model, with these parts on the far device."""
    return lemoe.load_base(str(tiny_folder("llama")), device_map=make_device_map(*devices, *request.param))


def saved_bytes(state: lemoe.AdaptorState, file: Path) -> bytes:
    save_adaptor(state, file)
    return file.read_bytes()


@pytest.fixture(scope="module")
def settings(anchor: SettingsOf, paper: SettingsOf) -> dict[str, lemoe.Settings]:
    return {"anchor": anchor(layer=EDITED), "paper": paper(layer=EDITED)}


@pytest.fixture(scope="module")
def states(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], settings: dict[str, lemoe.Settings]
) -> dict[str, lemoe.AdaptorState]:
    """A round of each method, trained on one device."""
    return {method: lemoe.train_round(base, facts[:3], chosen) for method, chosen in settings.items()}


def offloaded_weights(base: lemoe.BaseModel) -> set[str]:
    """The weights that are not in memory."""
    return {name for name, parameter in base.model.named_parameters() if parameter.is_meta}


def test_a_spread_model_has_the_fingerprint_of_the_model_on_one_device(
    base: lemoe.BaseModel, spread: lemoe.BaseModel
) -> None:
    before = offloaded_weights(spread)
    for layer in range(3):
        assert spread.fingerprint(layer) == base.fingerprint(layer)
    assert offloaded_weights(spread) == before


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt"])
def test_tied_weights_on_disk_count_once(
    tiny: Callable[[str], lemoe.BaseModel], tiny_folder: Callable[[str], Path], family: str
) -> None:
    spread = lemoe.load_base(str(tiny_folder(family)), device_map={"": "disk"})
    assert offloaded_weights(spread)
    assert spread.fingerprint(EDITED) == tiny(family).fingerprint(EDITED)


@pytest.mark.parametrize("method", ["anchor", "paper"])
def test_rounds_trained_on_a_spread_model_are_byte_for_byte_those_of_one_device(
    spread: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    settings: dict[str, lemoe.Settings],
    states: dict[str, lemoe.AdaptorState],
    tmp_path: Path,
    method: str,
) -> None:
    before = offloaded_weights(spread)
    state = lemoe.train_round(spread, facts[:3], settings[method])
    assert saved_bytes(state, tmp_path / "spread") == saved_bytes(states[method], tmp_path / "one")
    assert offloaded_weights(spread) == before


@pytest.mark.parametrize("decode", ["teacher", "greedy"])
@pytest.mark.parametrize("method", ["anchor", "paper"])
def test_a_spread_model_is_measured_and_asked_as_on_one_device(
    base: lemoe.BaseModel,
    spread: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    states: dict[str, lemoe.AdaptorState],
    method: str,
    decode: Decode,
) -> None:
    expected, found = (
        lemoe.evaluate(each, states[method], facts, lemoe.EvalOptions(decode=decode)) for each in (base, spread)
    )
    assert repr(found) == repr(expected)  # NaN where nothing was measured


@pytest.mark.parametrize("method", ["anchor", "paper"])
def test_answers_of_a_spread_model_are_those_of_one_device_and_its_own_again_when_removed(
    base: lemoe.BaseModel, spread: lemoe.BaseModel, states: dict[str, lemoe.AdaptorState], method: str
) -> None:
    ids = base.tokenizer(PROMPT, return_tensors="pt").input_ids
    before = offloaded_weights(spread)
    own, _ = (each.model(ids.to(each.device)).logits for each in (spread, base))
    said = []
    for each in (base, spread):
        with lemoe.insert(each, states[method]) as edited:
            replies = lemoe.ask(each, [PROMPT, "Another question?"], edited, max_new_tokens=4)
            inputs = ids.to(each.device)
            beams = each.model.generate(inputs, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
            said.append((replies, beams.tolist(), each.model(inputs).logits.cpu()))
    assert said[1][:2] == said[0][:2]
    torch.testing.assert_close(said[1][2], said[0][2], rtol=0, atol=0)
    assert not torch.equal(said[1][2], own.cpu())
    assert torch.equal(spread.model(ids.to(spread.device)).logits, own)
    assert offloaded_weights(spread) == before


def test_plans_of_a_spread_model_are_those_of_one_device(
    base: lemoe.BaseModel, spread: lemoe.BaseModel, facts: list[lemoe.Edit], settings: dict[str, lemoe.Settings]
) -> None:
    assert lemoe.plan(spread, facts, settings["anchor"]) == lemoe.plan(base, facts, settings["anchor"])


def test_weights_of_offloaded_layers_are_not_held_for_the_backward_pass(
    base: lemoe.BaseModel, tiny_folder: Callable[[str], Path], facts: list[lemoe.Edit]
) -> None:
    offloaded = lemoe.load_base(str(tiny_folder("llama")), device_map=make_device_map(str(base.device), "disk", 2))
    weight = torch.Size([48, 32])
    gradients = []
    for each in (base, offloaded):
        passages = encode_edits(each, facts[:3])
        frozen = compute_prefix_activations(each, each.ffn_site(EDITED), EDITED, passages, 64).freeze_batch(
            Batch.from_passages(passages, range(3), each.pad_token_id, each.device)
        )
        delta = torch.full(frozen.output.shape, 0.1, device=each.device, requires_grad=True)
        held: list[torch.Size] = []

        def record_shape(tensor: torch.Tensor, held: list[torch.Size] = held) -> torch.Tensor:
            held.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record_shape, lambda tensor: tensor):
            hidden = frozen.replay(delta)
        assert (weight in held) == (each is base)
        hidden.sin().sum().backward()
        assert delta.grad is not None
        gradients.append(delta.grad)
    assert torch.equal(*gradients)
    assert all(parameter.is_meta for parameter in offloaded.layers[2].parameters())


@pytest.mark.parametrize("method", ["ft", "rect", "lora", "lora-merge", "ultraedit"])
def test_baselines_that_change_weights_refuse_a_model_with_weights_on_disk(
    tiny_folder: Callable[[str], Path], facts: list[lemoe.Edit], method: str
) -> None:
    base = lemoe.load_base(str(tiny_folder("llama")), device_map=make_device_map("cpu", "disk", 2))
    settings = lemoe.resolve_settings(method, None, {"layer": EDITED, "steps": 1})
    with pytest.raises(ModelError, match="this baseline changes the base's own weights"):
        list(rounds.teach_rounds(base, [facts[:1]], settings))


def test_a_map_together_with_a_device_or_one_that_does_not_fit_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    folder = str(tiny_folder("llama"))
    with pytest.raises(ModelError, match="`device` cpu and `device_map` exclude each other"):
        lemoe.load_base(folder, device="cpu", device_map="auto")
    for unfit in ({"model.layers.0": "cpu", "model.layers.1": "disk"}, {"": "cuda:99"}):
        with pytest.raises(ModelError, match="cannot be loaded: "):
            lemoe.load_base(folder, device_map=unfit)


def test_the_command_line_spreads_a_model_as_the_memory_allows(
    tiny_folder: Callable[[str], Path], facts: list[lemoe.Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_folder("llama"))
    edits = tmp_path / "edits.jsonl"
    lines = ({"prompt": edit.prompt, "target": edit.target, "subject": edit.subject} for edit in facts[:2])
    edits.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not torch.cuda.is_available():  # else the model fits into main memory
        here = "transformers.integrations.accelerate.accelerate_max_memory"
        monkeypatch.setattr(here, lambda given: {"cpu": 120_000})
        assert offloaded_weights(lemoe.load_base(model, device_map="auto"))
    spread = ("--device-map", "auto")
    adaptor = tmp_path / "edits.lemoe" / "adaptor.safetensors"
    plan = run_command("plan", edits, "--model", model)
    assert run_command("plan", edits, "--model", model, *spread) == plan
    run_command("edit", edits, "--model", model, *spread, "--layer", "1", "--steps", "4")
    measured = ("eval", edits, "--model", model, "--adaptor", adaptor)
    assert run_command(*measured, *spread) == run_command(*measured)
    asked = ("ask", PROMPT, "--model", model, "--adaptor", adaptor, "--max-new-tokens", "2")
    assert run_command(*asked, *spread) == run_command(*asked)


def run_command(*arguments: object) -> str:
    """What a command prints on stdout."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
