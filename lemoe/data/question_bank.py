"""The bank of questions: relations of people, places, works, firms and things, each in many wordings of six languages.

It is what a base model's own reading of questions is fitted on (`lemoe.routing.anchor.fitting`). Written for this
project; nothing in it comes from a data set that edits are measured on.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from lemoe.data.yaml_file import parse_yaml

ENGLISH_FORMS = ("questions", "phrases", "requests", "casual")
LANGUAGE_FORMS = ("de", "fr", "es", "ja", "zh")
KEY_FORMS = ("questions", "phrases")  # the forms in which edits are written
FOLDER = Path(str(resources.files("lemoe").joinpath("data/questions")))
REMARK = "remark"  # the relation of texts that ask nothing


@dataclass(frozen=True, slots=True)
class Wording:
    """A way to ask for a relation of one kind of subject.

    Attributes:
        relation: what is asked for; `REMARK` for nothing.
        kind: of subject; empty if any will do.
        form: `questions`, `phrases` (to be completed), `requests`, `casual`, a language, or `remarks`.
        template: the text, with `{}` in the place of the subject.
        names: subjects of that kind, as the form's script writes them.
    """

    relation: str
    kind: str
    form: str
    template: str
    names: tuple[str, ...]


@functools.cache
def read_question_bank(folder: Path = FOLDER) -> tuple[Wording, ...]:
    """Every wording, in the order of the files, remarks last."""
    wordings: list[Wording] = []
    remarks: Sequence[str] = ()
    every_name: list[str] = []
    for path in sorted(folder.glob("*.yaml")):
        content = parse_yaml(path.read_text("utf-8"))
        remarks = content.get("remarks", remarks)
        for names in content.get("kinds", {}).values():
            every_name += names["names"]
        for relation, forms in content.get("relations", {}).items():
            names = content["kinds"][forms["of"]]
            for form in (*ENGLISH_FORMS, *LANGUAGE_FORMS):
                pool = tuple(names[form] if form in ("ja", "zh") else names["names"])
                wordings += [Wording(relation, forms["of"], form, template, pool) for template in forms[form]]
    return (*wordings, *(Wording(REMARK, "", "remarks", template, tuple(every_name)) for template in remarks))


def digest_bank(wordings: Sequence[Wording]) -> str:
    """A hash of all wordings and their names."""
    made_of = "\n".join(f"{w.relation}\t{w.kind}\t{w.form}\t{w.template}\t{w.names}" for w in wordings)
    return hashlib.sha256(made_of.encode()).hexdigest()
