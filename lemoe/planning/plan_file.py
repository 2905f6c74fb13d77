"""Plan files: rounds of edit ids as YAML that people edit by hand."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemoe.data.edits import Edit
from lemoe.data.yaml_file import read_yaml
from lemoe.errors import InputError


@dataclass(frozen=True)
class PlanFile:
    """The rounds of a plan file, and the edits that it leaves out.

    Attributes:
        rounds: the edits of each round, in training order.
        repeated: the edits that no round holds because a later one repeats or supersedes them: prompt and target by
            id, as they were when the plan was made.
    """

    rounds: list[list[Edit]]
    repeated: dict[str, str]

    def is_repeated(self, edit: Edit) -> bool:
        """Whether the plan leaves this edit out because a later one repeats or supersedes it."""
        return self.repeated.get(edit.id) == edit.fact

    def unnamed_edits(self, edits: Sequence[Edit]) -> list[Edit]:
        """Those of `edits` that the plan does not mention."""
        named = {edit.id for members in self.rounds for edit in members}
        return [edit for edit in edits if edit.id not in named and not self.is_repeated(edit)]


def read_plan(path: Path | str, edits: Sequence[Edit]) -> PlanFile:
    """A plan file of `edits`.

    Raises:
        InputError: if the file is no plan, or names unknown edits or one edit twice; all are listed.
    """
    document = read_yaml(Path(path))
    return PlanFile(_parse_rounds(Path(path), document, edits), _parse_repeated(document))


def load_plan(path: Path | str, edits: Sequence[Edit]) -> list[list[Edit]]:
    """The rounds of a plan file, as edits; raises as `read_plan` does."""
    return read_plan(path, edits).rounds


def _parse_rounds(path: Path, document: Any, edits: Sequence[Edit]) -> list[list[Edit]]:
    rounds = document.get("rounds") if isinstance(document, dict) else None
    if not isinstance(rounds, list) or not all(isinstance(members, (dict, list)) for members in rounds):
        raise InputError(f"{path}: not a plan; expected `rounds:` with a list of edit ids in each")
    named = [[str(name) for name in members] for members in rounds if members]
    by_id = {edit.id: edit for edit in edits}
    counts = Counter(name for members in named for name in members)
    problems = [f"edit {name!r} is not among the edits read" for name in counts if name not in by_id]
    problems += [f"edit {name!r} is named {count} times" for name, count in counts.items() if count > 1]
    if problems or not named:
        raise InputError.from_problems(f"{path}: the plan does not fit the edits", problems or ["it has no rounds"])
    return [[by_id[name] for name in members] for members in named]


def _parse_repeated(document: Any) -> dict[str, str]:
    """The edits that its conflicts leave out; contradictions leave out none, and malformed entries are ignored."""
    conflicts = document.get("conflicts")
    found: dict[str, str] = {}
    for conflict in conflicts if isinstance(conflicts, list) else ():
        earlier = conflict.get("earlier") if isinstance(conflict, dict) else None
        if isinstance(earlier, dict) and conflict.get("relation") in ("duplicate", "superseded"):
            found.update((str(name), str(fact)) for name, fact in earlier.items())
    return found
