"""The model card beside an adaptor: what it is, how it is used, and what was measured, in the format of the Hub.

The text between the marks is ours and is written anew; whatever a person writes around it stays.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

from lemoe.adaptor.state import AdaptorState
from lemoe.base.loading import BaseModel
from lemoe.data.files import write_atomically
from lemoe.data.yaml_file import parse_yaml
from lemoe.errors import InputError
from lemoe.evaluation.metrics import Metric

CARD_NAME = "README.md"
TAGS = ["lemoe", "model-editing", "knowledge-editing", "lifelong-model-editing"]
SHOWN = ("token_accuracy", "exact_match", "complete_match", "perplexity", "target_probability", "agreement")
KIND_SHOWN = 60  # characters of a kind of probes
_BEGIN, _END = "<!-- lemoe -->", "<!-- /lemoe -->"
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_OURS = re.compile(re.escape(_BEGIN) + r".*?" + re.escape(_END), re.DOTALL)


def write_card(
    folder: Path, base: BaseModel, state: AdaptorState, edits: str = "", metrics: Sequence[Metric] = ()
) -> Path:
    """Write the card of the adaptor in `folder`, or bring the one that is there up to date.

    Args:
        edits: name of the file whose probes were measured.
        metrics: what was measured; what the card says of an earlier measurement goes.

    Raises:
        InputError: if the card that is there is not text.
        OutputError: if it cannot be written.
    """
    path = folder / CARD_NAME
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from None
    title = f"Edits of {_strip_markup(base.source.shared_name)}"
    after = [metric for metric in metrics if metric.stage == "after" and metric.measure in SHOWN]
    front = f"---\n{_render_front_matter(before, title, base, edits, after)}---\n"
    section = f"{_BEGIN}\n{_render_section(base, state, edits, after)}{_END}"
    if _OURS.search(before):
        content = front + _OURS.sub(lambda found: section, _FRONT.sub("", before), count=1)
    else:
        content = f"{front}\n# {title}\n\n{section}\n" + _FRONT.sub("", before)
    write_atomically(path, content.encode(), overwrite=True)
    return path


def write_export_card(folder: Path, base: BaseModel, state: AdaptorState) -> Path:
    """Write the card of a whole model folder, which transformers loads by itself.

    Raises:
        OutputError: if it cannot be written.
    """
    name = f"{_strip_markup(base.source.shared_name)} with edits"
    data = ModelCardData(library_name="transformers", tags=TAGS, model_name=name, pipeline_tag="text-generation")
    relation = {"base_model": base.source.hub_id, "base_model_relation": "finetune"} if base.source.hub_id else {}
    front = yaml.safe_dump({**data.to_dict(), **relation}, sort_keys=False, allow_unicode=True)
    taught = sum(len(record.edits) for record in state.rounds)
    lines = [
        f"---\n{front}---\n",
        f"# {name}\n",
        f"`{_strip_markup(base.source.shared_name)}`, its weights as they were, with {taught:,} edits that "
        "[lemoe](https://pypi.org/project/lemoe/) taught it: `adaptor.safetensors` holds them, and the code beside it "
        "puts them to work. lemoe is not needed to run it.\n",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        "folder = ...  # where this file is: a path, or a repository of the Hub",
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "```\n",
        *_render_facts(state, taught),
    ]
    path = folder / CARD_NAME
    write_atomically(path, "\n".join(lines).encode())
    return path


def _render_front_matter(before: str, name: str, base: BaseModel, edits: str, metrics: Iterable[Metric]) -> str:
    """Our fields, merged over those of the card `before`."""
    found = _FRONT.match(before)
    try:
        known = parse_yaml(found.group().strip("-\n")) if found else {}
    except ValueError:
        known = {}
    kept = {key: value for key, value in known.items() if key != "model-index"} if isinstance(known, dict) else {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="edits",
            dataset_name=edits or "edits",
            metric_type=metric.measure,
            metric_name=f"{metric.name}, {_clean_kind(metric)} ({metric.decode})",
            metric_value=round(metric.value, 4),
        )
        for metric in metrics
    ]
    data = ModelCardData(library_name="lemoe", tags=TAGS, model_name=name, eval_results=results or None)
    relation = {"base_model": base.source.hub_id, "base_model_relation": "adapter"} if base.source.hub_id else {}
    return yaml.safe_dump({**kept, **data.to_dict(), **relation}, sort_keys=False, allow_unicode=True)


def _render_section(base: BaseModel, state: AdaptorState, edits: str, metrics: Sequence[Metric]) -> str:
    taught = sum(len(record.edits) for record in state.rounds)
    lines = [
        f"An adaptor of [lemoe](https://pypi.org/project/lemoe/) that teaches {taught:,} edits to "
        f"`{_strip_markup(base.source.shared_name)}`, beside the frozen FFN `{_strip_markup(state.base.ffn)}`. "
        "The base model's weights stay as they are.",
        "",
        "```python",
        "import lemoe",
        "",
        f'base = lemoe.load_base("{_strip_markup(_loading_name(base))}")',
        'edited = lemoe.insert(base, "adaptor.safetensors")',
        "```",
        "",
        *_render_facts(state, taught),
    ]
    if metrics:
        lines += [f"## Measured on {_strip_markup(edits) or 'its edits'}", ""]
        lines += ["| metric | kind | measure | decode | value | n |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {m.name} | {_clean_kind(m)} | {m.measure} | {m.decode} | {m.value:.4f} | {m.n:,} |" for m in metrics
        ]
        lines += [""]
    return "\n".join(lines)


def _loading_name(base: BaseModel) -> str:
    """What `load_base` takes; the embedded model is a 4-bit copy of the one on the Hub, and no other will do."""
    source = base.source
    return source.shared_name if source.embedded or source.hub_id is None else source.hub_id


def _render_facts(state: AdaptorState, taught: int) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        f"| method | {state.settings.method} |",
        f"| edits, rounds | {taught:,}, {len(state.rounds):,} |",
        f"| superseded by later edits | {len(state.superseded_edits):,} |",
        f"| edited layer | {state.base.layer} |",
        f"| SHA-256 of the base's FFN | `{_strip_markup(state.base.ffn_sha256)}` |",
        f"| SHA-256 of its weights, sampled | `{_strip_markup(state.base.weights_sha256)}` |",
        f"| SHA-256 of its tokenizer | `{_strip_markup(state.base.tokenizer_sha256)}` |",
        "",
    ]


def _strip_markup(text: str) -> str:
    """Text without characters that would end its line or its code span."""
    return re.sub(r"[^\w./@ -]", " ", text)


def _clean_kind(metric: Metric) -> str:
    """The kind of the probes, as an edits file names it, without characters that Markdown or the Hub interprets."""
    return re.sub(r"[^\w. -]", " ", metric.kind[:KIND_SHOWN])
