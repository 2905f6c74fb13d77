"""Quality of the default preset on real edits: all data sets, the trade-off curve and the ablation, one command each.

    python tests/benchmarks/quality.py bars zsre counterfact --out results/
    python tests/benchmarks/quality.py tradeoff --out results/
    python tests/benchmarks/quality.py ablation --out results/

Reads the real data from ../shared/data and writes one JSON file a case, so that an interrupted run goes on. Questions
that a data set probes with are removed from the negative prompts that training makes: no probe is trained on.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lemoe
from lemoe.adaptor.checkpoint import load_adaptor
from lemoe.evaluation.evaluate import EvalResult, Record
from lemoe.training.anchor import batches
from lemoe.training.anchor.examples import make_negative_prompts

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def first_of_each_subject(edits: list[lemoe.Edit]) -> list[lemoe.Edit]:
    seen: set[str | None] = set()
    return [edit for edit in edits if not (edit.subject in seen or seen.add(edit.subject))]  # type: ignore[func-returns-value]


@dataclass(frozen=True)
class Case:
    """A data set as it is measured."""

    file: str
    limit: int | None = None
    pick: Callable[[list[lemoe.Edit]], list[lemoe.Edit]] = list

    def edits(self) -> list[lemoe.Edit]:
        return self.pick(lemoe.read_edits(DATA / self.file)[: self.limit])


CASES = {
    "zsre": Case("zsre_mend_edit.json", 1000),
    "zsre-unique": Case("zsre_mend_edit.json", 1000, first_of_each_subject),
    "zsre-3000": Case("zsre_dev.json"),
    "counterfact": Case("counterfact_dev.json"),
    "knowedit": Case("knowedit_wiki_counterfact_dev.json"),
    "hallucination": Case("hallucination_dev.json"),
    "temporal": Case("temporal_dev.json"),
}


def exclude_probes(edits: Iterable[lemoe.Edit]) -> None:
    """Keep probes out of the negative prompts that training makes, so that all metrics are on unseen prompts."""
    probes = {probe.prompt for edit in edits for probe in (*edit.rephrases, *edit.locality, *edit.portability)}

    def make_unseen(gate: Any, members: Any, index: int, count: int, *rest: Any) -> list[str]:
        made = make_negative_prompts(gate, members, index, count + 8, *rest)
        return [text for text in made if text not in probes][:count]

    batches.make_negative_prompts = make_unseen  # type: ignore[assignment, attr-defined]  # where training reads it


def train_edits(
    base: lemoe.BaseModel, edits: list[lemoe.Edit], settings: lemoe.Settings, folder: Path
) -> dict[str, float]:
    """Train into `folder` (or resume there); seconds per edit, if all of it was trained now."""
    exclude_probes(edits)
    report = lemoe.edit(base, edits, folder, settings, lemoe.EditOptions(resume=True))
    return {"seconds_per_edit": report.seconds / report.taught, "bytes_per_edit": report.size / report.taught}


def metric_values(result: EvalResult) -> dict[str, float]:
    return {
        f"{m.name}/{m.kind}/{m.measure}/{m.decode}": m.value
        for m in result.metrics
        if m.stage == "after" and not m.kind.startswith("round")
    }


def worst_records(records: Iterable[Record], count: int = 8) -> list[dict[str, Any]]:
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(f"{record.name}/{record.kind}", []).append(record)
    return [
        asdict(record)
        for group in by_name.values()
        for record in sorted(group, key=lambda r: r.token_accuracy_after)[:count]
        if record.token_accuracy_after < 1
    ]


def measure_cases(base: lemoe.BaseModel, names: list[str], out: Path) -> None:
    """Train and measure each data set; teacher-forced, then greedy on prompts and rephrases."""
    for name in names:
        edits = CASES[name].edits()
        settings = lemoe.resolve_settings("anchor")
        measured = train_edits(base, edits, settings, out / name)
        state = load_adaptor(out / name / "adaptor.safetensors")
        started = time.monotonic()
        teacher = lemoe.evaluate(base, state, edits)
        measured["evaluation_seconds"] = time.monotonic() - started
        greedy = lemoe.evaluate(
            base, state, edits, lemoe.EvalOptions(decode="greedy", only=("reliability", "generality"))
        )
        write_results(
            out / f"{name}.json",
            measured | metric_values(teacher) | metric_values(greedy),
            worst_records(teacher.records),
        )


FEW_PROBES = 3  # locality prompts of each kind and edit, where many settings are compared


def select_few_probes(name: str, count: int) -> list[lemoe.Edit]:
    """`count` edits of a data set, each with at most `FEW_PROBES` locality prompts of a kind, and alias probes."""
    chosen = []
    for edit in CASES[name].edits()[:count]:
        kinds: dict[str, list[lemoe.Probe]] = {}
        for probe in edit.locality:
            kinds.setdefault(probe.kind, []).append(probe)
        locality = tuple(probe for group in kinds.values() for probe in group[:FEW_PROBES])
        aliases = tuple(probe for probe in edit.portability if probe.kind == "subject_alias")
        chosen.append(replace(edit, locality=locality, portability=aliases))
    return chosen


COMPARED_CASES = ("zsre-unique", "counterfact", "knowedit")


Table = dict[str, dict[str, dict[str, float]]]


def measure_tradeoff(base: lemoe.BaseModel, out: Path) -> None:
    """The gate's threshold against the weight of negatives, on 30 edits of each of three sets."""
    table: Table = {}
    for weight in (0.0, 3.0, 10.0):
        settings = replace(lemoe.resolve_settings("anchor"), negative_weight=weight)
        for threshold in (1.5, 3.5, 8.0, 1e9):
            row = table.setdefault(f"negatives {weight:g}, threshold {threshold:g}", {})
            for name in COMPARED_CASES:
                folder = out / f"tradeoff-{name}-{weight:g}"
                row[name] = measure_once(
                    folder,
                    f"-{threshold:g}",
                    partial(measure_case, base, select_few_probes(name, 30), settings, folder, threshold),
                )
    print_table(table)


def measure_case(
    base: lemoe.BaseModel,
    edits: list[lemoe.Edit],
    settings: lemoe.Settings,
    folder: Path,
    threshold: float | None = None,
) -> dict[str, float]:
    """Metrics of one data set, with the gate's threshold changed after training if given."""
    trained = (folder / "adaptor.safetensors").exists()
    measured = {} if trained else train_edits(base, edits, settings, folder)
    state = load_adaptor(folder / "adaptor.safetensors")
    if threshold is not None:
        state = replace(state, settings=replace(state.settings, gate_conflict=threshold))
    return measured | metric_values(lemoe.evaluate(base, state, edits))


def measure_once(folder: Path, variant: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The stored result of an earlier run, or else a new one, stored."""
    path = folder.with_name(f"{folder.name}{variant}.json")
    if not path.exists():
        write_results(path, measure(), [])
    stored: dict[str, float] = json.loads(path.read_text())["figures"]
    return stored


ABLATIONS: dict[str, dict[str, Any]] = {
    "anchor": {},
    "without gate": {"gate_conflict": 1e9},
    "without small experts": {"width": 64},
    "without noise": {"noise": 0.0},
    "without augmentation": {"variants": 0},
    "without negatives": {"negatives": 0},
    "without clustering": {"order": "random"},
}


def measure_ablation(base: lemoe.BaseModel, out: Path) -> None:
    """Preset `paper`, and preset `anchor` without each of its parts, on 100 edits of each of three sets."""
    runs = {"paper": lemoe.resolve_settings("paper")}
    runs |= {label: lemoe.resolve_settings("anchor", None, given) for label, given in ABLATIONS.items()}
    table: Table = {}
    for label, settings in runs.items():
        for name in COMPARED_CASES:
            folder = out / f"ablation-{name}-{label.replace(' ', '-')}"
            table.setdefault(label, {})[name] = measure_once(
                folder, "", partial(measure_case, base, select_few_probes(name, 100), settings, folder)
            )
    print_table(table)


COLUMNS = {
    "ZsRE reliability": ("zsre-unique", "reliability/all"),
    "ZsRE generality": ("zsre-unique", "generality/all"),
    "ZsRE unrelated": ("zsre-unique", "locality/all"),
    "CounterFact generality": ("counterfact", "generality/all"),
    "CounterFact same template": ("counterfact", "locality/same_template"),
    "KnowEdit alias": ("knowedit", "portability/subject_alias"),
    "KnowEdit same subject": ("knowedit", "locality/same_subject"),
}


def print_table(table: Table) -> None:
    """A Markdown table: token accuracy, with the share of whole answers in brackets."""
    print("| | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for label, row in table.items():
        cells = [format_cell(row[name], metric) for name, metric in COLUMNS.values()]
        print(f"| {label} | " + " | ".join(cells) + " |")


def format_cell(values: dict[str, float], metric: str) -> str:
    shares = [f"{values[f'{metric}/{measure}/teacher']:.3f}" for measure in ("token_accuracy", "exact_match")]
    tokens, exact = (share.removeprefix("0") for share in shares)
    return f"{tokens} ({exact})"


def measure_collapse(base: lemoe.BaseModel, adaptor: Path) -> None:
    """Perplexity of short texts that editing must not touch, before and after; and how many changed at all."""
    texts = [record["Text"] for record in json.loads((DATA / "me_ppl_dev.json").read_text())]
    state = load_adaptor(adaptor)
    before = [text_loss(base, text) for text in texts]
    with lemoe.insert(base, state) as edited:
        after = [text_loss(base, text) for text in texts]
        opened = [edited.acts_on(base.tokenizer(text).input_ids) for text in texts]
    same = sum(b == a for b, a, o in zip(before, after, opened, strict=True) if not o)
    levels = [math.exp(sum(s for s, _ in part) / sum(n for _, n in part)) for part in (before, after)]
    print(f"perplexity before {levels[0]:.4f} after {levels[1]:.4f} change {levels[1] / levels[0] - 1:+.4%}")
    print(f"gate never opens on {len(texts) - sum(opened)} of {len(texts)}; bit-identical on {same} of those")


@torch.no_grad()
def text_loss(base: lemoe.BaseModel, text: str) -> tuple[float, int]:
    ids = base.tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
    logits = base.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")), ids.shape[1] - 1


def write_results(path: Path, values: dict[str, float], records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"figures": values, "worst": records}, indent=1, ensure_ascii=False))
    print(path.stem, {name: round(value, 4) for name, value in values.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bars", "tradeoff", "ablation", "collapse"])
    parser.add_argument("names", nargs="*", help=f"data sets for bars ({', '.join(CASES)}); an adaptor for collapse")
    parser.add_argument("--out", type=Path, default=Path("quality-results"))
    parser.add_argument("--model", default="llama")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    base = lemoe.load_base(given.model)
    if given.what == "bars":
        measure_cases(base, given.names or list(CASES), given.out)
    elif given.what == "collapse":
        measure_collapse(base, Path(given.names[0]))
    else:
        {"tradeoff": measure_tradeoff, "ablation": measure_ablation}[given.what](base, given.out)


if __name__ == "__main__":
    main()
