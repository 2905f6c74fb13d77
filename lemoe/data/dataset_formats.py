"""The formats in which published data sets write an edit, each converted to the fields of `lemoe.data.edits.Edit`.

The keys of a record tell its format: ROME's CounterFact (`requested_rewrite`), EasyEdit's ZsRE
(`src`, `alt`), DUnE's statements (`edit`), and everything else by `prompt` with `target` or `target_new`, as in our own
files, KnowEdit, WISE and similar ones. Unknown keys are kept in `extra`.
"""

import re
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]

MAX_TEXT = 1_000_000  # characters; a longer field is a broken file, not a fact


class RecordError(Exception):
    """What is wrong with one record; the reader adds the file and line."""


def canonicalise_record(record: Any) -> dict[str, Any]:
    """The fields of an `Edit`, by name, from one record of any known format.

    Raises:
        Problem: naming the key, what was expected and what was found.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"expected a JSON object with `prompt` and `target`, not {_describe_json_type(record)}")
    if "requested_rewrite" in record:
        return _parse_counterfact(record)
    if "src" in record and "alt" in record:
        return _parse_zsre(record)
    if "edit" in record and "prompt" not in record:
        return _parse_dune(record)
    return _parse_prompt_target(record)


def extract_records(records: Any) -> list[Any]:
    """The records of a JSON document: a list, or DUnE's columns `edits` and `test_inputs`, one record per statement.

    Raises:
        Problem: if it is neither, or the columns differ in length.
    """
    if not (isinstance(records, Mapping) and "edits" in records and "test_inputs" in records):
        return records if isinstance(records, list) else [records]
    edits, inputs = records["edits"], records["test_inputs"]
    if not (isinstance(edits, list) and isinstance(inputs, list) and len(edits) == len(inputs)):
        raise RecordError("`edits` and `test_inputs` must be lists of one length")
    if not all(isinstance(edit, str) for edit in edits):
        raise RecordError("`edits` must be a list of texts")
    by_statement: dict[str, list[Any]] = {}
    for edit, questions in zip(edits, inputs, strict=True):
        by_statement.setdefault(edit, []).extend(questions if isinstance(questions, list) else [questions])
    return [{"edit": edit, "test_inputs": questions} for edit, questions in by_statement.items()]


def _parse_prompt_target(record: Record) -> dict[str, Any]:
    target_key = "target" if "target" in record else "target_new"
    missing = [name for name, key in (("prompt", "prompt"), ("target", target_key)) if key not in record]
    if missing:
        present = ", ".join(sorted(map(str, record))[:8]) or "no keys"
        raise RecordError(f"missing {' and '.join(f'`{name}`' for name in missing)} (the record has: {present})")
    edit = _start_edit(record, _get_text(record, "prompt"), _get_text(record, target_key))
    edit["rephrases"] = [
        *_parse_probes(record, "rephrases", "paraphrase", answer=edit["target"]),
        *_parse_probes(record, "rephrase", "paraphrase", answer=edit["target"]),
        *_parse_probes(record, "paraphrase_prompts", "paraphrase", answer=edit["target"]),
        *_parse_continuation(record, "ood_rephrase", edit),
    ]
    edit["locality"] = [
        *_parse_probes(record, "locality", "unrelated"),
        *_parse_probe_pair(record, "locality_prompt", "locality_ground_truth", "unrelated"),
    ]
    edit["portability"] = _parse_probes(record, "portability", "reasoning", needs_target=True)
    edit["generation"] = [probe["prompt"] for probe in _parse_probes(record, "generation", "generation")]
    return edit


def _parse_continuation(record: Record, key: str, edit: Record) -> list[dict[str, Any]]:
    """WISE's out-of-distribution text: its first words, as many as the prompt has, are the prompt of the rest.

    A text no longer than that is a paraphrase of the prompt.
    """
    if not isinstance(record.get(key), str) or not record[key].strip():
        return []
    text = _get_text(record, key)
    beginning = re.match(rf"\s*(?:\S+\s+){{{len(edit['prompt'].split())}}}", text)
    if beginning is None or not text[beginning.end() :].strip():
        return [{"prompt": text.strip(), "target": edit["target"], "kind": "paraphrase"}]
    prompt, target = text[: beginning.end()].strip(), text[beginning.end() :].strip()
    return [{"prompt": prompt, "target": target, "kind": "out_of_distribution"}]


def _parse_dune(record: Record) -> dict[str, Any]:
    """DUnE's statement: its second half, or what is right of its last `=`, is the target of the rest.

    Questions about it are portability probes.
    """
    edit = _start_edit(record, *_split_statement(_get_text(record, "edit")))
    edit["rephrases"] = []
    edit["locality"] = _parse_probes(record, "locality", "unrelated")
    edit["portability"] = [
        {"prompt": question, "target": answer or edit["target"], "kind": "question"}
        for question, answer in map(_parse_question, _get_list(record, "test_inputs"))
    ]
    return edit


def _split_statement(statement: str) -> tuple[str, str]:
    left, equals, right = statement.strip().rpartition(" = ")
    if equals and left.strip() and right.strip():
        return f"{left.strip()} =", right.strip()
    words = statement.split()
    if len(words) < 2:
        raise RecordError("`edit` is a statement of one word; it needs at least two, for a prompt and a target")
    half = len(words) // 2
    return " ".join(words[:half]), " ".join(words[half:])


def _parse_question(entry: Any) -> tuple[str, str]:
    """A question and its answer, empty if it has none."""
    question, answer = entry if isinstance(entry, list) and len(entry) == 2 else (entry, "")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise RecordError("each entry of `test_inputs` must be a question or a pair of question and answer")
    pair = {"question": question, "answer": answer}
    return _get_text(pair, "question").strip(), _get_answer(pair, "answer").strip()


def _get_list(record: Record, key: str) -> list[Any]:
    value = record.get(key, [])
    if not isinstance(value, list):
        raise RecordError(f"`{key}` must be a list, not {_describe_json_type(value)}")
    return value


def _parse_zsre(record: Record) -> dict[str, Any]:
    edit = _start_edit(record, _get_text(record, "src"), _get_text(record, "alt"))
    edit["rephrases"] = _parse_probes(record, "rephrase", "paraphrase", answer=edit["target"])
    edit["locality"] = _parse_probe_pair(record, "loc", "loc_ans", "unrelated")
    edit["portability"] = _parse_one_hop(record)
    return edit


def _parse_counterfact(record: Record) -> dict[str, Any]:
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise RecordError(f"`requested_rewrite` must be an object, not {_describe_json_type(rewrite)}")
    subject, template = _get_text(rewrite, "subject"), _get_text(rewrite, "prompt")
    target = rewrite.get("target_new")
    if not isinstance(target, Mapping):
        raise RecordError("`requested_rewrite.target_new` must be an object with `str`")
    edit = _start_edit({**record, "subject": subject}, template.replace("{}", subject), _get_text(target, "str"))
    edit["rephrases"] = _parse_probes(record, "paraphrase_prompts", "distracted", answer=edit["target"])
    edit["locality"] = _parse_probes(record, "neighborhood_prompts", "same_template")
    true = rewrite.get("target_true")
    if isinstance(true, Mapping) and isinstance(true.get("str"), str):
        edit["locality"] = [{**probe, "target": true["str"]} for probe in edit["locality"]]
    edit["portability"] = _parse_one_hop(record)
    prompts = _parse_probes(record, "generation_prompts", "generation")
    edit["generation"] = list(dict.fromkeys(probe["prompt"] for probe in prompts))
    return edit


_KNOWN_KEYS = frozenset(
    [
        "id",
        "case_id",
        "prompt",
        "target",
        "target_new",
        "subject",
        "rephrases",
        "rephrase",
        "paraphrase_prompts",
        "ood_rephrase",
        "locality",
        "locality_prompt",
        "locality_ground_truth",
        "portability",
        "src",
        "alt",
        "loc",
        "loc_ans",
        "requested_rewrite",
        "neighborhood_prompts",
        "generation",
        "generation_prompts",
        "edit",
        "test_inputs",
    ]
)


def _start_edit(record: Record, prompt: str, target: str) -> dict[str, Any]:
    subject = record.get("subject")
    if subject is not None and not isinstance(subject, str):
        raise RecordError(f"`subject` must be text, not {_describe_json_type(subject)}")
    return {
        "id": _get_id(record),
        "prompt": prompt,
        "target": target,
        "subject": _check_surrogates(subject or "", "subject").strip() or None,
        "generation": [],
        "extra": {str(key): value for key, value in record.items() if key not in _KNOWN_KEYS},
    }


def _get_id(record: Record) -> str:
    name = record.get("id", record.get("case_id", ""))
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise RecordError(f"`id` must be text or a whole number, not {_describe_json_type(name)}")
    if len(str(name)) > 200:
        raise RecordError("`id` is longer than 200 characters")
    return _check_surrogates(str(name), "id")


def _get_text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise RecordError(f"`{key}` must be text, not {_describe_json_type(value)}")
    if not value.strip():
        raise RecordError(f"`{key}` is empty")
    if len(value) > MAX_TEXT:
        raise RecordError(f"`{key}` has {len(value):,} characters, more than {MAX_TEXT:,}")
    return _check_surrogates(value, key)


def _check_surrogates(value: str, key: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordError(f"`{key}` holds half a surrogate pair, which is not text") from None
    return value


def _parse_probes(
    record: Record, key: str, kind: str, *, answer: str | None = None, needs_target: bool = False
) -> list[dict[str, Any]]:
    """A text, a list of texts or probe objects, or KnowEdit's groups of such lists, whose names are the kinds."""
    value = record.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        value = [value] if value.strip() else []
    if isinstance(value, Mapping):
        if "New Question" in value:
            return _parse_one_hop(record)
        return [
            probe
            for group, members in value.items()
            for probe in _parse_probe_list(members, f"{key}.{group}", _slugify_kind(group), answer, needs_target)
        ]
    return _parse_probe_list(value, key, kind, answer, needs_target)


def _parse_probe_list(value: Any, key: str, kind: str, answer: str | None, needs_target: bool) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RecordError(f"`{key}` must be a list, not {_describe_json_type(value)}")
    probes = [_parse_probe(item, key, kind, answer) for item in value]
    if not needs_target:
        return probes
    if any(probe["target"] is None for probe in probes):
        raise RecordError(f"each entry of `{key}` needs a `target`")
    return [probe for probe in probes if probe["target"]]


def _parse_probe(item: Any, key: str, kind: str, answer: str | None) -> dict[str, Any]:
    if isinstance(item, str):
        item = {"prompt": item}
    if not isinstance(item, Mapping):
        found = _describe_json_type(item)
        raise RecordError(f"each entry of `{key}` must be text or an object with `prompt`, not {found}")
    prompt = _get_text(item, "prompt")
    target_key = next((name for name in ("target", "ground_truth", "target_new") if name in item), None)
    target = answer if target_key is None or item[target_key] is None else _get_answer(item, target_key)
    own_kind = item.get("kind", kind)
    if not isinstance(own_kind, str):
        raise RecordError(f"`kind` in `{key}` must be text, not {_describe_json_type(own_kind)}")
    return {"prompt": prompt, "target": target or answer, "kind": _slugify_kind(_check_surrogates(own_kind, "kind"))}


def _get_answer(record: Record, key: str) -> str:
    """The answer to a probe, which may be blank in data sets: the edit is read all the same."""
    blank = isinstance(record[key], str) and not record[key].strip()
    return "" if blank else _get_text(record, key)


def _parse_probe_pair(record: Record, prompt_key: str, target_key: str, kind: str) -> list[dict[str, Any]]:
    if record.get(prompt_key) is None:
        return []
    target = _get_answer(record, target_key) if record.get(target_key) is not None else None
    return [{"prompt": _get_text(record, prompt_key), "target": target, "kind": kind}]


def _parse_one_hop(record: Record) -> list[dict[str, Any]]:
    """EasyEdit's portability: one question whose answer needs the edited fact."""
    hop = record.get("portability")
    if not isinstance(hop, Mapping) or "New Question" not in hop:
        return []
    return [{"prompt": _get_text(hop, "New Question"), "target": _get_text(hop, "New Answer"), "kind": "one_hop"}]


_KIND_ALIASES = {"relation_specificity": "same_subject", "subject_aliasing": "subject_alias"}


def _slugify_kind(name: str) -> str:
    slug = str(name).strip().lower().replace(" ", "_")[:60]
    return _KIND_ALIASES.get(slug, slug)


def _describe_json_type(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
