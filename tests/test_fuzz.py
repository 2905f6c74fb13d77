"""A small share of `tests/benchmarks/fuzz.py`: readers meet damaged and hostile files with clear errors alone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from fuzz import fuzz_files, fuzz_gate, fuzz_yaml

import lemoe


def test_damaged_and_hostile_files_give_clear_errors_and_never_a_wrong_state(tmp_path: Path) -> None:
    counts = fuzz_files(tmp_path, 2000, seed=1)
    assert counts["adaptors refused"] > 900
    assert counts["edits refused"] > 500


def test_settings_and_plans_of_any_kind_give_clear_errors_or_values_that_can_be_saved(tmp_path: Path) -> None:
    counts = fuzz_yaml(tmp_path, 1000, seed=1)
    assert min(counts.values()) > 10


def test_edits_and_texts_of_any_characters_go_through_the_gate(base: lemoe.BaseModel) -> None:
    counts = fuzz_gate(base, 150, seed=1)
    assert counts["gates built"] > 100
