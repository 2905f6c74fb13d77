"""A small share of `tests/benchmarks/fuzz.py`: readers meet damaged and hostile files with clear errors alone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from fuzz import fuzz


def test_damaged_and_hostile_files_give_clear_errors_and_never_a_wrong_state(tmp_path: Path) -> None:
    counts = fuzz(tmp_path, 2000, seed=1)
    assert counts["adaptors refused"] > 900
    assert counts["edits refused"] > 500
