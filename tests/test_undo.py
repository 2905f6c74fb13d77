"""`lemoe undo`: edits are found by what they teach, and taken out once somebody agrees."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import lemoe
from lemoe.adaptor.finding import find_edits
from lemoe.adaptor.merging import merge_adaptors
from lemoe.adaptor.state import TaughtEdit
from lemoe_cli.main import cli

TAUGHT = [
    TaughtEdit("e1", "1", "The CEO of Acme is", "Ada Byron", 1),
    TaughtEdit("e2", "2", "The CEO of Globex is", "Bo Li", 1),
    TaughtEdit("e3", "3", "Acme was founded in", "1931", 2),
    TaughtEdit("e4", "4", "Who wrote Solaris?", "Stanisław Lem", 2),
]


@pytest.mark.parametrize(
    ("text", "best"),
    [
        ("the CEO of Acme", "e1"),
        ("globex", "e2"),
        ("Globx edit", "e2"),
        ("when acme was founded", "e3"),
        ("Lem", "e4"),
        ("e3", "e3"),
        ("2/e4", "e4"),
    ],
)
def test_an_edit_is_found_by_words_of_it_or_by_its_id(text: str, best: str) -> None:
    assert find_edits(TAUGHT, text)[0].edit.id == best


def test_edits_that_fit_as_well_are_found_too_and_others_are_not() -> None:
    assert {found.edit.id for found in find_edits(TAUGHT, "the CEO")} == {"e1", "e2"}
    assert [found.edit.id for found in find_edits(TAUGHT, "e1")] == ["e1"]
    assert find_edits(TAUGHT, "volcano") == []


@pytest.fixture
def adaptor(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: Callable[..., lemoe.Settings], tmp_path: Path
) -> Path:
    path = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(lemoe.train_round(base, facts[:3], anchor(steps=1)), path)
    return path


def undo(adaptor: Path, *arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(cli, ["undo", str(adaptor), *arguments], input=answer)


def test_undo_shows_asks_and_writes_what_dropping_the_edit_gives(
    adaptor: Path, facts: list[lemoe.Edit], tmp_path: Path
) -> None:
    merge_adaptors([adaptor], tmp_path / "expected", drop=[facts[1].id])
    before = adaptor.read_bytes()
    for answer, code, said in (("n\n", 1, "Aborted!"), ("", 2, "nobody is there to answer: --yes")):
        refused = undo(adaptor, facts[1].prompt, answer=answer)
        assert (refused.exit_code, adaptor.read_bytes() == before) == (code, True)
        assert said in refused.stderr
        assert f"-> 1/{facts[1].label}" in " ".join(refused.stderr.split())
    elsewhere = undo(adaptor, facts[1].prompt, "-o", str(tmp_path / "other"), "--yes")
    assert (elsewhere.exit_code, adaptor.read_bytes() == before) == (0, True)
    assert undo(adaptor, facts[1].prompt, answer="y\n").exit_code == 0
    assert adaptor.read_bytes() == (tmp_path / "other").read_bytes() == (tmp_path / "expected").read_bytes()


def test_what_no_edit_has_is_refused_and_an_output_that_exists_stays(
    adaptor: Path, facts: list[lemoe.Edit], tmp_path: Path
) -> None:
    unknown = undo(adaptor, "volcano", "--yes")
    assert (unknown.exit_code, "no edit has words of 'volcano'" in unknown.stderr) == (2, True)
    (tmp_path / "there").write_text("precious")
    refused = undo(adaptor, facts[1].prompt, "--yes", "-o", str(tmp_path / "there"))
    assert (refused.exit_code, (tmp_path / "there").read_text()) == (2, "precious")
