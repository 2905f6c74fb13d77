"""Experts that are read when they are needed: the same answers, and no more in memory than the cache size."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import lemoe
from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.errors import AdaptorError
from lemoe.inference.expert_cache import ExpertCache
from lemoe.inference.insertion import InsertedAdaptor
from lemoe_cli.main import cli
from lemoe_cli.options import Size

SettingsOf = Callable[..., lemoe.Settings]


@pytest.fixture
def path(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path) -> Path:
    file = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(lemoe.train_round(base, facts, anchor(width=4)), file)  # all experts of one size
    return file


def expert_size(path: Path) -> int:
    return AdaptorFile(path).state.experts.select([0]).nbytes


def batch_logits(base: lemoe.BaseModel, prompts: list[str]) -> torch.Tensor:
    tokenizer = base.tokenizer
    tokenizer.padding_side = "left"
    with torch.no_grad():
        return base.model(**tokenizer(prompts, return_tensors="pt", padding=True)).logits


@pytest.mark.parametrize("cached", [0, 1, 3, 100])
def test_answers_are_those_of_an_adaptor_in_memory_however_few_experts_are_cached(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], path: Path, cached: int
) -> None:
    batches = [[fact.prompt for fact in facts], [facts[3].prompt], [facts[0].prompt], ["Nothing is known of this."]]
    with lemoe.insert(base, path):
        expected = [batch_logits(base, batch) for batch in batches]
        written = lemoe.answer(base, facts[2].prompt)
    with lemoe.insert(base, path, expert_cache=cached * expert_size(path)):
        assert all(torch.equal(batch_logits(base, batch), one) for batch, one in zip(batches, expected, strict=True))
        assert lemoe.answer(base, facts[2].prompt) == written


def test_preset_paper_reads_its_experts_on_demand_too(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, facts: list[lemoe.Edit], tmp_path: Path
) -> None:
    lemoe.save_adaptor(trained, tmp_path / "paper.safetensors")
    with lemoe.insert(base, trained):
        expected = batch_logits(base, [facts[0].prompt, facts[2].prompt])
    with lemoe.insert(base, tmp_path / "paper.safetensors", expert_cache=1):
        assert torch.equal(batch_logits(base, [facts[0].prompt, facts[2].prompt]), expected)


def test_the_least_recently_used_experts_are_evicted_first(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], path: Path
) -> None:
    file = AdaptorFile(path)
    cache = ExpertCache(file, base.device, 2 * expert_size(path))
    with InsertedAdaptor(base, file.state, experts=cache):
        for number, reads in ((2, 1), (3, 2), (2, 2), (4, 3), (2, 3), (3, 4)):
            batch_logits(base, [facts[number].prompt])
            assert cache.reads == reads


def test_a_file_that_changes_while_it_is_used_gives_an_error(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], path: Path
) -> None:
    with lemoe.insert(base, path, expert_cache=0):
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(AdaptorError, match="cannot be read any more"):
            batch_logits(base, [fact.prompt for fact in facts])


def test_metrics_are_those_of_an_adaptor_in_memory(base: lemoe.BaseModel, facts: list[lemoe.Edit], path: Path) -> None:
    whole = lemoe.evaluate(base, lemoe.load_adaptor(path), facts)
    assert lemoe.evaluate(base, AdaptorFile(path), facts, lemoe.EvalOptions(expert_cache=expert_size(path))) == whole
    assert lemoe.evaluate(base, AdaptorFile(path), facts) == whole


def run_command(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands_print_the_same_with_few_experts_in_memory(
    tiny_folder: Callable[[str], Path], facts: list[lemoe.Edit], path: Path, tmp_path: Path
) -> None:
    edits = tmp_path / "edits.jsonl"
    lines = (json.dumps({"prompt": fact.prompt, "target": fact.target, "subject": fact.subject}) for fact in facts)
    edits.write_text("\n".join(lines))
    model = ("--model", tiny_folder("llama"), "--adaptor", path, "--quiet", "--json")
    for command in (("ask", facts[0].prompt, facts[2].prompt), ("eval", edits)):
        assert run_command(*command, *model, "--expert-cache", "1K") == run_command(*command, *model)


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("700", 700), ("64M", 64 << 20), ("1.5g", 3 << 29), ("2KiB", 2048)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("--expert-cache", "64M"), "needs an --adaptor"), (("--adaptor", "a", "--expert-cache", "lots"), "64M or 2G")],
)
def test_a_cache_of_nothing_and_a_size_that_is_none_are_refused(arguments: tuple[str, ...], reason: str) -> None:
    result = CliRunner().invoke(cli, ["ask", "Who?", "--model", "llama", *arguments])
    assert result.exit_code == 2
    assert reason in result.stderr
