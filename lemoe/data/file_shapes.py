"""The shapes in which published data sets write an edit, each turned into the one shape of `lemoe.data.edits`.

The shape is told by the keys of a record: ROME's CounterFact (`requested_rewrite`), EasyEdit's ZsRE
(`src`, `alt`), DUnE's statements (`edit`), and everything else by `prompt` with `target` or `target_new`, as in our own
files, KnowEdit, WISE and their kin. Keys that no shape knows are kept as they are.
"""

import re
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]

MAX_TEXT = 1_000_000  # characters; a longer field is a broken file, not a fact


class Problem(Exception):
    """What is wrong with one record; the reader adds the place."""


def canonical(record: Any) -> dict[str, Any]:
    """One record of any known shape as `id, prompt, target, subject, rephrases, locality, portability, extra`.

    Raises:
        Problem: naming the key, what was expected and what is there.
    """
    if not isinstance(record, Mapping):
        raise Problem(f"expected a JSON object with `prompt` and `target`, not {_kind(record)}")
    if "requested_rewrite" in record:
        return _counterfact(record)
    if "src" in record and "alt" in record:
        return _zsre(record)
    if "edit" in record and "prompt" not in record:
        return _dune(record)
    return _plain(record)


def unfolded(records: Any) -> list[Any]:
    """The records of a JSON document: a list, or DUnE's columns `edits` and `test_inputs`, one record a statement.

    Raises:
        Problem: if it is neither, or the columns differ in length.
    """
    if not (isinstance(records, Mapping) and "edits" in records and "test_inputs" in records):
        return records if isinstance(records, list) else [records]
    edits, inputs = records["edits"], records["test_inputs"]
    if not (isinstance(edits, list) and isinstance(inputs, list) and len(edits) == len(inputs)):
        raise Problem("`edits` and `test_inputs` must be lists of one length")
    if not all(isinstance(edit, str) for edit in edits):
        raise Problem("`edits` must be a list of texts")
    asked: dict[str, list[Any]] = {}
    for edit, questions in zip(edits, inputs, strict=True):
        asked.setdefault(edit, []).extend(questions if isinstance(questions, list) else [questions])
    return [{"edit": edit, "test_inputs": questions} for edit, questions in asked.items()]


def _plain(record: Record) -> dict[str, Any]:
    target_key = "target" if "target" in record else "target_new"
    missing = [name for name, key in (("prompt", "prompt"), ("target", target_key)) if key not in record]
    if missing:
        there = ", ".join(sorted(map(str, record))[:8]) or "no keys"
        raise Problem(f"missing {' and '.join(f'`{name}`' for name in missing)} (the record has: {there})")
    edit = _start(record, _text(record, "prompt"), _text(record, target_key))
    edit["rephrases"] = [
        *_probes(record, "rephrases", "paraphrase", answer=edit["target"]),
        *_probes(record, "rephrase", "paraphrase", answer=edit["target"]),
        *_probes(record, "paraphrase_prompts", "paraphrase", answer=edit["target"]),
        *_continued(record, "ood_rephrase", edit),
    ]
    edit["locality"] = [
        *_probes(record, "locality", "unrelated"),
        *_paired(record, "locality_prompt", "locality_ground_truth", "unrelated"),
    ]
    edit["portability"] = _probes(record, "portability", "reasoning", needs_target=True)
    edit["generation"] = [probe["prompt"] for probe in _probes(record, "generation", "generation")]
    return edit


def _continued(record: Record, key: str, edit: Record) -> list[dict[str, Any]]:
    """WISE's other text about the subject: its own first words, as many as the prompt has, ask for what follows them.

    A text no longer than that is a rewording of the prompt.
    """
    if not isinstance(record.get(key), str) or not record[key].strip():
        return []
    text = _text(record, key)
    opening = re.match(rf"\s*(?:\S+\s+){{{len(edit['prompt'].split())}}}", text)
    if opening is None or not text[opening.end() :].strip():
        return [{"prompt": text.strip(), "target": edit["target"], "kind": "paraphrase"}]
    prompt, target = text[: opening.end()].strip(), text[opening.end() :].strip()
    return [{"prompt": prompt, "target": target, "kind": "out_of_distribution"}]


def _dune(record: Record) -> dict[str, Any]:
    """A statement: the model shall go on with its second half after its first, or with what is right of its last `=`.

    Questions about it are portability.
    """
    edit = _start(record, *_halves(_text(record, "edit")))
    edit["rephrases"] = []
    edit["locality"] = _probes(record, "locality", "unrelated")
    edit["portability"] = [
        {"prompt": question, "target": answer or edit["target"], "kind": "question"}
        for question, answer in map(_asked, _list(record, "test_inputs"))
    ]
    return edit


def _halves(statement: str) -> tuple[str, str]:
    left, equals, right = statement.strip().rpartition(" = ")
    if equals and left.strip() and right.strip():
        return f"{left.strip()} =", right.strip()
    words = statement.split()
    if len(words) < 2:
        raise Problem("`edit` is a statement of one word; it needs two at least, to ask with one and answer with one")
    half = len(words) // 2
    return " ".join(words[:half]), " ".join(words[half:])


def _asked(entry: Any) -> tuple[str, str]:
    """A question, with its answer if it has one."""
    question, answer = entry if isinstance(entry, list) and len(entry) == 2 else (entry, "")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise Problem("each entry of `test_inputs` must be a question or a pair of question and answer")
    asked = {"question": question, "answer": answer}
    return _text(asked, "question").strip(), _answer(asked, "answer").strip()


def _list(record: Record, key: str) -> list[Any]:
    value = record.get(key, [])
    if not isinstance(value, list):
        raise Problem(f"`{key}` must be a list, not {_kind(value)}")
    return value


def _zsre(record: Record) -> dict[str, Any]:
    edit = _start(record, _text(record, "src"), _text(record, "alt"))
    edit["rephrases"] = _probes(record, "rephrase", "paraphrase", answer=edit["target"])
    edit["locality"] = _paired(record, "loc", "loc_ans", "unrelated")
    edit["portability"] = _one_hop(record)
    return edit


def _counterfact(record: Record) -> dict[str, Any]:
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise Problem(f"`requested_rewrite` must be an object, not {_kind(rewrite)}")
    subject, template = _text(rewrite, "subject"), _text(rewrite, "prompt")
    target = rewrite.get("target_new")
    if not isinstance(target, Mapping):
        raise Problem("`requested_rewrite.target_new` must be an object with `str`")
    edit = _start({**record, "subject": subject}, template.replace("{}", subject), _text(target, "str"))
    edit["rephrases"] = _probes(record, "paraphrase_prompts", "distracted", answer=edit["target"])
    edit["locality"] = _probes(record, "neighborhood_prompts", "same_template")
    true = rewrite.get("target_true")
    if isinstance(true, Mapping) and isinstance(true.get("str"), str):
        edit["locality"] = [{**probe, "target": true["str"]} for probe in edit["locality"]]
    edit["portability"] = _one_hop(record)
    prompts = _probes(record, "generation_prompts", "generation")
    edit["generation"] = list(dict.fromkeys(probe["prompt"] for probe in prompts))
    return edit


_KNOWN = frozenset(
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


def _start(record: Record, prompt: str, target: str) -> dict[str, Any]:
    subject = record.get("subject")
    if subject is not None and not isinstance(subject, str):
        raise Problem(f"`subject` must be text, not {_kind(subject)}")
    return {
        "id": _id(record),
        "prompt": prompt,
        "target": target,
        "subject": _whole_text(subject or "", "subject").strip() or None,
        "generation": [],
        "extra": {str(key): value for key, value in record.items() if key not in _KNOWN},
    }


def _id(record: Record) -> str:
    name = record.get("id", record.get("case_id", ""))
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise Problem(f"`id` must be text or a whole number, not {_kind(name)}")
    if len(str(name)) > 200:
        raise Problem("`id` is longer than 200 characters")
    return _whole_text(str(name), "id")


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise Problem(f"`{key}` must be text, not {_kind(value)}")
    if not value.strip():
        raise Problem(f"`{key}` is empty")
    if len(value) > MAX_TEXT:
        raise Problem(f"`{key}` has {len(value):,} characters, more than {MAX_TEXT:,}")
    return _whole_text(value, key)


def _whole_text(value: str, key: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Problem(f"`{key}` holds half a surrogate pair, which is not text") from None
    return value


def _probes(
    record: Record, key: str, kind: str, *, answer: str | None = None, needs_target: bool = False
) -> list[dict[str, Any]]:
    """A text, a list of texts or probe objects, or KnowEdit's groups of such lists; the group names the kind."""
    value = record.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        value = [value] if value.strip() else []
    if isinstance(value, Mapping):
        if "New Question" in value:
            return _one_hop(record)
        return [
            probe
            for group, members in value.items()
            for probe in _listed(members, f"{key}.{group}", _slug(group), answer, needs_target)
        ]
    return _listed(value, key, kind, answer, needs_target)


def _listed(value: Any, key: str, kind: str, answer: str | None, needs_target: bool) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Problem(f"`{key}` must be a list, not {_kind(value)}")
    probes = [_probe(item, key, kind, answer) for item in value]
    if not needs_target:
        return probes
    if any(probe["target"] is None for probe in probes):
        raise Problem(f"each entry of `{key}` needs a `target`")
    return [probe for probe in probes if probe["target"]]


def _probe(item: Any, key: str, kind: str, answer: str | None) -> dict[str, Any]:
    if isinstance(item, str):
        item = {"prompt": item}
    if not isinstance(item, Mapping):
        raise Problem(f"each entry of `{key}` must be text or an object with `prompt`, not {_kind(item)}")
    prompt = _text(item, "prompt")
    target_key = next((name for name in ("target", "ground_truth", "target_new") if name in item), None)
    target = answer if target_key is None or item[target_key] is None else _answer(item, target_key)
    own_kind = item.get("kind", kind)
    if not isinstance(own_kind, str):
        raise Problem(f"`kind` in `{key}` must be text, not {_kind(own_kind)}")
    return {"prompt": prompt, "target": target or answer, "kind": _slug(_whole_text(own_kind, "kind"))}


def _answer(record: Record, key: str) -> str:
    """The answer to a probe; data sets leave some blank, which is no reason to refuse the edit."""
    blank = isinstance(record[key], str) and not record[key].strip()
    return "" if blank else _text(record, key)


def _paired(record: Record, prompt_key: str, target_key: str, kind: str) -> list[dict[str, Any]]:
    if record.get(prompt_key) is None:
        return []
    target = _answer(record, target_key) if record.get(target_key) is not None else None
    return [{"prompt": _text(record, prompt_key), "target": target, "kind": kind}]


def _one_hop(record: Record) -> list[dict[str, Any]]:
    """EasyEdit's portability: one question whose answer needs the edited fact."""
    hop = record.get("portability")
    if not isinstance(hop, Mapping) or "New Question" not in hop:
        return []
    return [{"prompt": _text(hop, "New Question"), "target": _text(hop, "New Answer"), "kind": "one_hop"}]


_KINDS = {"relation_specificity": "same_subject", "subject_aliasing": "subject_alias"}


def _slug(name: str) -> str:
    slug = str(name).strip().lower().replace(" ", "_")[:60]
    return _KINDS.get(slug, slug)


def _kind(value: Any) -> str:
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
