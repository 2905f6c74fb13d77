"""The card beside an adaptor: front matter that the Hub reads, what was measured, and no word of this machine."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from test_cli import lemoe_command

import lemoe
from lemoe.base.embedded import HUB_ID
from lemoe.base.sources import ModelSource
from lemoe.errors import InputError
from lemoe.report.card import write_card

SettingsOf = Callable[..., lemoe.Settings]


@pytest.fixture
def folder(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path) -> Path:
    lemoe.edit(base, facts[:2], tmp_path / "capitals", anchor())
    return tmp_path / "capitals"


def read_front_matter(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text().split("---\n")[1])
    return found


def test_a_run_writes_a_card_that_the_hub_reads(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "lemoe"
    assert "model-editing" in (card.data.tags or [])
    assert "teaches 2 edits to `llama`" in card.text
    assert str(folder.parent) not in card.content


def test_measuring_brings_the_card_up_to_date_and_leaves_what_people_wrote(
    folder: Path, tiny_folder: Callable[[str], Path], facts: list[lemoe.Edit], tmp_path: Path
) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text() + "\n## Licence\n\nOurs.\n")
    edits = tmp_path / "edits.jsonl"
    edits.write_text(f'{{"id": "{facts[0].id}", "prompt": "{facts[0].prompt}", "target": "{facts[0].target}"}}')
    where = ("-a", folder, "--model", tiny_folder("llama"), "--device", "cpu")
    for _ in range(2):
        assert lemoe_command("eval", edits, *where, "--card").exit_code == 0
        found = card.read_text()
        assert found.count("## Measured on edits.jsonl") == 1
        assert found.count("## Licence") == 1
        assert found.count("<!-- lemoe -->") == 1
    (entry,) = read_front_matter(card)["model-index"]
    metrics = [metric for result in entry["results"] for metric in result["metrics"]]
    assert {"type": "exact_match", "value": 1.0, "name": "reliability, all (teacher)"} in metrics


HOSTILE = "<script>alert(1)</script>|`x`\n# heading\x1b[2J @user [red]x[/red] :warning: \x9b31m"


def test_what_an_edits_file_names_stays_text_in_card_report_and_terminal(
    folder: Path, tiny_folder: Callable[[str], Path], facts: list[lemoe.Edit], tmp_path: Path
) -> None:
    edits = tmp_path / "edits.jsonl"
    probes = [{"prompt": HOSTILE, "target": "<i>\x1b[1m", "kind": kind} for kind in (HOSTILE, "b")]
    edit = {"id": HOSTILE, "prompt": facts[0].prompt, "target": facts[0].target, "rephrases": probes}
    edits.write_text(json.dumps(edit))
    reports = ("--report", tmp_path / "a.html", "--report", tmp_path / "a.md", "--decode", "greedy")
    where = ("-a", folder, "--model", tiny_folder("llama"), "--device", "cpu")
    result = lemoe_command("eval", edits, *where, "--card", *reports)
    assert result.exit_code == 0
    card = (folder / "README.md").read_text()
    for text in (card, result.output, (tmp_path / "a.html").read_text(), (tmp_path / "a.md").read_text()):
        assert not {char for char in text if unicodedata.category(char) == "Cc"} - {"\n"}
    for text in (card, (tmp_path / "a.html").read_text(), (tmp_path / "a.md").read_text()):
        assert "<script" not in text
    assert "@user" not in card.partition("<!-- lemoe -->")[2]
    rows = [line for line in card.splitlines() if line.startswith("| generality")]
    assert {line.count("|") for line in rows} == {7}
    assert any("script alert 1" in line for line in rows)
    shown = lemoe_command("ask", HOSTILE, *where, "--max-new-tokens", "1").stdout
    assert "[red]x[/red] :warning:" in " ".join(shown.split())
    assert "\x1b" not in shown


def test_a_card_whose_front_matter_is_made_to_harm_is_brought_up_to_date(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    state = lemoe.train_round(base, facts[:2], anchor())
    for before in ("[" * 5000, 'a: !!int ""'):
        (tmp_path / "README.md").write_text(f"---\n{before}\n---\nOurs.\n")
        write_card(tmp_path, base, state)
        assert read_front_matter(tmp_path / "README.md")["library_name"] == "lemoe"


def test_a_card_that_was_there_before_is_kept(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nOurs.\n")
    write_card(tmp_path, base, lemoe.train_round(base, facts[:2], anchor()))
    assert (tmp_path / "README.md").read_text().endswith("Ours.\n")
    assert read_front_matter(tmp_path / "README.md")["license"] == "mit"


def test_a_card_that_is_not_text_is_left_alone(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as text"):
        write_card(tmp_path, base, lemoe.train_round(base, facts[:2], anchor()))


def test_the_base_is_named_as_the_hub_names_it(tmp_path: Path) -> None:
    assert ModelSource("llama", "x", embedded=True).hub_id == HUB_ID
    assert ModelSource("org/name", "org/name").hub_id == "org/name"
    local = ModelSource(str(tmp_path), str(tmp_path))
    assert (local.hub_id, local.shared_name) == (None, tmp_path.name)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (ModelSource("llama", "x", embedded=True), "llama"),  # not the hub's own, of which it is a 4-bit copy
        (ModelSource("mine", "org/name"), "org/name"),
    ],
)
def test_the_card_loads_the_very_base_that_the_edits_were_made_for(
    tiny_folder: Callable[[str], Path],
    facts: list[lemoe.Edit],
    anchor: SettingsOf,
    tmp_path: Path,
    source: ModelSource,
    name: str,
) -> None:
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    base.source = source
    card = write_card(tmp_path, base, lemoe.train_round(base, facts[:2], anchor()))
    assert f'load_base("{name}")' in card.read_text()


def test_eval_without_an_adaptor_has_no_card(tmp_path: Path) -> None:
    assert lemoe_command("eval", tmp_path / "x", "--model", "llama", "--card").exit_code == 2
