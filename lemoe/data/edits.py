"""Edits, and the probes that measure whether they took effect and changed nothing else."""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

from lemoe.data.counting import format_count
from lemoe.data.dataset_formats import RecordError, canonicalise_record, extract_records
from lemoe.data.tables import EXPECTED, check_kind, is_table, parse_table
from lemoe.errors import InputError

BRIEF_LENGTH = 80  # characters of a prompt or target in messages
LABELS_SHOWN = 5  # edits listed in a message


@dataclass(frozen=True)
class Probe:
    """A prompt that measures an edit; `target` is the expected answer, None for the base model's own.

    Example:
        >>> import lemoe
        >>> unrelated = lemoe.Probe("The opposite of hot is", None, "unrelated")
        >>> edit = lemoe.Edit("The capital of France is", "Lyon", "France", locality=(unrelated,))
        >>> edit
        Edit('The capital of France is', 'Lyon', 'France', id='edit-eb6b644c65', locality=1)
    """

    prompt: str
    target: str | None
    kind: str


@dataclass(frozen=True)
class Edit:
    """One fact: the edited model answers `prompt` with `target`.

    `subject` is the entity the fact is about, None if the file has none. `rephrases` are paraphrases of the prompt
    (generality), `locality` prompts must keep the base model's answer, `portability` prompts need the fact for their
    answer, and `generation` prompts are continued to measure fluency. `id` names it in plans, adaptors and messages; if
    empty, one is made from its content.

    Example:
        >>> import lemoe
        >>> edit = lemoe.Edit("The capital of France is", "Lyon", "France")
        >>> edit.fact
        'The capital of France is -> Lyon'
        >>> edit.id == lemoe.Edit(prompt="The capital of France is", target="Lyon", subject="France").id
        True
    """

    prompt: str
    target: str
    subject: str | None = None
    _: KW_ONLY
    id: str = ""
    rephrases: tuple[Probe, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    generation: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", self._content_id)

    def __repr__(self) -> str:
        shown = [repr(brief_text(text)) for text in (self.prompt, self.target, self.subject) if text is not None]
        probes = [(name, len(getattr(self, name))) for name in ("rephrases", "locality", "portability", "generation")]
        counts = [f"{name}={count}" for name, count in probes if count]
        return f"Edit({', '.join([*shown, f'id={self.id!r}', *counts])})"

    @property
    def _content_id(self) -> str:
        return f"edit-{self.digest[:10]}"

    @property
    def given_id(self) -> str:
        """Its id, empty if that was made from its content."""
        return "" if self.id.startswith("edit-") and self.id == self._content_id else self.id

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

    Example:
        >>> import lemoe
        >>> edits = lemoe.read_edits("edits.jsonl")
        >>> edits[0].id, edits[0].target
        ('eiffel-tower-city', 'Rome')
    """
    path = Path(path)
    records, problems = read_records(path)
    edits = _build_edits(path, records, problems)
    if not edits:
        raise InputError(
            f'{path}: no edits in it; expected one JSON object per line, such as {{"prompt": ..., "target": ...}}'
        )
    return edits


Edits = Path | str | Sequence[Edit | Mapping[str, Any]]


def resolve_edits(edits: Edits) -> list[Edit]:
    """The edits that are given as such, as records of a file, or as the path of one; see `read_edits`.

    Raises:
        InputError: naming every bad record, and every record whose id came before.
    """
    if isinstance(edits, Path | str):
        return read_edits(edits)
    return _build_edits("edits", [(f"edits[{index}]", edit) for index, edit in enumerate(edits)])


def _build_edits(heading: object, records: Sequence[tuple[str, Any]], problems: Sequence[str] = ()) -> list[Edit]:
    """The edits of `records`, each with where it stands; `problems` are those of the file that they are from.

    Raises:
        InputError: listing all problems.
    """
    edits: list[Edit] = []
    found = list(problems)
    for source, record in records:
        try:
            edits.append(record if isinstance(record, Edit) else _build_edit(canonicalise_record(record)))
        except RecordError as problem:
            found.append(f"{source}: {problem}")
    names = [edit.given_id for edit in edits]
    if not found:
        sources = [source for source, _ in records]
        read = ["" if isinstance(record, Edit) else name for (_, record), name in zip(records, names, strict=True)]
        found += _find_repeated_ids(read, sources)
    if found:
        raise InputError.from_problems(f"{heading}: {format_count(len(found), 'bad record')}, nothing was done", found)
    return _tell_ids_apart(edits, names)


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


def check_ids(edits: Sequence[Edit]) -> None:
    """Refuse edits that only their ids could tell apart, and do not.

    Raises:
        InputError: naming every id that comes twice.
    """
    names, sources = [edit.id for edit in edits], [f"edits[{index}]" for index in range(len(edits))]
    if problems := _find_repeated_ids(names, sources):
        raise InputError.from_problems(f"edits: {len(problems)} of the same id as others", problems)


def _find_repeated_ids(names: Sequence[str], sources: Sequence[str]) -> list[str]:
    first: dict[str, str] = {}
    problems = []
    for name, source in zip(names, sources, strict=True):
        if name and name in first:
            problems.append(f"{source}: id {name!r} is already used at {first[name]}; ids must be unique")
        first.setdefault(name, source)
    return problems


def _tell_ids_apart(edits: Sequence[Edit], names: Sequence[str]) -> list[Edit]:
    """The edits, whose given ids are `names`, with different ids for those made from the same content."""
    used = set(names)
    seen: Counter[str] = Counter()
    named = []
    for edit, name in zip(edits, names, strict=True):
        if not name:
            seen[edit.id] += 1
            unique = edit.id if seen[edit.id] == 1 else f"{edit.id}-{seen[edit.id]}"
            unique = unique if unique not in used else f"{unique}-auto"
            edit = edit if unique == edit.id else replace(edit, id=unique)
        named.append(edit)
    return named
