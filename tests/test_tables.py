"""Edits as CSV and TSV, and files of other kinds."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lemoe
from lemoe.data.tables import parse_table
from lemoe.errors import InputError


def read_text(folder: Path, name: str, text: str) -> list[lemoe.Edit]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return lemoe.read_edits(path)


def refusal_lines(folder: Path, name: str, content: bytes) -> list[str]:
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        lemoe.read_edits(path)
    return [line.strip().removeprefix(f"{folder}/") for line in str(refused.value).splitlines()]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("a.CSV", ",")])
def test_a_table_gives_the_edits_that_json_lines_give(tmp_path: Path, name: str, mark: str) -> None:
    text = mark.join(("prompt", "target", "subject", "id")) + "\n" + mark.join(("Ada is", "Rome", "Ada", "e1")) + "\n"
    expected = read_text(tmp_path, "a.jsonl", '{"prompt": "Ada is", "target": "Rome", "subject": "Ada", "id": "e1"}\n')
    assert read_text(tmp_path, name, text) == expected


def test_cells_may_hold_marks_and_line_breaks_and_be_empty(tmp_path: Path) -> None:
    text = '\ufeffprompt,target_new,subject,id\r\n"Who, then?\r\nSay ""it""",Rome,,\r\n,,,\r\nBo is,Oslo,Bo,e2\r\n'
    first, second = read_text(tmp_path, "a.csv", text)
    assert (first.prompt, first.target, first.subject) == ('Who, then?\nSay "it"', "Rome", None)
    assert (second.id, second.subject) == ("e2", "Bo")


def test_all_bad_rows_are_named_at_once_by_their_lines(tmp_path: Path) -> None:
    text = b'prompt,target\n"Ada\nis",Rome\nBo is\nCleo is,Oslo,Bergen\nDee is,\n'
    assert refusal_lines(tmp_path, "a.csv", text) == [
        "a.csv: 3 bad records, nothing was done",
        "a.csv:4: expected 2 cells, as in the header, not 1",
        "a.csv:5: expected 2 cells, as in the header, not 3",
        "a.csv:6: missing `target` (the record has: prompt)",
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.xlsx", b"PK\x03\x04rest\xff", "this is a spreadsheet"),
        ("a.jsonl", b"PK\x03\x04rest", "this is a spreadsheet"),
        ("a.parquet", b"PAR1\x15\x04", "this is a Parquet file"),
        ("a.pdf", b"%PDF-1.7\n%\xe2\xe3", "this is a PDF document"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "this is a compressed file"),
        ("a.bin", b"\x7fELF\0\0", "there are zero bytes in it"),
        ("a.txt", b"Some prose.\nAnd more of it.\n", "no line of it is a JSON object"),
        ("a.csv", b"question,answer\nAda is,Rome\n", "a.csv:1: expected a header with `prompt` and `target`"),
        ("a.csv", b"", "no edits in it"),
        ("a.csv", b'prompt,target\n"Ada is,Rome\n', "a.csv:2: not a row of a table"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (line,) = refusal_lines(tmp_path, name, content)
    assert said in line


cells = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=5))
def test_what_a_spreadsheet_writes_is_read_as_it_was(rows: list[tuple[str, str]]) -> None:
    written = io.StringIO()
    csv.writer(written).writerows([("prompt", "target"), *rows])
    records, problems = parse_table(Path("a.csv"), written.getvalue())
    assert not problems
    assert [(record["prompt"], record["target"]) for _, record in records] == rows
