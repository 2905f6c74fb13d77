"""What a user wants changed: edits, and the probes that tell whether the change took and nothing else moved."""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lemoe.data.file_shapes import Problem, canonical, unfolded
from lemoe.errors import InputError

BRIEF = 80  # characters of a prompt or a target in a message
NAMED = 5  # edits in a message


@dataclass(frozen=True)
class Probe:
    """A prompt that measures an edit; `target` is the expected answer, or None where the base model says it."""

    prompt: str
    target: str | None
    kind: str


@dataclass(frozen=True)
class Edit:
    """One fact: after `prompt` the model shall answer `target`.

    `subject` is the entity the fact is about, None where the file does not say.
    `rephrases` ask the same question in other words (generality), `locality` prompts must keep the base
    model's answer, `portability` prompts need the fact for their answer. `generation` prompts are written on from, for
    fluency.
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
        """What it teaches, as plans write it."""
        return f"{self.prompt} -> {self.target}"

    @property
    def label(self) -> str:
        """Its id with what it teaches, for messages."""
        return edit_label(self.id, self.prompt, self.target)

    @property
    def digest(self) -> str:
        """SHA-256 of what the edit teaches: prompt, target and subject, not its probes."""
        text = json.dumps([self.prompt, self.target, self.subject], ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Round:
    """Edits that are trained together: the round `number`, from 1, `of` all that the plan has."""

    number: int
    of: int
    edits: Sequence[Edit]


def edit_label(name: str, prompt: str, target: str) -> str:
    """An edit as messages name it: an id that was made from content says nothing by itself."""
    return f"{name} ({brief_text(prompt)} -> {brief_text(target)})"


def brief_text(text: str) -> str:
    """`text` on one line, without its middle where it is longer than a line of a message."""
    line = " ".join(text.split())
    half = BRIEF // 2 - 2
    return line if len(line) <= BRIEF else f"{line[:half]} ... {line[-half:]}"


def labels_of(edits: Sequence[Edit]) -> str:
    """The first edits by id and fact, and how many there are besides."""
    more = f", and {len(edits) - NAMED} more" if len(edits) > NAMED else ""
    return ", ".join(edit.label for edit in edits[:NAMED]) + more


def digest_of(edits: Iterable[Edit]) -> str:
    """SHA-256 over the digests of `edits`, in their order."""
    return digest_over(edit.digest for edit in edits)


def digest_over(digests: Iterable[str]) -> str:
    """SHA-256 over the digests of edits, in their order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_edits(path: Path | str) -> list[Edit]:
    """Read a JSON Lines file or a JSON array of edits, in any of the shapes of `lemoe.data.file_shapes`.

    Raises:
        InputError: naming every bad record (the first 20) as `file:line: what was expected`.
    """
    path = Path(path)
    records, problems = read_records(path)
    edits: list[Edit] = []
    for place, record in records:
        try:
            edits.append(_edit(canonical(record)))
        except Problem as problem:
            problems.append(f"{place}: {problem}")
    problems += _repeated_ids(edits, [place for place, _ in records]) if not problems else []
    if problems:
        raise InputError.listing(f"{path}: {len(problems)} bad record(s), nothing was done", problems)
    if not edits:
        raise InputError(
            f'{path}: no edits in it; expected one JSON object a line, such as {{"prompt": ..., "target": ...}}'
        )
    return _with_ids(edits)


def sample_edits(edits: Sequence[Edit], limit: int | None, sample: int | None, seed: int) -> list[Edit]:
    """The first `limit` edits, then `sample` of those drawn with `seed`, in the file's order."""
    chosen = list(edits if limit is None else edits[:limit])
    if sample is None or sample >= len(chosen):
        return chosen
    kept = sorted(random.Random(seed).sample(range(len(chosen)), sample))
    return [chosen[index] for index in kept]


def read_records(path: Path) -> tuple[list[tuple[str, Any]], list[str]]:
    """The records of a JSON Lines file or a JSON array, each with its place, and what is wrong with lines.

    Raises:
        InputError: if the file cannot be read, or is no JSON array though it begins as one.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if text.lstrip().startswith("[") or _COLUMNS.match(text):
        return _document(path, text)
    return _lines(path, text)


_COLUMNS = re.compile(r'\s*\{\s*"edits"\s*:')  # DUnE writes a whole file as one object of columns


def _document(path: Path, text: str) -> tuple[list[tuple[str, Any]], list[str]]:
    try:
        records = unfolded(json.loads(text))
    except (ValueError, RecursionError) as error:
        place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise InputError(f"{place}: not a JSON array: {error}") from None
    except Problem as problem:
        raise InputError(f"{path}: {problem}") from None
    return [(f"{path}: record {number}", record) for number, record in enumerate(records, 1)], []


def _lines(path: Path, text: str) -> tuple[list[tuple[str, Any]], list[str]]:
    records: list[tuple[str, Any]] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append((f"{path}:{number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: expected one JSON object a line: {error}")
    return records, problems


def _edit(record: Mapping[str, Any]) -> Edit:
    rephrases, locality, portability = (
        tuple(Probe(probe["prompt"], probe["target"] or None, probe["kind"]) for probe in record[name])
        for name in ("rephrases", "locality", "portability")
    )
    plain = {name: record[name] for name in ("id", "prompt", "target", "subject", "extra")}
    generation = tuple(record["generation"])
    return Edit(**plain, rephrases=rephrases, locality=locality, portability=portability, generation=generation)


def _repeated_ids(edits: Sequence[Edit], places: Sequence[str]) -> list[str]:
    first: dict[str, str] = {}
    problems = []
    for edit, place in zip(edits, places, strict=True):
        if edit.id and edit.id in first:
            problems.append(f"{place}: id {edit.id!r} is already used at {first[edit.id]}; ids must be unique")
        first.setdefault(edit.id, place)
    return problems


def _with_ids(edits: Sequence[Edit]) -> list[Edit]:
    """Edits without an id get one from their content, so that it is the same in every run."""
    taken = {edit.id for edit in edits}
    seen: Counter[str] = Counter()
    named = []
    for edit in edits:
        if not edit.id:
            stem = f"edit-{edit.digest[:10]}"
            seen[stem] += 1
            name = stem if seen[stem] == 1 else f"{stem}-{seen[stem]}"
            edit = replace(edit, id=name if name not in taken else f"{name}-auto")
        named.append(edit)
    return named
