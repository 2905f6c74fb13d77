"""What only a real model shows: that edits are learned; and that the embedded model is the one that is documented."""

import subprocess
import sys
from pathlib import Path

import pytest

import lemoe
from lemoe.base.embedded import embedded_folder

pytestmark = pytest.mark.real

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "edits.jsonl"


@pytest.fixture(scope="module")
def ten() -> list[lemoe.Edit]:
    """The first ten examples that do not replace each other."""
    return lemoe.read_edits(EXAMPLES)[:10]


@pytest.fixture(scope="module")
def report(
    real_base: lemoe.BaseModel, ten: list[lemoe.Edit], tmp_path_factory: pytest.TempPathFactory
) -> "lemoe.runs.edit.EditReport":
    settings = lemoe.resolve_settings("paper", None, {"width": 32, "round_size": 5})
    return lemoe.edit(real_base, ten, tmp_path_factory.mktemp("real") / "run", settings)


def test_the_embedded_model_is_loaded_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, real_base: lemoe.BaseModel
) -> None:
    def fail_subprocess(*args: object, **kwargs: object) -> None:
        raise AssertionError("a subprocess was started although the model is in the cache")

    monkeypatch.setattr(subprocess, "run", fail_subprocess)
    said: list[str] = []
    assert (embedded_folder(said.append) / "model.safetensors").is_file()
    assert said == []


def test_the_embedded_model_is_smollm2(real_base: lemoe.BaseModel) -> None:
    assert type(real_base.model).__name__ == "LlamaForCausalLM"
    assert (len(real_base.layers), real_base.hidden_size) == (30, 576)
    assert real_base.source.layers == {"anchor": 28, "paper": 24, "ft": 24, "rect": 24, "memoe": 24}


def test_the_end_token_is_the_one_that_ends_a_chat_turn(real_base: lemoe.BaseModel) -> None:
    assert real_base.tokenizer.decode([real_base.eos_token_id]) == "<|im_end|>"


def test_ten_examples_are_learned(report: "lemoe.runs.edit.EditReport") -> None:
    assert report.taught == 10
    assert report.reliability_before < 0.3
    assert report.reliability_after > 0.9
    assert report.exact_after > 0.8


def test_the_model_writes_what_it_was_taught_and_forgets_it_when_the_adaptor_is_removed(
    real_base: lemoe.BaseModel, report: "lemoe.runs.edit.EditReport", ten: list[lemoe.Edit]
) -> None:
    eiffel = ten[0]
    with lemoe.insert(real_base, report.path):
        assert lemoe.answer(real_base, eiffel.prompt, max_new_tokens=4).strip().startswith(eiffel.target)
    assert "generate" not in vars(real_base.model)
    greedy = lemoe.evaluate(real_base, report.state, ten[:5], lemoe.EvalOptions(decode="greedy", only=("reliability",)))
    assert greedy.value("reliability", stage="before") < greedy.value("reliability")


def test_runs_that_were_trained_apart_answer_together(real_base: lemoe.BaseModel, ten: list[lemoe.Edit]) -> None:
    settings = lemoe.resolve_settings("paper", None, {"width": 32})
    parts = [lemoe.train_round(real_base, edits, settings) for edits in (ten[:4], ten[4:8])]
    result = lemoe.evaluate(real_base, lemoe.stack(parts), ten[:8], lemoe.EvalOptions(only=("reliability",)))
    apart = [
        lemoe.evaluate(real_base, part, edits, lemoe.EvalOptions(only=("reliability",))).value("reliability")
        for part, edits in zip(parts, (ten[:4], ten[4:8]), strict=True)
    ]
    assert min(apart) > 0.9
    assert result.value("reliability") > 0.5


def test_the_command_teaches_the_real_model(tmp_path: Path) -> None:
    arguments = ["edit", EXAMPLES, "--model", "llama", "--preset", "paper", "--width", "32", "--device", "cpu"]
    arguments += ["--limit", "3", "-o", tmp_path / "run"]
    code = "from lemoe_cli.main import cli; cli()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[0].startswith("model: llama = SmolLM2-135M-Instruct")
    assert "3 edits taught" in result.stdout
