"""How surely edits are found that contradict others in other words, and how often two questions are taken for one.

    python tests/benchmarks/contradictions.py --model llama

Pairs of prompts about one subject, which ask the same or do not: the bank's wordings as edits have them, of one kind of
subject; ZsRE's prompts with their rephrases; KnowEdit's with those of other relations; and edits with how people ask
(`wild`). The real data are read from ../shared. Printed are the shares of pairs that are certain, so that the later
edit would supersede the earlier, and of those that are certain or possible.
"""

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

import lemoe
from lemoe.base.frozen import read_layer_inputs
from lemoe.data.question_bank import KEY_FORMS, REMARK, read_question_bank
from lemoe.routing.anchor.anchors import get_lexicon
from lemoe.routing.anchor.bank_texts import BATCH_TOKENS, CHUNK
from lemoe.routing.anchor.contradictions import CERTAIN_RATIO, LIKELY_RATIO
from lemoe.routing.anchor.fitting import fitted_meaning
from lemoe.routing.anchor.gate import Gate
from lemoe.routing.anchor.meaning import Keys, Meaning, Vector
from lemoe.routing.anchor.subjects import Subject
from lemoe.routing.anchor.wording import has_digits, read_wording

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
ZSRE_EDITS = 600
MAX_OTHER = 6  # other questions of one of KnowEdit's edits


@dataclass(frozen=True)
class Prompt:
    """A question about a subject, and its answer, if it is known."""

    subject: str
    text: str
    target: str = ""


Pairs = dict[str, list[tuple[Prompt, Prompt]]]  # by what they are


def pair_wordings() -> Iterator[tuple[str, Prompt, Prompt]]:
    by_kind = defaultdict(list)
    for wording in read_question_bank():
        if wording.form in KEY_FORMS and wording.relation != REMARK:
            by_kind[wording.kind].append(wording)
    for kind, wordings in by_kind.items():
        name = wordings[0].names[sum(map(ord, kind)) % len(wordings[0].names)]
        prompts = [Prompt(name, wording.template.replace("{}", name)) for wording in wordings]
        for (one, prompt), (other, second) in itertools.combinations(zip(wordings, prompts, strict=True), 2):
            yield f"bank, {'same' if one.relation == other.relation else 'another'} relation", prompt, second


def pair_real_edits() -> Iterator[tuple[str, Prompt, Prompt]]:
    for edit in lemoe.read_edits(SHARED / "data" / "zsre_mend_edit.json")[:ZSRE_EDITS]:
        own = Prompt(edit.subject or "", edit.prompt, edit.target)
        yield "zsre, rephrase", own, Prompt(own.subject, edit.rephrases[0].prompt, edit.target)
    for edit in lemoe.read_edits(SHARED / "data" / "knowedit_wiki_counterfact_dev.json"):
        own = Prompt(edit.subject or "", edit.prompt, edit.target)
        for probe in edit.locality[:MAX_OTHER]:
            if probe.kind == "same_subject" and own.subject.lower() in probe.prompt.lower():
                yield "knowedit, another relation", own, Prompt(own.subject, probe.prompt, probe.target or "")


def pair_wild() -> Iterator[tuple[str, Prompt, Prompt]]:
    edits = {edit.id: edit for edit in lemoe.read_edits(SHARED / "wild" / "wild_dev.edits.jsonl")}
    for line in (SHARED / "wild" / "wild_dev.probes.jsonl").read_text("utf-8").splitlines():
        probe = json.loads(line)
        if probe["kind"] in ("plain", "synonym", "cloze", "instruct", "other question") and "prompt" in probe:
            edit = edits[probe["edit"]]
            own = Prompt(edit.subject or "", edit.prompt, edit.target)
            yield f"wild, {probe['kind']}", own, Prompt(own.subject, probe["prompt"], probe.get("target") or "")


def read_keys(base: lemoe.BaseModel, meaning: Meaning, prompts: Sequence[Prompt]) -> Vector:
    """What each prompt means, `[prompts, rank]`."""
    gate = Gate(get_lexicon(base), threshold=0.0, slack=0)
    keys = []
    for first in range(0, len(prompts), CHUNK):
        part = prompts[first : first + CHUNK]
        ids = base.tokenizer([prompt.text for prompt in part]).input_ids
        for prompt, tokens, hidden in zip(
            part, ids, read_layer_inputs(base, int(meaning.layer), ids, BATCH_TOKENS), strict=True
        ):
            projected = meaning.project(hidden).cpu().numpy()
            keys.append(meaning.embed(*gate.summarise(tokens, projected, Subject(prompt.subject, gate.lexicon))))
    return numpy.stack(keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    base = lemoe.load_base(parser.parse_args().model)
    layer = lemoe.resolve_settings("anchor", None, {}).resolve_layer(len(base.layers), base.source.layers)
    meaning = fitted_meaning(base, layer)
    assert meaning is not None, "a model without a fit"
    pairs: Pairs = defaultdict(list)
    for name, one, other in itertools.chain(pair_wordings(), pair_real_edits(), pair_wild()):
        pairs[name].append((one, other))
    prompts = list(dict.fromkeys(prompt for part in pairs.values() for pair in part for prompt in pair))
    index = {prompt: number for number, prompt in enumerate(prompts)}
    keys = read_keys(base, meaning, prompts)
    stored = Keys(meaning, keys)
    wordings = [read_wording(prompt.text, prompt.target, prompt.subject) for prompt in prompts]
    for name, part in sorted(pairs.items()):
        certain = likely = 0
        for one, group in itertools.groupby(part, key=lambda pair: pair[0]):
            ratios = stored.compare(keys[index[one]])
            for _, other in group:
                ratio, wording = ratios[index[other]], wordings[index[one]]
                if has_digits(one.target) == has_digits(other.target):
                    is_certain = wording is not None and wording == wordings[index[other]] and ratio >= CERTAIN_RATIO
                    certain += is_certain
                    likely += is_certain or ratio >= LIKELY_RATIO
        print(f"{name:28s} {len(part):7d} pairs  certain {certain:4d} {certain / len(part):.3f}", end="  ")
        print(f"certain or possible {likely / len(part):.3f}")


if __name__ == "__main__":
    main()
