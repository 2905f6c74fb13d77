"""Edits, and the probes that measure whether they took effect and changed nothing else."""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lemoe.data.dataset_formats import RecordError, canonicalise_record, extract_records
from lemoe.data.tables import EXPECTED, check_kind, is_table, parse_table
from lemoe.errors import InputError

BRIEF_LENGTH = 80  # characters of a prompt or target in messages
LABELS_SHOWN = 5  # edits listed in a message


@dataclass(frozen=True)
class Probe:
    """A prompt that measures an edit; `target` is the expected answer, None for the base model's own."""

    prompt: str
    target: str | None
    kind: str


@dataclass(frozen=True)
class Edit:
    """One fact: the edited model answers `prompt` with `target`.

    `subject` is the entity the fact is about, None if the file has none. `rephrases` are paraphrases of the prompt
    (generality), `locality` prompts must keep the base model's answer, `portability` prompts need the fact for their
    answer, and `generation` prompts are continued to measure fluency.
    """

    id: str
    prompt: str
    target: str
    subject: str | None = None
    rephrases: tuple[Probe, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    generation: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def fact(self) -> str:
        """The fact as plans write it: `prompt -> target`."""
        return f"{self.prompt} -> {self.target}"

    @property
    def label(self) -> str:
        """Its id and fact, for messages."""
        return edit_label(self.id, self.prompt, self.target)

    @property
    def digest(self) -> str:
        """SHA-256 of prompt, target and subject; the probes do not count."""
        text = json.dumps([self.prompt, self.target, self.subject], ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Round:
    """Edits that are trained together: round `number`, counted from 1, of `total` rounds in the plan."""

    number: int
    total: int
    edits: Sequence[Edit]


def edit_label(name: str, prompt: str, target: str) -> str:
    """An edit as messages name it: id and fact, since generated ids alone say nothing."""
    return f"{name} ({brief_text(prompt)} -> {brief_text(target)})"


def brief_text(text: str) -> str:
    """`text` on one line of at most `BRIEF_LENGTH` characters, without its middle if longer."""
    line = " ".join(text.split())
    half = BRIEF_LENGTH // 2 - 2
    return line if len(line) <= BRIEF_LENGTH else f"{line[:half]} ... {line[-half:]}"


def join_labels(edits: Sequence[Edit]) -> str:
    """The labels of the first `LABELS_SHOWN` edits, and how many more there are."""
    more = f", and {len(edits) - LABELS_SHOWN} more" if len(edits) > LABELS_SHOWN else ""
    return ", ".join(edit.label for edit in edits[:LABELS_SHOWN]) + more


def digest_edits(edits: Iterable[Edit]) -> str:
    """SHA-256 over the digests of `edits`, in order."""
    return combine_digests(edit.digest for edit in edits)


def combine_digests(digests: Iterable[str]) -> str:
    """SHA-256 over the digests of edits, in order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_edits(path: Path | str) -> list[Edit]:
    """Read JSON Lines or a JSON array of edits, in any format of `lemoe.data.dataset_formats`, or CSV or TSV.

    Raises:
        InputError: naming every bad record (the first 20) as `file:line: what was expected`.
    """
    path = Path(path)
    records, problems = read_records(path)
    edits: list[Edit] = []
    for source, record in records:
        try:
            edits.append(_build_edit(canonicalise_record(record)))
        except RecordError as problem:
            problems.append(f"{source}: {problem}")
    problems += _find_repeated_ids(edits, [source for source, _ in records]) if not problems else []
    if problems:
        raise InputError.from_problems(f"{path}: {len(problems)} bad record(s), nothing was done", problems)
    if not edits:
        raise InputError(
            f'{path}: no edits in it; expected one JSON object per line, such as {{"prompt": ..., "target": ...}}'
        )
    return _assign_ids(edits)


def sample_edits(edits: Sequence[Edit], limit: int | None, sample: int | None, seed: int) -> list[Edit]:
    """Of the first `limit` edits, `sample` drawn with `seed`, in the file's order; None takes all."""
    chosen = list(edits if limit is None else edits[:limit])
    if sample is None or sample >= len(chosen):
        return chosen
    drawn = sorted(random.Random(seed).sample(range(len(chosen)), sample))
    return [chosen[index] for index in drawn]


def read_records(path: Path) -> tuple[list[tuple[str, Any]], list[str]]:
    """The records of a file of edits, each with its file and line, and the problems of invalid ones.

    Raises:
        InputError: if the file cannot be read, is of another kind, or starts as a JSON array but is none.
    """
    try:
        content = path.read_bytes()
        check_kind(path, content)
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if is_table(path):
        return parse_table(path, text)
    if text.lstrip().startswith("[") or _DUNE_COLUMNS.match(text):
        return _parse_json_array(path, text)
    return _parse_json_lines(path, text)


_DUNE_COLUMNS = re.compile(r'\s*\{\s*"edits"\s*:')  # a DUnE file is one object of columns


def _parse_json_array(path: Path, text: str) -> tuple[list[tuple[str, Any]], list[str]]:
    try:
        records = extract_records(json.loads(text))
    except (ValueError, RecursionError) as error:
        source = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise InputError(f"{source}: not a JSON array: {error}") from None
    except RecordError as problem:
        raise InputError(f"{path}: {problem}") from None
    return [(f"{path}: record {number}", record) for number, record in enumerate(records, 1)], []


def _parse_json_lines(path: Path, text: str) -> tuple[list[tuple[str, Any]], list[str]]:
    records: list[tuple[str, Any]] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append((f"{path}:{number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: expected one JSON object per line: {error}")
    if not records and len(problems) > 1 and not text.lstrip().startswith("{"):
        raise InputError(f"{path}: no line of it is a JSON object; {EXPECTED}")
    return records, problems


def _build_edit(record: Mapping[str, Any]) -> Edit:
    rephrases, locality, portability = (
        tuple(Probe(probe["prompt"], probe["target"] or None, probe["kind"]) for probe in record[name])
        for name in ("rephrases", "locality", "portability")
    )
    fields = {name: record[name] for name in ("id", "prompt", "target", "subject", "extra")}
    generation = tuple(record["generation"])
    return Edit(**fields, rephrases=rephrases, locality=locality, portability=portability, generation=generation)


def _find_repeated_ids(edits: Sequence[Edit], sources: Sequence[str]) -> list[str]:
    first: dict[str, str] = {}
    problems = []
    for edit, source in zip(edits, sources, strict=True):
        if edit.id and edit.id in first:
            problems.append(f"{source}: id {edit.id!r} is already used at {first[edit.id]}; ids must be unique")
        first.setdefault(edit.id, source)
    return problems


def _assign_ids(edits: Sequence[Edit]) -> list[Edit]:
    """Give edits without an id one from their content, so that it is the same in every run."""
    used = {edit.id for edit in edits}
    seen: Counter[str] = Counter()
    named = []
    for edit in edits:
        if not edit.id:
            stem = f"edit-{edit.digest[:10]}"
            seen[stem] += 1
            name = stem if seen[stem] == 1 else f"{stem}-{seen[stem]}"
            edit = replace(edit, id=name if name not in used else f"{name}-auto")
        named.append(edit)
    return named
